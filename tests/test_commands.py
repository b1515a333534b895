"""Every command as a user types it, on tiny data: what it writes, one process against two, killed and resumed against
uninterrupted, FreiHAND's files read back, and one clear line for every mistake."""

import json
import os
import pickle
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

from data import HandDataset, HandIndex, image_size
from mano import Mano, joints_from_vertices, rotmat_from_axis_angle
from model import load_encoder
from synthetic_hand import synthetic_mano

TINY = ["--arch", "vit_tiny", "--image-size", "32", "--head-width", "32", "--batch-size", "8", "--log-every", "1", "--workers", "0"]


@pytest.fixture(scope="session")
def mesh(hands):
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", hands / "mesh", "--steps", 3, *TINY)
    return hands / "mesh"


@pytest.fixture(scope="session")
def freihand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freihand")
    call("make_synthetic.py", "--out", folder / "FreiHAND", "--hands", 10, "--layout", "freihand", "--size", 96)
    return folder


# ---------------------------------------------------------------------------------------------------------------- chain
def test_training_leaves_what_the_next_command_needs(hands, mesh):
    state = torch.load(mesh / "last.pt", weights_only=True)
    assert state["step"] == 3 and not [name for name in state["model"] if "hand" in name]
    assert load_encoder(mesh / "encoder.pt").arch == "vit_tiny"
    config = json.loads((mesh / "config.json").read_text())
    assert config["steps"] == 3 and config["world_size"] == 1 and config["torch"] == torch.__version__
    rows = [row for row in log(mesh) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3] and {"vertices", "lr", "images_per_second"} <= set(rows[0])
    assert "val_pa_mpvpe_mm" in log(mesh)[-1]
    assert {path.name for path in (mesh / "samples").iterdir()} >= {"views.png", "step_0000003.png", "loss.png"}


def test_encoder_of_one_run_starts_another(hands, mesh, tmp_path):
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", tmp_path / "run", "--init", mesh / "encoder.pt",
         "--steps", 1, "--label-fraction", 0.5, "--accumulate", 2, *TINY)


def test_resnet_trains_too(hands, tmp_path):
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", tmp_path / "run",
         "--steps", 1, *TINY, "--arch", "resnet50")


def test_evaluation_scores_and_its_prediction_file_scores_the_same(hands, mesh, tmp_path):
    call("evaluate.py", "--data", hands / "val", "--checkpoint", mesh / "last.pt", "--out", tmp_path / "a")
    table = json.loads((tmp_path / "a/metrics.json").read_text())
    assert {"pa_mpjpe_mm", "pa_mpvpe_mm", "mpjpe_mm", "f_5", "f_15", "auc_joints", "auc_vertices", "count",
            "mean_hand_pa_mpvpe_mm"} <= set(table)
    joints, vertices = json.loads((tmp_path / "a/pred.json").read_text())
    assert np.shape(joints) == (8, 21, 3) and np.shape(vertices) == (8, 778, 3) and table["count"] == 8
    assert "http" not in (tmp_path / "a/report.html").read_text().replace("http://www.w3.org", "")
    call("evaluate.py", "--data", hands / "val", "--predictions", tmp_path / "a/pred.json", "--out", tmp_path / "b")
    again = json.loads((tmp_path / "b/metrics.json").read_text())
    assert again == pytest.approx(table)
    call("evaluate.py", "--compare", f"scratch={tmp_path / 'a/metrics.json'}", "--out", tmp_path / "c")
    assert json.loads((tmp_path / "c/table.json").read_text())["scratch"]["pa_mpvpe_mm"] == pytest.approx(table["pa_mpvpe_mm"])


