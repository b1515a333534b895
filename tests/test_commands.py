"""Every command as a user types it, on tiny data: what it writes, one process against two, killed and resumed
against uninterrupted, FreiHAND's files read back, files of older versions, one clear line for every mistake.
And the wiring of the mesh stage, from first principles.

SEED=3 in the environment kills the run of the resume test at another moment."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call, log
from PIL import Image

import finetune_mesh
from data import EpochSampler, HandDataset, HandIndex, index_fingerprint, read_pairs, write_index
from mano import (
    Mano, axis_angle_from_rotmat, joints_from_vertices, rotmat_from_axis_angle, weak_perspective,
)
from model import build_encoder, load_encoder
from runtime import Runtime
from saving import FORMATS
from synthetic_hand import synthetic_mano
from views import normalise, random_theta, warp

SEED = int(os.environ.get("SEED", 0))
TINY = ["--arch", "vit_micro", "--image-size", "32", "--head-width", "32", "--batch-size", "8",
        "--log-every", "1", "--workers", "0"]
STEADY = ["--drop-path", 0, "--dropout", 0]  # leaves the views random, which depend on the step alone
LONG = ["--steps", 16, "--save-every", 5]


def train(hands, out, *more, **options):
    """A run of finetune_mesh.py on the drawn hands."""
    data = ["--data", hands / "train", "--val", hands / "val"]
    return call("finetune_mesh.py", *data, "--out", out, *TINY, *more, **options)


def load(run, name="last.pt"):
    return torch.load(run / name, weights_only=True)


def flat(value, key=""):
    """A nested dict or list -> {path: leaf}."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    leaves = {}
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        leaves |= flat(inner, f"{key}/{name}")
    return leaves


