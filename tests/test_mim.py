"""HandMIM's parts against plain loops and float64, its invariances, the wiring of its loop, and the command:
one process against two, killed against uninterrupted, every switch, collapse seen."""

import copy
import itertools
import math
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call, log

import masking
import pretrain_mim
from data import HandDataset, HandIndex
from masking import block_mask, random_mask
from model import KeypointHead, PrototypeHead, build_encoder, load_encoder
from probing import LiveProbe
from runtime import cosine, ema_update, generator
from views import (apply_theta, invert_theta, normalise, random_theta, rows_to_blur, strong_color, two_views,
                   warp)

TINY = ["--arch", "vit_micro", "--image-size", "64", "--batch-size", "8", "--prototypes", "64",
        "--log-every", "1", "--workers", "0"]


def mim(hands, out, *more, **options):
    return call("pretrain_mim.py", "--data", hands / "train", "--out", out, *TINY, *more, **options)


def weights(run):
    """Every tensor of a run's networks and centres, by name."""
    state = torch.load(run / "last.pt", weights_only=True)
    parts = ("student", "teacher", "centers")
    return {f"{part}.{name}": value for part in parts for name, value in state[part].items()}


def places(mask):
    """Where a flat mask is True."""
    return mask.flatten().nonzero().squeeze(1)


# ------------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("grid", [4, 14, 16])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
def test_masks_hide_what_they_should(grid, ratio):
    N = grid * grid
    block = block_mask(200, grid, ratio, generator(0))
    scattered = random_mask(200, grid, ratio, generator(0))
    assert block.dtype == scattered.dtype == torch.bool and block.shape == scattered.shape == (200, N)
    assert (block.sum(1) <= ratio * N).all() and (scattered.sum(1) == math.floor(ratio * N)).all()
    if grid > 4:
        assert block.sum(1).float().mean() > 0.75 * ratio * N  # the last rectangle rarely fits exactly
    assert len(scattered.float().mean(0).unique()) > 1 and scattered.any(0).all()
    assert torch.equal(block, block_mask(200, grid, ratio, generator(0)))


def test_block_masks_are_blocks_and_random_ones_are_not():
    def neighbours(mask):  # share of hidden patches whose right neighbour is hidden
        mask = mask.unflatten(1, (14, 14))
        return (mask[:, :, :-1] & mask[:, :, 1:]).sum() / mask[:, :, :-1].sum()

    block, scattered = (make(300, 14, 0.3, generator(1)) for make in (block_mask, random_mask))
    assert neighbours(block) > 0.7 > 0.4 > neighbours(scattered)


def test_each_image_has_its_own_ratio():
    ratio = torch.tensor([0.0, 0.1, 0.5, 0.004])
    for make in (block_mask, random_mask):
        hidden = make(4, 14, ratio, generator(2)).sum(1)
        assert hidden[0] == hidden[3] == 0 < hidden[1] < hidden[2]


def test_a_share_of_the_views_is_masked_within_the_ratios():
    mask = masking.mask_sampler(random_mask, 14, (0.2, 0.4), 0.3)(4000, generator(3))
    ratio = mask.float().mean(1)
    masked = ratio > 0
    assert masked.float().mean() == pytest.approx(0.3, abs=0.03)
    assert 0.19 < ratio[masked].min() < 0.21 and 0.39 < ratio[masked].max() <= 0.4
    assert ratio[masked].mean() == pytest.approx(0.3, abs=0.01)


# ----------------------------------------------------------------------------------------------------- losses
def test_distillation_is_the_sum_that_ibot_writes():
    g = generator(3)
    teacher, student, center = (torch.rand(n, 7, generator=g, dtype=torch.float64) for n in (5, 5, 1))
    found = pretrain_mim.distill(student, teacher, center, 0.05)
    for row in range(5):
        p = [math.exp(float(teacher[row, k] - center[0, k]) / 0.05) for k in range(7)]
        q = [math.exp(float(student[row, k]) / 0.1) for k in range(7)]
        wanted = -sum(p[k] / sum(p) * math.log(q[k] / sum(q)) for k in range(7))
        assert float(found[row]) == pytest.approx(wanted, abs=1e-9)