def test_prediction_of_photographs_with_and_without_boxes_and_of_both_sides(hands, mesh, tmp_path):
    index = HandIndex(hands / "val")
    photo = tmp_path / "photo.jpg"
    with Image.open(index.image_path(0)) as image:
        image.resize((300, 200)).save(photo)
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nphoto.jpg,50,40,150,160,right\nphoto.jpg,80,40,180,160,right\n"
                                        "mirror.png,150,40,250,160,left\n")
    call("predict.py", photo, "--checkpoint", mesh / "last.pt", "--out", tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["photo.npz", "photo.obj", "photo.png"]
    hand = np.load(tmp_path / "whole/photo.npz")
    assert hand["vertices"].shape == (778, 3) and hand["rotmats"].shape == (16, 3, 3) and hand["side"] == "right"
    assert image_size(tmp_path / "whole/photo.png") == (300, 200)
    call("predict.py", photo, tmp_path / "mirror.png", "--checkpoint", mesh / "last.pt", "--out", tmp_path / "boxes",
         "--boxes", tmp_path / "boxes.csv")
    right, left = (np.load(tmp_path / f"boxes/{name}.npz") for name in ("photo", "mirror"))
    assert (tmp_path / "boxes/photo_2.obj").exists() and left["side"] == "left"
    # JPEG decoding mirrors to a few grey levels, hence a tolerance above rounding
    np.testing.assert_allclose(left["vertices"], right["vertices"] * [-1, 1, 1], atol=2e-4)


# ---------------------------------------------------------------------------------------------------- exact continuation
def test_two_processes_compute_what_one_does(hands, tmp_path):
    steady = ["--steps", 4, "--drop-path", 0, "--dropout", 0, *TINY]
    for processes in (1, 2):
        call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", tmp_path / f"p{processes}",
             *steady, processes=processes)
    one, two = ([row["loss"] for row in log(tmp_path / f"p{n}") if "loss" in row] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    scores = [log(tmp_path / f"p{n}")[-1]["val_pa_mpvpe_mm"] for n in (1, 2)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_killed_run_resumes_to_the_same_bits(hands, tmp_path):
    command = ["finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--steps", 16, "--save-every", 5, *TINY, "--out"]
    call(*command, tmp_path / "whole")
    run = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:]), str(tmp_path / "killed")],
                           env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while run.poll() is None and not ((tmp_path / "killed/last.pt").exists() and len(log(tmp_path / "killed")) >= 7):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    refused = call(*command, tmp_path / "killed", check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = call(*command, tmp_path / "killed", "--resume", "--lr", "1", check=False)
    assert changed.returncode == 2 and "--lr is 1.0" in changed.stderr
    call(*command, tmp_path / "killed", "--resume")
    whole, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))

    def flat(value, key=""):
        if isinstance(value, dict):
            return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}/{name}").items()}
        return {key: value}

    for key, value in flat(whole).items():
        assert torch.equal(value, flat(resumed)[key]) if isinstance(value, torch.Tensor) else value == flat(resumed)[key], key
    strip = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in log(tmp_path / name)] for name in ("whole", "killed")]
    assert strip[0] == strip[1]


def test_one_hand_is_learned_by_heart(tmp_path):
    call("make_synthetic.py", "--out", tmp_path / "one", "--hands", 1, "--size", 96)
    call("finetune_mesh.py", "--data", tmp_path / "one", "--val", tmp_path / "one", "--out", tmp_path / "run",
         "--steps", 150, "--rotation", 0,
         "--zoom", 0, "--shift", 0, "--color", 0, "--drop-path", 0, "--dropout", 0, "--lr", 0.03, "--ema", 0, *TINY, "--batch-size", 4)
    first, last = log(tmp_path / "run")[0], log(tmp_path / "run")[-1]
    assert last["val_pa_mpvpe_mm"] < 2 and [row for row in log(tmp_path / "run") if "loss" in row][-1]["loss"] < 0.05 * first["loss"]


