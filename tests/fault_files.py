"""Valid files of every kind that the project reads, damaged at random, before the commands that read them:
the section `files` of faults.py.

A case is one file with one change; the first case of each kind has none. The command must read it, or refuse
it in a line, within 20 s and 2 GB. It must run nothing that stands in the file, leave nothing half-written,
and all other files as they were."""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import struct
import unicodedata
import zipfile
import zlib

import numpy as np
import test_layouts
import torch
from fault_runs import broken, call, leftovers, once
from fixtures import random_mano, write_official_pickle
from PIL import Image

MEMORY = 2048  # MB
TRAINING = ["--image-size", 32, "--batch-size", 4, "--steps", 1, "--workers", 0, "--out", "out"]
MESH = ["finetune_mesh.py", "--val", "hands", "--init", "encoder.pt", "--head-width", 32, "--iterations", 1,
        *TRAINING]
EVALUATE = ["evaluate.py", "--checkpoint", "mesh/last.pt", "--out", "out", "--data"]
PREDICT = ["predict.py", "photos", "--checkpoint", "mesh/last.pt", "--out", "out"]
FOLDER = ["prepare_data.py", "folder", "photos", "--out", "out"]
VIDEO = ["prepare_data.py", "video", "frames", "--every", 1, "--out", "out", "--detections"]
SCORE = ["evaluate.py", "--data", "hands", "--out", "out", "--predictions"]
MAKE = ["make_synthetic.py", "--hands", 2, "--size", 64, "--workers", 1, "--out", "out", "--mano"]
PREPARE = ["prepare_data.py", "--out", "out", "--mano", "mano.npz"]
PROBE = ["probe.py", "encoder.pt", "--data", "hands", "--out", "out"]
CONTRAST = ["pretrain_contrastive.py", "--data", "hands", "--labelled", "--init", "encoder.pt", *TRAINING]
OF_INDEX = [["mine_pairs.py", "--labelled", "--out", "out/pairs.npz", "--data", "hands"],
            [*EVALUATE, "hands"], [*MESH, "--data", "hands"], PROBE,
            ["prepare_data.py", "pack", "hands", "--out", "out"]]
# kind: files that are damaged (of which "{}" in a command is the one), and commands that read them
KINDS = {
    "photos": ("photos/*.*g photos/*.tif", [PREDICT, FOLDER]),
    "names": ("photos/*.*g photos/*.tif", [[*PREDICT, "--boxes", "photos/boxes.csv"], PREDICT,
                                           [*FOLDER, "--boxes", "photos/boxes.csv"], FOLDER]),
    "boxes": ("photos/boxes.csv", [[*PREDICT, "--boxes", "{}"], [*FOLDER, "--boxes", "{}"]]),
    "index.json": ("hands/index.json", OF_INDEX),
    "columns": ("hands/*.npy", OF_INDEX),
    "images of an index": ("hands/images/*", OF_INDEX),
    "packed": ("packed/*.npy packed/*.bin packed/index.json",
               [[*EVALUATE, "packed"], [*MESH, "--data", "packed"]]),
    "canvases": ("hands/canvases*.bin", [[*MESH, "--data", "hands", "--cache", "file"]]),
    "pairs": ("pairs.npz", [[*CONTRAST, "--pairs", "{}"]]),
    "encoder.pt": ("encoder.pt", [["pretrain_mim.py", "--data", "hands", "--init", "{}", *TRAINING], PROBE]),
    "last.pt": ("mesh/last.pt", [PREDICT, [*EVALUATE, "hands"]]),
    "run": ("out/last.pt out/config.json out/log.jsonl", [[*MESH, "--data", "hands", "--resume"]]),
    "predictions": ("results/pred.*", [[*SCORE, "{}"]]),
    "metrics": ("results/metrics.json", [["evaluate.py", "--out", "out", "--compare", "a={}", "b={}"]]),
    "mano": ("mano.*", [[*MAKE, "{}"], [*SCORE, "results/pred.json", "--mano", "{}"]]),
    "freihand": ("freihand/*.json", [["prepare_data.py", "freihand", "freihand", "--out", "out"]]),
    "ho3d": ("ho3d/train.txt ho3d/train/*/meta/*", [[*PREPARE, "--workers", 1, "ho3d", "ho3d"]]),
    "dexycb": ("dexycb/calibration/*/*.yml dexycb/*subject-01/*/*/*.npz dexycb/*subject-01/*/meta.yml",
               [[*PREPARE, "--workers", 1, "dexycb", "dexycb"]]),
    "assemblyhands": ("assemblyhands/annotations/*/*", [[*PREPARE[:3], "--split", "val", "assemblyhands",
                                                         "assemblyhands"]]),
    "interhand": ("interhand/annotations/*/*", [[*PREPARE, "--split", "val", "interhand", "interhand"]]),
    "hand100m": ("frames/annotations/*/*", [["prepare_data.py", "hand100m", "frames", "--out", "out"]]),
    "detections": ("seen.npz seen.csv", [[*VIDEO, "{}"]]),
    "frames": ("frames/film/*.png", [[*VIDEO, "seen.csv"]]),
}
if importlib.util.find_spec("cv2"):
    KINDS["videos"] = ("frames/*.avi", [[*VIDEO, "seen.csv"]])