def test_patch_and_pixel_losses_weigh_as_documented():
    """Against a loop over views. Patch: mean over views of the mean over a view's masked patches, 0 where
    none. Pixel: mean over all masked patches that show the photograph."""
    g = generator(4)
    ratio = torch.tensor([0, 0.2, 0.4, 0, 0.5, 0.3])
    mask = random_mask(6, 4, ratio, g).unflatten(0, (2, 3))
    views = torch.rand(2, 3, 3, 64, 64, generator=g)
    real = torch.rand(2, 3, 16, generator=g) < 0.7
    errors = torch.rand(int(mask.sum()), generator=g)
    predicted = torch.rand(len(errors), 768, generator=g)
    counted = (mask & real).sum().float()
    patches = masking.to_patches(views, 16)[mask]
    found_patch = (errors * pretrain_mim.patch_weights(mask, places(mask))).sum()
    found_pixel = pretrain_mim.pixel_loss(predicted, patches, real[mask] / counted)
    patch, pixel, m = 0.0, 0.0, 0
    for view in range(2):
        for hand in range(3):
            of_view = []
            for place in range(16):
                if mask[view, hand, place]:
                    y, x = divmod(place, 4)
                    block = views[view, hand, :, 16 * y:16 * y + 16, 16 * x:16 * x + 16].flatten()
                    block = (block - block.mean()) / (block.var() + 1e-2).sqrt()
                    pixel += float(((predicted[m] - block) ** 2).mean()) * bool(real[view, hand, place])
                    of_view.append(float(errors[m]))
                    m += 1
            patch += np.mean(of_view) / 6 if of_view else 0
    assert m == len(errors)
    assert float(found_patch) == pytest.approx(patch, rel=1e-5)
    assert float(found_pixel) == pytest.approx(pixel / float(counted), rel=1e-5)