# -------------------------------------------------------------------------------------------------------------- FreiHAND
def test_freihands_own_files_are_read_back(freihand, tmp_path):
    """Joints reproject within 0.01 px; vertices rebuilt from the 61 numbers within 1e-6 m (T1, T7, T8)."""
    root = freihand / "FreiHAND"
    arrays = synthetic_mano()
    hand = Mano(arrays).double()
    for split in ("training", "evaluation"):
        call("prepare_data.py", "freihand", root, "--split", split, "--out", tmp_path / split)
        index = HandIndex(tmp_path / split)
        raw = {name: json.loads((root / f"{split}_{name}.json").read_text()) for name in ("K", "xyz", "verts", "mano", "scale")}
        count = len(raw["K"])
        assert index.meta["labels"] == count and len(index) == count * (4 if split == "training" else 1)
        assert [index.label(row) for row in range(len(index))] == [row % count for row in range(len(index))]
        assert all(index.image_path(row).name == f"{row:08d}.jpg" and index.image_path(row).exists() for row in range(len(index)))
        columns = {name: np.array(value, np.float64) for name, value in index.columns.items() if name not in ("image", "mask")}
        if split == "training":                                          # four images to a mask, which holds the joints
            assert [index.mask_path(row).name for row in range(len(index))] == [f"{row % count:08d}.jpg" for row in range(len(index))]
            item = HandDataset([index], 64, 2.0, ("joints2d", "mask"))[len(index) - 1]
            x, y = ((item["joints2d"][1:] + 1) * 32).astype(int).clip(0, 63).T
            assert item["has_mask"] and (item["mask"][0, y, x] > 0).float().mean() > 0.8 and (item["mask"] > 0).float().mean() < 0.4
        pixels = columns["joints"] @ columns["K"].transpose(0, 2, 1)
        assert np.abs(pixels[..., :2] / pixels[..., 2:] - columns["joints2d"]).max() < 0.01
        np.testing.assert_allclose(columns["joints"], raw["xyz"], atol=1e-7)
        np.testing.assert_allclose(columns["vertices"], raw["verts"], atol=1e-7)
        np.testing.assert_allclose(np.linalg.norm(columns["joints"][:, 9] - columns["joints"][:, 10], axis=1), raw["scale"], atol=1e-6)
        pose = torch.tensor(columns["pose"]).view(-1, 16, 3)
        pose[:, 1:] += hand.hands_mean
        vertices, _ = hand(rotmat_from_axis_angle(pose), torch.tensor(columns["betas"]))
        mano = np.array(raw["mano"]).reshape(count, 61)
        u, v, s = mano[:, 58:].T
        focal = columns["K"][:, [0, 1], [0, 1]].mean(1)
        root9 = np.stack([(u - columns["K"][:, 0, 2]) / s, (v - columns["K"][:, 1, 2]) / s, focal / s], 1)
        joints = joints_from_vertices(vertices, arrays)
        rebuilt = vertices - joints[:, 9:10] + torch.tensor(root9)[:, None]
        assert np.abs(rebuilt.numpy() - columns["vertices"]).max() < 1e-6


def test_no_pose_is_in_both_parts_of_the_training_set(freihand, tmp_path):
    for split in ("train", "val"):
        done = call("prepare_data.py", "freihand", freihand / "FreiHAND", "--split", split, "--out", tmp_path / split, check=False)
    # nine poses are fewer than twenty: val is empty and says so
    assert done.returncode == 2 and "--split val: no hands" in done.stderr


