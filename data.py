"""Hands on disk to batches: the index, decoding, square canvases, the order of hands in training.

The index is a folder: `index.json` and one `.npy` file a column. Columns are memory-mapped, so two million
hands open in milliseconds and the loader's processes share the pages.

  one row a hand
    image       bytes        path of the image, relative to `root` of index.json
    box         (4,) f4      tight box x0, y0, x1, y1 in pixel-EDGE coordinates (0 .. width)
    size        (2,) i4      width and height of the image (optional, as all that follow)
    side        u1           0 right, 1 left
    video       i4           hands of one video share identity and background; -1 unknown
    label       i4           row of the label columns; without this column, the row itself. Images of one pose
                             (FreiHAND's four backgrounds) share a label and never part in a split
    mask        bytes        path of a picture that shows where the hand is (read_mask); empty: none
    number      i4           place in the data set's official list, which may hold images without a row here
    image_place (3,) i8      of a packed index: number of the pack_NNNN.bin, offset and length in bytes, 0 for
                             a file that was missing. `image` is then only a name
    mask_place  (3,) i8      as image_place
  one row a label (all optional)
    joints2d    (21,2) f4    pixels, pixel-CENTRE coordinates (what K projects to)
    visible     (21,) f4     confidence of joints2d, 0 .. 1
    joints      (21,3) f4    metres, camera frame x right, y down, z forward, FreiHAND order
    vertices    (778,3) f4   metres, the same frame
    pose        (48,) f4     axis-angle: 3 global, 45 articulation
    betas       (10,) f4     MANO shape
    K           (3,3) f4     pinhole camera, pixels
    extrinsics  (3,4) f4     [R | t], world to camera, metres
    scale       f4           length of the middle finger's proximal bone, metres
    keypoints   (21,2) f4    what a detector saw, with keypoints_score (21,) f4; score 0: nothing
    keypoints3d (21,3) f4    its points in space: metres about the hand's middle, axes of the camera

`index.json` holds: format, name, count, labels, root, columns, and

  joints      definition of the 21 joints: "freihand" = regressed from the posed mesh; "ho3d", "manopth" = the
              layer's own with these tips (all names: mano.labelled_joints)
  pose_mean   true: the 45 numbers are offsets to the hand's mean pose
  protocol    how the set is scored
  box         what the boxes were drawn around
  frames, sequences    the official list, for files of results
  reboxed, unseen      rows of hands that are scored although their box was replaced, or is the whole image
  partial     true: unknown labels are NaN (a joint, or all numbers of an entry)
  packs       of a packed index: the sizes of its pack_NNNN.bin in bytes

Left hands are stored as the image shows them. HandDataset mirrors them: in the networks every hand is a right
one. Canvases use the coordinates of views.py: [-1,1], x right, y down, +-1 at the image's edges.

Example::

    import numpy as np
    from PIL import Image
    from data import HandDataset, HandIndex, write_index

    Image.new("RGB", (128, 96)).save("a.png")
    columns = {"image": np.array([b"a.png"]), "box": [[30, 20, 90, 80]]}
    write_index("my_index", columns, {"name": "mine"}, root="..")
    hand = HandDataset([HandIndex("my_index")], canvas=256)[0]
    assert hand["canvas"].shape == (3, 256, 256)

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import posixpath
import shutil
import signal
import sys
import threading
import unicodedata
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

FORMAT = "hand-index-1"
PAIRS_FORMAT = 1  # of pairs.npz; a file without a number was written before there were any and counts as 1
CONTEXT = 2.0  # side of a canvas over the longer side of the box: room to turn and shift a view
HAND_COLUMNS = {"image": None, "mask": None, "box": (4,), "size": (2,), "side": (), "video": (), "label": (),
                "number": (), "image_place": (3,), "mask_place": (3,)}
LABEL_COLUMNS = {"joints2d": (21, 2), "visible": (21,), "joints": (21, 3), "vertices": (778, 3),
                 "pose": (48,), "betas": (10,), "K": (3, 3), "extrinsics": (3, 4), "scale": (),
                 "keypoints": (21, 2), "keypoints3d": (21, 3), "keypoints_score": (21,)}
DTYPES = {"side": np.uint8, "video": np.int32, "label": np.int32, "size": np.int32, "number": np.int32,
          "image_place": np.int64, "mask_place": np.int64}
PACK = "pack_{:04d}.bin"  # files of a packed index
PACK_BYTES = 4 << 30
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
OVERLAY = "hands, overlay of predict.py"  # `Software` in the overlays, which are results and no photographs
OVERLAYS = "overlays.txt"  # in a folder of them, of a video
MOST_FAILED = 100  # images in a row that cannot be read: then the data are not there at all
MAX_PIXELS = 2**28  # a larger image is a mistake or an attack; this is checked before decoding
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns


def canvas_size(image_size: int, window: float = 1.75) -> int:
    """Side of the canvas that has the resolution of views of this side, `window` times the box wide: 256 for
    224 and 1.75. A view of a smaller window is enlarged."""
    return round(image_size * CONTEXT / window)


# ------------------------------------------------------------------------------------------------------ index
def write_index(path: Path | str, columns: dict, meta: dict, root: Path | str = "."):
    """Checks every column, then writes the index folder `path`.

    columns: name -> array as in the table above. meta: for index.json. root: folder of the images, relative
    to `path` or absolute. index.json comes last, so a half-written index never opens. ValueError names the
    column and its first wrong entry; nothing is written then."""
    path = Path(path)
    if (path / "index.json").exists():
        raise ValueError(f"{path} already holds an index: choose another folder or delete it first")
    columns = {name: _as_stored(name, value) for name, value in columns.items()}
    if "image" in columns and columns["image"].dtype.kind == "U":
        columns["image"] = np.char.encode(columns["image"], "utf-8")
    count, labels = check_columns(columns, meta.get("partial", False))
    path.mkdir(parents=True, exist_ok=True)
    for name, value in columns.items():
        np.save(path / f"{name}.npy", value)
    header = {"format": FORMAT, **meta, "count": count, "labels": labels, "root": str(root)}
    header["columns"] = sorted(columns)
    (path / "index.json.part").write_text(json.dumps(header, indent=1))
    os.replace(path / "index.json.part", path / "index.json")


def check_columns(columns: dict, partial: bool = False) -> tuple[int, int]:
    """How many hands and labels the columns hold; ValueError names the column and entry that contradicts the
    format.

    partial: labels may be NaN, of a joint all its coordinates, of other columns all numbers of an entry.
    """
    unknown = set(columns) - set(HAND_COLUMNS) - set(LABEL_COLUMNS)
    if unknown or "image" not in columns or "box" not in columns:
        raise ValueError(f"columns: unknown {sorted(unknown)}, or `image` or `box` is missing")
    count = len(columns["image"])
    if count == 0:
        raise ValueError("no hands: nothing to write")
    labels = count
    if "label" in columns:
        stored = [len(columns[name]) for name in LABEL_COLUMNS if name in columns]
        labels = stored[0] if stored else int(columns["label"].max()) + 1
    for name, value in columns.items():
        of_hands = name in HAND_COLUMNS
        rows = count if of_hands else labels
        shape = HAND_COLUMNS[name] if of_hands else LABEL_COLUMNS[name]
        if len(value) != rows or (shape is not None and value.shape[1:] != shape):
            raise ValueError(f"column {name}: shape {value.shape}, needs ({rows}, {shape})")
        if value.dtype.kind == "f":
            parts = value.reshape(rows, 21 if shape[:1] == (21,) else 1, -1)  # what may be unknown as a whole
            wrong = ~np.isfinite(parts)
            if partial and not of_hands:
                wrong &= ~np.isnan(parts).all(2, keepdims=True)
            _refuse(name, wrong.any((1, 2)), "is not finite")
    box = columns["box"]
    _refuse("box", (box[:, 2] - box[:, 0] < 1) | (box[:, 3] - box[:, 1] < 1), "is thinner than a pixel")
    if "label" in columns:
        _refuse("label", (columns["label"] < 0) | (columns["label"] >= labels), f"is outside 0..{labels - 1}")
    if "side" in columns:
        _refuse("side", columns["side"] > 1, "is neither 0 (right) nor 1 (left)")
    for name in {"image", "mask"} & set(columns):
        wrong = [_leads_out(os.fsdecode(bytes(path))) for path in columns[name]]
        _refuse(name, np.array(wrong), "does not lie below `root`: a relative path without .. is needed")
    for name in {"image_place", "mask_place"} & set(columns):
        _refuse(name, (columns[name] < 0).any(1), "is no place in a pack")
    if "K" in columns:
        _check_cameras(columns)
    return count, labels


def _check_cameras(columns):
    """ValueError where K is no pinhole camera in pixels, or one that cannot belong to its image."""
    K = columns["K"].astype(np.float64)
    no_focal = (K[:, 0, 0] <= 1) | (K[:, 1, 1] <= 1)
    no_pinhole = np.abs(K[:, 2] - [0, 0, 1]).max(1) > 1e-6
    _refuse("K", no_focal | no_pinhole | (np.abs(K).max((1, 2)) > 1e6), "is no pinhole camera in pixels")
    if "size" in columns:
        size = columns["size"].astype(np.float64)
        K = K[columns["label"]] if "label" in columns else K
        focal = K[:, [0, 1], [0, 1]]
        centre = K[:, :2, 2]
        wrong = (focal > 50 * size) | (focal < 0.1 * size) | (centre < -size) | (centre > 2 * size)
        _refuse("K", wrong.any(1), "is out of range for the size of its image")


def _refuse(column, wrong, what):
    """ValueError that names the first entry where wrong (N,) is True."""
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"column {column}: entry {first} {what} ({int(wrong.sum())} such entries)")


class HandIndex:
    """An opened index: `columns` (memory-mapped arrays), `meta` (index.json), `root` (folder of the
    images)."""

    def __init__(self, path):
        self.path = Path(path)
        header = self.path / "index.json"
        if not header.is_file():
            raise ValueError(f"{path} is no index (no index.json): make one with prepare_data.py or "
                             "make_synthetic.py")
        try:
            self.meta = json.loads(header.read_text())
            if self.meta["format"] != FORMAT:
                raise ValueError(f"format {self.meta['format']!r}, this version reads {FORMAT!r}")
            self.columns = {name: np.load(self.path / f"{name}.npy", mmap_mode="r")
                            for name in self.meta["columns"]}
            for name, value in self.columns.items():
                rows = self.meta["count"] if name in HAND_COLUMNS else self.meta["labels"]
                if len(value) != rows:
                    raise ValueError(f"{name}.npy has {len(value)} rows instead of {rows}")
            self.root = self.path / self.meta["root"]
            self.packs = {}  # descriptors, by the pack's number
            for number, size in enumerate(self.meta.get("packs", ())):
                pack = self.path / PACK.format(number)
                found = os.path.getsize(pack)
                if found != size:
                    raise ValueError(f"{pack.name} has {found} bytes instead of {size}")
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{header}: broken index ({error}); prepare it again") from None

    def __reduce__(self):
        return HandIndex, (self.path,)  # a process of the loader maps the files anew: nothing is copied

    def __len__(self):
        return self.meta["count"]

    def image_path(self, row):
        """Where a hand's image lies; in a packed index its name alone, below the index's folder.

        ValueError where it would lie outside of `root`."""
        return self._below_root(self.image_name(row))

    def image_name(self, row):
        """The name of a hand's image, as the index has it."""
        return os.fsdecode(bytes(self.columns["image"][row]))

    def mask_path(self, row):
        """As image_path, of the hand's mask; None without one."""
        name = os.fsdecode(bytes(self.columns["mask"][row])) if "mask" in self.columns else ""
        return self._below_root(name) if name else None

    def _below_root(self, name):
        if _leads_out(name):
            raise ValueError(f"{self.path}: the image {name} does not lie below `root` of index.json: an "
                             "index may name no other files")
        return self.root / name

    def open_image(self, row):
        """What read_image and image_size take for a hand: the path of its image, or its bytes in a pack.

        ValueError or OSError names a pack that does not hold them."""
        return self._packed("image", row) if "image_place" in self.columns else self.image_path(row)

    def open_mask(self, row):
        """As open_image, of the hand's mask, for read_mask; None without one."""
        if "mask_place" in self.columns and self.columns["mask"][row]:
            return self._packed("mask", row)
        return self.mask_path(row)

    def _packed(self, column, row):
        """The PackedFile of a hand's image or mask."""
        name = self.root / os.fsdecode(bytes(self.columns[column][row]))
        number, offset, size = self.columns[f"{column}_place"][row].tolist()
        if size == 0:
            raise FileNotFoundError(f"{name}: was not there when {self.path} was packed")
        pack = self.path / PACK.format(number)
        if number not in self.packs:  # a process of the loader that was forked shares this descriptor
            self.packs[number] = os.open(pack, os.O_RDONLY)
            weakref.finalize(self, os.close, self.packs[number])
        content = os.pread(self.packs[number], size, offset)  # unlike `seek`, it moves nothing that is shared
        if len(content) != size:
            raise ValueError(f"{pack}: there is no {name.name} at {offset}: the pack or {column}_place.npy "
                             "is damaged; pack the index again")
        return PackedFile(content, name, f"{pack.name} at {offset}")

    def side(self, row):
        """0 right, 1 left."""
        return int(self.columns["side"][row]) if "side" in self.columns else 0

    def label(self, row):
        """The label row of a hand: the same number for all images of one pose."""
        return int(self.columns["label"][row]) if "label" in self.columns else int(row)

    def pose_ids(self):
        """(N,) the label row of every hand."""
        return np.asarray(self.columns["label"]) if "label" in self.columns else np.arange(len(self))


