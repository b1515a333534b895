"""HandMIM's parts against plain loops and float64, its invariances, and the command: one process against two, killed against
uninterrupted, every switch, collapse seen."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call, log
from PIL import Image

import pretrain_mim
from model import DistanceHead, KeypointHead, PrototypeHead, build_encoder, load_encoder
from runtime import Runtime, ema_update, generator
from views import apply_theta, blur, invert_theta, normalise, random_theta, warp

TINY = ["--arch", "vit_tiny", "--image-size", "64", "--batch-size", "8", "--prototypes", "64", "--head-width", "32", "--log-every", "1",
        "--workers", "0"]


class One:
    """A Runtime of one process."""
    world = 1

    def mean(self, value):
        return value

    def gather(self, value):
        return value

    def share(self, value):
        return value


def args_of(*more):
    args = pretrain_mim.flags().parse_args(["--data", "x", "--out", "y", *TINY, *map(str, more)])
    pretrain_mim.check_flags(args)
    return args


# --------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("grid", [4, 14, 16])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
def test_masks_hide_what_they_should(grid, ratio):
    N = grid * grid
    block = pretrain_mim.block_mask(200, grid, ratio, generator(0))
    scattered = pretrain_mim.random_mask(200, grid, ratio, generator(0))
    assert block.dtype == scattered.dtype == torch.bool and block.shape == scattered.shape == (200, N)
    assert (block.sum(1) <= ratio * N).all() and (scattered.sum(1) == math.floor(ratio * N)).all()
    if grid > 4:
        assert block.sum(1).float().mean() > 0.75 * ratio * N          # the last rectangle rarely fits exactly
    assert len(scattered.float().mean(0).unique()) > 1 and scattered.any(0).all()
    assert torch.equal(block, pretrain_mim.block_mask(200, grid, ratio, generator(0)))


def test_block_masks_are_blocks_and_random_ones_are_not():
    def neighbours(mask):                                              # share of hidden patches whose right neighbour is hidden
        mask = mask.unflatten(1, (14, 14))
        return (mask[:, :, :-1] & mask[:, :, 1:]).sum() / mask[:, :, :-1].sum()
    block, scattered = (make(300, 14, 0.3, generator(1)) for make in (pretrain_mim.block_mask, pretrain_mim.random_mask))
    assert neighbours(block) > 0.7 > 0.4 > neighbours(scattered)


def test_each_image_has_its_own_ratio():
    ratio = torch.tensor([0.0, 0.1, 0.5, 0.004])
    for make in (pretrain_mim.block_mask, pretrain_mim.random_mask):
        counts = make(4, 14, ratio, generator(2)).sum(1)
        assert counts[0] == counts[3] == 0 < counts[1] < counts[2]


# -------------------------------------------------------------------------------------------------------------- losses
def test_distillation_is_the_sum_that_ibot_writes():
    g = generator(3)
    teacher, student, center = (torch.rand(n, 7, generator=g, dtype=torch.float64) for n in (5, 5, 1))
    found = pretrain_mim.distill(teacher, center, student, 0.05)
    for row in range(5):
        p = [math.exp(float(teacher[row, k] - center[0, k]) / 0.05) for k in range(7)]
        q = [math.exp(float(student[row, k]) / 0.1) for k in range(7)]
        wanted = -sum(p[k] / sum(p) * math.log(q[k] / sum(q)) for k in range(7))
        assert float(found[row]) == pytest.approx(wanted, abs=1e-9)


def test_patch_and_pixel_losses_weigh_as_documented():
    """Against a loop over views: patch = mean over views of the mean over an image's masked patches, 0 where none; pixel = mean over
    all masked patches that show the photograph."""
    g, args = generator(4), args_of("--pose-loss", "none")
    mask = pretrain_mim.random_mask(6, 4, torch.tensor([0, 0.2, 0.4, 0, 0.5, 0.3]), g)
    views, seen = torch.rand(6, 3, 64, 64, generator=g), torch.rand(6, 16, generator=g) < 0.7
    count = (mask & seen).sum().float()
    target = pretrain_mim.make_target(views, mask, seen, count, 16) | {"temperature": 0.05}
    M = int(mask.sum())
    teacher, student = ({"patch": torch.rand(M, 9, generator=g), "pixels": torch.rand(M, 768, generator=g)} for _ in range(2))
    terms = pretrain_mim.pretraining_losses(student, teacher, {"patch": torch.zeros(1, 9)}, target, args, One())
    rows = pretrain_mim.distill(teacher["patch"], torch.zeros(1, 9), student["patch"], 0.05)
    patch, pixel, m = 0.0, 0.0, 0
    for view in range(6):
        inside = []
        for place in range(16):
            if mask[view, place]:
                y, x = divmod(place, 4)
                block = views[view, :, 16 * y:16 * y + 16, 16 * x:16 * x + 16].flatten()
                block = (block - block.mean()) / (block.var() + 1e-2).sqrt()
                assert torch.allclose(target["pixels"][m], block, atol=1e-5)
                pixel += float(((student["pixels"][m] - block) ** 2).mean()) * bool(seen[view, place]) / float(count)
                inside.append(float(rows[m]))
                m += 1
        patch += np.mean(inside) / 6 if inside else 0
    assert float(terms["patch"]) == pytest.approx(patch, rel=1e-5) and float(terms["pixel"]) == pytest.approx(pixel, rel=1e-5)


def test_class_token_losses_cross_the_views_and_patch_losses_do_not():
    """Every loss against a loop over rows: which row of the teacher a row of the student is asked for, and with what weight."""
    g, B, P = generator(8), 3, 7
    args = args_of("--no-align-norm", "--align", 0.7, "--distribution", 2, "--class-weight", 5, "--pose-weight", 0.5, "--sketch", 0)
    shapes = {"class": (2 * B, P), "pose": (2 * B, P), "patch": (4, P), "keypoints": (2 * B, 5, 2), "pixels": (4, 6)}
    student, teacher = ({name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(2))
    centers = {name: torch.randn(1, P, generator=g) for name in ("class", "pose", "patch")}
    target = {"temperature": 0.06, "patch_weight": torch.rand(4, generator=g), "pixel_weight": torch.rand(4, generator=g),
              "pixels": torch.randn(4, 6, generator=g)}
    terms = pretrain_mim.pretraining_losses(student, teacher, centers, target, args, One())

    def cross(name, row, other):
        aim = ((teacher[name][other] - centers[name][0]) / 0.06).softmax(0)
        return -float((aim * (student[name][row] / 0.1).log_softmax(0)).sum())
    wanted = {name: np.mean([cross(key, row, (row + B) % (2 * B)) for row in range(2 * B)])
              for name, key in (("class", "class"), ("distribution", "pose"))}
    wanted["patch"] = sum(cross("patch", row, row) * float(target["patch_weight"][row]) for row in range(4))
    apart = student["keypoints"] - teacher["keypoints"][[3, 4, 5, 0, 1, 2]]
    wanted["align"] = float(torch.where(apart.abs() < 0.1, apart ** 2 / 0.2, apart.abs() - 0.05).mean())
    wanted["pixel"] = float((((student["pixels"] - target["pixels"]) ** 2).mean(1) * target["pixel_weight"]).sum())
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(wanted, rel=1e-5)
    weights = {"class": 0.5 * 5, "distribution": 0.5 * 2, "align": 0.5 * 0.7, "patch": 0.1, "pixel": 0.3}
    total = float(pretrain_mim.total_loss(terms, args))
    assert total == pytest.approx(sum(weights[name] * wanted[name] for name in wanted), rel=1e-5)
    sketched = {"sketch": torch.tensor(1.0), "patch_sketch": torch.tensor(10.0)}
    assert float(pretrain_mim.total_loss(sketched, args_of("--sketch", 3))) == pytest.approx(33)
    tokens = torch.randn(2, 3, generator=g, requires_grad=True)
    assert float(pretrain_mim.gradient_sizes({"a": 3 * tokens.sum()}, tokens, 1, One())["a_gradient"]) == pytest.approx(3 * 6 ** 0.5)


def test_sketches_are_the_histograms_of_a_double_loop():
    """And a patch's sketch is the patch's; a whole view's the same cells, where it is 64 pixels wide."""
    views = torch.rand(2, 3, 64, 64, generator=generator(14), dtype=torch.float64)
    found, image = pretrain_mim.edges(views, 8), views[1].numpy()
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
    whole, patches = pretrain_mim.sketches(views, 16)                  # (2, 512), (2, 16, 8 * 2 * 2)
    assert torch.allclose(whole, found.flatten(1))
    assert torch.allclose(patches[:, 6].unflatten(1, (8, 2, 2)), found[:, :, 2:4, 4:6])