# -------------------------------------------------------------------------------------------------------------- mistakes
class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def broken_inputs(folder, hands, mesh, freihand):
    """name -> (command, words its one line must hold)."""
    image = HandIndex(hands / "val").image_path(0)
    files = {"truncated.jpg": image.read_bytes()[:400], "empty.jpg": b"", "text.jpg": b"this is a text", "notes.json": b"[1, 2",
             "hostile.pkl": pickle.dumps(Hostile()), "hostile.pt": pickle.dumps(Hostile())}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.new("1", (40000, 40000)).save(folder / "huge.png")
    for name in ("nan", "length", "nojson", "range", "lost"):
        shutil.copytree(freihand / "FreiHAND", folder / name)
    K = json.loads((folder / "nan/training_K.json").read_text())
    (folder / "range/training_K.json").write_text(json.dumps([[[1e9, 0, 1], [0, 1, 1], [0, 0, 1]], *K[1:]]))
    K[2][0][0] = float("nan")
    (folder / "nan/training_K.json").write_text(json.dumps(K))
    (folder / "length/training_xyz.json").write_text(json.dumps(json.loads((folder / "length/training_xyz.json").read_text())[:-1]))
    (folder / "nojson/training_verts.json").unlink()
    (folder / "lost/training/rgb/00000003.jpg").unlink()
    (folder / "full").mkdir()
    (folder / "full/something").write_text("mine")
    train = ["finetune_mesh.py", "--val", hands / "val", "--steps", 1, *TINY]
    predict = ["predict.py", "--checkpoint", mesh / "last.pt", "--out", folder / "out"]
    prepare = ["prepare_data.py", "freihand", "--out", folder / "out"]
    score = ["evaluate.py", "--data", hands / "val", "--out", folder / "out"]
    return {
        "truncated photograph": ([*predict, folder / "truncated.jpg"], "truncated.jpg"),
        "empty photograph": ([*predict, folder / "empty.jpg"], "empty.jpg"),
        "text as photograph": ([*predict, folder / "text.jpg"], "text.jpg"),
        "huge photograph": ([*predict, folder / "huge.png"], "huge.png"),
        "missing photograph": ([*predict, folder / "none.jpg"], "none.jpg"),
        "hostile MANO": ([*predict, image, "--mano", folder / "hostile.pkl"], "system"),
        "missing MANO": ([*predict, image, "--mano", folder / "MANO_RIGHT.pkl"], "mano.is.tue.mpg.de"),
        "hostile checkpoint": (["predict.py", image, "--checkpoint", folder / "hostile.pt", "--out", folder / "out"], "hostile.pt"),
        "wrong kind of checkpoint": (["predict.py", image, "--checkpoint", mesh / "encoder.pt", "--out", folder / "out"], "'mesh'"),
        "missing boxes": ([*predict, image, "--boxes", folder / "none.csv"], "none.csv"),
        "unwritable out": (["predict.py", image, "--checkpoint", mesh / "last.pt", "--out", folder / "empty.jpg" / "out"], "empty.jpg"),
        "NaN in a label": ([*prepare, folder / "nan"], "training_K.json: entry 2"),
        "camera out of range": ([*prepare, folder / "range"], "training_K.json: entry 0"),
        "label files of two lengths": ([*prepare, folder / "length"], "training_xyz.json: 8 entries"),
        "missing label file": ([*prepare, folder / "nojson"], "training_verts.json"),
        "missing image": ([*prepare, folder / "lost"], "00000003.jpg"),
        "folder without images": (["prepare_data.py", "folder", folder / "full", "--out", folder / "out"], "no readable image"),
        "full RUN": ([*train, "--data", hands / "train", "--out", folder / "full"], "--resume"),
        "no index": ([*train, "--data", folder / "full", "--out", folder / "out"], "index.json"),
        "odd image size": ([*train, "--data", hands / "train", "--out", folder / "out", "--image-size", 33], "--image-size"),
        "weights that are none": ([*train, "--data", hands / "train", "--out", folder / "out", "--init", folder / "text.jpg"], "text.jpg"),
        "no such machine": ([*train, "--data", hands / "train", "--out", folder / "out", "--device", "mps"], "--device"),
        "prediction that is no JSON": ([*score, "--predictions", folder / "notes.json"], "notes.json"),
        "synthetic of nothing": (["make_synthetic.py", "--out", folder / "out", "--hands", 0], "--hands"),
    }


def test_every_mistake_gets_one_line_and_leaves_nothing(hands, mesh, freihand, tmp_path):
    failures = []
    for name, (command, words) in broken_inputs(tmp_path, hands, mesh, freihand).items():
        if name == "no such machine" and torch.backends.mps.is_available():
            continue
        done = call(*command, check=False, cwd=tmp_path)
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "|" not in line]
        left = (tmp_path / "out").exists() or (tmp_path / "hacked").exists()
        if done.returncode != 2 or len(lines) != 1 or words not in lines[0] or left:
            failures.append((name, done.returncode, lines[-3:], left))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not failures, "\n".join(map(str, failures))


def test_training_survives_files_that_break(hands, tmp_path):
    shutil.copytree(hands / "train", tmp_path / "train")
    for row in (3, 7):
        HandIndex(tmp_path / "train").image_path(row).write_bytes(b"gone")
    done = call("finetune_mesh.py", "--data", tmp_path / "train", "--val", hands / "val", "--out", tmp_path / "run", "--steps", 3, *TINY)
    assert "2 images could not be read" in done.stdout and HandIndex(tmp_path / "train").image_path(3).name in done.stdout
