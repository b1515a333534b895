"""People's files: what a command may overwrite, what it takes and leaves, how it names it, and what files
from strangers can cost. The order is that of the bug reports it grew from."""

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import ENV, ROOT, call, log
from PIL import Image

import data
import draw
import evaluate
import layouts
import predict
import results
import video
from cache import cache_canvases
from data import (HandDataset, HandIndex, list_images, make_loader, match_boxes, read_boxes, read_image,
                  write_index)
from model import choose_encoder, load_encoder
from synthetic_hand import synthetic_mano


def picture(path, shade=90, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 120, 60)).save(path)
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words, *command):
    done = call(*command, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
    return done


# ---------------------------------------------------------------------------- results over one's own pictures
def test_nothing_that_predict_did_not_write_is_overwritten(checkpoint, tmp_path):
    """Its own results are, also a second time."""
    hand = picture(tmp_path / "hand.png")
    photo = picture(tmp_path / "photo.jpg")
    picture(tmp_path / "photo.png", 200)  # another picture
    for suffix in ("npz", "obj"):
        (tmp_path / f"third.{suffix}").write_text("mine")
    third = picture(tmp_path / "third.jpg")
    before = contents(tmp_path)
    for image in (hand, photo, third):
        refused("was not written by", "predict.py", image, "--checkpoint", checkpoint, "--out", tmp_path)
    assert contents(tmp_path) == before
    out = tmp_path / "out"
    for _ in range(2):
        call("predict.py", hand, photo, "--checkpoint", checkpoint, "--out", out)
    assert sorted(contents(out)) == [f"{name}.{suffix}" for name in ("hand", "photo")
                                     for suffix in ("npz", "obj", "png")]
    refused("was not written by", "predict.py", out / "hand.png", "--checkpoint", checkpoint, "--out", out)


def test_two_photographs_never_share_a_name(tmp_path):
    """Also where a file system takes A.png for a.png, and where one is called as another's second hand."""
    images = [(tmp_path / name, tmp_path) for name in ("a.jpg", "A.png", "a_2.jpg")]
    names = [name for *_, name in predict.find_hands(images, None, "right")]
    assert len({name.casefold() for name in names}) == 3 and names[0] == "a"


@pytest.mark.parametrize("name", ["pred.json", "report.html", "metrics.json"])
def test_nothing_that_evaluate_and_probe_did_not_write_is_overwritten(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    refused("was not written by", "evaluate.py", "--data", "i", "--checkpoint", "c", "--out", out)
    if name == "metrics.json":
        refused("was not written by", "probe.py", "encoder.pt", "--data", "i", "--out", out)
        (out / "table.json").write_text("[1]")
        refused("was not written by", "evaluate.py", "--compare", "a=b", "--out", out)
    assert (out / name).read_text() == '{"mine": 1}'


def test_hands_are_not_cut_out_into_a_folder_of_other_files(tmp_path):
    """With --pack the folder `images` is removed at the end: it must be the command's own."""
    picture(tmp_path / "film/images/0.png")
    before = contents(tmp_path)
    refused("there are files already", "prepare_data.py", "video", tmp_path / "film",
            "--out", tmp_path / "film", "--pack")
    assert contents(tmp_path) == before


# -------------------------------------------------------------------------------------- own results as inputs
def test_results_and_indices_are_no_photographs(checkpoint, tmp_path):
    """Predicted twice into the folder itself and once below it; then an index of the folder is made in it."""
    root = tmp_path / "photos"
    for name in ("a.jpg", "b/c.png"):
        picture(root / name)
    for out in (root / "predictions", root / "predictions", root / "other", root):
        done = call("predict.py", root, "--checkpoint", checkpoint, "--out", out)
        assert "2 hands" in done.stdout
    assert "3 .npz" not in call("prepare_data.py", "folder", root, "--out", root / "index").stdout
    assert len(HandIndex(root / "index")) == 2
    assert len(list_images(root)) == 2  # samples.png of the index is none
    assert [path.name for path in list_images(root / "index")] == []
    write_index(root / "frames", {"image": np.array([b"0.png"]), "box": [[0, 0, 9, 9]]}, {"name": "x"})
    picture(root / "frames/0.png")
    assert video.list_videos(root)[1:] == [root / "b", root / "other", root / "predictions"]
    assert [path.name for path in list_images(root / "frames")] == ["0.png"]  # where it is asked for itself


# ------------------------------------------------------------------------------------------------------ sides
def write_boxes(path, header, *lines):
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def test_the_callers_side_holds_where_the_file_says_none(checkpoint, tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"in/{name}.jpg")
    boxes = write_boxes(tmp_path / "boxes.csv", "image,x0,y0,x1,y1", "a.jpg,9,9,40,40", "b.jpg,9,9,40,40")
    call("predict.py", tmp_path / "in", "--checkpoint", checkpoint, "--out", tmp_path / "out",
         "--boxes", boxes, "--side", "left")
    assert np.load(tmp_path / "out/a.npz")["side"] == "left"
    write_boxes(boxes, "image,x0,y0,x1,y1, Side", "a.jpg,9,9,40,40,", "b.jpg,9,9,40,40, Right ")
    call("prepare_data.py", "folder", tmp_path / "in", "--out", tmp_path / "index", "--boxes", boxes,
         "--side", "left")
    assert HandIndex(tmp_path / "index").columns["side"].tolist() == [1, 0]


def test_headers_are_read_without_case_and_blanks_and_unknown_columns_named(tmp_path, capsys):
    boxes = write_boxes(tmp_path / "boxes.csv", "IMAGE, x0,y0 ,X1,y1, Side ,hand", "a,1,2,30,40,left,left")
    assert read_boxes(boxes) == {"a": [((1, 2, 30, 40), "left")]}
    assert "boxes.csv: not read: column hand" in capsys.readouterr().err
    write_boxes(boxes, "image,x0,y0,x1,y1,side,Side", "a,1,2,30,40,left,right")
    with pytest.raises(ValueError, match="each once"):
        read_boxes(boxes)
    write_boxes(boxes, "image,x0,y0,x1,y1", "a" * 200_000 + ",1,2,30,40")
    with pytest.raises(ValueError, match="boxes.csv, line .: not CSV"):
        read_boxes(boxes)
    cells = [f"{axis}{k}" for k in range(21) for axis in "xy"]
    seen = write_boxes(tmp_path / "seen.csv", ",".join([" Image", "SIDE ", "score", *cells, "hand"]),
                       ",".join(["f/0.png", "Left", "1", *"123456" * 7, "x"]))
    assert video.read_detections(seen)["f/0.png"][0]["side"] == "left"
    assert "seen.csv: not read: column hand" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- names in CSV
def test_one_rule_for_names_in_all_commands(checkpoint, tmp_path, monkeypatch):
    """Relative to the folder given, or as typed, in any composition of their letters."""
    monkeypatch.chdir(tmp_path)
    composed, apart = (unicodedata.normalize(form, "hände/bär.jpg") for form in ("NFC", "NFD"))
    for name in ("in/a/img.jpg", "in/b/img.jpg", f"in/{apart}"):
        picture(tmp_path / name)
    for number, names in enumerate((["a/img.jpg", composed], ["in/a/img.jpg", f"in/{apart}"],
                                    ["./a/img.jpg", f"in/{composed}"])):
        boxes = write_boxes(tmp_path / "boxes.csv", "image,x0,y0,x1,y1",
                            *(f"{name},9,9,40,40" for name in names))
        done = call("predict.py", "in", "--checkpoint", checkpoint, "--out", f"out{number}", "--boxes", boxes)
        assert "2 hands" in done.stdout and "without a line, left out: 1" in done.stdout
        call("prepare_data.py", "folder", "in", "--out", f"index{number}", "--boxes", boxes)
        images = [os.fsdecode(bytes(name)) for name in HandIndex(f"index{number}").columns["image"]]
        assert images == ["a/img.jpg", apart]


def test_a_bare_name_is_that_of_one_photograph_or_refused(tmp_path):
    boxes = {"img.jpg": [("box", None)]}
    a, b = (tmp_path / name for name in ("a/img.jpg", "b/img.jpg"))
    assert match_boxes(boxes, [(a, a.parent)], "boxes.csv") == ([boxes["img.jpg"]], [])
    assert match_boxes(boxes, [(a, tmp_path), (b, tmp_path)], "boxes.csv") == ([[], []], ["img.jpg"])
    with pytest.raises(ValueError, match="boxes.csv: img.jpg may be .*a/img.jpg and .*b/img.jpg"):
        match_boxes(boxes, [(a, a.parent), (b, b.parent)], "boxes.csv")
    asked = {str(b): [("box", "left")]}
    assert match_boxes(asked, [(a, a.parent), (b, b.parent)], "boxes.csv") == ([[], asked[str(b)]], [])


def test_detections_are_found_by_composed_and_typed_names(tmp_path):
    apart = unicodedata.normalize("NFD", "bär")
    picture(tmp_path / f"films/{apart}/0.png", size=(200, 150))
    cells = ",".join(f"{axis}{k}" for k in range(21) for axis in "xy")
    points = ",".join(f"{60 + 3 * k},{40 + 2 * k}" for k in range(21))
    for number, name in enumerate(("bär/0.png", f"{tmp_path}/films/bär/0.png")):
        seen = write_boxes(tmp_path / "seen.csv", f"image,side,score,{cells}", f"{name},left,1,{points}")
        call("prepare_data.py", "video", tmp_path / "films", "--every", 1, "--detections", seen,
             "--out", tmp_path / f"index{number}")
        assert len(HandIndex(tmp_path / f"index{number}")) == 1


# ---------------------------------------------------------------------------------------------------- folders
def test_links_are_followed_once_dots_skipped_and_the_rest_counted(tmp_path):
    root = tmp_path / "root"
    for name in ("a/1.jpg", "a/deep/2.png", "3.jfif", "._3.jpg", ".hidden/4.jpg", "a/._1.jpg"):
        picture(tmp_path / "x.jpg")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.jpg").rename(root / name)
    picture(tmp_path / "elsewhere/5.jpg")
    for name in ("b.heic", "a/c.HEIC", "notes"):
        (root / name).touch()
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "a/circle").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root / "a")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    left_out = Counter()
    found = [path.relative_to(root).as_posix() for path in list_images(root, left_out=left_out)]
    assert found == ["3.jfif", "a/1.jpg", "a/deep/2.png", "again/5.jpg"]
    assert left_out == {".heic": 2, "without a suffix": 1, "links that lead nowhere": 1}
    left_out = Counter()
    folders = [path.relative_to(root).as_posix() for path in video.list_videos(root, left_out=left_out)]
    assert folders == [".", "a", "a/deep", "again"]
    assert left_out == {".heic": 2, "without a suffix": 1, "links that lead nowhere": 1}
    assert [name for name, _ in video.read_frames(root / "a")] == ["1.jpg"]
    done = call("prepare_data.py", "folder", root, "--out", tmp_path / "index")
    assert "not taken: 2 .heic, 1 links that lead nowhere, 1 without a suffix" in done.stdout
    assert "not a readable image" not in done.stdout and len(HandIndex(tmp_path / "index")) == 4