ODD_NAMES = ["a\nb", "a\tb", " b ", "-rf", "a,b", 'a"b', "a'b", "a;b&c", "%s%n", "{0}", "$(touch hostile)",
             "a\\b", "\x1b[31m", ".b", "b.", "x" * 240, "\u624b", "\U0001f590",
             unicodedata.normalize("NFD", "h\u00e4nde"), os.fsdecode(b"\xff\xfe")]
ODD_VALUES = [float("nan"), float("inf"), 1e308, -1e38, 10 ** 30, -1, 0, 2 ** 31, None, "", "x", "../../etc",
              [], {}, [[]], True, 1e-320, "9" * 400, "\ud800"]


class Hostile:
    """What a pickle must not be allowed to do."""

    def __reduce__(self):
        return os.system, ("touch hostile",)


# ------------------------------------------------------------------------------------------------ valid files
def make_files(folder):
    """One small valid file, at least, of every kind in KINDS; by the commands and the tests' own writers."""
    def make(*command):
        status, said, _ = call(folder, command)
        if status != 0:
            raise RuntimeError(f"{command}: {said[-2000:]}")

    base = folder.parent / "base"
    shutil.copy(base / "encoder.pt", folder)
    make("make_synthetic.py", "--out", "hands", "--hands", 24, "--videos", 6, "--size", 64, "--workers", 1)
    make("mine_pairs.py", "--data", "hands", "--labelled", "--out", "mined/pairs.npz")
    shutil.move(folder / "mined" / "pairs.npz", folder)
    make("prepare_data.py", "pack", "hands", "--out", "packed")
    make(*MESH, "--data", "hands", "--cache", "file")
    shutil.copytree(folder / "out", folder / "mesh")
    make(*EVALUATE[:-2], "results", "--data", "hands")
    arrays = random_mano()
    np.savez(folder / "mano.npz", **arrays)
    write_official_pickle(folder / "mano.pkl", arrays)
    test_layouts.write_freihand(folder / "freihand", count=20)
    test_layouts.write_ho3d(folder / "ho3d")
    test_layouts.write_dexycb(folder / "dexycb", sequences=1, frames=1)
    test_layouts.write_assemblyhands(folder / "assemblyhands")
    test_layouts.write_interhand(folder / "interhand")
    _make_photos(folder)


def _make_photos(folder):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # (96,128,3)
    (folder / "photos").mkdir()
    (folder / "frames" / "film").mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "photos" / "a.jpg")
    Image.fromarray(pixels).save(folder / "photos" / "b.png")
    Image.fromarray(pixels).save(folder / "photos" / "c.tif")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "photos" / "d.tif")
    Image.fromarray(pixels[..., 0] / np.float32(255)).save(folder / "photos" / "e.tif")
    lines = [f"{name},20,10,90,80,{side}" for name, side in zip(
        ("a.jpg", "b.png", "c.tif", "d.tif", "e.tif"), ("right", "left") * 3, strict=False)]
    (folder / "photos" / "boxes.csv").write_text("\n".join(["image,x0,y0,x1,y1,side", *lines]) + "\n")
    points = rng.uniform(20, 90, (3, 21, 2))
    names = [f"film/{number:03d}.png" for number in range(3)]
    for name in names:
        Image.fromarray(pixels).save(folder / "frames" / name)
    np.savez(folder / "seen.npz", image=np.array(names), side=np.array(["right", "left", "right"]),
             keypoints=points, score=np.full(3, 0.9))
    head = ["image", "side", "score", *(f"{axis}{joint}" for joint in range(21) for axis in "xy")]
    rows = [",".join(map(str, [name, "right", 0.9, *hand.ravel()])) for name, hand in zip(names, points,
                                                                                          strict=True)]
    (folder / "seen.csv").write_text("\n".join([",".join(head), *rows]) + "\n")
    hands = [{"hand_id": str(k), "image_id": k, "boxes": "[20, 20, 90, 90]", "left_right": "Right",
              "keypoint_25d": np.c_[(points[k] - 10) / 90, np.zeros(21)].ravel().tolist(),
              "positive_sample": [str((k + 1) % 3)], "distance": [0.5]} for k in range(3)]
    images = [{"id": k, "file_name": f"their/disk/{name}"} for k, name in enumerate(names)]
    test_layouts.write(folder / "frames" / "annotations" / "Ego4D" / "Hand100M_Ego4D_50k_v1-1.json",
                       {"images": images, "annotations": hands})
    if "videos" in KINDS:
        import cv2
        kind = cv2.VideoWriter_fourcc(*"MJPG")
        video = cv2.VideoWriter(str(folder / "frames" / "v.avi"), kind, 10, (128, 96))
        for _ in range(9):
            video.write(pixels)
        video.release()