def assert_same_bits(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def first_moments(run):
    """Adam's running mean of every tensor's gradient: after one step a tenth of the clipped gradient."""
    return {number: state["exp_avg"] for number, state in load(run)["optimizer"]["state"].items()}


@pytest.fixture(scope="session")
def mesh(hands):
    """A run of 16 steps that nothing interrupted."""
    train(hands, hands / "mesh", *LONG)
    return hands / "mesh"


@pytest.fixture(scope="session")
def freihand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freihand")
    flags = ["--hands", 10, "--layout", "freihand", "--size", 96]
    call("make_synthetic.py", "--out", folder / "FreiHAND", *flags)
    return folder


# -------------------------------------------------------------------------------------- views, labels, losses
def posed_hands(count=5):
    """A batch as HandDataset makes it, of hands that are posed by MANO; their vertices and joints agree with
    pose and betas. joints2d: the joints, seen by a weak-perspective camera."""
    g = torch.Generator().manual_seed(1)
    arrays = synthetic_mano()
    hand = Mano(arrays)
    pose = 0.4 * torch.randn(count, 16, 3, generator=g)
    betas = torch.randn(count, 10, generator=g)
    absolute = torch.cat([pose[:, :1], pose[:, 1:] + hand.hands_mean], 1)
    vertices, _ = hand(rotmat_from_axis_angle(absolute), betas)
    vertices = vertices + torch.tensor([0.02, -0.03, 0.6])
    joints = joints_from_vertices(vertices, arrays)
    camera = torch.tensor([3.0, 0.01, 0.02]).expand(count, 3)
    labels = {"pose": pose.flatten(1), "betas": betas, "vertices": vertices, "joints": joints,
              "joints2d": weak_perspective(joints - joints[:, :1], camera), "visible": torch.ones(count, 21),
              "pose_mean": torch.ones(count), "mirrored": torch.zeros(count),
              "source": torch.zeros(count, dtype=torch.long), "known_joints": torch.ones(count, 21),
              "known_joints2d": torch.ones(count, 21)}
    for name in ("pose", "betas", "vertices", "joints", "joints2d"):
        labels[f"has_{name}"] = torch.ones(count)
    theta = random_theta(count, g, np.pi, (0.5, 0.8), 0.1)
    return hand, arrays, labels, theta


def assert_near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_labels_lie_on_the_hand_that_the_view_shows():
    """A canvas with a bright spot at a joint: the spot appears in the view where the target says."""
    hand, _, labels, theta = posed_hands()
    size = 64
    line = (torch.arange(256) + 0.5) / 128 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    joint = 0.3 * torch.tanh(labels["joints2d"][:, 9])  # inside every view
    labels["joints2d"][:, 9] = joint
    distance = (x - joint[:, 0, None, None]) ** 2 + (y - joint[:, 1, None, None]) ** 2
    views = warp(torch.exp(-distance / (2 * 0.05 ** 2))[:, None], theta, size)[:, 0]  # (B, S, S)
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    mass = views.sum((1, 2))
    centroid = torch.stack([(views * line).sum((1, 2)) / mass, (views * line[:, None]).sum((1, 2)) / mass], 1)
    target = finetune_mesh.make_target(labels, theta, hand.hands_mean)
    assert_near(target["joints2d"][:, 9], centroid, 0.01)


def test_labels_in_3d_turn_with_the_view():
    """Seen in the view, the 3-D joints fall on the 2-D ones after a scale and a shift, without a rotation.

    The turned rotations make the turned mesh, and without the global one the upright mesh."""
    hand, arrays, labels, theta = posed_hands()
    target = finetune_mesh.make_target(labels, theta, hand.hands_mean)
    points = target["joints2d"] - target["joints2d"].mean(1, keepdim=True)
    shadow = target["joints"][..., :2] - target["joints"][..., :2].mean(1, keepdim=True)
    scale = (points * shadow).sum((1, 2)) / (shadow ** 2).sum((1, 2))
    assert_near(points, scale[:, None, None] * shadow)
    vertices, _ = hand(target["rotmats"], labels["betas"])
    joints = joints_from_vertices(vertices, arrays)
    assert_near(vertices - joints[:, :1], target["vertices"] - target["joints"][:, :1])
    assert_near(joints - joints[:, :1], target["joints"] - target["joints"][:, :1])
    no_turn = torch.eye(3).expand(len(vertices), 1, 3, 3)
    vertices, _ = hand(torch.cat([no_turn, target["rotmats"][:, 1:]], 1), labels["betas"])
    assert_near(vertices - joints_from_vertices(vertices, arrays)[:, :1], target["upright"])


def perfect_estimate(hand, target):
    """What the head returns where it is right: the target's hand, and the camera that fits its 2-D joints."""
    vertices, joints = hand(target["rotmats"], target["betas"])
    shadow = target["joints"] - target["joints"][:, :1]
    points = target["joints2d"]
    spread = shadow[..., :2] - shadow[..., :2].mean(1, keepdim=True)
    scale = ((points - points.mean(1, keepdim=True)) * spread).sum((1, 2)) / (spread ** 2).sum((1, 2))
    shift = points.mean(1) / scale[:, None] - shadow[..., :2].mean(1)
    camera = torch.cat([scale[:, None], shift], 1)
    root = joints[:, :1]
    return {"rotmats": target["rotmats"], "betas": target["betas"], "camera": camera,
            "vertices": vertices - root, "joints": joints - root}


def losses_of(hand, arrays, estimates, target):
    joints = [finetune_mesh.defined_joints(estimate, target, arrays, {"freihand": None})
              for estimate in estimates]
    return finetune_mesh.mesh_losses(estimates, joints, target)


def test_the_right_answer_costs_nothing_and_every_error_its_own_loss():
    hand, arrays, labels, theta = posed_hands()
    target = finetune_mesh.make_target(labels, theta, hand.hands_mean)
    right = perfect_estimate(hand, target)
    losses = losses_of(hand, arrays, [right], target)
    assert list(losses) == list(finetune_mesh.WEIGHTS)
    assert max(float(loss) for loss in losses.values()) < 1e-3  # the two wrists differ by .2 mm
    turn = rotmat_from_axis_angle(torch.tensor([0.0, 0.0, 0.5]))
    turned = right | {name: right[name] @ turn.T for name in ("vertices", "joints")}
    turned["rotmats"] = torch.cat([turn @ right["rotmats"][:, :1], right["rotmats"][:, 1:]], 1)
    wrong = {"betas": ({"betas": right["betas"] + 1}, {"betas"}),
             "camera": ({"camera": right["camera"] * 1.1}, {"camera", "joints2d"}),
             "orientation": (turned, {"rotations", "joints2d", "joints", "vertices"}),
             "larger": ({name: 1.1 * right[name] for name in ("vertices", "joints")},
                        {"joints2d", "joints", "vertices", "articulation"})}
    for name, (change, expected) in wrong.items():
        losses = losses_of(hand, arrays, [right | change], target)
        assert {loss for loss, value in losses.items() if value > 1e-3} == expected, name
        half = losses_of(hand, arrays, [right | change, right], target)  # the mean over the estimates
        assert {loss: float(value) for loss, value in half.items()} == pytest.approx(
            {loss: float(value) / 2 for loss, value in losses.items()}, abs=1e-3)


def test_joints_learn_under_a_fixed_camera():
    """The 2-D loss of the joints moves the hand, not the camera; unless the true joints are unknown."""
    hand, arrays, labels, theta = posed_hands()
    target = finetune_mesh.make_target(labels, theta, hand.hands_mean)
    target["has_joints"][0] = 0
    right = perfect_estimate(hand, target)
    camera = (1.1 * right["camera"]).requires_grad_()
    losses = losses_of(hand, arrays, [right | {"camera": camera}], target)
    gradient, = torch.autograd.grad(losses["joints2d"], camera, retain_graph=True)
    assert gradient[0].any() and not gradient[1:].any()
    gradient, = torch.autograd.grad(losses["camera"], camera)
    assert not gradient[0].any() and gradient[1:].any(1).all()


def test_scale_and_shift_of_the_camera_learn_apart():
    """A scale that is too large is told to shrink as much, wherever the hand is thought to be."""
    hand, arrays, labels, theta = posed_hands()
    target = finetune_mesh.make_target(labels, theta, hand.hands_mean)
    right = perfect_estimate(hand, target)
    gradients = []
    for shift in (0, 0.03, -0.05):
        camera = (torch.tensor([1.1, 1, 1]) * right["camera"] + torch.tensor([0, shift, 0])).requires_grad_()
        loss = losses_of(hand, arrays, [right | {"camera": camera}], target)["camera"]
        gradients.append(torch.autograd.grad(loss, camera)[0])
    for gradient in gradients:
        assert_near(gradient[:, 0], gradients[0][:, 0])
        assert (gradient[:, 0] > 0).all()
    assert (gradients[1][:, 1] > 0).all() and (gradients[2][:, 1] < 0).all()
    target["joints2d"][:, 3:9] = 7  # unknown or hidden: they count neither for the middle nor by themselves
    target["known_joints2d"][:, 3:6] = 0
    target["visible"][:, 6:9] = 0
    points = target["joints2d"].clone().requires_grad_()
    loss = losses_of(hand, arrays, [right], target | {"joints2d": points})["camera"]
    gradient, = torch.autograd.grad(loss, points)
    assert loss < 1e-5 and not gradient[:, 3:9].any()


def test_views_and_colours_are_drawn_as_the_flags_say():
    g = torch.Generator().manual_seed(0)
    theta = finetune_mesh.draw_theta(4000, g, 1.3, 30, (0.8, 1.25), 0.1)
    scale = theta[:, :, 0].norm(dim=1)  # of the canvas, whose side is twice the box
    angle = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    shift_x, shift_y = theta[:, :, 2].T
    for drawn, low, high in ((scale, 0.65 * 0.8, 0.65 * 1.25), (angle, -30, 30), (shift_x, -0.065, 0.065),
                             (shift_y, -0.065, 0.065)):
        margin = 0.01 * (high - low)
        assert low - 1e-6 <= drawn.min() < low + margin and high - margin < drawn.max() <= high + 1e-6
    once, twice, never = (finetune_mesh.draw_color(4000, g.manual_seed(0), w) for w in (1, 2, 0))
    assert_near((once - 1).abs().amax(0), torch.tensor([0.4, 0.4, 0.4, 0.2, 0.3, 0.3]), 0.01)
    torch.testing.assert_close(twice - 1, 2 * (once - 1))
    assert (never == 1).all()


# ------------------------------------------------------------------------------ what is known before training
def test_validation_sees_the_usual_window_upright():
    """Its views are --box-scale x the box, where the canvas is 2 x the box: the middle 65 % of it for 1.3."""
    canvas = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    found = finetune_mesh.upright_views(canvas, 1.3 / 2, 52)  # one canvas pixel a pixel
    assert_near(found, normalise(canvas[:, :, 14:66, 14:66] / 255), 1e-3)


def test_every_process_has_a_dropout_of_its_own(hands, tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(finetune_mesh, "generator", lambda *key: keys.append(key) or torch.Generator())
    second = Runtime(torch.device("cpu"), torch.float32, 1, 1, 0, 0)
    monkeypatch.setattr(finetune_mesh, "setup", lambda args: second)
    fill_in = finetune_mesh.fill_in  # process 0 would have read the flags
    monkeypatch.setattr(finetune_mesh, "fill_in", lambda args, runtime: fill_in(args, Runtime(
        torch.device("cpu"), torch.float32, 0, 1, 0, 0)))
    monkeypatch.setattr(finetune_mesh, "make_sampler", lambda *_: EpochSampler(24, 8, 0, 0, 2))
    monkeypatch.setattr(Runtime, "local_rows", lambda self, rows, dim=0: rows)
    monkeypatch.setattr(Runtime, "draw", lambda self, draw, batch, *key, dim=0: draw(8, torch.Generator()))
    with contextlib.suppress(FileNotFoundError):  # it is not the process that makes RUN
        train(hands, tmp_path / "run", "--steps", 2)
    assert set(keys) == {(0, 0, 2, 1), (0, 1, 2, 1)}


def table(folder, count, **columns):
    """An index without images: the columns alone."""
    columns = {"image": np.full(count, b"none.jpg"), "box": np.tile(np.float32([10, 20, 50, 40]), (count, 1)),
               **columns}
    write_index(folder, columns, {"name": "table"})
    return HandIndex(folder)


def test_a_share_of_the_labels_is_whole_poses_seeded_and_nested(tmp_path):
    """FreiHAND's four pictures of a pose come together or not at all."""
    label = np.tile(np.arange(30), 4)
    four = table(tmp_path / "four", 120, label=label, joints=np.zeros((30, 21, 3)))
    one = table(tmp_path / "one", 10, joints=np.zeros((10, 21, 3)))
    pose = np.r_[label, 30 + np.arange(10)]  # 40 poses
    before = set()
    for fraction, poses in ((0.025, 1), (0.1, 4), (0.5, 20), (1.0, 40)):
        rows = finetune_mesh.label_rows([four, one], fraction, seed=3)
        chosen = set(pose[rows].tolist())
        assert len(chosen) == poses and before <= chosen
        np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(pose, list(chosen))))
        before = chosen
    half = [finetune_mesh.label_rows([four, one], 0.5, seed).tolist() for seed in (3, 3, 4)]
    assert half[0] == half[1] != half[2]
    for fraction in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="--label-fraction"):
            finetune_mesh.label_rows([one], fraction, 0)