# ------------------------------------------------------------------------------------------- videos cut short
def stand_in_for_opencv(monkeypatch, declared, readable):
    """A video that declares some frames, of which those in `readable` can be grabbed."""

    class Capture:
        def __init__(self, path):
            self.number = -1

        def get(self, what):
            return declared

        def grab(self):
            self.number += 1
            return self.number in readable

        def retrieve(self):
            return True, np.full((6, 8, 3), self.number, np.uint8)

        def release(self):
            pass

    cv2 = ModuleType("cv2")
    cv2.VideoCapture = Capture
    cv2.COLOR_BGR2RGB = cv2.CAP_PROP_FRAME_COUNT = 0
    cv2.cvtColor = lambda pixels, code: pixels
    monkeypatch.setitem(sys.modules, "cv2", cv2)


def test_a_video_is_read_on_to_its_declared_end_and_what_lacks_is_told(tmp_path, monkeypatch):
    film = tmp_path / "films/film.mp4"
    film.parent.mkdir()
    film.touch()
    cases = {(20, 20): 0, (0, 20): 0, (30, 20): 20, (-5, 20): 0, (1e300, 20): 20}
    for (declared, there), of in cases.items():
        stand_in_for_opencv(monkeypatch, declared, range(there))
        *frames, last = video.read_frames(film, every=10)
        assert (last[1] is None) == bool(of), (declared, last)
        assert not of or last[0].startswith(f"only {of} of ")
    stand_in_for_opencv(monkeypatch, 40, {*range(12), *range(25, 40)})  # a damaged stretch in the middle
    found = list(video.read_frames(film, every=10))
    assert [name for name, _ in found] == ["000000", "000010", "000030", "only 27 of 40 frames"]
    assert found[2][1].getpixel((0, 0)) == (30, 30, 30)
    cells = ",".join(f"{axis}{k}" for k in range(21) for axis in "xy")
    points = ",".join(f"{k % 5},{k % 4}" for k in range(21))
    monkeypatch.setattr(video, "SMALLEST", 1)
    seen = write_boxes(tmp_path / "seen.csv", f"image,side,score,{cells}", f"film.mp4/000030,left,1,{points}")
    done = call("prepare_data.py", "video", film.parent, "--every", 10, "--detections", seen,
                "--out", tmp_path / "index")
    assert "frame not readable: 1: film.mp4/only 27 of 40 frames" in done.stdout
    assert len(HandIndex(tmp_path / "index")) == 1


