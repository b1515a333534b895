"""The result files of the leaderboards, read and written: FreiHAND, HO-3D, DexYCB, AssemblyHands.

In memory, predictions are joints (N,21,3) in FreiHAND's order and vertices (N,778,3) or None, metres, in each
hand's camera frame (x right, y down, z forward), a row for each hand of an index. In the files:

    freihand        pred.json, pred.zip   [joints, vertices], the same order and frame, a hand for each entry
                                          of the official list
    ho3d            pred.json, pred.zip   the same; joints in MANO's order, y up and z backward
    dexycb          pred.txt              a line an image: its number in the split, from 0, and 63 numbers
                                          in mm, with commas, without a header
    assemblyhands   pred_world.json       {"annotations": {sequence: {frame: {"world_coord": 42 x 3}}}}, mm,
                                          world frame, right hand first, tip first in each finger

An index is any object with `columns` (dict of arrays), `meta` (dict), len(), side(row) and label(row), as
data.HandIndex. Its column `number` gives a hand's place in the official list, `meta["frames"]` the list's
length.

Example::

    from types import SimpleNamespace
    import json, numpy as np
    from pathlib import Path
    from results import read_predictions, write_predictions

    class Index(SimpleNamespace):
        def __len__(self):
            return 2

    index = Index(columns={}, meta={})
    joints, vertices = np.zeros((2, 21, 3)), np.zeros((2, 778, 3))
    write_predictions(Path("."), joints, vertices, "freihand", index)          # pred.json, pred.zip
    again, _ = read_predictions("pred.zip", index, "freihand")
    assert np.array_equal(again, joints)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

OPENGL = np.array([1.0, -1.0, -1.0])  # OpenCV's camera axes to HO-3D's, and back
# FreiHAND[i] = MANO[MANO_TO_FREIHAND[i]], MANO = the file's 16 joints and five tips, as HO-3D stores them;
# mano.py has the same table, and a test holds them equal.
MANO_TO_FREIHAND = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
FREIHAND_TO_MANO = [MANO_TO_FREIHAND.index(i) for i in range(21)]
ZIP_MARK = b"hands, predictions of evaluate.py"  # comment of every pred.zip that is written here
HAND_BYTES = 100_000  # most of a hand in a JSON file: 799 points of three numbers of 40 digits
HAND_VALUES = 4000  # most values of a hand there, lists counted
# FreiHAND's joint at each place of AssemblyHands' order: tip first in each finger, the wrist last.
TIP_FIRST = [4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17, 0]


# ---------------------------------------------------------------------------------------------------- reading
def read_predictions(path: Path | str, index, protocol: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Joints (N,21,3) and vertices (N,778,3) or None from a file of results; ValueError names file and mend.

    The file is DexYCB's text, the JSON of the AssemblyHands challenge, or [joints, vertices], plain or in a
    .zip. The two lists have an entry for each hand of the index, or for each of the official list."""
    suffix = Path(path).suffix
    if protocol == "dexycb" and suffix not in (".json", ".zip"):
        return _read_dexycb(path, index), None
    frames = sum(map(len, index.meta.get("sequences", {}).values()))
    content = _read_json(path, hands=max(len(index), index.meta.get("frames", 0), frames))
    if protocol == "assemblyhands" and isinstance(content, dict):
        return _read_world(path, content, index), None
    if not isinstance(content, list) or len(content) not in (1, 2):
        raise ValueError(f"{path}: needs [joints, vertices], two lists with one entry a hand")
    joints = _read_points(path, content[0], "joints", 21, index)
    vertices = None
    if len(content) == 2 and content[1]:
        vertices = _read_points(path, content[1], "vertices", 778, index)
    if protocol == "ho3d":
        joints = joints[:, MANO_TO_FREIHAND] * OPENGL
        vertices = None if vertices is None else vertices * OPENGL
    return joints, vertices


def _read_points(path, entries, name, number, index):
    """(N,number,3) of the index' hands from a list with an entry for each of them or of the official list."""
    entries = entries if isinstance(entries, list) else []
    if len(entries) == index.meta.get("frames") != len(index):  # the index lacks some of the official list
        entries = [entries[place] for place in index.columns["number"]]
    if len(entries) != len(index):
        raise ValueError(f"{path}: {len(entries)} entries of {name}, but the index has {len(index)} hands")
    points = _as_array(entries)
    if points is None or points.shape != (len(index), number, 3):
        wrong = [row for row, hand in enumerate(entries) if np.shape(_as_array(hand)) != (number, 3)]
        first = wrong[0] if wrong else 0
        raise ValueError(f"{path}: {name} of hand {first} are not {number} points of 3 numbers")
    return points


