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

`index.json` holds: format, name, count, labels, root, columns, and

  joints      definition of the 21 joints: "freihand" = regressed from the posed mesh; "ho3d", "manopth" = the
              layer's own with these tips (all names: mano.labelled_joints)
  pose_mean   true: the 45 numbers are offsets to the hand's mean pose
  protocol    how the set is scored
  box         what the boxes were drawn around
  frames, sequences    the official list, for files of results
  partial     true: unknown labels are NaN (a joint, or all numbers of an entry)

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
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

FORMAT = "hand-index-1"
PAIRS_FORMAT = 1  # of pairs.npz; a file without a number was written before there were any and counts as 1
CONTEXT = 2.0  # side of a canvas over the longer side of the box: room to turn and shift a view
HAND_COLUMNS = {"image": None, "mask": None, "box": (4,), "size": (2,), "side": (), "video": (), "label": (),
                "number": ()}
LABEL_COLUMNS = {"joints2d": (21, 2), "visible": (21,), "joints": (21, 3), "vertices": (778, 3),
                 "pose": (48,), "betas": (10,), "K": (3, 3), "extrinsics": (3, 4), "scale": (),
                 "keypoints": (21, 2), "keypoints_score": (21,)}
DTYPES = {"side": np.uint8, "video": np.int32, "label": np.int32, "size": np.int32, "number": np.int32}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PIXELS = 2**28  # a larger image is a mistake or an attack; this is checked before decoding
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns


def canvas_size(image_size: int) -> int:
    """Side of the canvas for views of this side: 256 for 224.

    A view of 1.75 x the box then has the canvas' resolution; a smaller window is enlarged.
    """
    return image_size * 8 // 7


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
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(f"{header}: broken index ({error}); prepare it again") from None

    def __reduce__(self):
        return HandIndex, (self.path,)  # a process of the loader maps the files anew: nothing is copied

    def __len__(self):
        return self.meta["count"]

    def image_path(self, row):
        return self.root / os.fsdecode(bytes(self.columns["image"][row]))

    def mask_path(self, row):
        """The file of a hand's mask, or None."""
        name = os.fsdecode(bytes(self.columns["mask"][row])) if "mask" in self.columns else ""
        return self.root / name if name else None

    def side(self, row):
        """0 right, 1 left."""
        return int(self.columns["side"][row]) if "side" in self.columns else 0

    def label(self, row):
        """The label row of a hand: the same number for all images of one pose."""
        return int(self.columns["label"][row]) if "label" in self.columns else int(row)

    def pose_ids(self):
        """(N,) the label row of every hand."""
        return np.asarray(self.columns["label"]) if "label" in self.columns else np.arange(len(self))


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
def read_image(path: Path | str, smallest: int | None = None) -> tuple[Image.Image, float]:
    """The photograph as an upright RGB image, whatever its mode, and its scale.

    A large JPEG is decoded at half, a quarter or an eighth of its size while at least `smallest` pixels a
    side remain; the scale is then below 1. Raises ValueError or OSError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            width = image.width
            if smallest and image.format == "JPEG":
                image.draft("RGB", (smallest, smallest))
            image.load()
            scale = 1 / 2 ** round(math.log2(width / image.width))  # libjpeg rounds the size, not the scale
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16 bits: keep the upper byte, where Pillow would clip
                wide = np.asarray(image, dtype=np.float32) / (257 if image.mode.startswith("I") else 1)
                image = Image.fromarray(wide.clip(0, 255).astype(np.uint8))
            elif image.mode in ("PA", "LA", "RGBA") or (image.mode == "P" and "transparency" in image.info):
                image = image.convert("RGBA")
            return image.convert("RGB"), scale
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:  # Pillow raises a dozen types for a broken file
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def read_mask(path: Path) -> Image.Image:
    """The hand's pixels as a grey image, 255 where it is; ValueError names the file.

    Reads FreiHAND's pictures (white on black), HO-3D's (hand blue, object green) and `seg` of DexYCB's label
    files."""
    if path.suffix != ".npz":
        return read_image(path)[0].getchannel("B").point(lambda value: 255 * (value > 127))
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            return Image.fromarray(np.uint8(255) * (content["seg"] == 255))
    except Exception as error:  # zipfile and numpy raise a dozen types
        raise ValueError(f"{path}: no label file with `seg` ({type(error).__name__}: {error})") from None


def list_images(folder: Path | str) -> list[Path]:
    """The image files below a folder, by their suffix, sorted."""
    files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in files if path.is_file())


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) of an upright image from its header; ValueError names the file."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def square(box, context: float) -> tuple[float, float, float]:
    """(centre x, centre y, side) in pixels of the square whose side is `context` times the longer side of the
    box."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return (x0 + x1) / 2, (y0 + y1) / 2, context * max(x1 - x0, y1 - y0)