def test_the_head_starts_from_the_mean_of_right_and_mirrored_left_hands(tmp_path):
    """Left hands that mirror the right ones have the right ones' mean; the scale is the one that projects."""
    rng = np.random.default_rng(0)
    pose = np.zeros((6, 48), np.float32)
    pose[:, :3] = [2.0, 0.5, -0.7] + rng.normal(scale=0.1, size=(6, 3))
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    orientations = rotmat_from_axis_angle(torch.tensor(pose[:, :3]))
    mirrored = pose.copy()
    mirrored[:, :3] = axis_angle_from_rotmat(mirror @ orientations @ mirror)
    joints = rng.normal(scale=0.05, size=(6, 21, 3))
    joints2d = 7.5 * (1.3 * 40 / 2) * joints[..., :2] + 30  # 7.5 half sides of the view a metre; box 40 wide
    means = []
    for side, poses in enumerate((pose, mirrored)):
        index = table(tmp_path / str(side), 6, pose=poses, side=np.full(6, side), joints=joints,
                      joints2d=joints2d)
        dataset = HandDataset([index], 64)
        rotmats, scale = finetune_mesh.training_mean(dataset, torch.zeros(15, 3), 1.3)
        assert scale == pytest.approx(7.5, rel=1e-4)
        means.append(rotmats)
    torch.testing.assert_close(means[0], means[1])
    u, _, v = np.linalg.svd(orientations.double().mean(0).numpy())
    np.testing.assert_allclose(means[0][0], u @ v, atol=1e-5)
    torch.testing.assert_close(means[0][1:], torch.eye(3).expand(15, 3, 3))