def test_the_small_picture_is_asked_for_as_documented():
    """Against a loop: means of 4 x 4 x 3 values, minus their mean and over their deviation in each view."""
    views = torch.rand(2, 3, 3, 64, 64, generator=generator(6))
    predicted = torch.rand(2, 3, 256, generator=generator(7))
    pictures = masking.small_picture(views)
    errors = []
    for view in range(2):
        for hand in range(3):
            for place in range(256):
                y, x = divmod(place, 16)
                cell = views[view, hand, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
                assert float(pictures[view, hand, place]) == pytest.approx(float(cell.mean()), abs=1e-6)
            known = pictures[view, hand]
            target = (known - known.mean()) / (known.var() + 1e-2).sqrt()
            errors.append(float(((predicted[view, hand] - target) ** 2).mean()))
    assert float(pretrain_mim.picture_loss(predicted, pictures)) == pytest.approx(np.mean(errors), rel=1e-5)
    assert masking.small_picture(torch.rand(2, 1, 3, 32, 32)).shape == (2, 1, 256)


def test_hog_is_the_histogram_of_a_double_loop():
    """And a patch's HOG is the patch's; a whole view's is the same cells, where it is 64 pixels wide."""
    views = torch.rand(2, 1, 3, 64, 64, generator=generator(14), dtype=torch.float64)
    found = masking.hog(views[:, 0], 8)
    image = views[1, 0].numpy()
    bins = np.zeros((8, 8, 8))
    for y in range(64):
        for x in range(64):
            left, right, up, down = max(x - 1, 0), min(x + 1, 63), max(y - 1, 0), min(y + 1, 63)
            across, along = image[:, y, right] - image[:, y, left], image[:, down, x] - image[:, up, x]
            c = np.argmax(across ** 2 + along ** 2)
            direction = math.atan2(along[c], across[c]) % math.pi / math.pi * 8
            low, share = math.floor(direction), direction % 1
            for k, part in ((low, 1 - share), (low + 1, share)):
                bins[k % 8, y // 8, x // 8] += part * math.hypot(across[c], along[c]) / 64
    for y in range(8):
        for x in range(8):
            around = bins[:, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2]
            size = math.sqrt((around ** 2).sum() / (around.shape[1] * around.shape[2]))
            assert np.allclose(found[1, :, y, x], bins[:, y, x] / (size + 0.1) / 0.16)
    whole, patches = masking.hog_targets(views, 16)  # (2, 1, 512), (2, 1, 16, 8 * 2 * 2)
    assert torch.allclose(whole[:, 0], found.flatten(1))
    assert torch.allclose(patches[:, 0, 6].unflatten(1, (8, 2, 2)), found[:, :, 2:4, 4:6])


def test_points_that_follow_the_image_agree_once_undone():
    """An ideal network, whose points are fixed to the canvas, has no alignment loss; without undoing it
    has."""
    theta = random_theta(20, generator(5), 0.8, (0.5, 0.9), 0.1).unflatten(0, (2, 10))
    points = torch.rand(10, 21, 2, generator=generator(6)) - 0.5
    points *= pretrain_mim.SPREAD / pretrain_mim.spreads(points.repeat(2, 1, 1, 1))[0]
    in_view = apply_theta(invert_theta(theta), points)
    undone = apply_theta(theta, in_view)
    assert float(pretrain_mim.align_loss(undone, undone.flip(0))) < 1e-10
    assert float(pretrain_mim.align_loss(in_view, in_view.flip(0))) > 1e-3
    assert float(pretrain_mim.contrast_loss(undone, undone.flip(0))) < 0.5 < math.log(10)


def test_alignment_is_a_distance_and_does_not_reward_shrinking():
    """A student at the teacher's points, both s times as large as the fixed spread: the loss is (1 - s)^2.
    And against a loop."""
    points = torch.randn(1, 8, 21, 2, generator=generator(7)).repeat(2, 1, 1, 1)
    points = pretrain_mim.SPREAD * points / pretrain_mim.spreads(points)[0]
    losses = [float(pretrain_mim.align_loss(s * points, s * points)) for s in (1, 0.5, 0.1)]
    assert losses == pytest.approx([0, 0.25, 0.81], abs=1e-4)
    student, teacher = torch.randn(2, 2, 4, 5, 2, generator=generator(8), dtype=torch.float64)
    middles = teacher.mean(2, keepdim=True)
    spread = math.sqrt(float(((teacher - middles) ** 2).sum(-1).mean()))
    total = 0.0
    for view in range(2):
        for hand in range(4):
            for k in range(5):
                middle = middles[view, hand, 0]
                aim = middle + (teacher[view, hand, k] - middle) * 0.4 / spread
                total += float(((student[view, hand, k] - aim) ** 2).sum()) / (2 * 4 * 5) / 0.16
    assert float(pretrain_mim.align_loss(student, teacher)) == pytest.approx(total)


def test_centers_follow_the_mean_of_the_teacher_and_stand_still_without_patches():
    centers = pretrain_mim.Centers(("patch", "class"), 5, torch.device("cpu"))
    patch, class_ = torch.rand(7, 5, generator=generator(9)), torch.rand(2, 4, 5, generator=generator(10))
    before = {"patch": torch.full((1, 5), 2.0), "class": torch.ones(1, 5)}
    centers.load_state_dict(before)
    for part in (slice(0, 3), slice(3, 7)):  # an accumulated batch: the mean over all parts, one move
        centers.collect({"patch": patch[part], "class": class_[:, part]})
    centers.move(lambda value: value)
    torch.testing.assert_close(centers["patch"], 0.9 * before["patch"] + 0.1 * patch.mean(0, keepdim=True))
    torch.testing.assert_close(centers["class"], 0.9 + 0.1 * class_.flatten(0, 1).mean(0, keepdim=True))
    moved = centers.state_dict()
    centers.collect({"patch": patch[:0], "class": class_})
    centers.move(lambda value: value)
    assert torch.equal(centers["patch"], moved["patch"]) and not torch.equal(centers["class"], moved["class"])


def test_gradient_norms_are_those_of_each_loss():
    tokens = torch.randn(2, 3, generator=generator(8), requires_grad=True)
    losses = {"a": 3 * tokens.sum(), "b": (tokens ** 2).sum()}
    found = pretrain_mim.gradient_norms(losses, tokens, parts=4, world=1, mean=lambda value: value)
    assert float(found["a_gradient"]) == pytest.approx(3 * 6 ** 0.5 / 2)
    assert float(found["b_gradient"]) == pytest.approx(float(tokens.detach().norm()))


# ------------------------------------------------------------------------------------------------------ views
def test_views_keep_the_box_and_colour_can_be_switched_off():
    """An upright window of half side s around t holds the box [-1/2, 1/2]; strength 0 leaves the colours."""
    canvas = torch.randint(0, 256, (64, 3, 72, 72), generator=generator(9), dtype=torch.uint8)
    draw = pretrain_mim.theta_sampler(45, (0.75, 1.1), 1)
    theta = two_views(draw)(64, generator(0))
    scale = theta[..., 0].norm(dim=-1)
    assert (theta[..., 2].abs() <= scale[..., None] - 0.5 + 1e-6).all() and theta[..., 2].abs().max() > 0.1
    assert 0.75 * 0.75 <= scale.min() < scale.max() <= 0.75 * 1.1 + 1e-6
    turned = torch.atan2(theta[..., 1, 0], theta[..., 0, 0]).rad2deg()
    assert turned.min() < -35 and turned.max() > 35 and turned.abs().max() <= 45 + 1e-3
    assert not torch.equal(theta[0], theta[1])  # each view is drawn alone
    for strength in (0, 1):
        light, color, sigma = (two_views(draw)(64, generator(1)) for draw in strong_color(strength, 64))
        looks = {"light": light, "color": color, "sigma": sigma, "blurred": rows_to_blur(sigma)}
        views = pretrain_mim.make_views(canvas, theta, 64, 1, looks)
        same = (views - normalise(warp(canvas, theta, 64))).abs().amax((2, 3, 4)) < 1e-5
        assert same.all() if strength == 0 else not same.any()


def test_padding_is_not_a_patch_to_paint():
    theta = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 2, 3)
    valid = torch.tensor([[-1.0, -1, 1, 1], [-0.5, -1, 1, 1]])  # the second canvas lacks its left quarter
    real = pretrain_mim.in_photograph(theta, valid, 4).unflatten(2, (4, 4))
    assert real[:, 0].all() and not real[:, 1, :, 0].any() and real[:, 1, :, 1:].all()


# ------------------------------------------------------------------------------------------------------ heads
def test_heads_have_the_shapes_and_starts_they_promise():
    torch.manual_seed(0)
    points = KeypointHead(192, 21)(0.1 * torch.randn(4, 192))
    assert points.shape == (4, 21, 2) and points.std() > 0.2 and points.abs().max() < 0.7
    head = PrototypeHead(16, 10, 8)
    logits = head(torch.randn(3, 5, 16))
    assert logits.shape == (3, 5, 10) and (logits.abs() <= 1 + 1e-6).all()


def test_the_student_does_not_see_masked_patches_and_the_teacher_sees_all():
    torch.manual_seed(0)
    student = pretrain_mim.HandMIM(build_encoder("vit_micro", 64), 64, ("class", "patch"), 5, hog=True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        student.mask_token += 3  # a teacher that hid patches would show it
    views = torch.randn(2, 3, 3, 64, 64, generator=generator(1))
    mask = random_mask(6, 4, 0.5, generator(2)).unflatten(0, (2, 3))
    masked = places(mask)
    taught, learned = teacher(views, mask, masked, hide=False), student(views, mask, masked, hide=True)
    assert torch.allclose(taught["tokens"], student.encoder(views.flatten(0, 1)), atol=1e-6)
    assert not torch.allclose(taught["tokens"], learned["tokens"], atol=1e-2)
    other = views.clone()  # other pixels behind the mask: the student does not notice
    hidden = masking.to_patches(views, 16).masked_fill(mask[..., None], 9)
    other = masking.from_patches(hidden, 64, 16).unflatten(0, (2, 3))
    assert torch.allclose(student(other, mask, masked, hide=True)["tokens"], learned["tokens"], atol=1e-5)
    assert not torch.allclose(teacher(other, mask, masked, hide=False)["tokens"], taught["tokens"], atol=1e-2)
    shapes = {name: tuple(value.shape) for name, value in learned.items()}
    assert shapes == {"tokens": (6, 17, 192), "class": (2, 3, 64), "patch": (48, 64),
                      "keypoints": (2, 3, 5, 2),
                      "pixels": (48, 768), "picture": (2, 3, 256), "hog": (2, 3, 512),
                      "patch_hog": (2, 3, 16, 32)}
    assert set(taught) == {"tokens", "class", "patch", "keypoints"}


# ------------------------------------------------------------------------------------------ the loop's wiring
class Recorder:
    """Stands in for functions of the script and keeps what they were given and what they returned, in
    order."""

    def __init__(self, monkeypatch, *names):
        self.calls = []
        for name in names:
            monkeypatch.setattr(pretrain_mim, name, self.spy(name, getattr(pretrain_mim, name)))

    def spy(self, name, real):
        def record(*args, **options):
            result = real(*args, **options)
            self.calls.append((name, args, options, result))
            return result
        return record

    def of(self, name):
        return [(args, options, result) for called, args, options, result in self.calls if called == name]


def one_step(hands, tmp_path, monkeypatch, *more):
    """A recorded step of the command on four hands: (Recorder, outputs of teacher and student in order)."""
    record = Recorder(monkeypatch, "make_views", "in_photograph", "align_loss", "contrast_loss", "distill",
                      "pixel_loss", "picture_loss")
    outputs, forward = [], pretrain_mim.HandMIM.forward

    def spy_forward(self, views, mask, masked, hide):
        found = forward(self, views, mask, masked, hide)
        outputs.append({"views": views, "mask": mask, "hide": hide, "training": self.training} | found)
        return found

    monkeypatch.setattr(pretrain_mim.HandMIM, "forward", spy_forward)
    mim(hands, tmp_path / "run", "--steps", 1, "--batch-size", 4, "--mask-share", 1, *more)
    return record, outputs[:2]  # what follows is for the picture


def test_what_is_compared_with_what(hands, tmp_path, monkeypatch):
    """Keypoints undone by their own view's theta against those of the OTHER view; class logits of the other
    view; patch logits, pixels and picture of the same view; the teacher's never hidden, the student's
    always."""
    wide = ("--zoom", 1.3, 1.33, "--mask", "random", "--mask-ratio", 0.5, 0.5)  # views show padding
    record, (taught, learned) = one_step(hands, tmp_path, monkeypatch, "--contrast", 1, *wide)
    assert not taught["hide"] and learned["hide"] and torch.equal(taught["mask"], learned["mask"])
    assert not taught["training"] and learned["training"]
    theta = record.of("make_views")[0][0][1]
    assert theta.shape == (2, 4, 2, 3)
    for name in ("align_loss", "contrast_loss"):
        (points, targets), _, _ = record.of(name)[0]
        for view in range(2):
            for hand in range(4):
                A, t = theta[view, hand, :, :2], theta[view, hand, :, 2]
                B, u = theta[1 - view, hand, :, :2], theta[1 - view, hand, :, 2]
                torch.testing.assert_close(points[view, hand], learned["keypoints"][view, hand] @ A.T + t)
                torch.testing.assert_close(targets[view, hand], taught["keypoints"][1 - view, hand] @ B.T + u)
    (student, teacher, center, temperature), _, _ = record.of("distill")[0]
    assert torch.equal(student, learned["patch"]) and torch.equal(teacher, taught["patch"])
    assert not center.any() and temperature == 0.04 and not teacher.requires_grad
    predicted, patches, share = record.of("pixel_loss")[0][0]
    mask = learned["mask"]
    assert torch.equal(predicted, learned["pixels"])
    assert torch.equal(patches, masking.to_patches(learned["views"], 16)[mask])
    real = record.of("in_photograph")[0][2]
    assert (real & mask).any() and (~real & mask).any()  # some canvases leave their photograph
    torch.testing.assert_close(share, real[mask] / (real & mask).sum())
    picture, whole = record.of("picture_loss")[0][0]
    assert torch.equal(picture, learned["picture"])
    assert torch.equal(whole, masking.small_picture(learned["views"]))  # also what the masks hide


@pytest.fixture(scope="module")
def pairs(hands, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs.npz"
    call("mine_pairs.py", "--data", hands / "train", "--out", out, "--neighbours", 3, "--labelled")
    return out


def test_view_v_shows_the_similar_hand(hands, pairs, tmp_path, monkeypatch):
    """With --pairs: the canvases of the two views are those of a hand and of its neighbour. The class token
    is compared across the two; patches and pixels within each."""
    idx = np.load(pairs)["idx"]
    dataset = HandDataset([HandIndex(hands / "train")], 73)
    canvases = dataset.batch(list(range(24)))["canvas"]

    def shown(record):
        found = record.of("make_views")[0][0][0]  # (2, 4, 3, 73, 73)
        same = (found[:, :, None] == canvases).flatten(3).all(3)  # (2, 4, 24)
        assert (same.sum(2) == 1).all()
        return same.float().argmax(2).numpy()

    record, (taught, learned) = one_step(hands, tmp_path / "all", monkeypatch, "--pairs", pairs,
                                         "--pair-share", 1)
    u, v = shown(record)
    assert (idx[u, 0] >= 0).any() and (v == np.where(idx[u, 0] < 0, u, idx[u, 0])).all()
    (points, targets), _, _ = record.of("align_loss")[0]
    theta = record.of("make_views")[0][0][1]
    torch.testing.assert_close(targets, apply_theta(theta, taught["keypoints"]).flip(0))
    assert torch.equal(record.of("distill")[0][0][1], taught["patch"])
    patches = masking.to_patches(learned["views"], 16)[learned["mask"]]
    assert torch.equal(record.of("pixel_loss")[0][0][1], patches)
    record, _ = one_step(hands, tmp_path / "none", monkeypatch)
    assert (shown(record) == u).all()  # without pairs: the same hands, each with itself


def test_an_item_that_comes_twice_is_read_once(hands, monkeypatch):
    dataset = HandDataset([HandIndex(hands / "train")], 73, labels=("joints2d",))
    read, real = [], HandDataset.read_canvas
    monkeypatch.setattr(HandDataset, "read_canvas", lambda self, row: read.append(row) or real(self, row))
    batch = dataset.batch([7, 3, 7, 7])
    assert read == [7, 3]
    for place, item in enumerate((7, 3, 7, 7)):
        for name, value in dataset[item].items():
            assert torch.equal(batch[name][place], torch.as_tensor(value)), name


def test_class_tokens_are_distilled_from_the_other_view(hands, tmp_path, monkeypatch):
    record, (taught, learned) = one_step(hands, tmp_path, monkeypatch, "--pose-loss", "class")
    (student, teacher, *_), _, _ = record.of("distill")[0]
    assert torch.equal(student, learned["class"]) and torch.equal(teacher, taught["class"].flip(0))
    assert teacher.shape == (2, 4, 64)


def test_the_total_is_the_weighted_sum_of_the_logged_losses(hands, tmp_path):
    flags = ["--align", 0.7, "--hog", 2, "--patch-loss", 0.5, "--pixel-loss", 0.25, "--contrast", 0.3]
    mim(hands, tmp_path / "run", "--steps", 2, *flags)
    weight = {"align": 0.7, "hog": 2, "patch_hog": 2, "patch": 0.5, "pixel": 0.25, "picture": 0.25,
              "contrast": 0.3}
    for row in log(tmp_path / "run"):
        assert row["loss"] == pytest.approx(sum(weight[name] * row[name] for name in weight), rel=1e-5)


def test_the_teacher_follows_after_the_step_and_prototypes_wait(hands, tmp_path, monkeypatch):
    """The first steps of a run of 150. Rate, decay, momentum and temperature by their formulas; prototypes
    move only from the fourth step on; the teacher moves towards the student as the optimiser has just left
    it; centres too."""
    rows = []
    real_update, real_distill = pretrain_mim.update, pretrain_mim.distill

    class Enough(Exception):
        pass

    def spy_distill(student, teacher, center, temperature):
        rows.append({"temperature": temperature, "center": center.clone()})
        return real_distill(student, teacher, center, temperature)

    def spy_update(optimizer, scaler, parameters, clip):
        rows[-1] |= {"rate": optimizer.param_groups[0]["lr"], "clip": clip,
                     "decays": {p.ndim > 1: group["weight_decay"]
                                for group in optimizer.param_groups for p in group["params"]},
                     "frozen": sum(p.grad is None for p in parameters)}
        norm = real_update(optimizer, scaler, parameters, clip)
        rows[-1]["after"] = [p.detach().clone() for p in parameters]
        return norm

    def spy_ema(teacher, student, momentum):
        before = [p.clone() for p in teacher.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(student.parameters(), rows[-1]["after"], strict=True))
        ema_update(teacher, student, momentum)
        rows[-1]["momentum"] = momentum
        for old, new, aim in zip(before, teacher.parameters(), rows[-1]["after"], strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * aim)
        if len(rows) == 5:
            raise Enough

    for name, spy in (("distill", spy_distill), ("update", spy_update), ("ema_update", spy_ema)):
        monkeypatch.setattr(pretrain_mim, name, spy)
    with pytest.raises(Enough):
        pretrain_mim.main(["--data", str(hands / "train"), "--out", str(tmp_path / "run"), *TINY, "--steps",
                           "150",
                           "--ema", "0.9"])
    assert [row["frozen"] for row in rows] == [1, 1, 1, 0, 0] and all(row["clip"] == 3 for row in rows)
    assert not rows[0]["center"].any() and all(row["center"].any() for row in rows[1:])
    for k, row in enumerate(rows):
        fall = (1 + math.cos(math.pi * k / 150)) / 2
        assert row["rate"] == pytest.approx(5e-4 * 8 / 256 * (k + 1) / 7)
        assert row["decays"] == {True: pytest.approx(0.4 - 0.36 * fall), False: 0}
        assert row["momentum"] == pytest.approx(1 - 0.1 * fall)
        assert row["temperature"] == pytest.approx(0.04 + 0.03 * k / 22.5)


def test_rates_are_cosines_of_the_step():
    assert cosine(0, 10, 1.0, warmup=4) == 0.25 and cosine(3, 10, 1.0, warmup=4) == 1
    assert cosine(7, 10, 1.0, warmup=4) == pytest.approx(0.5) and cosine(10, 10, 1.0,
                                                                         final=0.2) == pytest.approx(0.2)


# ---------------------------------------------------------------------------------------------------- command
@pytest.mark.parametrize("cache", ["file", "memory", "device"])
def test_kept_canvases_give_the_same_bits(cache, hands, tmp_path):
    flags = ["--steps", 4, "--workers", 1]
    shutil.copytree(hands / "train", tmp_path / "train")
    mim(hands, tmp_path / "decoded", *flags)
    done = mim(tmp_path, tmp_path / "kept", *flags, "--cache", cache)
    assert "cache: " in done.stdout
    decoded, kept = (weights(tmp_path / name) for name in ("decoded", "kept"))
    assert all(torch.equal(value, kept[name]) for name, value in decoded.items())


def test_a_run_leaves_what_the_next_commands_need(hands, tmp_path):
    done = mim(hands, tmp_path / "run", "--steps", 3)
    assert "M parameters; 24 hands, 3 steps of 8 = 1 epochs; cpu, float32; writes" in done.stdout
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses = {name.removesuffix("_gradient") for name in rows[0] if name.endswith("_gradient")}
    assert losses == {"patch", "pixel", "picture", "align"}  # the abstract's three, pixels at two levels
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in losses), rel=1e-5)
    names = {"patch", "pixel", "picture", "align", "patch_teacher_entropy", "patch_entropy_of_mean",
             "patch_center_norm", "keypoint_spread", "keypoint_batch_spread", "equivariance_error",
             "student_error",
             "masked_views", "masked_patches", "lr", "loss", "images_per_second", "align_gradient",
             "gradient_norm"}
    assert names <= set(rows[0])
    pictures = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert pictures == {"step_0000001.png", "step_0000003.png", "loss.png", "keypoints.png", "collapse.png"}
    saved, exported = weights(tmp_path / "run"), load_encoder(tmp_path / "run/encoder.pt").state_dict()
    assert all(torch.equal(value, saved[f"teacher.encoder.{name}"]) for name, value in exported.items())
    assert not all(torch.equal(value, saved[f"student.encoder.{name}"]) for name, value in exported.items())


def test_a_live_probe_keeps_the_best_encoder_and_changes_nothing(hands, tmp_path, monkeypatch):
    """Its lines stand at the saves. encoder_best.pt is the encoder that scored lowest, also where a kill came
    before it was written. The same weights are learned without a probe."""
    scores = {3: 3.0, 6: 1.0, 9: 2.0}
    seen = []
    probe = LiveProbe.__call__

    def spy(self, encoder):
        seen.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return probe(self, encoder) | {"probe_ridge_mm": scores[3 * len(seen)]}

    mim(hands, tmp_path / "plain", "--steps", 9)
    monkeypatch.setattr(LiveProbe, "__call__", spy)
    run = tmp_path / "run"
    flags = ["--steps", 9, "--save-every", 3, "--probe", hands / "train"]
    mim(hands, run, *flags)
    plain, probed = weights(tmp_path / "plain"), weights(run)
    assert all(torch.equal(value, probed[name]) for name, value in plain.items())
    rows = [row for row in log(run) if "loss" not in row]
    assert {row["step"]: row["probe_ridge_mm"] for row in rows} == scores
    assert set(rows[0]) == {"step", "probe_ridge_mm", "probe_neighbour_mm", "probe_orientation_r2"}
    assert {"probe.png", "probe_orientation.png"} <= {path.name for path in (run / "samples").iterdir()}

    def assert_best_is_second():
        best = torch.load(run / "encoder_best.pt", weights_only=True)
        assert best["step"] == 6
        assert all(torch.equal(value, seen[1][name]) for name, value in best["state_dict"].items())

    assert_best_is_second()
    (run / "last.prev.pt").replace(run / "last.pt")  # as a kill left it after the save of step 6
    (run / "encoder_best.pt").unlink()
    seen.pop()
    mim(hands, run, *flags, "--resume")
    assert_best_is_second()
    lines = [line for line in (run / "log.jsonl").read_text().splitlines(keepends=True)
             if json.loads(line).get("probe_ridge_mm") != scores[9]]
    (run / "log.jsonl").write_text("".join(lines))  # as a kill left it before the last probe
    seen.pop()
    mim(hands, run, *flags, "--resume")
    rows = [row for row in log(run) if "loss" not in row]
    assert {row["step"]: row["probe_ridge_mm"] for row in rows} == scores


@pytest.mark.parametrize("switches", [
    ["--pose-loss", "class", "--pixel-loss", 0],
    ["--pose-loss", "none", "--patch-loss", 0, "--mask", "random"],
    ["--pose-loss", "none", "--patch-loss", 0, "--mask-share", 0],  # the small picture alone
    ["--pose-loss", "none", "--pixel-loss", 0, "--hog", 1, "--accumulate", 2],
    ["--patch-loss", 0, "--pixel-loss", 0, "--mask-share", 0, "--hog", 0],
    ["--align", 0, "--contrast", 1, "--keypoints", 16, "--precision", "bf16"]])
def test_every_switch_trains(hands, tmp_path, switches):
    mim(hands, tmp_path / "run", "--steps", 2, *switches)
    first, last = log(tmp_path / "run")
    assert math.isfinite(last["loss"]) and first["loss"] != last["loss"]


def test_two_processes_compute_what_one_does(hands, pairs, tmp_path):
    """Twelve steps with every loss there is and with similar hands: each line of the log, diagnostics
    included, and the weights. Two processes keep the canvases in memory, which changes nothing."""
    more = ["--steps", 12, "--contrast", 0.3, "--hog", 1, "--pairs", pairs, "--neighbour", 0,
            "--probe", hands / "train"]
    for processes, cache in ((1, "none"), (2, "device")):
        mim(hands, tmp_path / f"p{processes}", *more, "--cache", cache, processes=processes)
    for one, two in zip(*(log(tmp_path / f"p{n}") for n in (1, 2)), strict=True):
        for name in set(one) - {"images_per_second"}:
            rel = 1e-3 if "gradient" in name or "probe" in name else 1e-5
            assert two[name] == pytest.approx(one[name], rel=rel, abs=1e-7), (one["step"], name)
    one, two = (weights(tmp_path / f"p{n}") for n in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_parts_in_two_processes_compute_the_whole_update(hands, tmp_path):
    """Where no loss looks across the batch, the parts of an update add up to the whole, in one process and in
    two."""
    flags = ["--steps", 4, "--align", 0, "--hog", 1]
    for parts, processes in ((1, 1), (2, 1), (2, 2)):
        run = tmp_path / f"a{parts}{processes}"
        mim(hands, run, *flags, "--accumulate", parts, processes=processes)
    whole = log(tmp_path / "a11")
    for run in ("a21", "a22"):
        for name in ("loss", "patch", "gradient_norm", "patch_center_norm"):
            found, wanted = ([row[name] for row in rows] for rows in (log(tmp_path / run), whole))
            assert found == pytest.approx(wanted, rel=1e-4), (run, name)


def test_a_run_killed_again_and_again_ends_with_the_same_bits(hands, pairs, tmp_path):
    """Killed KILLS times (2) at logged steps that SEED (0) draws, wherever the process then is; both are read
    from the environment."""
    command = ["--steps", 24, "--save-every", 4, "--image-size", 32, "--mask-ratio", 0.3, 0.5,
               "--pairs", pairs, "--pair-share", 0.7, "--probe", hands / "train"]
    mim(hands, tmp_path / "whole", *command)
    killed = tmp_path / "killed"
    full = [sys.executable, str(ROOT / "pretrain_mim.py"), "--data", str(hands / "train"), "--out",
            str(killed),
            *TINY, *map(str, command)]
    chance = random.Random(int(os.environ.get("SEED", 0)))
    for target in sorted(chance.sample(range(1, 20), int(os.environ.get("KILLS", 2)))):
        resume = ["--resume"] if (killed / "config.json").exists() else []
        run = subprocess.Popen([*full, *resume], env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        lines = killed / "log.jsonl"
        while run.poll() is None and not (lines.exists() and len(lines.read_text().splitlines()) >= target):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.03))
        assert run.poll() is None, "it ended before it could be killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
    mim(hands, killed, *command, "--resume")
    one, two = weights(tmp_path / "whole"), weights(killed)
    best = [torch.load(run / "encoder_best.pt", weights_only=True) for run in (tmp_path / "whole", killed)]
    one, two = (found | best["state_dict"] for found, best in zip((one, two), best, strict=True))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [log(run) for run in (tmp_path / "whole", killed)]
    numbers = [[{name: row.pop(name) for name in list(row) if name.startswith("probe_")} for row in part]
               for part in rows]
    for row in itertools.chain(*rows):
        row.pop("images_per_second", None)
    assert rows[0] == rows[1]
    for one, two in zip(*numbers, strict=True):  # a BLAS may solve by other threads, and round otherwise
        assert one == pytest.approx(two, rel=1e-6)


def test_a_machine_without_the_folder_continues_with_the_others(hands, tmp_path):
    """Process 1 works in another folder, where RUN is not: it gets the checkpoint of process 0."""
    (tmp_path / "start.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain_mim
from runtime import run
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
run(pretrain_mim.main)
""")
    flags = ["--steps", "8", "--save-every", "4", "--data", str(hands / "train"), *TINY]

    def start(*more):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*torchrun, "start.py", *flags, *more], env=ENV, cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    start("--out", "whole")
    whole = weights(tmp_path / "0/whole")
    run = tmp_path / "0/whole"
    (run / "last.prev.pt").replace(run / "last.pt")  # as after the save of step 4
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 4
    start("--out", "whole", "--resume")
    assert [path.name for path in (tmp_path / "1").iterdir()] == []
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


# --------------------------------------------------------------------------------------------------- collapse
def test_collapse_is_said_once(hands, tmp_path):
    """A teacher so soft that its targets are uniform: the student answers the same everywhere, and the run
    says so."""
    flags = ["--temperature", 9, 9, "--pose-loss", "none", "--pixel-loss", 0, "--mask-share", 1,
             "--image-size", 32,
             "--mask-ratio", 0.5, 0.5, "--lr", 0.2]
    done = mim(hands, tmp_path / "run", "--steps", 60, *flags)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("warning")]
    assert len(said) == 1 and "ln 64 = 4.159" in said[0]
    assert len([row for row in log(tmp_path / "run") if "warning" in row]) == 1


def test_collapse_is_told_from_health():
    healthy = {"class": 3.0, "patch": 1.0, "masked_views": 0.5, "keypoint_spread": 0.4,
               "keypoint_batch_spread": 0.2}
    # half have no mask
    sick = {"class": math.log(64) + 0.01, "patch": math.log(64) / 2, "keypoint_spread": 0.01}
    for names in ((), ("class",), ("patch",), ("keypoint_spread",), ("class", "patch", "keypoint_spread")):
        found = pretrain_mim.CollapseAlarm(64, 5).collapsed(healthy | {name: sick[name] for name in names})
        assert set(found) == {name.replace("keypoint_spread", "keypoints") for name in names}
    alarm = pretrain_mim.CollapseAlarm(64, start=5)
    due = [len(alarm.check(step, healthy | sick)) for step in range(18)]
    assert due == [0] * 15 + [3, 0, 0]  # steps 6 to 15 are ten in a row


@pytest.mark.parametrize("flags, words", [
    (["--mask-ratio", "0.5", "0.1"], "--mask-ratio"),
    (["--arch", "resnet50"], "--arch: invalid choice"),
    (["--color", "5"], "--color"),
    (["--pose-loss", "none", "--patch-loss", "0", "--pixel-loss", "0"], "nothing to learn"),
    (["--image-size", "33"], "--image-size"),
    (["--mask-ratio", "0.01", "0.02"], "--mask random"),
    (["--align", "0", "--hog", "0"], "--pose-loss none"),
    (["--pose-loss", "class", "--align", "1"], "--pose-loss keypoints"),
    (["--pose-loss", "none", "--mask-share", "0"], "--mask-share"),
    (["--image-size", "16"], "one patch"),
    (["--pose-loss", "none", "--pairs", "pairs.npz"], "no loss compares the two views"),
    (["--pairs", "nowhere.npz"], "nowhere.npz: no such file"),
    (["--probe", "nowhere"], "nowhere is no index"),
    (["--batch-size", "0"], "--batch-size"),
    (["--data", "nowhere"], "nowhere")])
def test_mistakes_get_one_line(hands, tmp_path, flags, words):
    done = mim(hands, tmp_path / "run", "--steps", 1, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