# ----------------------------------------------------------------------------------------------------- damage
def of_bytes(path, rng):
    """Any file: bits flipped, cut, repeated, zeroed, inserted, or nothing left."""
    data = bytearray(path.read_bytes())
    at, length = int(rng.integers(max(1, len(data)))), int(rng.integers(1, 400))
    if rng.random() < 0.4:  # headers
        at = int(rng.integers(min(max(1, len(data)), 200)))
    how = rng.choice(["flip", "cut", "repeat", "zero", "insert", "empty"], p=[.4, .2, .1, .1, .15, .05])
    if how == "flip":
        for place in rng.integers(0, max(1, len(data)), rng.integers(1, 8)) if len(data) else ():
            data[place] ^= 1 << int(rng.integers(8))
    elif how == "insert":
        data[at:at] = rng.bytes(length)
    else:
        changed = {"cut": data[:at], "repeat": data[:at + length] + data[at:], "empty": b"",
                   "zero": data[:at] + bytes(length) + data[at + length:]}
        data = changed[how]
    path.write_bytes(bytes(data))
    return f"{how} at {at}"


def of_json(path, rng):
    """A value replaced, a key dropped, an entry twice, endless nesting."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    which = int(rng.integers(len(lines)))
    holder, key = [json.loads(lines[which])], 0
    whole = holder
    for _ in range(rng.integers(1, 7)):
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, keys[int(rng.integers(len(keys)))]
    how = rng.choice(["replace", "drop", "double", "nest", "name"], p=[.5, .2, .1, .1, .1])
    if how == "drop" and holder is not whole:
        del holder[key]
    elif how == "double" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif how == "name" and isinstance(holder, dict):
        holder[ODD_NAMES[rng.integers(len(ODD_NAMES))]] = holder.pop(key)
    else:
        holder[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    lines[which] = json.dumps(whole[0])
    if how == "nest":
        lines[which] = "[" * 100_000 + lines[which] + "]" * 100_000
    path.write_text("\n".join(lines))
    return f"{how} {key}"


def of_text(path, rng):
    """CSV, YAML, lists: a word replaced, a line dropped or doubled, other encodings, a very long line."""
    text = path.read_text()
    lines = text.splitlines()
    which = int(rng.integers(len(lines)))
    how = rng.choice(["word", "drop", "double", "utf-16", "long", "nul"], p=[.6, .1, .1, .05, .05, .1])
    if how == "word":
        words = re.split(r"([,:\s])", lines[which])
        value = str(ODD_VALUES[rng.integers(len(ODD_VALUES))]).replace("\ud800", "\ufffd")
        words[2 * int(rng.integers((len(words) + 1) // 2))] = value
        lines[which] = "".join(words)
    elif how in ("drop", "double"):
        lines[which:which + 1] = [lines[which]] * (2 if how == "double" else 0)
    else:
        lines[which] = {"utf-16": lines[which], "long": "9" * 1_000_000, "nul": "\0" * 9 + lines[which]}[how]
    path.write_text("\n".join(lines) + "\n", encoding="utf-16" if how == "utf-16" else "utf-8")
    return f"{how} in line {which + 1}"


def odd_array(array, rng):
    """An array of other numbers, type or shape; or one that would run code when it is read."""
    flat = np.array(array).ravel()
    how = rng.choice(["numbers", "huge", "shape", "short", "type", "hostile"], p=[.35, .25, .1, .1, .1, .1])
    if how in ("numbers", "huge") and flat.size and flat.dtype.kind in "fiu":
        values = {"f": [np.nan, np.inf, 1e38, -1e38, 0], "i": [-1, np.iinfo(np.int32).max, 0, -2 ** 31, 7],
                  "u": [255, 254, 2, 1, 0]}[flat.dtype.kind]
        value = values[rng.integers(5)]
        flat[rng.integers(0, flat.size, flat.size if how == "huge" else 3)] = value
        return f"{value}", flat.reshape(np.shape(array))
    if how == "shape":
        return how, np.array(array)[..., None]
    if how == "short":
        return how, np.array(array)[:len(array) // 2] if np.ndim(array) else np.zeros((0, 3))
    if how == "hostile":
        return how, np.array([Hostile()], object)
    return "type", [np.array(array).astype(str), np.zeros(np.shape(array), complex),
                    np.array("text")][rng.integers(3)]


def huge_header(path_or_file, dtype="<f4"):
    """A .npy of a few bytes that says it had a million million numbers."""
    np.lib.format.write_array_header_1_0(path_or_file, {"descr": dtype, "fortran_order": False,
                                                        "shape": (10 ** 6, 10 ** 6)})
    path_or_file.write(bytes(64))


def of_npy(path, rng):
    if rng.random() < 0.1:
        with open(path, "wb") as file:
            huge_header(file)
        return "a huge shape"
    how, array = odd_array(np.load(path), rng)
    np.save(path, array)
    return how


def of_npz(path, rng):
    """An array as in odd_array, dropped, or with a header that asks for memory."""
    with np.load(path, allow_pickle=False) as file:
        content = dict(file)
    name = list(content)[rng.integers(len(content))]
    how = "dropped"
    array = content.pop(name)
    if rng.random() < 0.8:
        how, content[name] = odd_array(array, rng)
    np.savez(path, **content)
    if how == "dropped" and rng.random() < 0.5:
        how = "a huge shape"
        with zipfile.ZipFile(path, "a") as archive, io.BytesIO() as file:
            huge_header(file)
            archive.writestr(f"{name}.npy", file.getvalue())
    return f"{name}: {how}"


def of_pt(path, rng):
    """A tensor or value of a checkpoint replaced or dropped; or a pickle that runs a command."""
    if rng.random() < 0.15:
        torch.save({"kind": "encoder", "state_dict": Hostile()}, path)
        return "hostile"
    holder, key = [torch.load(path, weights_only=True)], 0
    whole = holder
    for _ in range(rng.integers(1, 6)):
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, keys[int(rng.integers(len(keys)))]
    if rng.random() < 0.3 and holder is not whole:
        how = "dropped"
        del holder[key]
    elif isinstance(holder[key], torch.Tensor) and rng.random() < 0.8:
        how, array = odd_array(holder[key].numpy(), rng)
        holder[key] = torch.from_numpy(array) if array.dtype.kind in "fiub" else str(how)
    else:
        how = holder[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    torch.save(whole[0], path)
    return f"{key}: {how!r}"


def of_pickle(path, rng):
    """HO-3D's and MANO's: a command in place of a value; HO-3D's other values too."""
    hostile = rng.random() < 0.3
    if path.name == "mano.pkl":
        if not hostile:
            return of_bytes(path, rng)
        path.write_bytes(pickle.dumps({"v_template": Hostile()}, protocol=2))
        return "hostile"
    content = pickle.loads(path.read_bytes())
    name = list(content)[rng.integers(len(content))]
    if hostile:
        content[name] = Hostile()
    elif rng.random() < 0.3 or not isinstance(content[name], np.ndarray):
        content[name] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    else:
        content[name] = odd_array(content[name], rng)[1]
    path.write_bytes(pickle.dumps(content, protocol=2))
    return name


