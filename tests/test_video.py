"""Hands cut out of videos and of SiMHand's annotations, on files of exactly their layouts."""
import json
import shutil

import numpy as np
import pytest
from fixtures import call
from PIL import Image

from data import HandDataset, HandIndex, image_size, read_image


@pytest.fixture(scope="module")
def frames(hands, tmp_path_factory):
    """ROOT with two folders of frames of 240 x 200 pixels, three frames each, and what is to be found: a list of
    (name, left, keypoints)."""
    root, index, truth = tmp_path_factory.mktemp("videos"), HandIndex(hands / "train"), []
    for row in range(6):
        folder, name = f"film{row // 3}", f"frame_{30 * (row % 3):06d}.png"
        (root / folder).mkdir(exist_ok=True)
        frame = Image.new("RGB", (240, 200), (90, 80, 70))
        at = np.array([(0, 100), (144, 0), (60, 50), (10, 20), (100, 104), (144, 104)][row])
        frame.paste(read_image(index.image_path(row))[0], tuple(map(int, at)))
        frame.save(root / folder / name)
        truth.append((f"{folder}/{name}", index.side(row) == 1, np.array(index.columns["joints2d"][row], np.float64) + at))
    return root, truth


def write_csv(path, truth):
    head = ["image", "side", "score", *(f"{axis}{k}" for k in range(21) for axis in "xy")]
    lines = [",".join(head)] + [",".join([name, "left" if left else "right", "0.9", *(f"{v:.6f}" for v in points.flat)])
                                for name, left, points in truth]
    path.write_text("\n".join(lines) + "\n")


def check(index, truth, tolerance):
    """Every hand is there with its side, and its keypoints lie on the same pixels as in the frame."""
    assert len(index) == len(truth)
    for row, (_, left, points) in enumerate(truth):
        kept = np.array(index.columns["keypoints"][row], np.float64)
        size = np.array(index.columns["size"][row])
        assert index.side(row) == left and image_size(index.image_path(row)) == tuple(size)
        low = np.round(np.mean(points - kept, axis=0))                         # frames are small: nothing was resized
        assert np.abs(kept + low - points).max() < tolerance
        box = np.array(index.columns["box"][row])
        assert np.allclose(box, np.concatenate([kept.min(0), kept.max(0)]) + 0.5, atol=1e-3)
        longest = (box[2:] - box[:2]).max()
        inside = (low > 0) & (low + size < [240, 200])
        assert (size <= 2 * longest + 2).all() and (np.abs(size - 2 * longest)[inside] <= 2).all()


def test_hands_are_cut_out_of_frames_whoever_detected_them(frames, tmp_path):
    root, truth = frames
    name, left, points = zip(*truth, strict=True)
    np.savez(tmp_path / "seen.npz", image=np.array(name), side=np.where(left, "left", "right"), keypoints=np.array(points),
             score=np.full((6, 21), 0.9))
    write_csv(tmp_path / "seen.csv", truth)
    for kind in ("npz", "csv"):
        done = call("prepare_data.py", "video", root, "--out", tmp_path / kind, "--every", 1, "--detections", tmp_path / f"seen.{kind}")
        assert "6 hands" in done.stdout
        index = HandIndex(tmp_path / kind)
        check(index, truth, 1e-4)
        assert np.asarray(index.columns["video"]).tolist() == [0, 0, 0, 1, 1, 1]
    call("prepare_data.py", "video", root, "--out", tmp_path / "two", "--every", 1, "--detections", tmp_path / "seen.npz", processes=2)
    one, two = HandIndex(tmp_path / "npz"), HandIndex(tmp_path / "two")
    assert all(np.array_equal(two.columns[column], one.columns[column]) for column in one.columns)
    item = HandDataset([two], 64, 2.0, ("keypoints",))[0]
    assert item["canvas"].float().std() > 5 and np.abs(item["keypoints"]).max() <= 0.51       # the box is half of the canvas
    call("prepare_data.py", "video", root, "--out", tmp_path / "some", "--every", 2, "--detections", tmp_path / "seen.npz")
    assert len(HandIndex(tmp_path / "some")) == 4


def test_cutting_goes_on_where_it_was_stopped(frames, tmp_path):
    root, truth = shutil.copytree(frames[0], tmp_path / "root"), frames[1]
    (root / "film0" / "frame_000030.png").write_bytes(b"no picture")
    write_csv(tmp_path / "seen.csv", truth)
    command = ("prepare_data.py", "video", root, "--out", tmp_path / "out", "--every", 1, "--detections", tmp_path / "seen.csv")
    done = call(*command)
    assert "frame not readable: 1: film0/frame_000030.png" in done.stdout and len(HandIndex(tmp_path / "out")) == 5
    (tmp_path / "out" / "index.json").unlink()                             # as if killed before the second video was done
    (tmp_path / "out" / "parts" / "0000001.npz").unlink()
    before = (tmp_path / "out" / "images" / "0000000" / "000000_0.jpg").stat().st_mtime_ns
    call(*command)
    assert len(HandIndex(tmp_path / "out")) == 5
    assert (tmp_path / "out" / "images" / "0000000" / "000000_0.jpg").stat().st_mtime_ns == before
    (tmp_path / "out" / "index.json").unlink()
    done = call(*command[:-3], 2, *command[-2:], check=False)
    assert done.returncode == 2 and "other videos, detections or flags" in done.stderr