# ---------------------------------------------------------------------------------------------- dark pictures
RAMP = np.tile(np.arange(64) / 63, (64, 1))  # from black to white


@pytest.mark.parametrize("white, kind, tags, told", [
    (1.0, np.float32, {}, False), (255.0, np.float32, {}, False), (65535, np.uint16, {}, False),
    (4095, np.uint16, {}, True), (1023, np.uint16, {}, True), (255, np.uint16, {}, True),
    (255, np.int32, {}, True), (65535, np.int32, {}, False), (4095, np.uint16, {281: 4095}, False),
    (3000, np.uint16, {281: 3000}, False)])
def test_pictures_of_more_than_8_bits_are_not_black(tmp_path, capsys, white, kind, tags, told):
    """White is what the file says; where it says nothing, a guess that is told."""
    data._TOLD.clear()
    Image.fromarray((RAMP * white).astype(kind)).save(tmp_path / "a.tif", tiffinfo=tags)
    read = np.asarray(read_image(tmp_path / "a.tif")[0]).astype(float)
    np.testing.assert_allclose(read, np.repeat(RAMP[..., None] * 255, 3, 2), atol=1.01)
    warning = capsys.readouterr().err
    assert ("a.tif: nothing is brighter than" in warning) == told, warning


def test_16_bits_of_colour_of_which_12_are_used_are_told(tmp_path, capsys):
    """Pillow drops the lower byte: the picture cannot be mended, only named."""
    data._TOLD.clear()
    deep = (np.stack([RAMP] * 3, -1) * 4095).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert np.asarray(read_image(tmp_path / "a.png")[0]).max() == 15
    assert "a.png: 16 bits a sample" in capsys.readouterr().err
    read_image(tmp_path / "a.png")
    assert not capsys.readouterr().err  # once


