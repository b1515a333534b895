"""fit_hands.py: hands whose parameters are known come back from their points; the index that it writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from fixtures import call, log

from data import HandDataset, HandIndex
from fit_hands import fit, first_guess, spread_rotations
from mano import (
    Mano, joints_from_vertices, nearest_rotation, rotmat_from_axis_angle, weak_perspective,
)
from metrics import procrustes
from synthetic_hand import synthetic_mano

ARRAYS = synthetic_mano()
HAND = Mano(ARRAYS)


def posed(count, seed):
    """Hands of the pose prior in any orientation: rotmats, vertices, joints from the wrist, their points."""
    rng = np.random.default_rng(seed)
    pose = ARRAYS["hands_mean"] + 0.8 * ARRAYS["hands_coeffs"][rng.permutation(1554)[:count]] @ ARRAYS[
        "hands_components"]
    pose = np.concatenate([rng.normal(size=(count, 3)), pose], axis=1).reshape(count, 16, 3)
    rotmats = rotmat_from_axis_angle(torch.tensor(pose, dtype=torch.float32))
    vertices, _ = HAND(rotmats, torch.tensor(rng.normal(size=(count, 10)), dtype=torch.float32))
    joints = joints_from_vertices(vertices, ARRAYS)
    vertices, joints = vertices - joints[:, :1], joints - joints[:, :1]
    camera = torch.tensor([[5.0, 0.01, -0.02]]).repeat(count, 1)
    return rotmats, vertices, joints, weak_perspective(joints, camera)


@pytest.mark.parametrize("in_space, mesh, turn", [(True, 4, 8), (False, 9, 25)])
def test_known_hands_come_back(in_space, mesh, turn):
    rotmats, vertices, joints, points = posed(48, 0)
    space = {"points3d": joints * 1.3 + 0.1, "has_space": torch.ones(48)} if in_space else {}
    found = fit(HAND, ARRAYS, points, torch.ones(48, 21), **space)
    true = vertices.numpy().astype(np.float64)
    errors = np.linalg.norm(procrustes(found["vertices"].numpy().astype(np.float64), true) - true, axis=2)
    assert np.median(1000 * errors.mean(1)) < mesh
    assert found["error"].median() < 0.01
    between = found["rotmats"][:, 0].transpose(1, 2) @ rotmats[:, 0]
    angle = torch.rad2deg(((between.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos())
    assert angle.median() < turn


def test_a_wrong_point_moves_nothing_else():
    """One point of each hand lies half a box away: the others stay where they are without it."""
    _, _, joints, points = posed(16, 1)
    wrong = points.clone()
    wrong[:, 8] += 0.5
    clean, robust = (fit(HAND, ARRAYS, given, torch.ones(16, 21), joints, torch.ones(16))
                     for given in (points, wrong))
    others = [k for k in range(21) if not 5 <= k <= 8]
    side = (points.amax(1) - points.amin(1)).amax(1)
    moved = (clean["points"] - robust["points"])[:, others].norm(dim=2) / side[:, None]
    assert moved.median() < 0.01
    unsure = torch.ones(16, 21)
    unsure[:, 8] = 0  # the detector says so: then it does not count at all
    ignored = fit(HAND, ARRAYS, wrong, unsure, joints, torch.ones(16))
    assert (ignored["points"] - clean["points"]).norm(dim=2).median() < 0.01
    far = points.clone()
    far[:, [8, 12]] = -5  # where a detector's file says nothing, far outside of the crop
    unsure[:, 12] = 0
    ignored = fit(HAND, ARRAYS, far, unsure, joints, torch.ones(16))
    assert (ignored["points"] - points).norm(dim=2)[:, others].median() < 0.01 * side.median()
    assert ignored["error"].median() < 0.01


def test_first_guesses():
    rotations = spread_rotations(48)
    assert torch.allclose(rotations @ rotations.transpose(1, 2), torch.eye(3).expand(48, 3, 3), atol=1e-5)
    assert torch.allclose(torch.det(rotations), torch.ones(48), atol=1e-5)
    assert torch.allclose(nearest_rotation(3 * rotations), rotations, atol=1e-5)
    rotmats, _, joints, points = posed(32, 2)
    orientation, _ = first_guess(HAND, ARRAYS, points, joints, torch.ones(32))
    between = orientation.transpose(1, 2) @ rotmats[:, 0]
    angle = torch.rad2deg(((between.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos())
    assert angle.median() < 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """24 drawn hands of both sides."""
    folder = tmp_path_factory.mktemp("drawn") / "index"
    call("make_synthetic.py", "--out", folder, "--hands", 24, "--videos", 12, "--size", 96)
    return folder


@pytest.fixture(scope="module")
def detected(drawn, tmp_path_factory):
    """The drawn hands with their detector's points alone, and metric points for half of them."""
    folder = tmp_path_factory.mktemp("detected") / "index"
    shutil.copytree(drawn, folder)
    header = json.loads((folder / "index.json").read_text())
    points3d = np.load(folder / "joints.npy")
    points3d[::2] = np.nan
    kept = {"image", "box", "size", "side", "video", "keypoints", "keypoints_score"}
    header["columns"] = sorted(kept | {"keypoints3d"})
    header["partial"] = True
    np.save(folder / "keypoints3d.npy", points3d)
    (folder / "index.json").write_text(json.dumps(header))
    return folder