def test_points_that_follow_the_image_agree_once_undone():
    """An ideal network, whose points are fixed to the canvas, has no alignment loss whatever the views; without undoing it has."""
    theta = random_theta(20, generator(5), 0.8, (0.5, 0.9), 0.1)
    points = torch.rand(10, 21, 2, generator=generator(6)) - 0.5
    points *= pretrain_mim.SPREAD / next(pretrain_mim.spreads(points[None].repeat(2, 1, 1, 1)))
    in_view = apply_theta(invert_theta(theta), points.repeat(2, 1, 1))
    undone = apply_theta(theta, in_view).unflatten(0, (2, -1))
    for norm in (True, False):
        assert float(pretrain_mim.align_loss(undone, undone.flip(0), norm)) < 1e-10
        assert float(pretrain_mim.align_loss(in_view.unflatten(0, (2, -1)), in_view.unflatten(0, (2, -1)).flip(0), norm)) > 1e-3
    assert float(pretrain_mim.contrast_loss(undone, undone.flip(0))) < 0.5 < math.log(10)


def test_alignment_does_not_reward_shrinking():
    """Two teachers and students that agree perfectly: with the spread fixed, the smaller set has the larger loss; without, none has."""
    points = torch.randn(1, 8, 21, 2, generator=generator(7)).repeat(2, 1, 1, 1)
    points = pretrain_mim.SPREAD * points / next(pretrain_mim.spreads(points))
    losses = [float(pretrain_mim.align_loss(s * points, s * points, True)) for s in (1, 0.5, 0.1)]
    assert losses == pytest.approx([0, 0.25, 0.81], abs=1e-4)          # (1 - s)^2
    assert float(pretrain_mim.align_loss(0.1 * points, 0.1 * points, False)) == 0
    assert float(pretrain_mim.hinge_loss(0.01 * points)) > 0.4 and float(pretrain_mim.hinge_loss(9 * points)) == 0