def test_rates_fall_from_the_head_to_the_first_layer():
    vit = build_encoder("vit_micro", 32)  # four blocks
    layers = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.norm1.bias",
              "blocks.2.mlp.fc1.weight", "blocks.3.mlp.fc2.bias", "norm.weight")
    rates = [finetune_mesh.lr_scale(f"encoder.{name}", vit, 0.5) for name in layers]
    assert rates == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    assert finetune_mesh.lr_scale("encoder.cls_token", vit, 0.5) == 1 / 32
    assert finetune_mesh.lr_scale("head.regress.0.fc1.weight", vit, 0.5) == 1
    assert finetune_mesh.lr_scale("encoder.cls_token", vit, 1) == 1
    resnet = build_encoder("resnet50", 32)
    assert finetune_mesh.lr_scale("encoder.conv1.weight", resnet, 0.75) == 0.1
    assert finetune_mesh.lr_scale("encoder.conv1.weight", resnet, 1) == 1


# --------------------------------------------------------------------------------------------------- the loop
def test_an_accumulated_batch_is_one_batch(hands, tmp_path, monkeypatch):
    """In one, two or four parts: the same losses, the same gradient, clipped once.

    The gradients are exchanged in the last part. The average takes the weights as they are after the step."""
    exchanged = []

    def sync_gradients(self, model, now):
        exchanged.append(now)
        return contextlib.nullcontext()

    monkeypatch.setattr(Runtime, "sync_gradients", sync_gradients)
    for parts in (1, 2, 4):
        train(hands, tmp_path / str(parts), *STEADY, "--steps", 1, "--ema", 0, "--accumulate", parts)
    assert exchanged == [True] + [False, True] + [False, False, False, True]
    runs = [tmp_path / str(parts) for parts in (1, 2, 4)]
    whole = log(runs[0])[0]
    moments = first_moments(runs[0])
    norm = float(sum(moment.double().square().sum() for moment in moments.values()).sqrt())
    assert whole["gradient_norm"] > 1.5 and norm == pytest.approx(0.1 * finetune_mesh.CLIP, rel=1e-4)
    for run in runs[1:]:
        row = log(run)[0]
        for name in (*finetune_mesh.WEIGHTS, "loss", "gradient_norm"):
            assert row[name] == pytest.approx(whole[name], rel=1e-4), name
        for number, moment in first_moments(run).items():
            torch.testing.assert_close(moment, moments[number], atol=2e-6, rtol=0)
    for run in runs:
        state = load(run)
        assert_same_bits(state["ema"], state["model"])


def test_processes_exchange_gradients_in_every_part_but_the_earlier_ones():
    class Model:
        def no_sync(self):
            return "kept back"

    several = Runtime(torch.device("cpu"), torch.float32, 0, 2, 0, 0)
    assert several.sync_gradients(Model(), now=False) == "kept back"
    assert several.sync_gradients(Model(), now=True) != "kept back"
    one = Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, 0)
    assert one.sync_gradients(Model(), now=False) != "kept back"


