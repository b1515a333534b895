"""Frames, detectors and their files; hands cut out of videos and of SiMHand's annotations, on files of
exactly their layouts."""
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fixtures import call
from PIL import Image

import video
from data import HandDataset, HandIndex, image_size, read_image

CELLS = ["image", "side", "score", *(f"{axis}{k}" for k in range(21) for axis in "xy")]


@pytest.fixture(scope="module")
def frames(hands, tmp_path_factory):
    """ROOT with two folders of three frames of 240 x 200 pixels, and a list of (name, side, keypoints)."""
    root = tmp_path_factory.mktemp("videos")
    index = HandIndex(hands / "train")
    truth = []
    for row, corner in enumerate([(0, 100), (144, 0), (60, 50), (10, 20), (100, 104), (144, 104)]):
        folder = f"film{row // 3}"
        name = f"frame_{30 * (row % 3):06d}.png"
        (root / folder).mkdir(exist_ok=True)
        frame = Image.new("RGB", (240, 200), (90, 80, 70))
        frame.paste(read_image(index.image_path(row))[0], corner)
        frame.save(root / folder / name)
        points = np.array(index.columns["joints2d"][row], np.float64) + corner
        truth.append((f"{folder}/{name}", ("right", "left")[row % 2], points))
    return root, truth


def write_csv(path, truth, score="0.9"):
    lines = [",".join(CELLS)]
    for name, side, points in truth:
        lines.append(",".join([name, side, score, *(f"{value:.6f}" for value in points.flat)]))
    path.write_text("\n".join(lines) + "\n")


def write_npz(path, truth):
    name, side, points = zip(*truth, strict=True)
    np.savez(path, image=np.array(name), side=np.array(side), keypoints=np.array(points),
             score=np.full(len(name), 0.9))


def check(index, root, truth, tolerance):
    """Every hand is there with its side, its crop shows the frame's pixels, and its keypoints lie on them."""
    assert len(index) == len(truth)
    whole = 0
    for row, (name, side, points) in enumerate(truth):
        kept = np.array(index.columns["keypoints"][row], np.float64)
        size = np.array(index.columns["size"][row])
        image = index.open_image(row)
        assert index.side(row) == (side == "left")
        assert image_size(image) == tuple(size)
        corner = np.round(np.mean(points - kept, axis=0))  # frames are small: nothing was resized
        assert np.abs(kept + corner - points).max() < tolerance
        cut = read_image(root / name)[0].crop((*corner, *(corner + size)))
        off = np.asarray(cut, float) - np.asarray(read_image(image)[0], float)
        assert np.abs(off).mean() < 6  # JPEG's loss; a crop elsewhere is off by 20 and more
        box = np.array(index.columns["box"][row])
        assert np.allclose(box, np.concatenate([kept.min(0), kept.max(0)]) + 0.5, atol=1e-3)
        longest = (box[2:] - box[:2]).max()
        assert (size <= 2 * longest + 2).all()
        in_frame = ((corner > 0) & (corner + size < [240, 200])).all()
        if in_frame:  # then the crop is the whole square of twice the box
            assert np.abs(size - 2 * longest).max() <= 2
        whole += in_frame
    assert whole > 0