def test_centers_follow_the_mean_of_the_teacher_and_stand_still_without_patches():
    center, logits = torch.full((1, 5), 2.0), torch.rand(7, 5, generator=generator(9))
    moved = pretrain_mim.move_center(center, logits.sum(0, keepdim=True), 7, One())
    assert torch.allclose(moved, 0.9 * center + 0.1 * logits.mean(0, keepdim=True))
    assert torch.equal(pretrain_mim.move_center(center, torch.zeros(1, 5), 0, One()), center)


def test_views_keep_the_box_and_colour_can_be_switched_off():
    """An upright window of half side s around t holds the box [-1/2, 1/2] of the canvas; --color 0 leaves the colours as they are."""
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    canvas = torch.randint(0, 256, (64, 3, 72, 72), generator=generator(9), dtype=torch.uint8)
    for strength in (0, 1):
        args = args_of("--batch-size", 64, "--color", strength, "--shift", 1)
        theta, *color = pretrain_mim.draw_views(args, runtime, 5)
        scale = theta[:, :, 0].norm(dim=1)
        assert (theta[:, :, 2].abs() <= scale[:, None] - 0.5 + 1e-6).all() and theta[:, :, 2].abs().max() > 0.1
        assert 0.75 * 0.75 <= scale.min() < scale.max() <= 0.75 * 1.1 + 1e-6
        turned = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]).rad2deg()
        assert turned.min() < -35 and turned.max() > 35 and turned.abs().max() <= 45 + 1e-3
        views = pretrain_mim.make_views(canvas, theta, *color, 64)
        same = (views - normalise(warp(canvas.repeat(2, 1, 1, 1), theta, 64))).abs().amax((1, 2, 3)) < 1e-5
        assert same.all() if strength == 0 else not same.any()


def test_padding_is_not_a_patch_to_paint():
    theta = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]] * 4)
    valid = torch.tensor([[-1.0, -1, 1, 1], [-0.5, -1, 1, 1]])          # the second canvas lacks its left quarter
    real = pretrain_mim.inside(theta, valid, 4).unflatten(1, (4, 4))
    assert real[[0, 2]].all() and not real[[1, 3], :, 0].any() and real[[1, 3], :, 1:].all()


# --------------------------------------------------------------------------------------------------------------- heads
def test_heads_have_the_shapes_and_starts_they_promise():
    torch.manual_seed(0)
    points = KeypointHead(192, 21)(0.1 * torch.randn(4, 192))
    assert points.shape == (4, 21, 2) and points.std() > 0.2 and points.abs().max() < 0.7
    head = PrototypeHead(16, 10, 8)
    logits = head(torch.randn(3, 5, 16))
    assert logits.shape == (3, 5, 10) and (logits.abs() <= 1 + 1e-6).all()
    far = DistanceHead(42, 12)
    q = torch.randn(3, 42)
    wanted = -((q[:, None] - far.prototypes) ** 2).sum(-1) / (0.2 * 21)
    assert torch.allclose(far(q), wanted, atol=1e-4)