def test_two_processes_and_two_parts_compute_what_one_does(hands, tmp_path):
    flags = ["--steps", 3, "--lr", 0.01, *STEADY]
    train(hands, tmp_path / "one", *flags)
    train(hands, tmp_path / "two", *flags, "--accumulate", 2, processes=2)
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    for row, other in zip(one[:3], two[:3], strict=True):
        for name in ("loss", "gradient_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)
    assert two[-1]["val_pa_mpvpe_mm"] == pytest.approx(one[-1]["val_pa_mpvpe_mm"], rel=1e-4)


def test_depth_and_dropout_are_random_in_training_alone(hands, mesh, tmp_path):
    """At rate 0 nothing is learned: what differs is what was dropped, and that not in validation."""
    rows = {}
    for name, flags in (("none", STEADY), ("depth", ["--drop-path", 0.9, "--dropout", 0]),
                        ("dropout", ["--drop-path", 0, "--dropout", 0.9])):
        train(hands, tmp_path / name, "--init", mesh / "encoder.pt", "--lr", 0, "--steps", 1, *flags)
        rows[name] = log(tmp_path / name)
        assert rows[name][1] == rows["none"][1]
    losses = {round(row[0]["loss"], 6) for row in rows.values()}
    assert len(losses) == 3
    blocks = build_encoder("vit_micro", 32, drop_path=0.9).blocks
    assert [block.drop_path for block in blocks] == pytest.approx([0, 0.3, 0.6, 0.9])


# ------------------------------------------------------------------------------------------------------ chain
def test_training_leaves_what_the_next_command_needs(hands, mesh):
    state = load(mesh)
    assert state["step"] == 16 and not [name for name in state["model"] if "hand" in name]
    encoder = load_encoder(mesh / "encoder.pt")
    assert encoder.arch == "vit_micro"
    for name, tensor in encoder.state_dict().items():  # of the average
        assert torch.equal(tensor, state["ema"][f"encoder.{name}"])
    assert not torch.equal(state["ema"]["encoder.norm.weight"], state["model"]["encoder.norm.weight"])
    config = json.loads((mesh / "config.json").read_text())
    assert config["steps"] == 16 and config["world_size"] == 1 and config["torch"] == torch.__version__
    rows = [row for row in log(mesh) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {*finetune_mesh.WEIGHTS, "lr", "gradient_norm", "images_per_second"} <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx(sum(finetune_mesh.WEIGHTS[name] * rows[0][name]
                                                for name in finetune_mesh.WEIGHTS))
    assert {"val_pa_mpvpe_mm", "val_pa_mpjpe_mm"} < set(log(mesh)[-1])
    pictures = {path.name for path in (mesh / "samples").iterdir()}
    assert pictures == {"views.png", "step_0000016.png", "loss.png", "val_pa_mpvpe_mm.png"}


def test_encoder_of_one_run_starts_another(hands, mesh, tmp_path):
    """Its weights are found, its layers have lower rates than the head, and 1-D tensors no weight decay."""
    flags = ["--init", mesh / "encoder.pt", "--steps", 1, "--label-fraction", 0.5]
    done = train(hands, tmp_path / "run", *flags)
    assert "12 hands, 1 steps of 8" in done.stdout
    state = load(tmp_path / "run")
    for name, tensor in load_encoder(mesh / "encoder.pt").state_dict().items():
        torch.testing.assert_close(state["model"][f"encoder.{name}"], tensor, atol=1e-4, rtol=0)
    optimizer = state["optimizer"]
    rates = {}
    for group in optimizer["param_groups"]:
        rates.setdefault(group["lr_scale"], []).extend(group["params"])
        dimensions = {optimizer["state"][number]["exp_avg"].ndim > 1 for number in group["params"]}
        assert dimensions == {group["weight_decay"] > 0}
        assert group["lr"] == pytest.approx(5e-4 * 8 / 256 * group["lr_scale"])
    assert sorted(rates) == pytest.approx([0.75 ** k for k in (5, 4, 3, 2, 1, 0)])
    shapes = {rate: {tuple(optimizer["state"][number]["exp_avg"].shape) for number in numbers}
              for rate, numbers in rates.items()}
    assert (192, 3, 16, 16) in shapes[0.75 ** 5]  # the first convolution
    assert all(((1024, 1024) in found) == (rate == 1) for rate, found in shapes.items())  # the head


def test_resnet_trains_too_and_its_statistics_are_copied_to_the_average(hands, tmp_path):
    train(hands, tmp_path / "run", "--steps", 1, "--arch", "resnet50")
    state = load(tmp_path / "run")
    for name in ("bn1.running_mean", "bn1.num_batches_tracked", "layer4.2.bn3.running_var"):
        assert torch.equal(state["ema"][f"encoder.{name}"], state["model"][f"encoder.{name}"])
    assert state["ema"]["encoder.bn1.running_mean"].any()
    assert state["ema"]["encoder.bn1.num_batches_tracked"] == 1


def test_evaluation_scores_and_its_prediction_file_scores_the_same(hands, mesh, tmp_path):
    command = ["evaluate.py", "--data", hands / "val", "--out"]
    call(*command, tmp_path / "a", "--checkpoint", mesh / "last.pt")
    scores = json.loads((tmp_path / "a/metrics.json").read_text())
    assert {"pa_mpjpe_mm", "pa_mpvpe_mm", "mpjpe_mm", "f_5", "f_15", "auc_joints", "auc_vertices", "count",
            "mean_hand_pa_mpvpe_mm"} <= set(scores)
    assert scores["pa_mpvpe_mm"] == pytest.approx(log(mesh)[-1]["val_pa_mpvpe_mm"], rel=1e-5)
    joints, vertices = json.loads((tmp_path / "a/pred.json").read_text())
    assert np.shape(joints) == (8, 21, 3) and np.shape(vertices) == (8, 778, 3) and scores["count"] == 8
    page = (tmp_path / "a/report.html").read_text().replace("http://www.w3.org", "")
    assert not re.search("https?:", page)  # its pictures are letters, which may spell http
    call(*command, tmp_path / "b", "--predictions", tmp_path / "a/pred.json")
    again = json.loads((tmp_path / "b/metrics.json").read_text())
    expected = {key: value for key, value in scores.items() if not key.startswith(("wrist", "image_"))}
    assert again == pytest.approx(expected)
    call("evaluate.py", "--compare", f"scratch={tmp_path / 'a/metrics.json'}", "--out", tmp_path / "c")
    row = json.loads((tmp_path / "c/table.json").read_text())["scratch"]
    assert row["pa_mpvpe_mm"] == pytest.approx(scores["pa_mpvpe_mm"])


# ----------------------------------------------------------------------------------------- exact continuation
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_to_the_same_bits(hands, mesh, tmp_path, number, status):
    """Killed at any moment; or asked to stop, after which it saves: nothing is computed twice."""
    moment = int(np.random.default_rng(SEED).integers(1, 16))  # logged steps after which it is killed
    out = tmp_path / "killed"
    data = ["--data", hands / "train", "--val", hands / "val"]
    command = ["finetune_mesh.py", *data, "--out", out, *TINY, *LONG]
    run = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], env=ENV,
                           stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while run.poll() is None and not ((out / "log.jsonl").exists() and len(log(out)) >= moment):
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait() == status
    if number == signal.SIGTERM:
        assert load(out)["step"] == log(out)[-1]["step"]
    refused = call(*command, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = call(*command, "--resume", "--ema", "0.5", check=False)
    assert changed.returncode == 2 and "--ema is 0.5" in changed.stderr
    call(*command, "--resume", "auto")
    for name in ("last.pt", "encoder.pt"):
        assert_same_bits(load(mesh, name), load(out, name))
    whole, resumed = ([{name: value for name, value in row.items() if name != "images_per_second"}
                       for row in log(each)] for each in (mesh, out))
    assert whole == resumed
    done = call(*command, "--resume")
    assert "is finished: step 16 of 16" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not tell who sends a signal")
def test_a_signal_to_all_processes_of_a_run_is_answered_by_its_main_one(hands, tmp_path):
    """As timeout, torchrun and clusters send it: the processes that decode images let it save."""
    out = tmp_path / "run"
    command = ["finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", out, *TINY,
               "--workers", 2, "--steps", 10_000]
    run = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], env=ENV,
                           stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                           start_new_session=True)
    while run.poll() is None and not ((out / "log.jsonl").exists() and log(out)):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 143 and "stopped by a signal after a save" in said and "Traceback" not in said
    assert load(out)["step"] == log(out)[-1]["step"]