def whole_box(size, box_scale: float) -> tuple[float, float, float, float]:
    """The box of an image (width, height) that is itself a hand's crop: a view of box_scale times it is the
    whole image."""
    width, height = size
    half = max(size) / box_scale / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def read_boxes(path: Path | str) -> dict:
    """CSV with the header image,x0,y0,x1,y1[,side], pixels, side right or left -> {image: [(box, side),
    ...]}."""
    boxes = {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(line.replace("\0", " ") for line in file)
        if not {"image", "x0", "y0", "x1", "y1"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the first line must be image,x0,y0,x1,y1 or image,x0,y0,x1,y1,side, "
                             "with commas")
        for number, row in enumerate(reader, 2):
            try:
                box = tuple(float(row[key]) for key in ("x0", "y0", "x1", "y1"))
                side = (row.get("side") or "right").strip().lower()
                usable = 1 <= box[2] - box[0] < 1e6 and 1 <= box[3] - box[1] < 1e6
                if side not in ("right", "left") or not usable:
                    raise ValueError
                boxes.setdefault(row["image"], []).append((box, side))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{path}, line {number}: needs image,x0,y0,x1,y1[,side] with x0 < x1, "
                                 "y0 < y1 and side right or left") from None
    return boxes


def refuse_unread(index, row: int):
    """ValueError or OSError that says why no canvas can be cut for a row of an index."""
    path = index.image_path(row)
    read_image(path)  # says what is wrong with the file
    raise ValueError(f"{path}: its box lies outside the image")


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


def crop_mask(path: Path, width, centre_x, centre_y, side, size: int):
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
    An item is a dict of tensors and numbers:

      canvas (3,S,S)             u8
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
        self.rows = np.arange(self.starts[-1]) if rows is None else np.asarray(rows)
        self.substitute = substitute

    def __len__(self):
        return len(self.rows)

    def locate(self, row):
        """(index, its row) of a row of the concatenated indices."""
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.indices[which], int(row - self.starts[which])

    def __getitem__(self, item):
        failed = -1
        for step in range(min(len(self), 100)):
            row = int(self.rows[(item + step) % len(self)])
            try:
                return self.load(row, failed)
            except (ValueError, OSError) as error:
                failed = row if failed < 0 else failed
                if not self.substitute:
                    return self.load(row, failed, blank=True)
                last = error
        raise ValueError(f"100 images in a row cannot be read; the last: {last}")

    def load(self, row, failed=-1, blank=False):
        """The item of a row; blank: with a black canvas."""
        index, local = self.locate(row)
        crop = square(index.columns["box"][local], self.context)
        mirrored = index.side(local)
        if blank:
            canvas = np.zeros((self.canvas, self.canvas, 3), np.uint8)
            valid = np.zeros(4, np.float32)
        else:
            canvas, valid = self._read_canvas(index, local, crop)
        if mirrored:
            canvas = canvas[:, ::-1]
            valid = valid[[2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        item = {"canvas": torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1))),
                "valid": valid, "row": row, "failed": failed, "crop": np.float32(crop),
                "mirrored": np.float32(mirrored), "source": self.indices.index(index),
                "pose_mean": np.float32(index.meta.get("pose_mean", True))}
        for name in self.labels:
            if name == "mask":
                item |= self._mask(index, local, crop, mirrored, blank)
            else:
                item |= self._label(name, index, local, crop, mirrored)
        return item

    def _read_canvas(self, index, local, crop):
        path = index.image_path(local)
        centre_x, centre_y, side = crop
        shrink = self.canvas / side  # a JPEG may be decoded smaller, down to this scale
        smallest = int(shrink * image_size(path)[0]) if shrink < 0.5 else None
        image, scale = read_image(path, smallest)
        return crop_canvas(image, centre_x * scale, centre_y * scale, side * scale, self.canvas)

    def _mask(self, index, local, crop, mirrored, blank):
        """The item's entries of the label "mask"."""
        path = index.mask_path(local)
        picture = torch.zeros(1, self.canvas, self.canvas, dtype=torch.uint8)
        if not path or blank:
            return {"mask": picture, "has_mask": np.float32(0)}
        mask = crop_mask(path, image_size(index.image_path(local))[0], *crop, self.canvas)
        picture[0] = torch.from_numpy(255 * np.uint8(mask[:, ::-1] if mirrored else mask))
        return {"mask": picture, "has_mask": np.float32(1)}

    def _label(self, name, index, local, crop, mirrored):
        """The item's entries of a label column: the value, has_<label>, and known_<label> of 21 joints."""
        columns = index.columns
        label = index.label(local)
        has = name in columns
        if has:
            value = np.array(columns[name][label])
        elif name == "visible" and "joints2d" in columns:
            value = np.ones(21, np.float32)
            has = True
        else:
            value = np.zeros(LABEL_COLUMNS[name], np.float32)
        if name in ("joints2d", "keypoints"):  # pixel centres to canvas coordinates
            centre_x, centre_y, side = crop
            value = (value + 0.5 - np.float32([centre_x, centre_y])) / np.float32(side / 2)
        finite = np.isfinite(value)
        entries = {}
        if LABEL_COLUMNS[name][:1] == (21,):
            known = finite.reshape(21, -1).all(1)
            if name == "joints" and index.meta.get("partial") and "visible" in columns:
                known &= np.asarray(columns["visible"][label]) > 0  # the annotator doubted the others
                finite = finite & known[:, None]
            entries[f"known_{name}"] = known.astype(np.float32) * has
            has = has and (finite[0].all() if name == "joints" else finite.any())
        else:
            has = has and finite.all()
        value = np.where(finite, value, np.float32(0))
        return entries | {name: mirror(name, value) if mirrored else value, f"has_{name}": np.float32(has)}