# ----------------------------------------------------------------------------------------------------- memory
def test_an_overlay_in_strips_is_the_overlay_in_one(monkeypatch):
    arrays = synthetic_mano()
    image = np.random.default_rng(0).integers(0, 255, (150, 220, 3), dtype=np.uint8)
    points = arrays["v_template"] * [900, 900, 1] + [110, 70, 0.5]
    whole = draw.overlay(image, points, arrays["f"])
    assert 0.05 < (whole != image).any(2).mean() < 0.9
    monkeypatch.setattr(draw, "CHUNK", 3000)
    np.testing.assert_array_equal(draw.overlay(image, points, arrays["f"]), whole)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says how much was used")
def test_a_large_photograph_takes_little_memory(checkpoint, tmp_path):
    """Three hands on two photographs of 12 megapixels: under 700 MB, Python and torch included. Before, one
    took 2.9 GB, and a batch held all of its photographs."""
    for name in ("a", "b"):
        picture(tmp_path / f"photos/{name}.jpg", size=(4000, 3000))
    boxes = write_boxes(tmp_path / "boxes.csv", "image,x0,y0,x1,y1", "b.jpg,500,900,1400,1800",
                        *(f"a.jpg,{x},900,{x + 900},1800" for x in (500, 1500)))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import predict