def of_image(path, rng):
    """Another mode, shape or size of picture under the same name, or a header that says it is huge."""
    data = path.read_bytes()
    width, height = (int(side) for side in rng.choice([1, 9000, 16000, 30000, 65000], 2))
    if rng.random() < 0.4 and path.suffix == ".png":
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
        return f"says {width} x {height}"
    if rng.random() < 0.4 and path.suffix == ".jpg":
        at = data.index(b"\xff\xc0") + 5
        path.write_bytes(data[:at] + struct.pack(">HH", height, width) + data[at + 4:])
        return f"says {width} x {height}"
    kind = rng.choice(["1", "L", "LA", "P", "CMYK", "I;16", "I", "F", "RGBA", "thin", "gif", "tiny"])
    with Image.open(path) as image:
        image = image.convert("RGB")
    if kind in ("thin", "tiny"):
        image = image.resize((1, 5000) if kind == "thin" else (1, 1))
    elif kind != "gif":
        image = image.convert("L").convert(kind) if kind in ("I;16", "I", "F") else image.convert(kind)
    image.save(path, "GIF" if kind == "gif" else "TIFF")
    return kind


def of_zip(path, rng):
    """pred.zip with a member that is damaged, missing, of another name, or a bomb."""
    how = rng.choice(["bomb", "name", "json"])
    with zipfile.ZipFile(path) as archive:
        inner = archive.read("pred.json")
    if how == "bomb":
        inner = b"[" + b"0," * 200_000_000 + b"0]"
    elif how == "json":
        plain = path.with_suffix(".inner")
        plain.write_bytes(inner)
        of_json(plain, rng)
        inner = plain.read_bytes()
        plain.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("../pred.json" if how == "name" else "pred.json", inner)
    return how