def _leads_out(name):
    """True where a name, joined to a folder, may lie outside of it."""
    return os.path.isabs(name) or ".." in name.replace(os.sep, "/").split("/")


class PackedFile(io.BytesIO):
    """The bytes of a file in a pack. As text it is its name and place, for messages; suffix: as Path's."""

    def __init__(self, content, path, place):
        super().__init__(content)
        self.suffix = path.suffix
        self.text = f"{path} in {place}"

    def __str__(self):
        return self.text


def pack_files(columns: dict, root: Path | str, folder: Path | str):
    """Copies the images and masks that `columns` name, relative to `root`, to pack_0000.bin, ... in `folder`.

    Returns columns image_place (N,3) and, with masks, mask_place, the packs' sizes in bytes for the meta data
    of the index ("packs"), and the names of files that are not there, whose places have length 0. A file that
    is named twice is stored once. FileNotFoundError where none is there."""
    writer = _PackWriter(Path(folder))
    places = {}
    missing = []
    for column in ("image", "mask"):
        if column not in columns:
            continue
        names, first, row_of_name = np.unique(columns[column], return_index=True, return_inverse=True)
        order = np.argsort(first)  # as the index names them: a video's images stay together
        place = np.zeros((len(names), 3), np.int64)
        bar = tqdm(total=len(names), desc=f"{column}s", leave=False)
        with ThreadPoolExecutor(16) as pool:
            for some in np.array_split(order, -(-len(order) // 256)):  # of which the contents are in memory
                paths = [Path(root) / os.fsdecode(bytes(name)) if name else None for name in names[some]]
                for which, path, content in zip(some, paths, pool.map(_content, paths), strict=True):
                    if content:
                        place[which] = writer.add(content)
                    elif path is not None:
                        missing.append(str(path))
                bar.update(len(some))
        bar.close()
        places[f"{column}_place"] = place[row_of_name]
    writer.close()
    if not writer.sizes:
        raise FileNotFoundError(f"{missing[0]}: not there, like all others: nothing to pack")
    return places, writer.sizes, missing


def _content(path):
    """The bytes of a file; none where there is no file."""
    try:
        return b"" if path is None else path.read_bytes()
    except FileNotFoundError:
        return b""


class _PackWriter:
    """Writes one file after the other, each at most PACK_BYTES long unless a single content is longer."""

    def __init__(self, folder):
        self.folder = folder
        self.sizes = []
        self.file = None

    def add(self, content):
        """Number, offset and length of the content, which is appended."""
        if self.file is None or self.sizes[-1] + len(content) > PACK_BYTES:
            self.close()
            self.file = open(self.folder / PACK.format(len(self.sizes)), "wb")  # noqa: SIM115 (close)
            self.sizes.append(0)
        offset = self.sizes[-1]
        self.file.write(content)
        self.sizes[-1] += len(content)
        return len(self.sizes) - 1, offset, len(content)

    def close(self):
        if self.file is not None:
            self.file.close()


def index_fingerprint(tables: list[dict], points: str) -> str:
    """A short text that differs for other hands: of the boxes, videos and the column `points` of tables of
    columns, in order."""
    digest = hashlib.sha256(points.encode())
    for columns in tables:
        for name in ("box", "video", "label", points):
            if name in columns:
                digest.update(np.ascontiguousarray(_as_stored(name, columns[name])))
    return digest.hexdigest()[:16]


def _as_stored(name, value):
    return np.asarray(value, dtype=None if name in ("image", "mask") else DTYPES.get(name, np.float32))


# ----------------------------------------------------------------------------------------------------- images
def read_image(path: Path | str | PackedFile, smallest: int | None = None) -> tuple[Image.Image, float]:
    """The photograph as an upright RGB image, whatever its mode, and its scale. path: or what open_image
    gives.

    A large JPEG is decoded at half, a quarter or an eighth of its size while at least `smallest` pixels a
    side remain; the scale is then below 1. Raises ValueError or OSError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            width = image.width
            if smallest and image.format == "JPEG":
                image.draft("RGB", (smallest, smallest))
            has_two_bytes = any(";16" in str(tile[-1]) for tile in image.tile)  # Pillow drops the lower one
            image.load()
            scale = 1 / 2 ** round(math.log2(width / image.width))  # libjpeg rounds the size, not the scale
            white = _declared_white(image)
            if image.getexif().get(0x0112, 1) != 1:  # otherwise it would only be copied
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = _grey_of_wide(image, white, path)
            elif has_two_bytes and max(high for _, high in _extrema(image)) < 64:
                _tell_once(f"{path}: 16 bits a sample, of which the upper 2 are never used: the picture is "
                           "dark. Scale such pictures to 16 bits")
            if image.mode in ("PA", "LA", "RGBA") or (image.mode == "P" and "transparency" in image.info):
                image = image.convert("RGBA")
            return image if image.mode == "RGB" else image.convert("RGB"), scale
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:  # Pillow raises a dozen types for a broken file
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def _declared_white(image):
    """The value of white in the tags of a TIFF; None where nothing says it."""
    tags = getattr(image, "tag_v2", {})
    for tag in (281, 341):  # MaxSampleValue, SMaxSampleValue
        value = np.ravel(tags.get(tag, ()))
        if len(value) and np.isfinite(value[0]) and value[0] > 0:
            return float(value[0])
    bits = int(np.ravel(tags.get(258, 16))[0])
    return None if bits in (8, 16, 32, 64) else 2.0**bits - 1


def _grey_of_wide(image, white, path):
    """An image of 16 or 32 bits or of floats as 8 bits, where Pillow would clip. white: its value, or None.

    Where the file does not say it, white is the lowest usual value that nothing exceeds; a guess is told."""
    wide = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
    if not white:
        brightest = float(wide.max())
        white = next((value for value in (1, 255, 1023, 4095, 16383, 65535) if brightest <= value), brightest)
        expected = (1, 255) if image.mode == "F" else (65535,)
        if white not in expected and brightest > 0:
            _tell_once(f"{path}: nothing is brighter than {brightest:g}, and the file does not say what "
                       f"white is: it was taken as {white:g}")
    return Image.fromarray((wide * (255 / white) + 0.5).clip(0, 255).astype(np.uint8))


def _extrema(image):
    """(lowest, highest) of every band."""
    extrema = image.getextrema()
    return extrema if isinstance(extrema[0], tuple) else (extrema,)


_TOLD = set()


def _tell_once(text):
    """A warning on stderr, for the first file of its kind that a process reads."""
    kind = text.partition(": ")[2][:20]
    if kind not in _TOLD:
        _TOLD.add(kind)
        print(f"warning: {text} (other files may be alike)", file=sys.stderr)


def read_mask(path: Path | PackedFile) -> Image.Image:
    """The hand's pixels as a grey image, 255 where it is; ValueError names the file. path: or what open_mask
    gives.

    Reads FreiHAND's pictures (white on black), HO-3D's (hand blue, object green) and `seg` of DexYCB's label
    files."""
    if path.suffix != ".npz":
        return read_image(path)[0].getchannel("B").point(lambda value: 255 * (value > 127))
    try:
        file = path if isinstance(path, PackedFile) else io.BytesIO(path.read_bytes())
        with np.load(file, allow_pickle=False) as content:
            return Image.fromarray(np.uint8(255) * (content["seg"] == 255))
    except Exception as error:  # zipfile and numpy raise a dozen types
        raise ValueError(f"{path}: no label file with `seg` ({type(error).__name__}: {error})") from None


def find_backgrounds(folder: Path) -> list[Path]:
    """Paths of the images below --backgrounds. ValueError where there are none, or one cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"--backgrounds {folder}: not a folder")
    found = list_images(folder)
    if not found:
        raise ValueError(f"--backgrounds {folder}: no images there; give a folder of photographs")
    for path in found:  # all at once, so that no set is left half drawn
        read_image(path, smallest=32)
    return found


def list_images(folder: Path | str, skip: Path | str | None = None, left_out: Counter | None = None):
    """The image files below a folder, by their suffix, sorted.

    Links to folders are followed, and no folder is taken twice. Left out: what begins with a dot, the folder
    `skip`, and what this project wrote: indices and runs below the folder, samples.png of an index, the
    overlays of predict.py. left_out: counts what was not taken, by suffix or kind."""
    found = []
    top = os.path.realpath(folder)
    seen = {top} if skip is None else {top, os.path.realpath(skip)}
    _list_below(str(folder), top, seen, found, Counter() if left_out is None else left_out)
    return found


def _list_below(folder, top, seen, found, left_out):
    """Appends the images below a folder. top: the real path of the first; seen: those of all."""
    try:
        with os.scandir(folder) as entries:  # it tells files from folders without a look at each
            entries = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:  # such as lost+found
        left_out["folders that may not be read"] += 1
        return
    names = {entry.name for entry in entries}
    is_top = os.path.realpath(folder) == top
    kind = "indices" if "index.json" in names else "runs" if {"config.json", "log.jsonl"} <= names else ""
    kind = "folders of overlays of predict.py" if OVERLAYS in names else kind
    if kind and not is_top:
        left_out[kind] += 1
        return
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        hand = stem.removesuffix("_all")  # of which an overlay shows all hands
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            is_inside = entry.is_symlink() and real.startswith(top + os.sep)  # taken in its own place
            if real not in seen and not is_inside:
                seen.add(real)
                _list_below(entry.path, top, seen, found, left_out)
        elif not entry.is_file():
            left_out["links that lead nowhere"] += entry.is_symlink()
        elif suffix.lower() not in SUFFIXES:
            left_out[suffix.lower() or "without a suffix"] += 1
        elif "index.json" in names and entry.name == "samples.png":
            left_out["samples.png of an index"] += 1
        elif {f"{hand}.npz", f"{hand}.obj"} <= names and is_overlay(entry.path):
            left_out["overlays of predict.py"] += 1
        else:
            found.append(Path(entry.path))


def is_overlay(path: Path | str) -> bool:
    """True for a picture that predict.py drew."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == OVERLAY
    except Exception:  # Pillow raises a dozen types for a broken file
        return False


def counts_text(counts: Counter) -> str:
    """What list_images left out, in words: "3 .heic, 1 indices"; empty where that was nothing."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)


def image_size(path: Path | str | PackedFile) -> tuple[int, int]:
    """(width, height) of an upright image from its header; ValueError names the file."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            # Newer versions of Pillow have turned a TIFF's size already. Its tags are as it is stored.
            stored = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
            return stored[::-1] if turned else stored
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def square(box, context: float):
    """(centre x, centre y, side) in pixels, each (...), of the squares whose side is `context` times the
    longer side of the boxes (...,4)."""
    x0, y0, x1, y1 = np.moveaxis(np.asarray(box, np.float64), -1, 0)
    return (x0 + x1) / 2, (y0 + y1) / 2, context * np.maximum(x1 - x0, y1 - y0)


def whole_box(size, box_scale: float) -> tuple[float, float, float, float]:
    """The box of an image (width, height) that is itself a hand's crop: a view of box_scale times it is the
    whole image."""
    width, height = size
    half = max(size) / box_scale / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def read_boxes(path: Path | str) -> dict:
    """CSV with the header image,x0,y0,x1,y1[,side], pixels -> {image as written: [(box, side), ...]}.

    side: "right", "left", or None where the file does not say it. The header is read without case and blanks;
    a line on stderr names columns that are not known."""
    boxes = {}
    needed = ("image", "x0", "y0", "x1", "y1")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(line.replace("\0", " ") for line in file)
        try:
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            if not set(needed) <= set(header) or len(set(header)) < len(header):
                raise ValueError(f"{path}: the first line must be image,x0,y0,x1,y1 or image,x0,y0,x1,y1,side"
                                 ", with commas and each once")
            unknown = sorted(set(header) - {*needed, "side"})
            if unknown:
                print(f"warning: {path}: not read: column {', '.join(unknown)} (a hand's side is in `side`)",
                      file=sys.stderr)
            reader.fieldnames = header
            for row in reader:
                found = _box_and_side(row, f"{path}, line {reader.line_num}")
                boxes.setdefault(row["image"], []).append(found)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return boxes


def _box_and_side(row, place):
    """The box and side (or None) in a line of a CSV file; ValueError that begins with `place`."""
    try:
        box = tuple(float(row[key]) for key in ("x0", "y0", "x1", "y1"))
        side = (row.get("side") or "").strip().lower() or None
        usable = 1 <= box[2] - box[0] < 1e6 and 1 <= box[3] - box[1] < 1e6
        if side not in ("right", "left", None) or not usable or not row["image"]:
            raise ValueError
        return box, side
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{place}: needs image,x0,y0,x1,y1[,side] with x0 < x1, y0 < y1 and side right or "
                         "left") from None


def name_key(name: str) -> str:
    """What two spellings of one file's name have in common: composed letters (NFC; macOS writes them apart),
    slashes, no blanks around."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace(os.sep, "/")))


def match_boxes(boxes: dict, images: list[tuple], path: Path | str) -> tuple[list, list]:
    """The hands [(box, side), ...] of every image, and the names in the file of boxes that no image has.

    boxes: of read_boxes(path). images: (path as typed, folder that was given) of each. A name is that of the
    image as typed, else relative to its folder. ValueError names one that several images have."""
    typed = {}
    relative = {}
    for number, (image, folder) in enumerate(images):
        typed.setdefault(name_key(str(image)), []).append(number)
        relative.setdefault(name_key(str(image.relative_to(folder))), []).append(number)
    hands = [[] for _ in images]
    without_image = []
    for name, found in boxes.items():
        owners = typed.get(name_key(name)) or relative.get(name_key(name), [])
        if len(owners) > 1:
            several = " and ".join(str(images[owner][0]) for owner in owners[:2])
            raise ValueError(f"{path}: {name} may be {several}: write the path as on the command line")
        for owner in owners:
            hands[owner] += found
        if not owners:
            without_image.append(name)
    return hands, without_image


def refuse_unread(index, row: int):
    """ValueError or OSError that says why no canvas can be cut for a row of an index."""
    image = index.open_image(row)
    read_image(image)  # says what is wrong with the file
    raise ValueError(f"{image}: its box lies outside the image")


def crop_canvas(image: Image.Image, centre_x, centre_y, side, size: int):
    """The square crop of an image, resized to size x size; where it leaves the image it is padded by
    reflection.

    centre, side: pixels. Returns canvas (size,size,3) u8 and valid (4,) f4: the rectangle x0, y0, x1, y1 of
    real pixels in canvas coordinates. ValueError where the crop does not touch the image."""
    x0, y0 = centre_x - side / 2, centre_y - side / 2
    left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x0 + side), math.ceil(y0 + side)
    beside = right <= 0 or bottom <= 0 or left >= image.width or top >= image.height
    if beside or side > 4 * max(image.size):
        raise ValueError("the box lies outside the image or is far larger than it")
    pixels = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    rows = max(-top, 0), max(bottom - image.height, 0)
    columns = max(-left, 0), max(right - image.width, 0)
    if any(rows) or any(columns):
        pixels = Image.fromarray(np.pad(np.asarray(pixels), (rows, columns, (0, 0)), mode="symmetric"))
    window = (x0 - left, y0 - top, x0 - left + side, y0 - top + side)
    canvas = pixels.resize((size, size), Image.Resampling.BILINEAR, box=window, reducing_gap=2.0)
    edges = np.array([0 - centre_x, 0 - centre_y, image.width - centre_x, image.height - centre_y])
    return np.array(canvas), np.clip(edges / (side / 2), -1, 1).astype(np.float32)


