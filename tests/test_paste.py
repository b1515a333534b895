"""paste_hands.py: what it cuts out is the hand, also where its mesh is a little off; labels stay with it."""

import numpy as np
import torch
from fixtures import call
from PIL import Image

from data import HandDataset, HandIndex, write_index
from draw import rasterise
from mano import Mano, rotmat_from_axis_angle
from paste_hands import cut_out, mesh_in_canvas
from synthetic_hand import synthetic_mano

ARRAYS = synthetic_mano()
SIZE = 160


def a_hand(rng):
    """A hand held up: its mesh (778,3) in pixels of a picture and depth, its joints (21,2)."""
    pose = torch.tensor(rng.normal(0, 0.15, (1, 16, 3)), dtype=torch.float32)
    pose[:, 1:] += torch.tensor(ARRAYS["hands_mean"], dtype=torch.float32).reshape(1, 15, 3)
    vertices, joints = (points[0].numpy() for points in Mano(ARRAYS)(rotmat_from_axis_angle(pose),
                                                                    torch.zeros(1, 10)))
    middle = (joints.max(0) + joints.min(0))[:2] / 2
    places, joints = ((points[:, :2] - middle) * 650 + SIZE / 2 for points in (vertices, joints))
    return np.c_[places, vertices[:, 2]], joints


def test_cuts_follow_the_colours():
    """The mesh lies 3 of 80 pixels beside the hand, as a fit may: the cut is nearer than the mesh."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        mesh, joints = a_hand(rng)
        true = rasterise(mesh, ARRAYS["f"], (SIZE, SIZE), weights=False)[0] >= 0
        colors = np.where(true[..., None], rng.uniform(120, 220, 3), rng.uniform(20, 110, 3))
        canvas = (colors + rng.normal(0, 8, colors.shape)).clip(0, 255).astype(np.uint8)
        moved = [2.5, -2.0]
        beside = rasterise(mesh + [*moved, 0], ARRAYS["f"], (SIZE, SIZE), weights=False)[0] >= 0
        cut = cut_out(canvas, mesh + [*moved, 0], joints + moved, ARRAYS["f"])
        assert cut.shape == (SIZE, SIZE) and cut.min() == 0 and cut.max() == 1
        of_cut, of_mesh = ((mask & true).sum() / (mask | true).sum() for mask in (cut > 0.5, beside))
        assert of_cut > 0.9 and 1 - of_cut < 0.5 * (1 - of_mesh)


def test_labels_and_hands_stay_together(hands, tmp_path):
    """A canvas of the new index shows the hand where that of the old one does; backgrounds differ."""
    index = HandIndex(hands / "train")
    rows = np.arange(6)
    columns = {name: np.array(value)[rows] for name, value in index.columns.items() if name != "mask"}
    columns["vertices"][5] = np.nan  # a hand without a mesh is left out
    meta = {name: value for name, value in index.meta.items() if name in ("name", "joints", "pose_mean")}
    write_index(tmp_path / "old", columns, meta | {"partial": True}, index.root.resolve())
    for out in ("a", "b"):
        call("paste_hands.py", "--data", tmp_path / "old", "--out", tmp_path / out, "--times", 2)
    old, new = HandIndex(tmp_path / "old"), HandIndex(tmp_path / "a")
    assert len(new) == 10 and (tmp_path / "a/samples.png").exists()
    needs = ("pose", "betas", "joints", "vertices", "joints2d")
    before, after = (HandDataset([one], 128, 2.0, needs) for one in (old, new))
    for row in range(10):
        was, now = before[row // 2], after[row]
        for name in needs:
            np.testing.assert_allclose(now[name], was[name], atol=2e-3)
        if now["mirrored"] == 0:
            mesh, _ = mesh_in_canvas(new, row, 128)
            mask = rasterise(mesh, ARRAYS["f"], (128, 128), weights=False)[0] >= 0
            assert mask.sum() > 200
    pictures = [np.asarray(Image.open(new.image_path(row)), float) for row in range(4)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 10
    again = HandIndex(tmp_path / "b")
    for row in range(10):
        assert new.image_path(row).read_bytes() == again.image_path(row).read_bytes()


def test_a_hand_without_its_image_is_left_out(hands, tmp_path):
    index = HandIndex(hands / "train")
    columns = {name: np.array(value)[:4] for name, value in index.columns.items() if name != "mask"}
    columns["box"][1] += 10_000
    meta = {name: value for name, value in index.meta.items() if name in ("name", "joints", "pose_mean")}
    write_index(tmp_path / "old", columns, meta, index.root.resolve())
    done = call("paste_hands.py", "--data", tmp_path / "old", "--out", tmp_path / "new", "--times", 1)
    assert "left out, whose image cannot be cut: 1" in done.stdout
    assert str(index.image_path(1).name) in done.stdout and "3 pictures of 3 of 4 hands" in done.stdout
    new = HandIndex(tmp_path / "new")
    np.testing.assert_array_equal(new.columns["pose"], columns["pose"][[0, 2, 3]])


def test_refusals(hands, tmp_path):
    index = HandIndex(hands / "train")
    columns = {name: np.asarray(value) for name, value in index.columns.items() if name != "vertices"}
    meta = {name: value for name, value in index.meta.items() if name in ("name", "joints", "pose_mean")}
    write_index(tmp_path / "old", columns, meta, index.root.resolve())
    for flags, message in (
        (["--data", tmp_path / "old"], "no vertices in this index; fit_hands.py makes them"),
        (["--data", hands / "train", "--backgrounds", tmp_path / "old"], "no images there"),
        (["--data", hands / "train", "--times", 0], "--times 0"),
    ):
        done = call("paste_hands.py", *flags, "--out", tmp_path / "new", check=False)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "new").exists()
    done = call("paste_hands.py", "--data", hands / "train", "--out", tmp_path / "old", check=False)
    assert done.returncode == 2 and "files already" in done.stderr