OF_SUFFIX = {".json": of_json, ".jsonl": of_json, ".csv": of_text, ".yml": of_text, ".txt": of_text,
             ".npy": of_npy, ".npz": of_npz, ".pt": of_pt, ".pkl": of_pickle, ".zip": of_zip,
             ".jpg": of_image, ".png": of_image, ".tif": of_image}


def rename(path, rng):
    """An odd name, in the file of boxes too."""
    name = ODD_NAMES[rng.integers(len(ODD_NAMES))] + path.suffix
    path.rename(path.with_name(name))
    boxes = path.with_name("boxes.csv")
    quoted = '"' + name.replace('"', '""') + '"'
    boxes.write_text(boxes.read_text().replace(path.name, quoted), errors="surrogateescape", newline="")
    return f"called {name!a}"


# ------------------------------------------------------------------------------------------------------ cases
def case(number, rng, folder, work):
    """One damaged file and a command that reads it. Returns what is wrong, or an empty text."""
    valid = work / "files"
    once(valid, make_files)
    kind = list(KINDS)[number % len(KINDS)]
    patterns, commands = KINDS[kind]
    command = commands[rng.integers(len(commands))]
    words = " ".join(map(str, command)) + " " + patterns
    for path in valid.iterdir():
        if re.search(rf"(^|[ =]){re.escape(path.name)}|\b{path.stem}\.\*", words) and path.name != "out":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    if kind == "run":
        shutil.copytree(valid / "mesh", folder / "out")
    damaged = sorted(path for pattern in patterns.split() for path in folder.glob(pattern) if path.is_file())
    path = damaged[rng.integers(len(damaged))]
    terminal = "ascii" if rng.random() < 0.2 else "utf-8"
    change = of_bytes if rng.random() < 0.3 else OF_SUFFIX.get(path.suffix, of_bytes)
    command = [str(word).format(path.relative_to(folder)) for word in command]
    what = "as it was"
    if number >= len(KINDS):  # before that, what is valid must be read
        what = rename(path, rng) if kind == "names" else change(path, rng)
    before = _facts(folder)
    status, said, memory = call(folder, command, limit=20, memory=MEMORY, terminal=terminal)
    problem = judge(folder, command, status, said, memory, before)
    if what == "as it was" and status != 0:
        problem = f"refused: {said[-2000:]}"
    return problem and f"{' '.join(command)}\n    {path.relative_to(folder)!s:.60}: {what!a}\n    {problem}"


def judge(folder, command, status, said, memory, before):
    """What is wrong with how a command ended before a damaged file."""
    lines = [line.strip(" \x1b[A") for line in said.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    if (folder / "hostile").exists():
        return "the file ran a command"
    if status is None:
        return "still at work after 20 s"
    if status not in (0, 2) or "Traceback" in said:
        return f"status {status}: {said[-3000:]}"
    if status == 2 and not (lines and lines[-1].startswith("error") and len(lines[-1]) > 20):
        return f"refused without a line of its own at the end: {said[-1000:]}"
    if "codec can't encode" in said:
        return f"a name that cannot be printed ends it: {said[-1000:]}"
    if memory > MEMORY:
        return f"{memory:.0f} MB"
    if _facts(folder) != before:
        return f"other files than --out have changed: {_facts(folder) ^ before}"
    left = [] if "--resume" in command else broken(folder / "out")  # which was damaged
    left += [path for path in leftovers(folder) if path not in {name for name, *_ in before}]
    goes_on = {"video", "hand100m"} & set(command)  # where it was stopped
    if command[0] == "prepare_data.py" and status == 2 and not goes_on:
        left += [str(path) for path in (folder / "out").rglob("*")]
    return f"half-written: {left[:5]}" if left else ""


def _facts(folder):
    """{(name, size, time)} of the files outside of --out; canvases are kept beside their index."""
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and "out" not in path.relative_to(folder).parts and path.suffix != ".bin"}