predict.main(sys.argv[2:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "photos", "--boxes", boxes,
                           "--checkpoint", checkpoint, "--out", tmp_path / "out"],
                          env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 700e3


def test_an_overlay_of_a_very_large_photograph_is_smaller(checkpoint, tmp_path, monkeypatch):
    """Drawing it takes a second for 2 megapixels of hand. The hand lies where it lies at full size."""
    photo = picture(tmp_path / "photo.jpg", size=(301, 200))
    ours = [photo, "--checkpoint", checkpoint, "--refine", 0, "--out"]
    call("predict.py", *ours, tmp_path / "whole")
    monkeypatch.setattr(predict, "MOST_DRAWN", 301 * 200 / 9)
    call("predict.py", *ours, tmp_path / "small")
    whole, small = (Image.open(tmp_path / name / "photo.png") for name in ("whole", "small"))
    assert (whole.size, small.size) == ((301, 200), (101, 67))
    off = np.asarray(whole.reduce(3), float) - np.asarray(small, float)
    assert np.abs(off).mean() < 2
    assert np.abs(np.asarray(small, float) - np.asarray(Image.open(photo).reduce(3))).mean() > 5
    hand = [np.load(tmp_path / name / "photo.npz")["crop"] for name in ("whole", "small")]
    np.testing.assert_array_equal(*hand)


def test_canvases_that_a_killed_run_began_are_removed(hands, tmp_path):
    """Unless they were written to within a day, maybe by another machine."""
    index = HandIndex(shutil.copytree(hands / "val", tmp_path / "val"))
    dead, alive = (index.path / f"canvases_32_0.bin.node.{number}.part" for number in (1, 2))
    for part in (dead, alive):
        part.touch()
    os.utime(dead, (0, 0))
    cache_canvases(HandDataset([index], 32), "file")
    assert alive.exists() and not dead.exists()


# -------------------------------------------------------------------------------------------------- terminals
def test_names_that_a_terminal_cannot_print_are_printed_with_escapes(tmp_path):
    root = tmp_path / "фото"
    picture(root / "рука.jpg")
    (root / "снимок.jpg").write_bytes(b"none")
    done = call("prepare_data.py", "folder", root, "--out", tmp_path / "индекс",
                env=ENV | {"PYTHONIOENCODING": "ascii"})
    assert "1 hands" in done.stdout and "\\u0441\\u043d" in done.stdout
    assert len(HandIndex(tmp_path / "индекс")) == 1


# --------------------------------------------------------------------------------------------- packed indices
def test_the_report_shows_the_photographs_of_a_packed_index(hands, checkpoint, tmp_path):
    call("prepare_data.py", "pack", hands / "val", "--out", tmp_path / "packed")
    shown = []
    for index in (HandIndex(hands / "val"), HandIndex(tmp_path / "packed")):
        labels = {"gt_joints": index.columns["joints"], "gt_vertices": index.columns["vertices"]}
        guess = (np.asarray(labels["gt_joints"]), np.asarray(labels["gt_vertices"]))
        _, images, _ = evaluate.show_case(index, synthetic_mano()["f"], guess, labels, 0, "vertices")
        shown.append(images["photograph"])
    assert shown[0].std() > 5
    np.testing.assert_array_equal(*shown)
    refused("the hands of --data themselves", "probe.py", checkpoint.parent / "encoder.pt", "--data",
            hands / "val", "--train", tmp_path / "packed", "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------- files from strangers
class TwoHands(SimpleNamespace):
    """An index, as far as results.py looks at one."""

    def __len__(self):
        return 2


@pytest.mark.parametrize("text", ["[[" + "0," * 3_000_000 + "0]]", "[" * 500, "[" + "[]," * 400_000 + "[]]",
                                  "[[" + "9" * 5000 + "]]"])
@pytest.mark.parametrize("suffix", ["json", "zip"])
def test_a_small_file_of_results_does_not_grow_in_memory(tmp_path, text, suffix):
    """A zip of a few kilobytes says how large it will be, and JSON how many values, before they are read."""
    path = tmp_path / f"pred.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pred.json", text)
    else:
        path.write_text(text)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"pred.{suffix}"):
        results.read_predictions(path, TwoHands(columns={}, meta={}), "freihand")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30e6