def test_the_teacher_learns_nothing_by_gradient_and_sees_no_mask():
    args = args_of()
    torch.manual_seed(0)
    student = pretrain_mim.HandMIM(build_encoder("vit_micro", 64), args)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        student.mask_token += 3                                        # were the teacher to hide patches, it would show
    views, theta = torch.randn(4, 3, 64, 64), random_theta(4, generator(1), 0.5, (0.6, 0.8), 0.1)
    mask = pretrain_mim.random_mask(4, 4, 0.5, generator(2))
    where = mask.flatten().nonzero().squeeze(1)
    whole, masked = teacher(views, theta, where), student(views, theta, where, mask)
    assert torch.allclose(whole["tokens"], student.encoder(views), atol=1e-6)
    assert not torch.allclose(whole["tokens"], masked["tokens"], atol=1e-2) and "pixels" not in whole
    assert whole["patch"].shape == (32, 64) and masked["pixels"].shape == (32, 768)
    target = pretrain_mim.make_target(views, mask, torch.ones_like(mask), torch.tensor(32.0), 16) | {"temperature": 0.05}
    terms = pretrain_mim.pretraining_losses(masked, whole, {"patch": torch.zeros(1, 64)}, target, args, One())
    pretrain_mim.total_loss(terms, args).backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_blur_is_a_gaussian():
    from scipy.ndimage import gaussian_filter1d
    images, sigma = torch.rand(3, 3, 24, 24, generator=generator(3)), torch.tensor([0.0, 0.8, 1.5])
    found = blur(images, sigma, 1.5)
    assert torch.equal(found[0], images[0])
    for k in (1, 2):                                                   # both are cut where the widest is
        wanted = images[k].double().numpy()
        for axis in (1, 2):
            wanted = gaussian_filter1d(wanted, float(sigma[k]), axis=axis, mode="mirror", truncate=5 / float(sigma[k]))
        np.testing.assert_allclose(found[k], wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- command
def weights(run):
    state = torch.load(run / "last.pt", weights_only=True)
    return {f"{part}.{name}": value for part in ("student", "teacher", "centers") for name, value in state[part].items()}


def mim(hands, out, *more, **options):
    return call("pretrain_mim.py", "--data", hands / "train", "--out", out, *TINY, *more, **options)


def test_schedules_and_the_frozen_last_layer(hands, tmp_path, monkeypatch):
    """The first steps of a run of 150: rate, decay and temperature by their formulas; prototypes move only from the fourth on; teacher and
    centres follow."""
    seen, losses, step = [], pretrain_mim.pretraining_losses, pretrain_mim.update

    class Enough(Exception):
        pass

    def spy_losses(student, teacher, centers, target, *rest):
        seen.append({"temperature": target["temperature"], "centers": centers["patch"].clone()})
        return losses(student, teacher, centers, target, *rest)

    def spy_update(optimizer, scaler, parameters, clip):
        seen[-1] |= {"rate": optimizer.param_groups[0]["lr"], "decay": max(group["weight_decay"] for group in optimizer.param_groups),
                     "frozen": sum(p.grad is None for p in parameters)}
        return step(optimizer, scaler, parameters, clip)

    def spy_ema(teacher, student, momentum):
        before = next(teacher.parameters()).clone()
        ema_update(teacher, student, momentum)
        seen[-1] |= {"momentum": momentum, "moved": not torch.equal(before, next(teacher.parameters()))}
        if len(seen) == 5:
            raise Enough
    for name, spy in (("pretraining_losses", spy_losses), ("update", spy_update), ("ema_update", spy_ema)):
        monkeypatch.setattr(pretrain_mim, name, spy)
    with pytest.raises(Enough):
        pretrain_mim.main(["--data", str(hands / "train"), "--out", str(tmp_path / "run"), *TINY, "--steps", "150", "--ema", "0.9"])
    assert [row["frozen"] for row in seen] == [1, 1, 1, 0, 0] and all(row["moved"] for row in seen)
    assert not seen[0]["centers"].any() and all(row["centers"].any() for row in seen[1:])
    for k, row in enumerate(seen):
        fall = (1 + math.cos(math.pi * k / 150)) / 2
        assert row["rate"] == pytest.approx(5e-4 * 8 / 256 * (k + 1) / 7)
        assert row["decay"] == pytest.approx(0.4 - 0.36 * fall) and row["momentum"] == pytest.approx(1 - 0.1 * fall)
        assert row["temperature"] == pytest.approx(0.04 + 0.03 * k / 22.5)


def test_a_run_leaves_what_the_next_commands_need(hands, tmp_path):
    mim(hands, tmp_path / "run", "--steps", 3)
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"patch", "pixel", "sketch", "patch_sketch", "align", "patch_teacher_entropy", "patch_entropy_of_mean", "patch_center_norm",
            "keypoint_spread", "keypoint_batch_spread", "equivariance_error", "masked_views", "lr", "loss", "images_per_second",
            "align_gradient"} <= set(rows[0])
    assert {"step_0000001.png", "step_0000003.png", "loss.png", "keypoints.png"} <= {p.name for p in (tmp_path / "run/samples").iterdir()}
    teacher, exported = weights(tmp_path / "run"), load_encoder(tmp_path / "run/encoder.pt").state_dict()
    assert all(torch.equal(value, teacher[f"teacher.encoder.{name}"]) for name, value in exported.items())
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", tmp_path / "mesh",
         "--init", tmp_path / "run/encoder.pt", "--steps", 1, "--image-size", 64, "--head-width", 32, "--batch-size", 8, "--workers", 0)