def cut_canvas(image: Path | str | PackedFile, box, context: float, size: int):
    """Canvas and valid of crop_canvas, of the square that is `context` times the box, cut out of an image
    file. A large JPEG is decoded smaller."""
    centre_x, centre_y, side = square(box, context)
    if not (0 < side < 1e7 and abs(centre_x) < 1e7 and abs(centre_y) < 1e7):
        raise ValueError(f"{image}: its box {np.round(box, 1).tolist()} is empty or not finite")
    shrink = size / side  # a JPEG may be decoded smaller, down to this scale
    smallest = int(shrink * image_size(image)[0]) if shrink < 0.5 else None
    photograph, scale = read_image(image, smallest)
    try:
        return crop_canvas(photograph, centre_x * scale, centre_y * scale, side * scale, size)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from None


def crop_mask(path: Path | PackedFile, width, centre_x, centre_y, side, size: int):
    """The mask at `path` of an image `width` pixels wide, cut as crop_canvas cuts the image -> (size,size)
    bool."""
    mask = read_mask(path)
    scale = mask.width / width
    canvas, _ = crop_canvas(mask.convert("RGB"), centre_x * scale, centre_y * scale, side * scale, size)
    return canvas[..., 0] > 127


# ---------------------------------------------------------------------------------------------------- dataset
class HandDataset(torch.utils.data.Dataset):
    """Hands of one or more indices as canvases with their labels, right-handed, in canvas coordinates.

    labels: names of label columns, or "mask". rows: some rows of the concatenated indices (default: all).
    An item is a dict of tensors and numbers; `batch` makes the same of many at once:

      canvas (3,S,S)             u8; absent where a cache on the device has it (cache_canvases)
      valid (4,)                 rectangle of real pixels in canvas coordinates, the rest is padding
      crop (3,)                  centre x, y and side in pixels
      row, source                of the concatenated indices; which index
      mirrored                   1 for a left hand
      failed                     the row whose image could not be read, or -1
      pose_mean                  1 where the pose's 45 numbers are offsets to the hand's mean
      joints2d, keypoints (21,2) canvas coordinates; visible, keypoints_score (21,)
      joints (21,3), vertices (778,3)    metres; pose (48,), betas (10,)
      mask (1,S,S)               u8, 0 or 255
      has_<label>                1 or 0; has_joints asks for the wrist
      known_<label> (21,)        of labels of 21 joints; a `partial` index knows only `visible` joints

    Labels are zero where they are unknown. A file that cannot be read never ends a run. With `substitute`
    the next readable hand takes its place, otherwise the canvas is black; `failed` says so either way.
    """

    def __init__(self, indices, canvas=256, context=CONTEXT, labels=(), rows=None, substitute=True):
        self.indices = list(indices)
        self.canvas = canvas
        self.context = context
        self.labels = tuple(labels)
        self.starts = np.cumsum([0] + [len(index) for index in self.indices])
        self.rows = np.arange(self.starts[-1]) if rows is None else np.asarray(rows, np.int64)
        self.substitute = substitute
        self.cache = None

    def __len__(self):
        return len(self.rows)

    def locate(self, row):
        """(index, its row) of a row of the concatenated indices."""
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.indices[which], int(row - self.starts[which])

    def __getitem__(self, item):
        values = {name: value[0] for name, value in self._load([item]).items()}
        pictures = {name: torch.from_numpy(values[name]) for name in ("canvas", "mask") if name in values}
        return values | pictures

    def batch(self, items):
        """The items of a list of B as one: a dict of tensors (B, ...). An item that comes twice is read
        once."""
        place = {item: number for number, item in enumerate(dict.fromkeys(items))}
        loaded = self._load(list(place))
        if len(place) < len(items):
            places = [place[item] for item in items]
            loaded = {name: value[places] for name, value in loaded.items()}
        return {name: torch.from_numpy(value) for name, value in loaded.items()}

    def _load(self, items):
        """The items of a list of B as one: a dict of arrays (B, ...)."""
        rows, failed, pictures = self._pictures(items)
        sources = np.searchsorted(self.starts, rows, side="right") - 1
        loaded = pictures | {"row": rows, "failed": failed, "source": sources}
        for source in set(sources.tolist()):
            mine = np.flatnonzero(sources == source)
            local = rows[mine] - self.starts[source]
            for name, value in self._entries(self.indices[source], local).items():
                whole = loaded.setdefault(name, np.zeros((len(rows), *value.shape[1:]), value.dtype))
                whole[mine] = value
        return loaded

    def _pictures(self, items):
        """rows (B,) that stand for the items, rows that failed (B,) or -1, and what is cut out of images."""
        rows = self.rows[np.asarray(items, np.int64)]
        failed = np.full(len(rows), -1)
        if self.cache is not None and "mask" not in self.labels and self.cache.readable(rows).all():
            return rows, failed, self.cache.read(rows)
        pictures = self._black(len(rows))
        for place, first in enumerate(rows.tolist()):
            for row in self._rows_for(items[place]):
                try:
                    found = self._cut(row)
                except (ValueError, OSError) as error:
                    failed[place] = first
                    last = error
                    continue
                rows[place] = row
                for name, value in found.items():
                    pictures[name][place] = value
                break
            else:
                if self.substitute:
                    raise ValueError(f"{MOST_FAILED} images in a row cannot be read; the last: {last}")
        return rows, failed, pictures

    def _rows_for(self, item):
        """The row of an item, then the rows that may take its place."""
        steps = min(len(self), MOST_FAILED) if self.substitute else 1
        return (int(self.rows[(item + step) % len(self)]) for step in range(steps))

    def _black(self, count):
        """What _cut returns, for many: black canvases, no real pixels, no masks."""
        size = self.canvas
        black = {"valid": np.zeros((count, 4), np.float32)}
        if self.cache is None or not self.cache.is_on_device:
            black["canvas"] = np.zeros((count, 3, size, size), np.uint8)
        if "mask" in self.labels:
            black["mask"] = np.zeros((count, 1, size, size), np.uint8)
            black["has_mask"] = np.zeros(count, np.float32)
        return black

    def _cut(self, row):
        """A row's canvas, valid rectangle and mask; ValueError or OSError names what cannot be read."""
        if self.cache is None:
            canvas, valid = self.read_canvas(row)
            found = {"canvas": canvas, "valid": valid}
        elif self.cache.readable([row])[0]:
            found = {name: value[0] for name, value in self.cache.read([row]).items()}
        else:
            raise ValueError(f"{self.image_name(row)}: could not be read when the cache was made")
        if "mask" in self.labels:
            found |= self._mask(row)
        return found

    def read_canvas(self, row):
        """canvas (3,S,S) u8 and valid (4,) f4 of a row, cut out of its image; ValueError or OSError names the
        image that cannot be read."""
        index, local = self.locate(row)
        box = index.columns["box"][local]
        canvas, valid = cut_canvas(index.open_image(local), box, self.context, self.canvas)
        if index.side(local):
            canvas = canvas[:, ::-1]
            valid = valid[[2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        return canvas.transpose(2, 0, 1), valid

    def item_bytes(self):
        """Bytes of an item, of which the canvas is most."""
        pictures = sum(value.nbytes for value in self._black(1).values())
        return pictures + sum(4 * math.prod(LABEL_COLUMNS.get(name, ())) for name in self.labels)

    def image_name(self, row):
        """The path of a row's image, for messages."""
        index, local = self.locate(row)
        return str(index.root / index.image_name(local))

    def _entries(self, index, local):
        """What the index itself says of some of its rows (n,): arrays (n, ...)."""
        crop = np.stack(square(index.columns["box"][local], self.context), 1)  # (n,3)
        left = np.zeros(len(local), bool)
        if "side" in index.columns:
            left = index.columns["side"][local] == 1
        mean = np.full(len(local), index.meta.get("pose_mean", True), np.float32)
        entries = {"crop": crop.astype(np.float32), "mirrored": left.astype(np.float32), "pose_mean": mean}
        for name in self.labels:
            if name != "mask":
                entries |= self._label(name, index, local, crop, left)
        return entries

    def _mask(self, row):
        """The label "mask" of a row, {} without one; ValueError or OSError names what cannot be read."""
        index, local = self.locate(row)
        file = index.open_mask(local)
        if file is None:
            return {}
        crop = square(index.columns["box"][local], self.context)
        mask = crop_mask(file, image_size(index.open_image(local))[0], *crop, self.canvas)
        return {"mask": 255 * np.uint8(mask[:, ::-1] if index.side(local) else mask), "has_mask": 1}

    def _label(self, name, index, local, crop, left):
        """The entries of a label column: the values, has_<label>, and known_<label> of 21 joints."""
        columns = index.columns
        label = columns["label"][local] if "label" in columns else local
        shape = (len(local), *LABEL_COLUMNS[name])
        has = np.full(len(local), name in columns)
        if name in columns:
            value = np.array(columns[name][label])
        elif name == "visible" and "joints2d" in columns:
            value = np.ones(shape, np.float32)
            has[:] = True
        else:
            value = np.zeros(shape, np.float32)
        if name in ("joints2d", "keypoints"):  # pixel centres to canvas coordinates
            centre = crop[:, None, :2].astype(np.float32)
            value = (value + np.float32(0.5) - centre) / (crop[:, None, 2:] / 2).astype(np.float32)
        finite = np.isfinite(value)
        entries = {}
        if LABEL_COLUMNS[name][:1] == (21,):
            known = finite.reshape(len(local), 21, -1).all(2)  # (n,21)
            if name == "joints" and index.meta.get("partial") and "visible" in columns:
                known &= np.asarray(columns["visible"][label]) > 0  # the annotator doubted the others
                finite = finite & known[:, :, None]
            entries[f"known_{name}"] = known.astype(np.float32) * has[:, None]
            wanted = finite[:, 0].all(1) if name == "joints" else finite.reshape(len(local), -1).any(1)
        else:
            wanted = finite.reshape(len(local), -1).all(1)
        value = np.where(finite, value, np.float32(0))
        value[left] = mirror(name, value[left])
        return entries | {name: value, f"has_{name}": (has & wanted).astype(np.float32)}


def mirror(name: str, value):
    """A label of a left hand as that of the right hand in the mirrored image, and back: it is its own
    inverse."""
    if name in ("joints2d", "keypoints", "keypoints3d", "joints", "vertices"):
        return value * np.float32([-1] + [1] * (value.shape[-1] - 1))
    if name == "pose":  # diag(-1,1,1) R diag(-1,1,1) as axis-angle
        return value * np.tile(np.float32([1, -1, -1]), 16)
    if name == "camera":  # scale, tx, ty
        return value * np.float32([1, -1, 1])
    return value


class UnreadImages:
    """Collects the rows of a run whose images could not be read, for one line at its end."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.rows = set()

    def watch(self, batches):
        """An iterator over the batches, whose `failed` it notes. Processes of a loader start here, at once.
        Started in a thread that asks for the batches, they could not end well."""
        return map(self._noted, batches)

    def _noted(self, batch):
        failed = batch["failed"]
        self.rows |= set(failed[failed >= 0].tolist())
        return batch

    def __str__(self):
        names = "; ".join(self.dataset.image_name(row) for row in sorted(self.rows)[:10])
        return f"{len(self.rows)} images could not be read and were replaced by others: {names}"


# ----------------------------------------------------------------------------------------- the order of hands
class EpochSampler:
    """The rows of every step of one process, a pure function of (seed, step): resuming starts it at another
    step.

    Each epoch is a permutation of `count` hands. Batches run on across epochs, so none is short. The global
    batch of a step is the same for any number of processes; process `rank` of `world` takes its consecutive
    rows."""

    def __init__(self, count, batch, seed, start, stop, rank=0, world=1):
        self.count = count
        self.batch = batch
        self.seed = seed
        self.start = start
        self.stop = stop
        self.local_rows = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        shuffled = -1
        mine = np.arange(self.batch)[self.local_rows]
        for step in range(self.start, self.stop):
            epochs, places = np.divmod(step * self.batch + mine, self.count)
            rows = np.empty_like(places)
            for epoch in sorted(set(epochs.tolist())):
                if epoch != shuffled:
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                    shuffled = epoch
                rows[epochs == epoch] = order[places[epochs == epoch]]
            yield rows.tolist()


class MixSampler(EpochSampler):
    """Rows drawn with replacement from sources of `sizes` (S,), one after the other, in proportion to
    `shares` (S,)."""

    def __init__(self, sizes, shares, batch, seed, start, stop, rank=0, world=1):
        super().__init__(int(np.sum(sizes)), batch, seed, start, stop, rank, world)
        self.sizes = np.asarray(sizes)
        self.shares = np.asarray(shares, float)

    def __iter__(self):
        ends = np.cumsum(self.shares) / self.shares.sum()
        starts = np.cumsum(self.sizes) - self.sizes
        for step in range(self.start, self.stop):
            drawn = np.random.default_rng([self.seed, step, 9]).random((2, self.batch))
            source, place = drawn[:, self.local_rows]
            source = np.searchsorted(ends[:-1], source, side="right")
            rows = starts[source] + (place * self.sizes[source]).astype(int)
            yield rows.tolist()


def make_sampler(rows, starts, mix, batch, seed, start, stop, rank=0, world=1):
    """Positions in `rows` (M,), the ascending rows of concatenated indices that begin at `starts`.

    An EpochSampler; with `mix`, a number for each index, a MixSampler. ValueError where they do not fit.
    """
    if mix is None:
        return EpochSampler(len(rows), batch, seed, start, stop, rank, world)
    return MixSampler(check_mix(rows, starts, mix), mix, batch, seed, start, stop, rank, world)


def check_mix(rows, starts, mix):
    """How many of `rows` each index has; ValueError where `mix`, if there is one, does not fit."""
    sizes = np.diff(np.searchsorted(rows, starts))
    if mix is None:
        return sizes
    fits = len(mix) == len(sizes) and min(mix) >= 0 and any(mix)
    if not fits or any(share and not size for share, size in zip(mix, sizes, strict=True)):
        raise ValueError(f"--mix {' '.join(map(str, mix))}: needs a number from 0 on for each of the "
                         f"{len(sizes)} --data, and hands where it is above 0")
    return sizes


class PairSampler:
    """The rows of each step of an EpochSampler over `anchors` (M,): the hands, then as many of their
    neighbours.

    idx (N,K): the neighbours of every hand, nearest first, -1 where there are fewer; without it the hands
    alone. neighbour: 1 the nearest, 2 the next (where there is none, the last), 0 any at random. share: of
    the hands, drawn at random, that get their neighbour. The others, and hands without one, get
    themselves."""

    def __init__(self, order, anchors, idx=None, neighbour=1, seed=0, share=1.0):
        self.order = order
        self.anchors = anchors
        self.idx = idx
        self.neighbour = neighbour
        self.seed = seed
        self.share = share

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for step, positions in enumerate(self.order, self.order.start):
            rows = self.anchors[positions]
            if self.idx is None:
                yield rows.tolist()
                continue
            neighbours = (self.idx[rows] >= 0).sum(1)
            if self.neighbour:
                rank = np.minimum(self.neighbour, neighbours) - 1
            else:
                rank = (self._chance(step) * neighbours).astype(int)
            others = self.idx[rows, rank]
            is_paired = (self._chance(step, 1) < self.share) & (neighbours > 0)
            yield rows.tolist() + np.where(is_paired, others, rows).tolist()

    def _chance(self, *key):
        """Numbers in 0 .. 1 for this process's rows of a step."""
        return np.random.default_rng([self.seed, *key]).random(self.order.batch)[self.order.local_rows]


def pair_rows(failed, pairs):
    """Rows (2,B) of a PairSampler's batch: who stands in the first view and who in the second of each of the
    B pairs.

    failed (B,) of hands that are paired with themselves, or (2B,) of hands and then their neighbours: -1
    where the image could be read. Where it could not, the other one of the pair stands in both views."""
    rows = torch.arange(len(failed), device=failed.device).unflatten(0, (-1, pairs)).expand(2, pairs)
    return torch.where(failed[rows] < 0, rows, rows.flip(0))


def has_points(index, *columns):
    """(N,) True where all 21 points of a hand are there, in each of the columns: "joints", "joints2d",
    "keypoints"."""
    if not set(columns) <= set(index.columns):
        return np.zeros(len(index), bool)
    # Of the labels' rows.
    is_known = np.all([np.isfinite(index.columns[name]).all((1, 2)) for name in columns], axis=0)
    if "keypoints" in columns and "keypoints_score" in index.columns:
        is_known &= (np.asarray(index.columns["keypoints_score"]) > 0).all(1)
    return is_known[index.pose_ids()]


def pose_labels(index):
    """The columns that tell a hand's pose: ("joints", "joints2d"), or its 2-D points alone. ValueError where
    there are neither."""
    for names in (("joints", "joints2d"), ("joints2d",), ("keypoints",)):
        if set(names) <= set(index.columns):
            return names
    raise ValueError(f"{index.path} has no joints with joints2d, and no keypoints: nothing to probe; detect "
                     "keypoints with prepare_data.py video")


def read_pairs(path: Path | str, indices: list[HandIndex], *points: str):
    """idx (N,K) of mine_pairs.py for these indices and points: "keypoints", "joints2d", or either.

    ValueError where the file is damaged, of another format, or of other hands.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            idx = file["idx"]
            made_for = str(file["fingerprint"])
            number = int(file["format"]) if "format" in file else 1
    except FileNotFoundError:
        raise FileNotFoundError(f"--pairs {path}: no such file; make it with mine_pairs.py") from None
    except Exception as error:  # zipfile and numpy raise a dozen types
        raise ValueError(f"--pairs {path}: no pairs of mine_pairs.py ({type(error).__name__})") from None
    if number != PAIRS_FORMAT:
        raise ValueError(f"--pairs {path}: format {number}, this version reads {PAIRS_FORMAT}: mine again")
    if made_for not in [index_fingerprint([index.columns for index in indices], name) for name in points]:
        raise ValueError(f"--pairs {path}: mined from other indices, in another order, or from other points "
                         f"than {' or '.join(points)}; mine these with mine_pairs.py")
    hands = sum(len(index) for index in indices)
    shaped = idx.ndim == 2 and idx.shape[0] == hands and idx.shape[1] > 0 and idx.dtype.kind == "i"
    in_range = shaped and idx.min() >= -1 and idx.max() < hands
    gap = in_range and ((idx[:, :-1] < 0) & (idx[:, 1:] >= 0)).any()
    if not in_range or gap or not (idx[:, 0] >= 0).any():
        raise ValueError(f"--pairs {path}: damaged, or no hand has a neighbour")
    return idx


def make_loader(dataset, sampler=None, batch_size=None, workers=0, pin=False):
    """DataLoader over the batches of a sampler, or in order in batches of batch_size; each as
    HandDataset.batch makes it.

    The processes of the loader hand over batches in /dev/shm. Where it is too small, fewer prepare less, and
    a line on stderr says so: the batches are the same.
    """
    if sampler is None:
        order = torch.utils.data.SequentialSampler(dataset)
        sampler = torch.utils.data.BatchSampler(order, batch_size, drop_last=False)
    ahead = None
    if workers:
        hands = batch_size or len(next(iter(sampler), ()))
        workers, ahead = _fit_shared_memory(workers, hands * dataset.item_bytes())
    return torch.utils.data.DataLoader(_Batches(dataset), batch_size=None, sampler=sampler,
                                       num_workers=workers, prefetch_factor=ahead, pin_memory=pin,
                                       worker_init_fn=_heed_main_process)


def _heed_main_process(_):
    """A process of a loader ends by SIGTERM only where its main process sends it.

    timeout, torchrun and clusters send signals to all processes of a run. The main one answers: it saves. A
    loader that dies before would end it at once. macOS does not tell who sends."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Batches(torch.utils.data.Dataset):
    """A dataset whose item is a whole batch: collating hands one by one costs more than reading them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, items):
        return self.dataset.batch(items)


def _fit_shared_memory(workers, batch_bytes):
    """(workers, batches that each prepares ahead) that leave room in /dev/shm; 0 and None without room."""
    ahead = 2 if 2 * workers * batch_bytes < 2**30 else 1
    try:
        free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:  # only Linux has it
        return workers, ahead
    most = free // max(batch_bytes, 1) - 1  # one is in use
    if most >= ahead * workers:
        return workers, ahead
    fitting = min(workers, max(0, most))
    if fitting < workers and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"warning: {fitting} processes decode instead of --workers {workers}: /dev/shm has "
              f"{free / 1e6:.1f} MB free, and a batch takes {batch_bytes / 1e6:.1f} MB. Start the container "
              "with docker run --shm-size, or use --cache device", file=sys.stderr)
    return fitting, 1 if fitting else None