def test_the_index_has_labels_of_both_sides(drawn, detected, tmp_path):
    done = call("fit_hands.py", "--data", detected, "--out", tmp_path / "fit", "--most-error", 0.5)
    rows = np.flatnonzero(np.load(detected / "keypoints_score.npy").max(1) > 0)  # the others were missed
    assert f"{len(rows)} of 24 hands fitted" in done.stdout and (tmp_path / "fit" / "samples.png").exists()
    fitted, true = HandIndex(tmp_path / "fit"), HandIndex(drawn)
    assert {0, 1} == set(np.asarray(true.columns["side"]).tolist())
    away = np.linalg.norm(fitted.columns["joints2d"] - true.columns["joints2d"][rows], axis=2)
    assert np.median(away) < 0.05 * np.median(true.columns["box"][:, 2] - true.columns["box"][:, 0])
    names = ("joints2d", "joints", "vertices", "pose", "betas")
    hand = HandDataset([fitted], 64, labels=names).batch(list(range(len(rows))))
    pose = hand["pose"].unflatten(1, (16, 3)).clone()
    pose[:, 1:] += HAND.hands_mean
    vertices, _ = HAND(rotmat_from_axis_angle(pose), hand["betas"])
    joints = joints_from_vertices(vertices, ARRAYS)
    assert torch.allclose(vertices - joints[:, :1], hand["vertices"] - hand["joints"][:, :1], atol=1e-4)
    call("finetune_mesh.py", "--data", tmp_path / "fit", "--val", tmp_path / "fit", "--out", tmp_path / "run",
         "--arch", "resnet_micro", "--image-size", 64, "--head-width", 32, "--head-hidden", 32,
         "--batch-size", 8, "--steps", 2, "--spoil", 1, "--workers", 0)
    assert np.isfinite(log(tmp_path / "run")[-1]["val_pa_mpvpe_mm"])


def test_a_packed_index_stays_readable(detected, tmp_path):
    call("prepare_data.py", "pack", detected, "--out", tmp_path / "packed")
    call("fit_hands.py", "--data", tmp_path / "packed", "--out", tmp_path / "fit", "--most-error", 1,
         "--steps", 1)
    hands = HandDataset([HandIndex(tmp_path / "fit")], 64, substitute=False).batch([0, 1])
    assert (hands["failed"] < 0).all() and hands["canvas"].float().std() > 0


def test_fits_need_no_pictures(detected, tmp_path):
    """They are there for the samples alone."""
    shutil.copytree(detected, tmp_path / "moved")
    header = json.loads((tmp_path / "moved/index.json").read_text())
    (tmp_path / "moved/index.json").write_text(json.dumps(header | {"root": str(tmp_path / "elsewhere")}))
    done = call("fit_hands.py", "--data", tmp_path / "moved", "--out", tmp_path / "fit", "--most-error", 1,
                "--steps", 1)
    assert "hands fitted" in done.stdout and (tmp_path / "fit/samples.png").exists()


def test_refusals(drawn, detected, tmp_path):
    done = call("fit_hands.py", "--data", detected, "--out", drawn, check=False)
    assert done.returncode == 2 and "there are files already" in done.stderr
    done = call("fit_hands.py", "--data", detected, "--out", tmp_path / "a", "--most-error", 0, check=False)
    assert done.returncode == 2 and "--most-error" in done.stderr and not (tmp_path / "a").exists()