def test_refusals_name_the_file(frames, tmp_path):
    root, truth = frames
    write_csv(tmp_path / "good.csv", truth)
    text = (tmp_path / "good.csv").read_text()
    (tmp_path / "short.csv").write_text(text.replace(",y20", ",other"))
    (tmp_path / "side.csv").write_text(text.replace(",right,", ",both,").replace(",left,", ",both,"))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "empty").mkdir()
    for folder, name, message in ((root, "short.csv", "short.csv"), (root, "side.csv", "entry 0"), (root, "broken.npz", "broken.npz"),
                                  (root, "none.csv", "no such file"), (tmp_path / "empty", "good.csv", "no video"),
                                  (tmp_path / "nowhere", "good.csv", "no such folder")):
        done = call("prepare_data.py", "video", folder, "--out", tmp_path / "out", "--detections", tmp_path / name, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- Hand100M
@pytest.fixture
def hand100m(frames, tmp_path):
    """ROOT in the authors' layout: a JSON file with positives, frames below another prefix than they name."""
    root, truth = tmp_path / "hand100m", frames[1]
    (root / "annotations" / "Ego4D").mkdir(parents=True)
    shutil.copytree(frames[0], root, dirs_exist_ok=True)
    images, annotations = [], []
    for k, (name, left, points) in enumerate(truth):
        box = [*np.floor(points.min(0)), *np.ceil(points.max(0))]
        middle, half = np.array([box[0] + box[2], box[1] + box[3]]) / 2, 1.3 * max(box[2] - box[0], box[3] - box[1]) / 2
        low, high = np.maximum(middle - half, 0), np.minimum(middle + half, [240, 200])
        flat = np.concatenate([(points + 0.5 - low) / (high - low), np.zeros((21, 1))], 1)
        images.append({"id": k, "file_name": f"authors/disk/{name}"})
        annotations.append({"hand_id": str(100 + k), "image_id": k, "boxes": json.dumps([int(v) for v in box]), "left_right":
                            "Left" if left else "Right", "keypoint_25d": flat.ravel().tolist(), "positive_sample": [str(100 + (k + 3) % 6)],
                            "distance": [0.25 + k]})
    annotations[5]["positive_sample"] = ["999"]                            # of a hand that is not there
    (root / "annotations" / "Ego4D" / "Hand100M_Ego4D_50k_v1-1.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root, truth


def test_the_authors_annotations_give_crops_and_pairs(hand100m, tmp_path):
    root, truth = hand100m
    call("prepare_data.py", "hand100m", root, "--out", tmp_path / "index")
    index = HandIndex(tmp_path / "index")
    check(index, truth, 1e-3)
    with np.load(tmp_path / "index" / "pairs.npz") as file:
        assert file["idx"][:, 0].tolist() == [3, 4, 5, 0, 1, -1] and file["dist"][:3, 0].tolist() == [0.25, 1.25, 2.25]
    done = call("pretrain_contrastive.py", "--data", tmp_path / "index", "--method", "simhand", "--pairs", tmp_path / "index" / "pairs.npz",
                "--out", tmp_path / "run", "--arch", "vit_micro", "--image-size", 32, "--batch-size", 4, "--steps", 1, "--workers", 0)
    assert "encoder.pt" in done.stdout


def test_a_damaged_annotation_is_named(hand100m, tmp_path):
    root, _ = hand100m
    path = next((root / "annotations").rglob("*.json"))
    whole = json.loads(path.read_text())
    damages = {"annotation 2": lambda c: c["annotations"][2].update(keypoint_25d=[0.5] * 60), "annotation 4": lambda c:
               c["annotations"][4].update(left_right="Both"), "annotation 1": lambda c: c["annotations"][1].update(boxes="[1, 2"),
               "images": lambda c: c.pop("images")}
    for where, damage in damages.items():
        content = json.loads(json.dumps(whole))
        damage(content)
        path.write_text(json.dumps(content))
        done = call("prepare_data.py", "hand100m", root, "--out", tmp_path / "index", check=False)
        assert done.returncode == 2 and where in done.stderr and path.name in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "index").exists()
    path.write_text(json.dumps(whole)[:2000])
    done = call("prepare_data.py", "hand100m", root, "--out", tmp_path / "index", check=False)
    assert done.returncode == 2 and "broken JSON" in done.stderr and not (tmp_path / "index").exists()