# ------------------------------------------------------------------------------------------- the library file
def test_frames_come_by_name_and_a_broken_one_is_none(tmp_path):
    for number in range(5):
        Image.new("RGB", (8, 6), (50 * number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "02.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no frame")
    found = list(video.read_frames(tmp_path, every=2))
    assert [name for name, _ in found] == ["00.png", "02.png", "04.png"]
    assert found[1][1] is None and found[2][1].getpixel((0, 0)) == (200, 0, 0)
    for name in ("10.png", "9.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    assert [name for name, _ in video.read_frames(tmp_path)][-3:] == ["04.png", "9.png", "10.png"]


def test_a_video_file_gives_its_frames_by_number(tmp_path, monkeypatch):
    """On a stand-in for OpenCV: its order of colours is exchanged; a frame that it cannot decode is None."""

    class Capture:
        def __init__(self, path):
            self.number = -1

        def get(self, what):
            return 5

        def grab(self):
            self.number += 1
            return self.number < 5

        def retrieve(self):
            return self.number != 2, np.full((6, 8, 3), (10, 20, self.number), np.uint8)

        def release(self):
            pass

    cv2 = ModuleType("cv2")
    cv2.VideoCapture = Capture
    cv2.CAP_PROP_FRAME_COUNT = 7
    cv2.COLOR_BGR2RGB = "bgr to rgb"
    cv2.cvtColor = lambda pixels, code: pixels[..., ::-1]
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    found = list(video.read_frames(tmp_path / "film.mp4", every=2))
    assert [name for name, _ in found] == ["000000", "000002", "000004"]
    assert found[1][1] is None
    assert found[2][1].size == (8, 6) and found[2][1].getpixel((0, 0)) == (4, 20, 10)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="film.mp4.*OpenCV"):
        list(video.read_frames(tmp_path / "film.mp4"))


def test_videos_and_folders_are_listed_and_the_output_left_out(tmp_path):
    for name in ("b/film.MP4", "a/0.png", "a/1.png", "out/crop.jpg", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert video.list_videos(tmp_path, skip=tmp_path / "out") == [tmp_path / "b/film.MP4", tmp_path / "a"]
    with pytest.raises(FileNotFoundError, match="no video"):
        video.list_videos(tmp_path / "c")


def test_the_detector_names_sides_as_the_person_has_them(monkeypatch):
    """On a stand-in for MediaPipe, whose points are shares of the image and whose sides are a mirror's."""
    points = np.random.default_rng(0).random((2, 21, 2))
    result = SimpleNamespace(
        multi_hand_landmarks=[SimpleNamespace(landmark=[SimpleNamespace(x=x, y=y) for x, y in hand])
                              for hand in points],
        multi_handedness=[SimpleNamespace(classification=[SimpleNamespace(label=label, score=score)])
                          for label, score in (("Right", 0.75), ("Left", 0.5))])
    mediapipe = ModuleType("mediapipe")
    detector = SimpleNamespace(process=lambda pixels: result if pixels.any() else SimpleNamespace(
        multi_hand_landmarks=None, multi_handedness=None))
    hands = SimpleNamespace(Hands=lambda **options: detector)
    mediapipe.solutions = SimpleNamespace(hands=hands)
    monkeypatch.setitem(sys.modules, "mediapipe", mediapipe)
    detect = video.mediapipe_detector()
    found = detect(Image.new("RGB", (200, 100), "white"))
    assert [hand["side"] for hand in found] == ["left", "right"]
    assert np.allclose(found[1]["keypoints"], points[1] * [200, 100] - 0.5)
    assert [hand["score"].tolist() for hand in found] == [[0.75] * 21, [0.5] * 21]
    assert detect(Image.new("RGB", (200, 100), "black")) == []
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ValueError, match="requirements-video.txt"):
        video.mediapipe_detector()


def test_both_files_of_detections_hold_the_same_hands(frames, tmp_path):
    truth = [(name.upper(), side, points) for name, side, points in frames[1]] + [frames[1][0]] * 2
    write_csv(tmp_path / "seen.csv", truth)
    head, *lines = (tmp_path / "seen.csv").read_text().splitlines()
    cells = lines[0].split(",")
    cells[CELLS.index("x4")] = ""  # the thumb's tip was not seen
    (tmp_path / "seen.csv").write_text("\n".join([head, ",".join(cells), *lines[1:]]))
    name, side, points = zip(*truth, strict=True)
    points = np.array(points)
    points[0, 4, 1] = np.nan
    np.savez(tmp_path / "seen.npz", image=np.array(name), side=np.array(side), keypoints=points,
             score=np.full((len(truth), 21), 0.9))
    of_csv, of_npz = (video.read_detections(tmp_path / f"seen.{suffix}") for suffix in ("csv", "npz"))
    assert list(of_csv) == list(of_npz) == list(dict.fromkeys(name))
    assert len(of_csv[frames[1][0][0]]) == 2
    for image, hands in of_csv.items():
        for a, b in zip(hands, of_npz[image], strict=True):
            assert a["side"] == b["side"]
            assert np.abs(a["keypoints"] - b["keypoints"]).max() < 1e-4
            assert np.abs(a["score"] - b["score"]).max() < 1e-6
    unseen = of_csv[name[0]][0]
    assert unseen["score"][4] == 0 and (np.delete(unseen["score"], 4) > 0.89).all()
    others = np.delete(points[0], 4, axis=0)  # the box is around what was seen
    assert np.allclose(video.hand_box(unseen), [*others.min(0) + 0.5, *others.max(0) + 0.5], atol=1e-4)


def test_a_large_hand_is_cut_smaller_and_its_points_stay_on_it():
    rng = np.random.default_rng(0)
    points = rng.integers((300, 300), (700, 600), (21, 2)).astype(float)
    pixels = np.zeros((1000, 1100, 3), np.uint8)
    for x, y in points.astype(int):
        pixels[y - 2:y + 3, x - 2:x + 3] = 255
    hand = {"side": "right", "keypoints": points, "score": np.ones(21)}
    crop, labels = video.cut_hand(Image.fromarray(pixels), hand, context=2.0, longest=256)
    assert crop.size == (256, 256)  # the square of twice the box lies inside the frame
    values = np.asarray(crop)[..., 0]
    for x, y in labels["keypoints"].round().astype(int):
        assert values[y, x] > 100  # elsewhere the frame is black
    extent = np.ptp(labels["keypoints"], axis=0)
    assert labels["box"][2:] - labels["box"][:2] == pytest.approx(extent)
    assert extent.max() == pytest.approx(128, abs=1)  # half of the crop
    assert video.cut_hand(Image.fromarray(pixels), hand | {"keypoints": points / 100}, 2.0, 256) is None
    assert video.cut_hand(Image.fromarray(pixels), hand | {"score": np.zeros(21)}, 2.0, 256) is None
    upright = points * [0, 1] + [500, 0]  # no box of an index
    assert video.cut_hand(Image.fromarray(pixels), hand | {"keypoints": upright}, 2.0, 256) is None


# ----------------------------------------------------------------------------------------------- the commands
def test_hands_are_cut_out_of_frames_whoever_detected_them(frames, tmp_path):
    root, truth = frames
    write_npz(tmp_path / "seen.npz", truth)
    write_csv(tmp_path / "seen.csv", truth)
    for kind in ("npz", "csv"):
        done = call("prepare_data.py", "video", root, "--out", tmp_path / kind, "--every", 1,
                    "--detections", tmp_path / f"seen.{kind}")
        assert "6 hands (3 left) of 2 videos" in done.stdout
        index = HandIndex(tmp_path / kind)
        check(index, root, truth, 1e-4)
        assert np.asarray(index.columns["video"]).tolist() == [0, 0, 0, 1, 1, 1]
    call("prepare_data.py", "video", root, "--out", tmp_path / "two", "--every", 1,
         "--detections", tmp_path / "seen.npz", processes=2)
    one = HandIndex(tmp_path / "npz")
    two = HandIndex(tmp_path / "two")
    assert one.columns.keys() == two.columns.keys()
    assert all(np.array_equal(two.columns[column], one.columns[column]) for column in one.columns)
    item = HandDataset([two], 64, 2.0, ("keypoints",))[0]
    assert item["canvas"].float().std() > 5
    assert 0.49 <= np.abs(item["keypoints"]).max() <= 0.51  # the box is half of the canvas
    call("prepare_data.py", "video", root, "--out", tmp_path / "some", "--every", 2,
         "--detections", tmp_path / "seen.npz")
    assert len(HandIndex(tmp_path / "some")) == 4


def test_points_in_space_go_with_their_hand(frames, tmp_path):
    """Also where hands are left out, and entries are in no order; a left hand is mirrored like its image."""
    root, truth = frames
    entries = [truth[k] for k in (4, 0, 5, 2, 1, 3)]
    entries[2] = (*entries[2][:2], entries[2][2] / 100)  # a hand of a few pixels
    points3d = np.random.default_rng(0).normal(scale=0.05, size=(6, 21, 3)).astype(np.float32)
    write_csv(tmp_path / "seen.csv", entries)
    np.save(tmp_path / "world.npy", points3d)
    command = ("prepare_data.py", "video", root, "--every", 1, "--detections", tmp_path / "seen.csv")
    call(*command, "--world", tmp_path / "world.npy", "--out", tmp_path / "index")
    index = HandIndex(tmp_path / "index")
    check(index, root, truth[:5], 1e-4)
    kept = np.array(index.columns["keypoints3d"])
    assert np.array_equal(kept, points3d[[1, 4, 3, 5, 0]])
    item = HandDataset([index], 64, 2.0, ("keypoints3d",))[1]
    assert item["has_keypoints3d"] == 1 and item["known_keypoints3d"].all()
    assert np.array_equal(item["keypoints3d"], kept[1] * np.float32([-1, 1, 1]))
    points3d[3] *= 1000
    np.save(tmp_path / "mm.npy", points3d)
    np.save(tmp_path / "short.npy", points3d[:5])
    for name, message in (("mm.npy", "entry 3"), ("short.npy", "(6, 21, 3)"), ("none.npy", "no such file")):
        done = call(*command, "--world", tmp_path / name, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2 and name in done.stderr and message in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_hands_can_be_packed_at_once(frames, tmp_path):
    """The same index, whose crops lie in one file; also where the last step was stopped."""
    write_csv(tmp_path / "seen.csv", frames[1])
    command = ("prepare_data.py", "video", frames[0], "--every", 1, "--detections", tmp_path / "seen.csv")
    call(*command, "--out", tmp_path / "single")
    single = HandIndex(tmp_path / "single")
    for _ in range(2):
        call(*command, "--out", tmp_path / "packed", "--pack")
        packed = HandIndex(tmp_path / "packed")
        check(packed, *frames, 1e-4)
        for row in range(len(single)):
            assert packed.open_image(row).getvalue() == single.open_image(row).read_bytes()
        assert sorted(path.name for path in (tmp_path / "packed").iterdir() if path.suffix != ".npy") == [
            "index.json", "pack_0000.bin", "parts", "samples.png"]
        shutil.copytree(tmp_path / "single" / "images", tmp_path / "packed" / "images")
        (tmp_path / "packed" / "index.json").unlink()


def test_cutting_goes_on_where_it_was_stopped(frames, tmp_path):
    root = shutil.copytree(frames[0], tmp_path / "root")
    (root / "film0" / "frame_000030.png").write_bytes(b"no picture")
    write_csv(tmp_path / "seen.csv", frames[1])
    out = root / "pool"  # its crops are no frames to cut again
    command = ("prepare_data.py", "video", root, "--out", out, "--detections", tmp_path / "seen.csv",
               "--every")
    done = call(*command, 1)
    assert "frame not readable: 1: film0/frame_000030.png" in done.stdout
    assert len(HandIndex(out)) == 5
    (out / "index.json").unlink()  # as if killed before the second video was done
    (out / "parts" / "0000001.npz").unlink()
    first, second = (out / "images" / folder / "000000_0.jpg" for folder in ("0000000", "0000001"))
    first.write_bytes(first.read_bytes() + b"\0")
    second.write_bytes(second.read_bytes() + b"\0")
    call(*command, 1)
    assert len(HandIndex(out)) == 5
    assert first.read_bytes()[-1:] == b"\0"  # left alone
    assert second.read_bytes()[-1:] != b"\0"  # cut again
    (out / "index.json").unlink()
    done = call(*command, 2, check=False)
    assert done.returncode == 2 and "other videos, detections or flags" in done.stderr


def test_refusals_name_the_file(frames, tmp_path):
    root, truth = frames
    write_csv(tmp_path / "good.csv", truth)
    text = (tmp_path / "good.csv").read_text()
    (tmp_path / "short.csv").write_text(text.replace(",y20", ",other"))
    (tmp_path / "side.csv").write_text(text.replace(",left,", ",both,"))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "empty").mkdir()
    for folder, name, message in ((root, "short.csv", "short.csv"), (root, "side.csv", "side.csv: entry 1"),
                                  (root, "broken.npz", "broken.npz"), (root, "none.csv", "no such file"),
                                  (tmp_path / "empty", "good.csv", "no video"),
                                  (tmp_path / "nowhere", "good.csv", "no such folder")):
        done = call("prepare_data.py", "video", folder, "--out", tmp_path / "out",
                    "--detections", tmp_path / name, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- Hand100M
@pytest.fixture
def hand100m(frames, tmp_path):
    """ROOT in the authors' layout: a JSON file with positives, frames below another prefix than they name."""
    root = tmp_path / "hand100m"
    (root / "annotations" / "Ego4D").mkdir(parents=True)
    shutil.copytree(frames[0], root, dirs_exist_ok=True)
    images = []
    annotations = []
    for k, (name, side, points) in enumerate(frames[1]):
        box = np.concatenate([np.floor(points.min(0)), np.ceil(points.max(0))]).astype(int)
        middle = (box[:2] + box[2:]) / 2
        half = 1.3 * (box[2:] - box[:2]).max() / 2
        low = np.maximum(middle - half, 0)
        high = np.minimum(middle + half, [240, 200])
        flat = np.concatenate([(points + 0.5 - low) / (high - low), np.zeros((21, 1))], 1)
        images.append({"id": k, "file_name": f"authors/disk/{name}"})
        annotations.append({"hand_id": str(100 + k), "image_id": k, "boxes": json.dumps(box.tolist()),
                            "left_right": side.title(), "keypoint_25d": flat.ravel().tolist(),
                            "positive_sample": [str(100 + (k + 3) % 6)], "distance": [0.25 + k]})
    annotations[5]["positive_sample"] = ["999"]  # of a hand that is not there
    content = {"images": images, "annotations": annotations}
    path = root / "annotations" / "Ego4D" / "Hand100M_Ego4D_50k_v1-1.json"
    path.write_text(json.dumps(content))
    return root, frames[1]


def test_the_authors_annotations_give_crops_and_pairs(hand100m, tmp_path):
    root, truth = hand100m
    call("prepare_data.py", "hand100m", root, "--out", tmp_path / "index")
    index = HandIndex(tmp_path / "index")
    check(index, root, truth, 1e-3)
    with np.load(tmp_path / "index" / "pairs.npz") as file:
        assert file["idx"][:, 0].tolist() == [3, 4, 5, 0, 1, -1]
        assert file["dist"][:, 0].tolist() == [0.25, 1.25, 2.25, 3.25, 4.25, np.inf]
        assert file["format"] == 1
    done = call("pretrain_contrastive.py", "--data", tmp_path / "index", "--method", "simhand",
                "--pairs", tmp_path / "index" / "pairs.npz", "--out", tmp_path / "run", "--arch", "vit_micro",
                "--image-size", 32, "--batch-size", 4, "--steps", 1, "--workers", 0)
    assert "encoder.pt" in done.stdout


def test_a_damaged_annotation_is_named(hand100m, tmp_path):
    root, _ = hand100m
    path = next((root / "annotations").rglob("*.json"))
    whole = json.loads(path.read_text())
    damages = {"annotation 2": lambda c: c["annotations"][2].update(keypoint_25d=[0.5] * 60),
               "annotation 4": lambda c: c["annotations"][4].update(left_right="Both"),
               "annotation 1": lambda c: c["annotations"][1].update(boxes="[1, 2"),
               "images": lambda c: c.pop("images")}
    command = ("prepare_data.py", "hand100m", root, "--out", tmp_path / "index")
    for place, damage in damages.items():
        content = json.loads(json.dumps(whole))
        damage(content)
        path.write_text(json.dumps(content))
        done = call(*command, check=False)
        assert done.returncode == 2 and place in done.stderr and path.name in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "index").exists()
    path.write_text(json.dumps(whole)[:2000])
    done = call(*command, check=False)
    assert done.returncode == 2 and "broken JSON" in done.stderr and not (tmp_path / "index").exists()
