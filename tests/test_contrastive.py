"""Mining and contrastive pre-training: brute force, double loops in float64, gradcheck, ideal latents, one process against two."""
import colorsys
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call, log
from scipy.spatial.distance import cdist

import mine_pairs
import pretrain_contrastive as pc
from data import EpochSampler, HandIndex, PairSampler, write_index
from mine_pairs import mine, normalise_pose
from runtime import generator
from views import (
    apply_color,
    apply_hsv,
    apply_light,
    apply_theta,
    blur,
    invert_theta,
    normalise,
    random_hsv,
    warp,
)


# -------------------------------------------------------------------------------------------------------------- mining
def poses(count, seed=0, latent=6):
    """Keypoints (count,21,2) of a smooth map of a few numbers, with noise, of any place and size."""
    rng = np.random.default_rng(seed)
    points = np.tanh(rng.normal(size=(count, latent)) @ rng.normal(size=(latent, 42)) / 2).reshape(count, 21, 2)
    return 30 * rng.uniform(0.5, 2, (count, 1, 1)) * (points + 0.02 * rng.normal(size=points.shape)) + 100 * rng.random((count, 1, 2))


def uneven_videos(count, videos, seed=0):
    """(count,) ids: the first video holds 40 % of the hands, the others what is left in uneven shares."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(videos - 1, 0.5)) * 0.6
    return rng.choice(videos, count, p=np.r_[0.4, share])


@pytest.mark.parametrize("count, videos, neighbours", [(20000, 300, 10), (700, 3, 4), (40, 8, 45)])
def test_neighbours_are_those_of_brute_force(count, videos, neighbours):
    keypoints, video = poses(count), uneven_videos(count, videos)
    found = mine(keypoints, video, neighbours)
    x = (normalise_pose(keypoints) - found["mean"]) @ found["components"].T
    assert found["idx"].dtype == np.int32 and found["dist"].dtype == np.float32
    for rows in np.arange(count).reshape(-1, 20).T:
        apart, idx, dist = cdist(x[rows], x), found["idx"][rows], found["dist"][rows]
        apart[video[rows, None] == video] = np.inf
        wanted = np.sort(np.partition(apart, min(neighbours, count - 1), axis=1)[:, :neighbours], axis=1)
        wanted = np.pad(wanted, ((0, 0), (0, neighbours - wanted.shape[1])), constant_values=np.inf)
        there = np.isfinite(wanted)
        assert np.array_equal(there, idx >= 0) and np.array_equal(there, np.isfinite(dist))
        assert np.abs(wanted[there] - dist[there]).max() < 1e-6
        which = np.nonzero(there)[0]
        assert (video[idx[there]] != video[rows][which]).all()
        assert np.abs(apart[which, idx[there]] - wanted[there]).max() < 1e-9


def test_mining_knows_place_and_size_not_rotation():
    keypoints = poses(5)
    moved = 3 * keypoints + [100, -7]
    turned = keypoints @ [[0, 1], [-1, 0]]
    assert np.allclose(normalise_pose(keypoints), normalise_pose(moved))
    assert np.abs(normalise_pose(keypoints) - normalise_pose(turned)).max() > 0.1
    assert np.allclose((normalise_pose(keypoints).reshape(5, 21, 2)[:, 1:] ** 2).sum(2).mean(1), 1)


def test_unusable_hands_are_none_and_equal_ones_come_by_number():
    keypoints, video = poses(60), np.arange(60) % 6
    keypoints[7, 3] = np.nan
    keypoints[8] = 5.0                                                     # all on one spot
    keypoints[30], keypoints[45] = keypoints[1], keypoints[1]              # videos 0, 3 and 1
    found = mine(keypoints, video, 3)
    assert (found["idx"][[7, 8]] == -1).all() and np.isinf(found["dist"][[7, 8]]).all() and not np.isin(found["idx"], [7, 8]).any()
    assert found["idx"][1, :2].tolist() == [30, 45] and (found["dist"][1, :2] == 0).all()
    parts = [mine(keypoints, video, 3, share=(i, 2)) for i in (0, 1)]
    assert np.array_equal(np.maximum(parts[0]["idx"], parts[1]["idx"]), found["idx"])


def test_components_are_those_of_the_svd():
    x = normalise_pose(poses(400))
    mean, axes, explained = mine_pairs.principal(poses(400), 14)
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert np.allclose(np.abs((axes * rows[:14]).sum(1)), 1, atol=1e-6) and np.allclose(axes @ axes.T, np.eye(14), atol=1e-9)
    assert np.allclose(explained, values[:14] ** 2 / (values ** 2).sum())


# ---------------------------------------------------------------------------------------------------------------- loss
def slow_nt_xent(a, b, temperature, positive, negative):
    h, N = np.concatenate([a, b]), len(a)
    total = 0.0
    for i in range(2 * N):
        other = (i + N) % (2 * N)
        below = sum(math.exp(negative[i, j] * float(h[i] @ h[j]) / temperature) for j in range(2 * N) if j != i)
        total -= math.log(math.exp(positive[i % N] * float(h[i] @ h[other]) / temperature) / below)
    return total / (2 * N)


@pytest.mark.parametrize("N", [1, 2, 7, 20])
def test_nt_xent_is_the_double_loop(N, monkeypatch):
    g = generator(N)
    a, b = (torch.nn.functional.normalize(torch.randn(N, 6, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    joints = torch.randn(2, N, 21, 2, generator=g, dtype=torch.float64)
    positive, negative = pc.pair_weights(*joints)
    one, ones = torch.ones(N, dtype=torch.float64), torch.ones(2 * N, 2 * N, dtype=torch.float64)
    for chunk in (1024, 3):
        monkeypatch.setattr(pc, "CHUNK", chunk)
        for plus, minus in ((None, None), (positive, None), (None, negative), (positive, negative)):
            found = pc.nt_xent(a, b, 0.5, plus, minus)
            plus, minus = (one if plus is None else plus).numpy(), (ones if minus is None else minus).numpy()
            wanted = slow_nt_xent(a.numpy(), b.numpy(), 0.5, plus, minus)
            assert float(found) == pytest.approx(wanted, abs=1e-9)
        _, rows = pc.weights(*joints)
        assert float(pc.nt_xent(a, b, 0.5, positive, rows)) == pytest.approx(float(pc.nt_xent(a, b, 0.5, positive, negative)), abs=1e-12)


def test_nt_xent_has_the_right_gradient(monkeypatch):
    g = generator(3)
    a, b = (torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positive, negative = pc.pair_weights(*torch.randn(2, 4, 21, 2, generator=g, dtype=torch.float64))
    for chunk in (1024, 3):
        monkeypatch.setattr(pc, "CHUNK", chunk)
        assert torch.autograd.gradcheck(lambda a, b: pc.nt_xent(a, b, 0.5, positive, negative), (a, b))


def test_weights_are_one_for_the_closest_and_all_one_where_all_are_equal():
    joints = torch.randn(2, 9, 21, 2, generator=generator(4))
    positive, negative = pc.pair_weights(*joints)
    both = joints.flatten(0, 1)
    apart = torch.tensor([[sum(float((both[i, k] - both[j, k]).norm()) for k in range(21)) / 21 for j in range(18)] for i in range(18)])
    assert torch.allclose(negative, 1 - apart / apart.max(), atol=1e-5)
    pairs = apart[torch.arange(9), torch.arange(9) + 9]
    assert torch.allclose(positive, (pairs.max() - pairs) / (pairs.max() - pairs.min()), atol=1e-5)
    assert positive.min() == 0 and positive.max() == 1 and negative.min() == 0 and (negative.diagonal() == 1).all()
    alike = joints[:1, :1].expand(2, 9, 21, 2)
    positive, negative = pc.pair_weights(*alike)
    assert (positive == 1).all() and (negative == 1).all()


# --------------------------------------------------------------------------------------------------------------- views
def drawn(method, undo="exact", pairs=512, color=0):
    """theta (2B,2,3), middle, and joints (2B,21,2) on the canvas: both views of each hand."""
    args = pc.flags().parse_args(["--data", "x", "--out", "y", "--method", method, "--undo", undo, "--batch-size", str(pairs),
                                  "--color", str(color), "--image-size", "32"])

    class One:
        def share(self, x):
            return x
    joints = (torch.randn(pairs, 21, 2, generator=generator(5)) * 0.15 + 0.05).repeat(2, 1, 1)
    theta, args.drawn, middle = pc.draw_views(args, One(), 0, joints, torch.ones(2 * pairs, dtype=torch.bool))
    return args, theta, middle, joints


def test_strong_color_changes_looks_and_not_geometry():
    plain, strong = drawn("peclr", pairs=4), drawn("peclr", pairs=4, color=1)
    assert torch.equal(plain[1], strong[1])
    canvas = (255 * torch.rand(8, 3, 64, 64, generator=generator(3))).byte()
    views, other = (pc.make_views(canvas, theta, args.drawn, args) for args, theta, *_ in (plain, strong))
    a, b = (x.flatten(1) for x in (views, other))
    assert views.shape == other.shape == (8, 3, 32, 32) and ((a - b).abs().mean(1) > 0.2).all()
    light, factors, sigma = strong[0].drawn
    assert light.shape == (8, 3, 4, 4) and factors.shape == (8, 6) and sigma.shape == (8,) and (light - 1).abs().max() <= 0.4
    expected = blur(apply_color(apply_light(warp(canvas, strong[1], 32), light), factors), sigma, 3 * 32 / 224)
    torch.testing.assert_close(other, normalise(expected))


def test_an_ideal_latent_agrees_once_undone():
    """64 points fixed to the canvas, as seen in each view: exact undoing brings both views to the same vector, the public
    arithmetic nearly, nothing at all does not (method: .807, .998 and 1 for padded windows)."""
    args, theta, middle, joints = drawn("peclr")
    points = joints.repeat(1, 4, 1)[:, :64]
    latent = apply_theta(invert_theta(theta), points).flatten(1)
    cosine = {}
    for undo in ("exact", "official", "none"):
        args.undo = undo
        a, b = pc.embed(latent, theta, middle, args).chunk(2)
        cosine[undo] = float((a * b).sum(1).mean())
    assert cosine["exact"] > 0.9999 > cosine["official"] > 0.98 > 0.95 > cosine["none"]


@pytest.mark.parametrize("undo", ["exact", "official"])
def test_where_a_hand_lies_in_its_box_does_not_tell_it(undo):
    """Whatever the network puts out: a hand moved within its canvas, window and all, embeds alike."""
    args, theta, middle, _ = drawn("peclr", undo)
    latent, away = torch.randn(len(theta), 128, generator=generator(8)), torch.rand(len(theta), 2, generator=generator(9)) - 0.5
    moved = torch.cat([theta[:, :, :2], theta[:, :, 2:] + away[:, :, None]], 2)
    torch.testing.assert_close(pc.embed(latent, moved, middle + away, args), pc.embed(latent, theta, middle, args), atol=1e-5, rtol=0)


def test_simclr_views_do_not_turn_and_hold_the_hand():
    _, theta, middle, joints = drawn("simclr")
    assert (theta[:, 0, 1] == 0).all() and torch.allclose(theta[:, 0, 0], 1.25 * (joints - middle[:, None]).norm(dim=2).amax(1))
    reach = (joints - middle[:, None]).norm(dim=2).amax(1).min()       # the shift counts most for the smallest hand
    assert apply_theta(invert_theta(theta), joints).abs().max() < (1 + 15 / 112 * 1.3 / 2 / reach) / 1.25
    _, theta, *_ = drawn("peclr")
    angle = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    assert 40 < angle.max() <= 45 and -45 <= angle.min() < -40


def test_hue_is_that_of_colorsys():
    images, factors = torch.rand(4, 3, 3, 3, generator=generator(6)), random_hsv(4, generator(7))
    images[0, :, 0, 0] = 0.3                                               # grey has no hue
    made = apply_hsv(images, factors)
    for b in range(4):
        for y in range(3):
            for x in range(3):
                h, s, v = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
                h, s, v = h * float(factors[b, 0]), s * float(factors[b, 1]), v * float(factors[b, 2]) + float(factors[b, 3])
                assert np.allclose(np.clip(colorsys.hsv_to_rgb(h, s, v), 0, 1), made[b, :, y, x], atol=1e-5)


def test_pairs_come_with_their_neighbours():
    idx = np.array([[3, 4], [0, -1], [-1, -1], [0, 1], [1, 0]])
    anchors = np.array([0, 1, 3, 4])

    def rows(neighbour):
        return np.array(list(PairSampler(EpochSampler(4, 8, 0, 0, 5), anchors, idx, neighbour))).reshape(-1, 2, 8)
    nearest, second, any_ = rows(1), rows(2), rows(0)
    assert (nearest[:, 1] == idx[nearest[:, 0], 0]).all() and set(nearest[:, 0].flat) == {0, 1, 3, 4}
    assert (second[:, 1] == np.where(second[:, 0] == 1, 0, idx[second[:, 0], 1])).all()
    assert (any_[:, :, None] == any_[:, :, None]).all() and all(b in idx[a] for a, b in zip(any_[:, 0].flat, any_[:, 1].flat, strict=True))
    assert len({tuple(pair) for pair in zip(any_[:, 0].flat, any_[:, 1].flat, strict=True)}) == 7
    halves = [list(PairSampler(EpochSampler(4, 8, 0, 0, 5, rank, 2), anchors, idx, 0)) for rank in (0, 1)]
    assert [a[:4] + b[:4] + a[4:] + b[4:] for a, b in zip(*halves, strict=True)] == any_.reshape(-1, 16).tolist()


# ------------------------------------------------------------------------------------------------------------ commands
TINY = ("--arch", "vit_micro", "--image-size", "32", "--batch-size", "8", "--log-every", "1", "--workers", "0", "--precision", "fp32")


@pytest.fixture(scope="module")
def pairs(hands, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs.npz"
    done = call("mine_pairs.py", "--data", hands / "train", "--out", out, "--neighbours", 3, "--labelled")
    assert "hands paired" in done.stdout
    return out


def test_mining_as_a_command_in_one_process_and_in_two(hands, pairs, tmp_path):
    with np.load(pairs) as file:
        found = {name: file[name] for name in file}
    assert {"idx", "dist", "mean", "components", "explained", "fingerprint"} == set(found) and found["components"].shape == (14, 42)
    index = HandIndex(hands / "train")
    video = np.asarray(index.columns["video"])
    assert (video[found["idx"]] != video[:, None]).all() and pairs.with_name("pairs.png").is_file()
    done = call("mine_pairs.py", "--data", hands / "train", "--out", tmp_path / "two.npz", "--neighbours", 3, "--labelled", processes=2)
    near, _, random = map(float, re.search(r"PA-MPJPE in mm: (\S+) of .*, (\S+) of .*, (\S+) of", done.stdout).groups())
    assert near < random
    with np.load(tmp_path / "two.npz") as file:
        assert all(np.array_equal(file[name], found[name]) for name in found)
    for flags, message in ((("--out", pairs), "exists"), (("--out", tmp_path / "x.txt"), "npz"), (("--components", 43), "--components")):
        done = call("mine_pairs.py", "--data", hands / "train", "--out", tmp_path / "new.npz", *flags, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("method", ["simclr", "peclr", "simhand"])
def test_training_resumes_as_if_it_had_not_stopped(method, hands, pairs, tmp_path):
    with np.load(pairs) as file:                                   # of ten hands alone
        few = {name: file[name] for name in file}
    few["idx"][10:] = -1
    np.savez(tmp_path / "few.npz", **few)
    own = {"simclr": ("--accumulate", 2), "peclr": ("--pairs", tmp_path / "few.npz", "--color", 1), "simhand": ("--pairs", pairs)}
    flags = ("--data", hands / "train", "--method", method, "--labelled", *TINY, "--steps", 4, *own[method])
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = call("pretrain_contrastive.py", *flags, "--out", whole, "--save-every", 2)
    assert ("10 of" in done.stdout) == (method == "peclr")
    rows = log(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and {"loss", "alignment", "uniformity", "lr"} <= set(rows[0])
    pictures = {"step_0000001.png", "step_0000002.png", "step_0000004.png", "loss.png", "agreement.png", "similarity.png"}
    assert {path.name for path in (whole / "samples").iterdir()} == pictures
    dies = ("import pretrain_contrastive as p, os\nreal = p.save_checkpoint\n"
            "def save(path, **state):\n    real(path, **state)\n    path.name == 'last.pt' and os._exit(9)\n"
            "p.save_checkpoint = save\np.main()")
    command = [sys.executable, "-c", dies, *map(str, flags), "--out", part, "--save-every", "2"]
    assert subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True).returncode == 9
    assert torch.load(part / "last.pt", weights_only=True)["step"] == 2
    call("pretrain_contrastive.py", *flags, "--out", part, "--save-every", 2, "--resume")
    one, two = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (whole, part))
    assert all(torch.equal(two[name], value) for name, value in one.items())


def test_gathered_processes_are_one(hands, pairs, tmp_path):
    flags = ("--data", hands / "train", "--method", "simhand", "--pairs", pairs, "--labelled", *TINY, "--steps", 5, "--gather",
             "--optimizer", "adamw", "--color", 1)
    call("pretrain_contrastive.py", *flags, "--out", tmp_path / "one")
    call("pretrain_contrastive.py", *flags, "--out", tmp_path / "two", processes=2)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_refusals_say_what_to_do(hands, pairs, tmp_path):
    index = HandIndex(hands / "train")
    lone = {name: np.asarray(index.columns[name]) for name in index.columns} | {"video": np.zeros(len(index))}
    write_index(tmp_path / "lone", lone, {"name": "lone"}, root=hands / "train")
    other = {name: value[::-1] for name, value in lone.items() if name != "video"} | {"video": np.arange(len(index))}
    write_index(tmp_path / "other", other, {"name": "other"}, root=hands / "train")
    bare = {name: value for name, value in lone.items() if name in ("image", "box")}
    write_index(tmp_path / "bare", bare, {"name": "bare"}, root=hands / "train")
    (tmp_path / "broken.npz").write_bytes(pairs.read_bytes()[:500])
    train, mining = "pretrain_contrastive.py", "mine_pairs.py"
    for command, flags, message in (
            (train, ("--data", hands / "train", "--method", "simhand"), "needs --pairs"),
            (train, ("--data", hands / "train", "--method", "peclr", "--rotation", 0), "--rotation 0"),
            (train, ("--data", tmp_path / "other", "--method", "simhand", "--pairs", pairs), "other indices"),
            (train, ("--data", hands / "train", "--method", "simhand", "--pairs", tmp_path / "broken.npz"), "no pairs of mine_pairs.py"),
            (train, ("--data", hands / "train", "--method", "simhand", "--pairs", tmp_path / "none.npz"), "no such file"),
            (train, ("--data", tmp_path / "bare", "--method", "peclr", "--weights", "both"), "--weights none"),
            (train, ("--data", hands / "train", "--method", "peclr", "--batch-size", 8, "--accumulate", 8), "--accumulate"),
            (mining, ("--data", tmp_path / "lone", "--labelled"), "one video"),
            (mining, ("--data", tmp_path / "bare"), "no column keypoints")):
        out = tmp_path / "out.npz" if command == mining else tmp_path / "out"
        done = call(command, *flags, "--out", out, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists()
