"""Drawn data: the same bytes for any number of workers, labels that agree with each other and with the pictures, and
FreiHAND's files as its authors ship them."""

import filecmp
import json

import numpy as np
import pytest
import torch
from PIL import Image

import draw
import make_synthetic
from data import HandIndex
from mano import Mano, joints_from_vertices, mirror_arrays, rotmat_from_axis_angle
from synthetic_hand import synthetic_mano


@pytest.fixture(scope="module")
def arrays():
    return synthetic_mano()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "index"
    make_synthetic.main(["--out", str(out), "--hands", "14", "--videos", "7", "--seed", "1", "--size", "64", "--workers", "1"])
    return HandIndex(out)


@pytest.fixture(scope="module")
def freihand(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "freihand"
    flags = ["--layout", "freihand", "--hands", "5", "--videos", "3", "--size", "96", "--workers", "1"]
    make_synthetic.main(["--out", str(out), *flags])
    return out


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_same_bytes_for_two_workers(index, tmp_path):
    make_synthetic.main(["--out", str(tmp_path / "again"), "--hands", "14", "--videos", "7", "--seed", "1", "--size", "64",
                         "--workers", "2"])
    names = all_files(index.path)
    assert names == all_files(tmp_path / "again") and len(names) > 14
    assert filecmp.cmpfiles(index.path, tmp_path / "again", names, shallow=False)[0] == names


def test_another_seed_draws_others(index, tmp_path):
    make_synthetic.main(["--out", str(tmp_path / "b"), "--hands", "2", "--size", "64", "--seed", "1", "--workers", "1"])
    assert not filecmp.cmp(tmp_path / "b" / "betas.npy", index.path / "betas.npy", shallow=False)


def test_labels_agree(index, arrays):
    columns = {name: np.array(value) for name, value in index.columns.items() if name != "image"}
    assert all(value.dtype == np.float32 for name, value in columns.items() if value.ndim > 1 and name != "size")
    pixels = columns["joints"].astype(float) @ columns["K"].astype(float).transpose(0, 2, 1)
    assert np.abs(pixels[..., :2] / pixels[..., 2:] - columns["joints2d"]).max() < 0.01
    regressed = joints_from_vertices(torch.from_numpy(columns["vertices"]), arrays).numpy()
    np.testing.assert_allclose(regressed, columns["joints"], atol=1e-6)
    bone = np.linalg.norm(columns["joints"][:, 9] - columns["joints"][:, 10], axis=1)
    np.testing.assert_allclose(columns["scale"], bone, atol=1e-6)
    np.testing.assert_allclose(columns["box"][:, :2], columns["joints2d"].min(1) + 0.5, atol=1e-4)
    np.testing.assert_allclose(columns["box"][:, 2:], columns["joints2d"].max(1) + 0.5, atol=1e-4)
    assert set(np.unique(columns["side"])) == {0, 1} and set(np.unique(columns["visible"])) <= {0, 1}
    assert index.meta["joints"] == "freihand" and index.meta["pose_mean"] is True


def test_pose_rebuilds_the_mesh_of_both_sides(index, arrays):
    columns = {name: np.asarray(index.columns[name]) for name in ("pose", "betas", "vertices", "side")}
    for side, number in (("right", 0), ("left", 1)):
        rows = columns["side"] == number
        hand = Mano(arrays, side=side).double()
        pose = torch.from_numpy(columns["pose"][rows].astype(float)).reshape(-1, 16, 3)
        pose = torch.cat([pose[:, :1], pose[:, 1:] + hand.hands_mean], 1)
        vertices = hand(rotmat_from_axis_angle(pose), torch.from_numpy(columns["betas"][rows].astype(float)))[0].numpy()
        stored = columns["vertices"][rows]
        error = (vertices - vertices.mean(1, keepdims=True)) - (stored - stored.mean(1, keepdims=True))
        assert np.abs(error).max() < 2e-6


def test_left_hands_are_mirrored(tmp_path, arrays):
    flags = ["--hands", "40", "--videos", "40", "--size", "32", "--workers", "1"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    index = HandIndex(tmp_path / "a")
    joints = np.asarray(index.columns["joints"]).astype(float)
    across = np.cross(joints[:, 5] - joints[:, 0], joints[:, 17] - joints[:, 0])
    flexed = joints[:, [8, 12, 16, 20]].mean(1) - joints[:, [5, 9, 13, 17]].mean(1)
    right_handed = (across * flexed).sum(1) > 0
    side = np.asarray(index.columns["side"])
    assert 0.1 < side.mean() < 0.5
    assert (right_handed == (side == 0)).mean() > 0.85  # a stretched hand may give either sign


def test_videos_share_identity_and_move_smoothly(tmp_path):
    flags = ["--hands", "40", "--videos", "2", "--size", "32", "--workers", "1"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    columns = HandIndex(tmp_path / "a").columns
    video, betas, joints = (np.asarray(columns[name]) for name in ("video", "betas", "joints"))
    assert (video == np.repeat([0, 1], 20)).all()
    assert (betas[:20] == betas[0]).all() and (betas[20:] == betas[20]).all() and (betas[0] != betas[20]).any()
    move = np.linalg.norm(np.diff(joints, axis=0), axis=2).mean(1)
    assert np.median(move) < 0.03 and move[:19].max() < 0.12
    assert np.ptp(joints[:20] - joints[:20, :1], axis=0).max() > 0.02  # and they do move


def test_keypoints_look_detected(tmp_path):
    rng = np.random.default_rng(0)
    joints2d, hidden = rng.uniform(20, 100, (21, 2)), np.arange(21) % 3 == 0
    drawn = [make_synthetic.detect(np.random.default_rng(k), joints2d, hidden, 128) for k in range(300)]
    keypoints, score = (np.array(part) for part in zip(*drawn, strict=True))
    seen = score > 0
    assert 0.9 < seen.mean() < 1 and (~seen).all(1).any() and score.max() <= 1
    error = np.linalg.norm(keypoints - joints2d, axis=2)
    visible, covered = error[:, ~hidden][seen[:, ~hidden]], error[:, hidden][seen[:, hidden]]
    assert 0.5 < np.median(visible) < np.median(covered) < 12
    assert np.percentile(error[seen], 99) > 20  # exchanged joints


def test_freihand_layout(freihand, arrays):
    names = set(all_files(freihand))
    expected = {f"training/rgb/{k:08d}.jpg" for k in range(16)} | {f"training/mask/{k:08d}.jpg" for k in range(4)}
    expected |= {"evaluation/rgb/00000000.jpg", "samples.png"}
    expected |= {f"{part}_{name}.json" for part in ("training", "evaluation")
                 for name in ("K", "mano", "scale", "verts", "xyz")}
    assert names == expected
    hand, regressor = Mano(arrays).double(), arrays
    for part, count in (("training", 4), ("evaluation", 1)):
        K, mano, scale, verts, xyz = (np.array(json.loads((freihand / f"{part}_{name}.json").read_text()))
                                      for name in ("K", "mano", "scale", "verts", "xyz"))
        assert (K.shape, mano.shape, scale.shape) == ((count, 3, 3), (count, 1, 61), (count,))
        assert (verts.shape, xyz.shape) == ((count, 778, 3), (count, 21, 3))
        pose, betas, uv, s = np.split(mano[:, 0], [48, 58, 60], 1)
        angles = torch.from_numpy(pose + np.r_[np.zeros(3), arrays["hands_mean"]]).reshape(-1, 16, 3)
        rebuilt = hand(rotmat_from_axis_angle(angles), torch.from_numpy(betas))[0]
        joints = joints_from_vertices(rebuilt, regressor).numpy()
        focal = (K[:, 0, 0] + K[:, 1, 1]) / 2
        root = np.concatenate([(uv - K[:, :2, 2]) / s, focal[:, None] / s], 1)
        np.testing.assert_allclose(rebuilt.numpy() + (root - joints[:, 9])[:, None], verts, atol=1e-6)
        np.testing.assert_allclose(joints_from_vertices(torch.from_numpy(verts), regressor).numpy(), xyz, atol=1e-9)
        np.testing.assert_allclose(scale, np.linalg.norm(xyz[:, 9] - xyz[:, 10], axis=1), atol=1e-9)


def test_pictures_show_the_labelled_hand(freihand, arrays):
    K, verts = (np.array(json.loads((freihand / f"training_{name}.json").read_text())) for name in ("K", "verts"))
    for k in range(4):
        mask = np.asarray(Image.open(freihand / f"training/mask/{k:08d}.jpg")) > 127
        pixels = verts[k] @ K[k].T
        points = np.concatenate([pixels[:, :2] / pixels[:, 2:] + 0.5, pixels[:, 2:]], 1)
        outline = draw.rasterise(points, arrays["f"], mask.shape)[0] >= 0
        assert (mask & ~outline).sum() < 0.06 * mask.sum() and mask.sum() > 0.4 * outline.sum()
        green = np.asarray(Image.open(freihand / f"training/rgb/{k:08d}.jpg").convert("RGB")).astype(int)
        assert np.ptp(green[mask].mean(0)[[0, 1]]) < 100 and not np.array_equal(
            green, np.asarray(Image.open(freihand / f"training/rgb/{k + 4:08d}.jpg")))
        screen = green[..., 1] - green[..., 0] > 40
        assert (screen & mask).sum() < 0.05 * mask.sum() and screen.mean() > 0.15


@pytest.mark.parametrize("flags, message", [
    (["--hands", "0"], "--hands 0"), (["--hands", "1", "--layout", "freihand"], "from 2"),
    (["--size", "8"], "--size 8"), (["--hands", "3", "--videos", "4"], "--videos 4"), (["--seed", "-1"], "--seed -1"),
    (["--workers", "0"], "--workers 0"), (["--mano", "nowhere.pkl"], "nowhere.pkl")])
def test_mistakes_cost_one_line(tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        make_synthetic.main(["--out", str(tmp_path / "a"), *flags])
    assert not (tmp_path / "a").exists()


def test_draws_another_hand_but_no_left_file(tmp_path, arrays):
    other = synthetic_mano(seed=3)
    np.savez(tmp_path / "right.npz", **other)
    np.savez(tmp_path / "left.npz", **mirror_arrays(other))
    flags = ["--hands", "2", "--size", "32", "--workers", "1", "--mano"]
    make_synthetic.main(["--out", str(tmp_path / "a"), *flags, str(tmp_path / "right.npz")])
    index = HandIndex(tmp_path / "a")
    regressed = joints_from_vertices(torch.from_numpy(np.array(index.columns["vertices"])), other).numpy()
    np.testing.assert_allclose(regressed, index.columns["joints"], atol=1e-6)
    with pytest.raises(ValueError, match="MANO_RIGHT"):
        make_synthetic.main(["--out", str(tmp_path / "b"), *flags, str(tmp_path / "left.npz")])


def test_never_writes_into_a_used_folder(index):
    with pytest.raises(ValueError, match="files already"):
        make_synthetic.main(["--out", str(index.path), "--hands", "2"])