def _as_array(nested):
    """Nested lists as float64; None where they are ragged or hold something else than numbers."""
    try:
        return np.asarray(nested, np.float64)
    except (TypeError, ValueError):
        return None


def _read_json(path, hands=math.inf):
    """The JSON in a file, or in the pred.json of a .zip; ValueError or OSError that names the file.

    hands: as many as it may hold. Much more is refused unread: a few kilobytes of a .zip can unpack to
    gigabytes, and a byte of JSON can take thirty in memory."""
    try:
        text = _read_zipped(path, hands) if Path(path).suffix == ".zip" else _read_bytes(path, hands)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, where a JSON file is needed") from None
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > HAND_VALUES * (hands + 10):
        raise ValueError(f"{path}: {values} values, far more than predictions of {hands} hands are")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None


def _read_bytes(path, hands):
    _refuse_large(path, os.path.getsize(path), hands)
    return Path(path).read_bytes()


def _read_zipped(path, hands):
    """The bytes of pred.json in a pred.zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("pred.json").file_size  # what is read never exceeds it
            content = archive.read("pred.json") if size <= HAND_BYTES * (hands + 10) else b""
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile raises a dozen types
        raise ValueError(f"{path}: no zipped pred.json ({type(error).__name__}: {error})") from None
    _refuse_large(path, size, hands)
    return content


def _refuse_large(path, size, hands):
    if size > HAND_BYTES * (hands + 10):
        raise ValueError(f"{path}: {size / 1e6:.0f} MB, far more than predictions of {hands} hands are")


def _read_dexycb(path, index):
    """Joints (N,21,3) from the toolkit's text: a line for each image, its number in the split and 63 numbers
    in mm."""
    found = {}
    try:
        for line in Path(path).read_text().splitlines():
            number, *values = map(float, line.split(","))
            found[int(number)] = np.reshape(values, (21, 3)) / 1000
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, OSError):
        raise ValueError(f"{path}: line {len(found) + 1} is not an image's number and 63 others in mm, with "
                         "commas") from None
    numbers = _official_numbers(index)
    missing = [number for number in numbers if number not in found]
    if missing:
        raise ValueError(f"{path}: image {missing[0]} is missing, as are {len(missing) - 1} others that show "
                         "a hand")
    return np.array([found[number] for number in numbers])


def _read_world(path, content, index):
    """Joints (N,21,3) in each hand's camera from the JSON of the AssemblyHands challenge."""
    joints = np.empty((len(index), 21, 3))
    for row in range(len(index)):
        sequence, frame, extrinsics = _place_in_world(index, row)
        try:
            hands = np.reshape(content["annotations"][sequence][frame]["world_coord"], (2, 21, 3)) / 1000
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: {sequence} {frame} is missing, or not 42 points") from None
        joints[row, TIP_FIRST] = hands[index.side(row)] @ extrinsics[:, :3].T + extrinsics[:, 3]
    return joints


def warn_of_units(joints: np.ndarray, true: np.ndarray, path: Path | str):
    """Warns of two mistakes in a file of results that a similarity fit would hide: other units, and hands
    behind the camera where the labels stand before it.

    joints, true (N,21,3): as read, and the labels, metres, NaN where a label is missing."""
    ratio = _hand_size(joints) / max(_hand_size(true), 1e-9)
    if not 0.2 < ratio < 5:
        print(f"warning: {path}: hands are {ratio:.3g} times as large as the labels'; are they in metres "
              "(pred.txt: mm)?")
    if np.median(joints[:, 0, 2]) < 0 < np.nanmedian(true[:, 0, 2]):
        print(f"warning: {path}: hands lie behind the camera; is it in the frame of another --protocol?")


def warn_of_order(joints: np.ndarray, vertices: np.ndarray, true: np.ndarray, true_vertices: np.ndarray,
                  path: Path | str):
    """Warns where joints lie elsewhere in their meshes than the labels do in theirs, and another order of
    them would fit.

    joints (N,21,3), vertices (N,778,3): as read; true, true_vertices: the labels. No hand model is needed."""
    some = np.unique(np.linspace(0, len(joints) - 1, 64).astype(int))
    hands = [points[some] for points in (joints, vertices, true, true_vertices)]
    hands = [hand for hand in zip(*hands, strict=True) if all(np.isfinite(points).all() for points in hand)]
    if not hands:
        return
    near = np.mean([cdist(*label) for _, _, *label in hands], 0).argmin(1)  # (21,) vertices
    apart = np.mean([cdist(own, mesh[near]) for own, mesh, *_ in hands], 0)  # (21, 21)
    place = linear_sum_assignment(apart)[1]  # of each joint in the labels' order
    if apart.diagonal().mean() > 1.5 * apart[range(21), place].mean():
        moved = int(np.flatnonzero(place != np.arange(21))[0])
        print(f"warning: {path}: joints stand in another order than their meshes: number {moved} lies where "
              f"the labels have number {place[moved]}, and so on; needed is the order of --protocol "
              "(top of results.py)")