@pytest.mark.parametrize("switches", [
    ["--pose-loss", "class", "--pixel-loss", 0], ["--pose-loss", "none", "--patch-loss", 0, "--mask", "random"],
    ["--pose-loss", "none", "--pixel-loss", 0, "--accumulate", 2],
    ["--patch-loss", 0, "--pixel-loss", 0, "--mask-share", 0, "--no-align-norm", "--hinge", 0.25],
    ["--distribution", 1, "--logits", "mlp", "--shape-input", "--class-weight", 1, "--pose-prototypes", 32, "--align", 0],
    ["--distribution", 1, "--pose-prototypes", 32, "--drop-path", 0.1, "--precision", "bf16"]])
def test_every_switch_trains(hands, tmp_path, switches):
    mim(hands, tmp_path / "run", "--steps", 2, *switches)
    assert math.isfinite(log(tmp_path / "run")[-1]["loss"])


def test_two_processes_compute_what_one_does(hands, tmp_path):
    """Twenty steps with every loss there is: each line of the log, diagnostics included, and the weights."""
    more = ["--steps", 20, "--contrast", 0.3, "--distribution", 1, "--class-weight", 1, "--hinge", 0.5, "--pose-prototypes", 32]
    for processes in (1, 2):
        mim(hands, tmp_path / f"p{processes}", *more, processes=processes)
    for one, two in zip(*(log(tmp_path / f"p{n}") for n in (1, 2)), strict=True):
        for name in set(one) - {"images_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5 if "gradient" not in name else 1e-3, abs=1e-7), (one["step"], name)
    one, two = (weights(tmp_path / f"p{n}") for n in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_accumulation_computes_the_same_update(hands, tmp_path):
    """Where no loss looks across the batch, parts add up to the whole; centres move once an update."""
    for parts in (1, 2):
        mim(hands, tmp_path / f"a{parts}", "--steps", 6, "--no-align-norm", "--accumulate", parts)
    one, two = (log(tmp_path / f"a{n}") for n in (1, 2))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["patch_center_norm"] for row in two] == pytest.approx([row["patch_center_norm"] for row in one], rel=1e-5)


def test_a_run_killed_again_and_again_ends_with_the_same_bits(hands, tmp_path):
    """Killed KILLS times (3; set it in the environment) at random logged steps, wherever the process then is."""
    command = ["--steps", 40, "--save-every", 4, "--image-size", 32, "--mask-ratio", 0.3, 0.5]
    mim(hands, tmp_path / "whole", *command)
    killed = tmp_path / "killed"
    full = [sys.executable, str(ROOT / "pretrain_mim.py"), "--data", str(hands / "train"), "--out", str(killed), *TINY, *map(str, command)]
    chance = random.Random()
    for target in sorted(chance.sample(range(1, 38), int(os.environ.get("KILLS", 3)))):
        resume = ["--resume"] if (killed / "config.json").exists() else []
        run = subprocess.Popen([*full, *resume], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = killed / "log.jsonl"
        while run.poll() is None and not (lines.exists() and len(lines.read_text().splitlines()) >= target):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        assert run.poll() is None, "it ended before it could be killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
    mim(hands, killed, *command, "--resume")
    one, two = weights(tmp_path / "whole"), weights(killed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    strip = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in log(tmp_path / name)] for name in ("whole", "killed")]
    assert strip[0] == strip[1]


def test_collapse_is_said_once(hands, tmp_path):
    """A teacher so soft that its targets are uniform: the student says the same of everything, and the run says so."""
    done = mim(hands, tmp_path / "run", "--steps", 60, "--temperature", 9, 9, "--pose-loss", "none", "--pixel-loss", 0, "--mask-share", 1,
               "--image-size", 32, "--mask-ratio", 0.5, 0.5, "--lr", 0.2)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("warning")]
    assert len(said) == 1 and "ln 64 = 4.159" in said[0]
    assert [row for row in log(tmp_path / "run") if "warning" in row]