def test_an_error_in_a_process_that_decodes_ends_the_run(hands, tmp_path):
    shutil.copytree(hands / "train", tmp_path / "moved")
    header = json.loads((tmp_path / "moved/index.json").read_text())
    (tmp_path / "moved/index.json").write_text(json.dumps(header | {"root": str(tmp_path / "elsewhere")}))
    done = call("finetune_mesh.py", "--data", tmp_path / "moved", "--val", hands / "val", "--out",
                tmp_path / "run", *TINY, "--workers", 2, "--steps", 2, check=False, timeout=120)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_joints_that_nobody_has_defined_are_refused_before_the_run(hands, tmp_path):
    shutil.copytree(hands / "val", tmp_path / "val")
    header = json.loads((tmp_path / "val/index.json").read_text())
    for definition in ("openpose", "regressed 1 2 3 4 9999", ["freihand"]):
        (tmp_path / "val/index.json").write_text(json.dumps(header | {"joints": definition}))
        done = call("finetune_mesh.py", "--data", hands / "train", "--val", tmp_path / "val", "--out",
                    tmp_path / "run", *TINY, check=False)
        assert done.returncode == 2 and f"val/index.json: joints {definition!r}" in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_continued_run_may_have_another_rate_and_length_and_data_elsewhere(hands, tmp_path):
    """The log says so. Other hands under the same name are refused."""
    shutil.copytree(hands / "train", tmp_path / "a")
    flags = ["--val", hands / "val", "--out", tmp_path / "run", *TINY]
    call("finetune_mesh.py", "--data", tmp_path / "a", *flags, "--steps", 2)
    (tmp_path / "a").rename(tmp_path / "b")
    call("finetune_mesh.py", "--data", tmp_path / "b/", *flags, "--steps", 4, "--lr", 1e-5, "--resume")
    rows = log(tmp_path / "run")
    assert {"step": 2, "changed": {"lr": [5e-4, 1e-5], "steps": [2, 4]}} in rows
    assert rows[-1]["step"] == 4 and rows[-2]["lr"] < 1e-6
    done = call("finetune_mesh.py", "--data", hands / "val", *flags, "--steps", 4, "--resume", check=False)
    assert done.returncode == 2 and "--data holds something else" in done.stderr


def test_a_run_continues_without_the_file_it_started_from(hands, mesh, tmp_path):
    shutil.copy(mesh / "encoder.pt", tmp_path / "start.pt")
    flags = ["--init", tmp_path / "start.pt", "--steps", 2]
    train(hands, tmp_path / "run", *flags)
    (tmp_path / "start.pt").unlink()
    before = load(tmp_path / "run")
    train(hands, tmp_path / "run", *flags, "--resume")
    assert_same_bits(before, load(tmp_path / "run"))


@pytest.mark.commands
def test_one_hand_is_learned_by_heart(tmp_path):
    call("make_synthetic.py", "--out", tmp_path / "one", "--hands", 1, "--size", 96)
    one_view = ["--rotation", 0, "--zoom", 1, 1, "--shift", 0, "--color", 0]
    call("finetune_mesh.py", "--data", tmp_path / "one", "--val", tmp_path / "one", "--out", tmp_path / "run",
         *TINY, *STEADY, *one_view, "--steps", 150, "--lr", 0.03, "--ema", 0, "--batch-size", 4)
    rows = log(tmp_path / "run")
    assert rows[-1]["val_pa_mpvpe_mm"] < 2
    assert rows[-2]["loss"] < 0.05 * rows[0]["loss"]


# ------------------------------------------------------------------------------------ files of older versions
def without_format(path):
    """A file of this version as it was written before formats had numbers."""
    state = torch.load(path, weights_only=True)
    del state["format"]
    torch.save(state, path)


def refused(*command, words):
    done = call(*command, check=False)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_checkpoints_and_encoders_without_a_number_are_read(hands, mesh, tmp_path):
    """What has not changed since: a mesh network predicts the same, an encoder starts a run."""
    photo = HandIndex(hands / "val").image_path(0)
    old = tmp_path / "old"
    old.mkdir()
    for name in ("last.pt", "encoder.pt"):
        shutil.copy(mesh / name, old)
        without_format(old / name)
    for run in (mesh, old):
        call("predict.py", photo, "--checkpoint", run / "last.pt", "--out", tmp_path / f"by_{run.name}")
    new, again = (np.load(tmp_path / f"by_{run.name}/{photo.stem}.npz") for run in (mesh, old))
    assert all(np.array_equal(new[name], again[name]) for name in new.files)
    encoders = [load_encoder(run / "encoder.pt").state_dict() for run in (mesh, old)]
    assert_same_bits(*encoders)
    train(hands, tmp_path / "run", "--init", old / "encoder.pt", "--steps", 1)