def test_a_comparison_leaves_out_what_is_no_number(tmp_path):
    for number, note in enumerate((7, "7" * 400)):
        text = json.dumps({"pa_mpjpe_mm": 6.0 + number, "count": 2, "note": note})
        (tmp_path / f"{number}.json").write_text(text)
    evaluate.compare([f"ours={tmp_path}/{number}.json" for number in (0, 1)], tmp_path / "out")
    row = json.loads((tmp_path / "out/table.json").read_text())["ours"]
    assert row["pa_mpjpe_mm"] == 6.5 and "note" not in row


@pytest.mark.parametrize("name", [b"../secret.png", b"a/../../secret.png", b"/etc/secret.png"])
def test_an_index_names_no_file_outside_of_its_root(tmp_path, name):
    """`root` may be any folder; image and mask lie below it. Written and read."""
    picture(tmp_path / "secret.png")
    picture(tmp_path / "root/good.png")
    columns = {"image": np.array([b"good.png", b"good.png"]), "box": [[0, 0, 40, 40]] * 2}
    for wrong in ("image", "mask"):
        with pytest.raises(ValueError, match=f"column {wrong}: entry 1 does not lie below"):
            write_index(tmp_path / "a", columns | {wrong: np.array([b"good.png", name])}, {}, root="../root")
    write_index(tmp_path / "b", columns, {"name": "b"}, root="../root")
    np.save(tmp_path / "b/image.npy", np.array([b"good.png", name]))
    index = HandIndex(tmp_path / "b")
    with pytest.raises(ValueError, match="does not lie below `root`"):
        index.open_image(1)
    assert HandDataset([index], 32).batch([0, 1])["failed"].tolist() == [-1, 1]


def test_a_box_that_is_none_is_an_unreadable_image(tmp_path):
    """Not an OverflowError, which ends a run."""
    picture(tmp_path / "good.png")
    boxes = [[0, 0, 40, 40], [0, 0, np.inf, 40], [np.nan] * 4, [9, 9, 9, 9], [0, 0, 1e30, 9]]
    write_index(tmp_path, {"image": np.array([b"good.png"] * 5), "box": [boxes[0]] * 5}, {"name": "x"})
    np.save(tmp_path / "box.npy", np.float32(boxes))
    assert HandDataset([HandIndex(tmp_path)], 32).batch(range(5))["failed"].tolist() == [-1, 1, 2, 3, 4]


@pytest.mark.parametrize("name, words", [("hand", "another hand model"), ("box_scale", "box_scale")])
def test_a_checkpoint_without_a_value_is_refused_in_a_line(hands, checkpoint, tmp_path, name, words):
    state = torch.load(checkpoint, weights_only=True)
    del state[name]
    torch.save(state, tmp_path / "last.pt")
    ours = ["--checkpoint", tmp_path / "last.pt", "--out", tmp_path / "out"]
    refused(words, "evaluate.py", "--data", hands / "val", *ours)
    refused(words, "predict.py", picture(tmp_path / "a.png"), *ours)


def test_an_encoder_of_other_things_than_tensors_is_refused_in_a_line(checkpoint, tmp_path):
    whole = torch.load(checkpoint.with_name("encoder.pt"), weights_only=True)
    name = next(name for name in whole["state_dict"] if name.startswith("blocks."))
    for wrong in (-1, "text", None):
        torch.save(whole | {"state_dict": whole["state_dict"] | {5: 0, name: wrong}}, tmp_path / "encoder.pt")
        with pytest.raises(ValueError, match="encoder.pt: not a plain vit_micro"):
            load_encoder(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="--resume: the checkpoint's encoder cannot be rebuilt"):
        choose_encoder(None, None, 32, saved={"arch": 2 ** 31, "config": whole["config"]})