def _hand_size(joints):
    """The median distance of joints from their wrist."""
    return np.nanmedian(np.linalg.norm(joints - joints[:, :1], axis=2))


# ---------------------------------------------------------------------------------------------------- writing
def write_predictions(folder: Path, joints: np.ndarray, vertices: np.ndarray | None, protocol: str, index):
    """Writes the files of a leaderboard into `folder`. Hands of the official list that the index lacks are
    zeros.

    DexYCB and AssemblyHands get their own file too, and a pred.json without meshes.
    """
    numbers = _official_numbers(index)
    entries = max(index.meta.get("frames", 0), len(index))
    if protocol == "dexycb":
        _write_dexycb(folder / "pred.txt", joints, numbers)
        numbers = list(range(len(index)))  # pred.json is ours alone here: a hand of the index after the other
        entries = len(index)
        vertices = None
    elif protocol == "assemblyhands":
        if "extrinsics" in index.columns:
            (folder / "pred_world.json").write_text(json.dumps(_to_world(index, joints)))
        vertices = None
    elif protocol == "ho3d":
        joints = joints[:, FREIHAND_TO_MANO] * OPENGL
        vertices = None if vertices is None else vertices * OPENGL
    rows = {number: row for row, number in enumerate(numbers)}
    with open(folder / "pred.json", "w") as file:  # a hand at a time: a large set would not fit in memory
        file.write("[")
        _write_points(file, joints, rows, entries)
        file.write(", ")
        _write_points(file, vertices, rows, entries)
        file.write("]")
    with zipfile.ZipFile(folder / "pred.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "pred.json", "pred.json")
        archive.comment = ZIP_MARK


def is_own_zip(path: Path | str) -> bool:
    """True for a pred.zip that write_predictions wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == ZIP_MARK
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _write_points(file, points, rows, entries):
    """Writes a JSON list of `entries` hands. Number n is points[rows[n]], or zeros without such a row. The
    list is empty where points are None."""
    file.write("[")
    for number in range(entries if points is not None else 0):
        hand = points[rows[number]] if number in rows else 0 * points[0]
        file.write((", " if number else "") + json.dumps(hand.tolist()))
    file.write("]")


def _write_dexycb(path, joints, numbers):
    with open(path, "w") as file:
        for number, hand in zip(numbers, joints.reshape(-1, 63), strict=True):
            file.write(",".join([str(number), *(f"{1000 * value:.10g}" for value in hand)]) + "\n")


def _to_world(index, joints):
    """The challenge's file: joints in the world for every frame of the official list. Each is the mean over
    the cameras that see the hand, zeros where no camera does."""
    official = index.meta.get("sequences", {})
    sums = {}
    for sequence, frames in official.items():
        sums[sequence] = {frame: np.zeros((2, 21, 4)) for frame in frames}
    for row in range(len(index)):
        sequence, frame, extrinsics = _place_in_world(index, row)
        world = (joints[row] - extrinsics[:, 3]) @ extrinsics[:, :3]
        hands = sums.setdefault(sequence, {}).setdefault(frame, np.zeros((2, 21, 4)))
        hands[index.side(row)] += np.c_[1000 * world[TIP_FIRST], np.ones(21)]  # mm, and how many cameras
    annotations = {}
    for sequence, frames in sums.items():
        annotations[sequence] = {}
        for frame, hands in frames.items():
            mean = hands[..., :3] / np.maximum(hands[..., 3:], 1)
            annotations[sequence][frame] = {"world_coord": mean.reshape(42, 3).tolist()}
    return {"annotations": annotations}


# ------------------------------------------------------------------------------------------ the official list
def _official_numbers(index):
    """The place of each hand in the data set's official list."""
    return np.asarray(index.columns.get("number", np.arange(len(index)))).tolist()


def _place_in_world(index, row):
    """Sequence, frame and extrinsics (3,4) of a hand of AssemblyHands, whose images are
    SEQUENCE/CAMERA/FRAME.jpg."""
    name = os.fsdecode(bytes(index.columns["image"][row])).removesuffix(".jpg")
    sequence, _, frame = name.rsplit("/", 3)[-3:]
    return sequence, frame, np.asarray(index.columns["extrinsics"][index.label(row)], np.float64)