@pytest.mark.parametrize("script, kind, more", [
    ("pretrain_mim.py", "mim", ()),
    ("pretrain_contrastive.py", "contrastive", ("--method", "simclr", "--labelled")),
    ("finetune_mesh.py", "mesh", ("--head-width", 32)),
])
def test_a_run_of_an_older_version_is_not_continued(hands, tmp_path, script, kind, more):
    """Its config.json has no number: flags had other meanings. Where that is new, its last.pt has none."""
    out = tmp_path / "run"
    val = ("--val", hands / "val") if kind == "mesh" else ()
    tiny = ["--arch", "vit_micro", "--image-size", 32, "--batch-size", 4, "--workers", 0]
    command = [script, "--data", hands / "train", *val, *tiny, *more, "--steps", 2, "--out"]
    out.mkdir()
    old = {"data": [str(hands / "train")], "out": str(out), "arch": "vit_micro", "image_size": 32, "steps": 2,
           "batch_size": 4, "zoom": 0.25, "color": 0.4, "world_size": 1, "revision": "1234567"}
    (out / "config.json").write_text(json.dumps(old))
    torch.save({"kind": kind, "step": 1, "student": {}, "model": {}}, out / "last.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(*command, out, "--resume", words=["config.json", "another version", "--out"])
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    if kind != "mesh":
        other = tmp_path / "other"
        call(*command, other)
        without_format(other / "last.pt")
        refused(*command, other, "--resume", words=["last.pt", "format 1", f"reads {FORMATS[kind]}"])


def test_a_run_of_another_stage_is_not_continued_or_used(hands, tmp_path):
    """A whole pre-training is no encoder to start from, and the network of one stage none of another."""
    torch.save({"kind": "mim", "step": 1, "student": {}}, tmp_path / "last.pt")
    out = ["--out", tmp_path / "out"]
    photo = HandIndex(hands / "val").image_path(0)
    refused("predict.py", photo, *out, "--checkpoint", tmp_path / "last.pt", words=["last.pt", "'mim'"])
    refused("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", *out, *TINY, "--steps", 1,
            "--init", tmp_path / "last.pt", words=["whole run", "encoder.pt"])


def test_pairs_without_a_number_are_read_and_of_other_hands_refused(hands, tmp_path):
    index = HandIndex(hands / "train")
    count = len(index)
    idx = np.stack([np.roll(np.arange(count), 1), np.roll(np.arange(count), 2)], 1).astype(np.int32)
    fingerprint = index_fingerprint([index.columns], "joints2d")
    old = {"idx": idx, "dist": np.zeros((count, 2), np.float32), "fingerprint": np.array(fingerprint)}
    np.savez(tmp_path / "old.npz", **old)
    np.testing.assert_array_equal(read_pairs(tmp_path / "old.npz", [index], "joints2d"), idx)
    np.savez(tmp_path / "new.npz", **old, format=np.array(99))
    np.savez(tmp_path / "other.npz", **old | {"fingerprint": np.array("0123456789abcdef")})
    learn = ["pretrain_contrastive.py", "--data", hands / "train", "--labelled", "--out", tmp_path / "out",
             "--arch", "vit_micro", "--image-size", 32, "--batch-size", 4, "--steps", 1, "--workers", 0]
    refused(*learn, "--pairs", tmp_path / "new.npz", words=["new.npz", "format 99", "mine again"])
    refused(*learn, "--pairs", tmp_path / "other.npz", words=["other.npz", "mined from other"])
    assert not (tmp_path / "out").exists()


def test_an_index_of_an_older_version_is_read_and_an_unknown_one_refused(hands, tmp_path):
    """The index's number has not changed since it has one."""
    shutil.copytree(hands / "val", tmp_path / "val")
    header = json.loads((tmp_path / "val/index.json").read_text())
    assert header["format"] == "hand-index-1"
    data = ["--data", tmp_path / "val", "--val", hands / "val", "--out", tmp_path / "out"]
    unnumbered = {name: value for name, value in header.items() if name != "format"}
    for changed in (header | {"format": "hand-index-0"}, unnumbered):
        (tmp_path / "val/index.json").write_text(json.dumps(changed))
        refused("finetune_mesh.py", *data, *TINY, "--steps", 1, words=["index.json", "format", "again"])
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- FreiHAND
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_freihands_own_files_are_read_back(freihand, tmp_path, split):
    """Joints reproject within 0.01 px; vertices rebuilt from the 61 numbers within 1e-6 m."""
    root = freihand / "FreiHAND"
    arrays = synthetic_mano()
    hand = Mano(arrays).double()
    call("prepare_data.py", "freihand", root, "--split", split, "--out", tmp_path / split)
    index = HandIndex(tmp_path / split)
    raw = {name: np.array(json.loads((root / f"{split}_{name}.json").read_text()))
           for name in ("K", "xyz", "verts", "mano", "scale")}
    count = len(raw["K"])
    rows = range(len(index))
    assert index.meta["labels"] == count and len(index) == count * (4 if split == "training" else 1)
    assert [index.label(row) for row in rows] == [row % count for row in rows]
    assert [index.image_path(row).name for row in rows] == [f"{row:08d}.jpg" for row in rows]
    assert all(index.image_path(row).exists() for row in rows)
    if split == "training":  # four images to a mask, which holds the joints
        assert [index.mask_path(row).name for row in rows] == [f"{row % count:08d}.jpg" for row in rows]
        item = HandDataset([index], 64, labels=("joints2d", "mask"))[len(index) - 1]
        x, y = ((item["joints2d"][1:] + 1) * 32).astype(int).clip(0, 63).T
        is_hand = item["mask"] > 0
        assert item["has_mask"] and is_hand[0, y, x].float().mean() > 0.8 and is_hand.float().mean() < 0.4
    numbers = ("K", "joints", "joints2d", "vertices", "pose", "betas")
    columns = {name: np.array(index.columns[name], np.float64) for name in numbers}
    K = columns["K"]
    projected = columns["joints"] @ K.transpose(0, 2, 1)
    assert np.abs(projected[..., :2] / projected[..., 2:] - columns["joints2d"]).max() < 0.01
    np.testing.assert_allclose(columns["joints"], raw["xyz"], atol=1e-7)
    np.testing.assert_allclose(columns["vertices"], raw["verts"], atol=1e-7)
    bone = columns["joints"][:, 9] - columns["joints"][:, 10]
    np.testing.assert_allclose(np.linalg.norm(bone, axis=1), raw["scale"], atol=1e-6)

    pose = torch.tensor(columns["pose"]).view(-1, 16, 3)
    pose[:, 1:] += hand.hands_mean
    vertices, _ = hand(rotmat_from_axis_angle(pose), torch.tensor(columns["betas"]))
    u, v, s = raw["mano"].reshape(count, 61)[:, 58:].T
    focal = K[:, [0, 1], [0, 1]].mean(1)
    root9 = np.stack([(u - K[:, 0, 2]) / s, (v - K[:, 1, 2]) / s, focal / s], 1)
    rebuilt = vertices - joints_from_vertices(vertices, arrays)[:, 9:10] + torch.tensor(root9)[:, None]
    assert np.abs(rebuilt.numpy() - columns["vertices"]).max() < 1e-6


# --------------------------------------------------------------------------------------------------- mistakes
class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def broken_inputs(folder, hands, mesh, freihand):
    """name -> (command, words of its one line)."""
    image = HandIndex(hands / "val").image_path(0)
    files = {"truncated.jpg": image.read_bytes()[:400], "empty.jpg": b"", "text.jpg": b"this is a text",
             "notes.json": b"[1, 2", "hostile.pkl": pickle.dumps(Hostile()),
             "hostile.pt": pickle.dumps(Hostile())}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.new("1", (40000, 40000)).save(folder / "huge.png")
    for name in ("nan", "length", "nojson", "range", "lost"):
        shutil.copytree(freihand / "FreiHAND", folder / name)
    K = json.loads((folder / "nan/training_K.json").read_text())
    (folder / "range/training_K.json").write_text(json.dumps([[[1e9, 0, 1], [0, 1, 1], [0, 0, 1]], *K[1:]]))
    K[2][0][0] = float("nan")
    (folder / "nan/training_K.json").write_text(json.dumps(K))
    joints = folder / "length/training_xyz.json"
    joints.write_text(json.dumps(json.loads(joints.read_text())[:-1]))
    (folder / "nojson/training_verts.json").unlink()
    (folder / "lost/training/rgb/00000003.jpg").unlink()
    (folder / "full").mkdir()
    (folder / "full/something").write_text("mine")
    out = ["--out", folder / "out"]
    train = ["finetune_mesh.py", "--val", hands / "val", "--steps", 1, *TINY]
    learn = [*train, "--data", hands / "train", *out]
    predict = ["predict.py", image, *out, "--checkpoint"]
    look = ["predict.py", "--checkpoint", mesh / "last.pt", *out]
    prepare = ["prepare_data.py", "freihand", *out]
    score = ["evaluate.py", "--data", hands / "val", *out]
    return {
        "truncated photograph": ([*look, folder / "truncated.jpg"], "truncated.jpg"),
        "empty photograph": ([*look, folder / "empty.jpg"], "empty.jpg"),
        "text as photograph": ([*look, folder / "text.jpg"], "text.jpg"),
        "huge photograph": ([*look, folder / "huge.png"], "huge.png"),
        "missing photograph": ([*look, folder / "none.jpg"], "none.jpg"),
        "hostile MANO": ([*look, image, "--mano", folder / "hostile.pkl"], "system"),
        "missing MANO": ([*look, image, "--mano", folder / "MANO_RIGHT.pkl"], "mano.is.tue.mpg.de"),
        "hostile checkpoint": ([*predict, folder / "hostile.pt"], "hostile.pt"),
        "wrong kind of checkpoint": ([*predict, mesh / "encoder.pt"], "'mesh'"),
        "missing boxes": ([*look, image, "--boxes", folder / "none.csv"], "none.csv"),
        "unwritable out": ([*predict, mesh / "last.pt", "--out", folder / "empty.jpg" / "out"], "empty.jpg"),
        "NaN in a label": ([*prepare, folder / "nan"], "training_K.json: entry 2"),
        "camera out of range": ([*prepare, folder / "range"], "training_K.json: entry 0"),
        "label files of two lengths": ([*prepare, folder / "length"], "training_xyz.json: 8 entries"),
        "missing label file": ([*prepare, folder / "nojson"], "training_verts.json"),
        "missing image": ([*prepare, folder / "lost"], "00000003.jpg"),
        "too few poses for a part": ([*prepare, freihand / "FreiHAND", "--split", "val"], "val: no hands"),
        "folder without images": (["prepare_data.py", "folder", folder / "full", *out], "no readable image"),
        "full RUN": ([*train, "--data", hands / "train", "--out", folder / "full"], "--resume"),
        "no index": ([*train, "--data", folder / "full", *out], "index.json"),
        "odd image size": ([*learn, "--image-size", 33], "--image-size"),
        "zoom from far to near": ([*learn, "--zoom", 1.2, 0.8], "--zoom: the lower number comes first"),
        "colours out of range": ([*learn, "--color", 3], "--color 3.0: must lie in 0 .. 2"),
        "weights that are none": ([*learn, "--init", folder / "text.jpg"], "text.jpg"),
        "no such machine": ([*learn, "--device", "mps"], "--device"),
        "prediction that is no JSON": ([*score, "--predictions", folder / "notes.json"], "notes.json"),
        "synthetic of nothing": (["make_synthetic.py", *out, "--hands", 0], "--hands"),
    }


def test_every_mistake_gets_one_line_and_leaves_nothing(hands, mesh, freihand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures = []
    for name, (command, words) in broken_inputs(tmp_path, hands, mesh, freihand).items():
        if name == "no such machine" and torch.backends.mps.is_available():
            continue
        done = call(*command, check=False)
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines()
                 if line.strip() and "it/s" not in line and "|" not in line]
        left = (tmp_path / "out").exists() or (tmp_path / "hacked").exists()
        if done.returncode != 2 or len(lines) != 1 or words not in lines[0] or left:
            failures.append((name, done.returncode, lines[-3:], left))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not failures, "\n".join(map(str, failures))


def test_training_survives_files_that_break(hands, tmp_path):
    shutil.copytree(hands / "train", tmp_path / "train")
    lost = [HandIndex(tmp_path / "train").image_path(row) for row in (3, 7)]
    for path in lost:
        path.write_bytes(b"gone")
    data = ["--data", tmp_path / "train", "--val", hands / "val", "--out", tmp_path / "run"]
    done = call("finetune_mesh.py", *data, "--steps", 3, *TINY)
    assert "2 images could not be read" in done.stdout and all(path.name in done.stdout for path in lost)