def mirror(name: str, value):
    """A label of a left hand as that of the right hand in the mirrored image, and back: it is its own
    inverse."""
    if name in ("joints2d", "keypoints", "joints", "vertices"):
        return value * np.float32([-1] + [1] * (value.shape[-1] - 1))
    if name == "pose":  # diag(-1,1,1) R diag(-1,1,1) as axis-angle
        return value * np.tile(np.float32([1, -1, -1]), 16)
    return value


class UnreadImages:
    """Collects the rows of a run whose images could not be read, for one line at its end."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.rows = set()

    def note(self, batch):
        failed = batch["failed"]
        self.rows |= set(failed[failed >= 0].tolist())

    def __str__(self):
        places = [self.dataset.locate(row) for row in sorted(self.rows)]
        names = "; ".join(str(index.image_path(local)) for index, local in places[:10])
        return f"{len(places)} images could not be read and were replaced by others: {names}"


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
        epoch = -1
        for step in range(self.start, self.stop):
            rows = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                rows.append(int(order[position % self.count]))
            yield rows[self.local_rows]


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
            source, place = np.random.default_rng([self.seed, step, 9]).random((2, self.batch))
            source = np.searchsorted(ends[:-1], source, side="right")
            rows = starts[source] + (place * self.sizes[source]).astype(int)
            yield rows[self.local_rows].tolist()


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
    alone. neighbour: 1 the nearest, 2 the next (where there is none, the last), 0 any at random."""

    def __init__(self, order, anchors, idx=None, neighbour=1, seed=0):
        self.order = order
        self.anchors = anchors
        self.idx = idx
        self.neighbour = neighbour
        self.seed = seed

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
                chance = np.random.default_rng([self.seed, step]).random(self.order.batch)
                rank = (chance[self.order.local_rows] * neighbours).astype(int)
            yield rows.tolist() + self.idx[rows, rank].tolist()


def read_pairs(path: Path | str, indices: list[HandIndex], points: str):
    """idx (N,K) of mine_pairs.py for these indices and points ("keypoints" or "joints2d").

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
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--pairs {path}: no pairs of mine_pairs.py ({reason})") from None
    if number != PAIRS_FORMAT:
        raise ValueError(f"--pairs {path}: format {number}, this version reads {PAIRS_FORMAT}: mine again")
    if made_for != index_fingerprint([index.columns for index in indices], points):
        raise ValueError(f"--pairs {path}: mined from other indices, in another order, or from other points "
                         f"than {points}; mine these with mine_pairs.py")
    hands = sum(len(index) for index in indices)
    shaped = idx.ndim == 2 and idx.shape[0] == hands and idx.shape[1] > 0 and idx.dtype.kind == "i"
    in_range = shaped and idx.min() >= -1 and idx.max() < hands
    gap = in_range and ((idx[:, :-1] < 0) & (idx[:, 1:] >= 0)).any()
    if not in_range or gap or not (idx[:, 0] >= 0).any():
        raise ValueError(f"--pairs {path}: damaged, or no hand has a neighbour")
    return idx


def make_loader(dataset, sampler=None, batch_size=None, workers=0, pin=False):
    """DataLoader over the batches of a sampler, or in order in batches of batch_size."""
    if sampler is None:
        return torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, pin_memory=pin)
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pin)