def test_readers_take_the_cores_that_are_lent_to_them(monkeypatch):
    """A container or a queue may lend fewer than the machine has."""
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    class Pool:
        def __init__(self, workers):
            asked.append(workers)

        def __enter__(self):
            return SimpleNamespace(map=lambda function, items, chunksize: map(function, items))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(layouts, "ProcessPoolExecutor", Pool)
    assert layouts._in_parallel(abs, list(range(6400)), 0, "x") == list(range(6400)) and asked == [3]


@pytest.mark.parametrize("is_packed", [False, True])
def test_loaders_work_where_processes_are_spawned(hands, tmp_path, monkeypatch, is_packed):
    """As on macOS and Windows: what a process of the loader needs goes there pickled."""
    path = hands / "val"
    if is_packed:
        call("prepare_data.py", "pack", hands / "val", "--out", tmp_path / "packed")
        path = tmp_path / "packed"
    dataset = HandDataset([HandIndex(path)], 32, labels=("joints", "joints2d"))
    expected = dataset.batch(range(8))  # and a pack is open now
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        (batch,) = make_loader(dataset, batch_size=8, workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value)


# ----------------------------------------------------------------------------- joints unknown, pictures twice
def changed_index(path, source, **change):
    """A copy of an index with other columns, whose unknown labels are NaN."""
    index = HandIndex(source)
    columns = {name: np.array(value) for name, value in index.columns.items()}
    changed = {name: value(columns[name]) for name, value in change.items()}
    write_index(path, columns | changed, {"name": "changed", "partial": True}, root=source)
    return path


def test_hands_whose_wrist_is_never_known_are_left_out_or_refused_in_a_line(hands, checkpoint, tmp_path):
    """No joint is taken for (0, 0). As in AssemblyHands and InterHand2.6M, where joints are missing."""
    def without_wrist(points):
        points[:, 0] = np.nan
        return points

    index = changed_index(tmp_path / "index", hands / "train", joints2d=without_wrist, joints=without_wrist)
    out = tmp_path / "out"
    refused("--weights none", "pretrain_contrastive.py", "--data", index, "--labelled", "--method", "peclr",
            "--weights", "both", "--out", out)
    refused("nothing to mine", "mine_pairs.py", "--data", index, "--labelled", "--out", out / "pairs.npz")
    tiny = ["--arch", "vit_micro", "--image-size", 32, "--batch-size", 4, "--workers", 0, "--steps", 1]
    for command in (["pretrain_contrastive.py", "--labelled", "--method", "peclr", "--weights", "none"],
                    ["finetune_mesh.py", "--val", index, "--head-width", 32]):
        call(*command, "--data", index, *tiny, "--out", tmp_path / command[0])
        losses = [row["loss"] for row in log(tmp_path / command[0]) if "loss" in row]
        assert np.isfinite(losses).all()
    refused("only the protocols assemblyhands and interhand leave out missing joints", "evaluate.py",
            "--data", index, "--checkpoint", checkpoint, "--out", out)


def test_pictures_that_are_in_two_videos_are_told(hands, tmp_path):
    """Hand by hand: rows 12 to 23 show what rows 0 to 11 show, under other videos."""
    def twice(values):
        return np.concatenate([values[:12], values[:12]])

    def other_videos(values):
        return np.concatenate([values[:12], values[:12] + 100])

    change = dict.fromkeys(HandIndex(hands / "train").columns, twice) | {"video": other_videos}
    index = changed_index(tmp_path / "index", hands / "train", **change)
    mine = ["mine_pairs.py", "--data", index, "--labelled", "--neighbours", 2]
    told = "24 hands have a neighbour with the very same points"
    assert told in call(*mine, "--out", tmp_path / "a.npz").stdout
    passed = call(*mine, "--out", tmp_path / "b.npz", "--least-distance", 0.01).stdout
    assert "very same points" not in passed
    assert np.load(tmp_path / "b.npz")["dist"].min() >= 0.01