def test_collapse_is_told_from_health():
    healthy = {"class": 3.0, "patch": 1.0, "masked_views": 0.5, "keypoint_spread": 0.4, "keypoint_batch_spread": 0.2}
    sick = {"class": math.log(64) + 0.01, "patch": math.log(64) / 2, "keypoint_spread": 0.01}       # half of the views have no mask
    sizes = {"class": 64, "patch": 64}
    for names in ((), ("class",), ("patch",), ("keypoint_spread",), ("class", "patch", "keypoint_spread")):
        found = pretrain_mim.collapsed(healthy | {name: sick[name] for name in names}, sizes)
        assert set(found) == {name.replace("keypoint_spread", "keypoints") for name in names}


@pytest.mark.parametrize("flags, words", [
    (["--mask-ratio", "0.5", "0.1"], "--mask-ratio"), (["--arch", "resnet50"], "--arch resnet50"), (["--color", "5"], "--color"),
    (["--pose-loss", "none", "--patch-loss", "0", "--pixel-loss", "0"], "nothing to learn"), (["--image-size", "33"], "--image-size"),
    (["--mask-ratio", "0.01", "0.02"], "--mask random"), (["--distribution", "1", "--shape-input"], "--logits mlp"),
    (["--align", "0", "--sketch", "0"], "--pose-loss none"), (["--pose-loss", "class", "--sketch", "1"], "--pose-loss keypoints"),
    (["--pose-weight", "0", "--mask-share", "0"], "--mask-share"), (["--image-size", "16"], "one patch"),
    (["--batch-size", "0"], "--batch-size"), (["--data", "nowhere"], "nowhere")])
def test_mistakes_get_one_line(hands, tmp_path, flags, words):
    done = mim(hands, tmp_path / "run", "--steps", 1, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- probe
def test_the_probe_reads_poses_and_classes(hands, tmp_path):
    encoder, pool = tmp_path / "encoder.pt", tmp_path / "pool"
    call("make_synthetic.py", "--out", pool, "--hands", 12, "--videos", 6, "--size", 96, "--seed", 2)
    net = build_encoder("vit_micro", 32)
    torch.save({"kind": "encoder", "step": 0, "arch": net.arch, "config": net.config, "state_dict": net.state_dict()}, encoder)
    call("evaluate.py", "--data", hands / "train", "--probe", encoder, "--out", tmp_path / "a")
    table = json.loads((tmp_path / "a/metrics.json").read_text())
    assert table["count"] + table["train_count"] == 24 and table["ridge_pa_mpjpe_mm"] == table["probe_both_ridge_pa_mpjpe_mm"]
    call("evaluate.py", "--data", hands / "train", "--probe", encoder, "--probe-train", pool, "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b/metrics.json").read_text())["train_count"] == 12
    for data, train, words in ((hands / "val", hands / "train", "at least 10"), (pool, pool, "--probe-train")):
        refused = call("evaluate.py", "--data", data, "--probe", encoder, "--probe-train", train, "--out", tmp_path / "no", check=False)
        assert refused.returncode == 2 and words in refused.stderr and not (tmp_path / "no").exists()
    for k, row in enumerate(range(12)):
        folder = tmp_path / "classes" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 250 * (k % 2) + row % 2, np.uint8)).save(folder / f"{k}.png")
    call("evaluate.py", "--data", tmp_path / "classes", "--probe", encoder, "--out", tmp_path / "c")
    assert json.loads((tmp_path / "c/metrics.json").read_text())["pixels_raw_knn_accuracy"] == 1
