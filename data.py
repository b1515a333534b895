"""Hands on disk to batches on the device: the index, square canvases, views as 2x3 matrices, colour.

The index is a folder: `index.json` and one `.npy` file a column, opened with memory mapping, so that two million hands
open in milliseconds and workers share the pages.

  one row a hand     image     bytes        path of the image, relative to `root` of index.json
                     box       (4,) f4      tight box x0, y0, x1, y1 in pixel-EDGE coordinates (0 .. width)
                     size      (2,) i4      width and height of the image (optional)
                     side      u1           0 right, 1 left
                     video     i4           hands of one video share identity and background; -1 unknown
                     label     i4           row of the label columns (absent: the row itself); images that share a pose
                                            (FreiHAND's four backgrounds) share a label and never part in a split
                     mask      bytes        path of a picture of which hand is where, relative to root (read_mask); empty: none
                     number    i4           place in the data set's official list, where that also holds what has no row here
  one row a label    joints2d  (21,2) f4    pixels, pixel-CENTRE coordinates (what K projects to)
  (all optional)     visible   (21,) f4     confidence of joints2d, 0 .. 1
                     joints    (21,3) f4    metres, camera frame x right, y down, z forward, FreiHAND order
                     vertices  (778,3) f4   metres, the same frame
                     pose      (48,) f4     axis-angle: 3 global, 45 articulation
                     betas     (10,) f4     MANO shape
                     K         (3,3) f4     pinhole camera, pixels
                     extrinsics (3,4) f4    [R | t], world to camera, metres
                     scale     f4           length of the middle finger's proximal bone, metres
                     keypoints (21,2) f4, keypoints_score (21,) f4     what a detector saw (score 0: nothing)

`index.json`: format, name, count, labels, root, and `joints` (definition of the 21 joints: "freihand" = regressed from the
posed mesh; "ho3d", "manopth" = the layer's own with these tips; all names: mano.labelled_joints), `pose_mean` (true: the 45 numbers are
offsets to the hand's mean pose), `protocol` (how it is scored), `box` (what it was drawn around),
`frames` and `sequences` (the official list, for files of results), `partial` (true: a label that is not known is NaN: a joint, or all
numbers of an entry).
Left hands are stored as the image shows them; HandDataset mirrors them, because the right hand is canonical in the networks.

Coordinates of canvases and views are [-1,1], x right, y down, +-1 at the image edges (align_corners=False). A view is one
2x3 matrix theta that maps VIEW coordinates to CANVAS coordinates; undoing a view on points is applying theta.
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
HAND_COLUMNS = {"image": None, "mask": None, "box": (4,), "size": (2,), "side": (), "video": (), "label": (), "number": ()}
LABEL_COLUMNS = {"joints2d": (21, 2), "visible": (21,), "joints": (21, 3), "vertices": (778, 3), "pose": (48,),
                 "betas": (10,), "K": (3, 3), "extrinsics": (3, 4), "scale": (), "keypoints": (21, 2), "keypoints_score": (21,)}
DTYPES = {"side": np.uint8, "video": np.int32, "label": np.int32, "size": np.int32, "number": np.int32}     # others float32
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PIXELS = 2**28                                            # a larger image is a mistake or an attack; checked before
Image.MAX_IMAGE_PIXELS = None                                 # decoding, in place of Pillow's own limit, which warns


# ---------------------------------------------------------------------------------------------------------------- index
def write_index(path, columns, meta, root="."):
    """Checks every column, then writes the index folder `path`; index.json comes last, so a half-written one never opens.

    columns: name -> array as in the table above. root: folder of the images, relative to `path` or absolute.
    Raises ValueError that names the column and the first wrong row; nothing is written then.
    """
    path = Path(path)
    if (path / "index.json").exists():
        raise ValueError(f"{path} already holds an index: choose another folder or delete it first")
    columns = {name: as_stored(name, value) for name, value in columns.items()}
    if "image" in columns and columns["image"].dtype.kind == "U":
        columns["image"] = np.char.encode(columns["image"], "utf-8")
    count, labels = check_columns(columns, meta.get("partial", False))
    path.mkdir(parents=True, exist_ok=True)
    for name, value in columns.items():
        np.save(path / f"{name}.npy", value)
    header = {"format": FORMAT, **meta, "count": count, "labels": labels, "root": str(root), "columns": sorted(columns)}
    (path / "index.json.part").write_text(json.dumps(header, indent=1))
    os.replace(path / "index.json.part", path / "index.json")


def check_columns(columns, partial=False):
    """(hands, labels) of a dict of columns; ValueError names the column and row that contradicts the format. partial: labels may be NaN,
    a joint with all its coordinates, of other columns all of an entry."""
    unknown = set(columns) - set(HAND_COLUMNS) - set(LABEL_COLUMNS)
    if unknown or "image" not in columns or "box" not in columns:
        raise ValueError(f"columns: unknown {sorted(unknown)}, or `image` or `box` is missing")
    count = len(columns["image"])
    labels = count
    if "label" in columns and count:
        labels = next((len(columns[name]) for name in LABEL_COLUMNS if name in columns), int(columns["label"].max()) + 1)
    if count == 0:
        raise ValueError("no hands: nothing to write")
    for name, value in columns.items():
        rows, shape = (count, HAND_COLUMNS[name]) if name in HAND_COLUMNS else (labels, LABEL_COLUMNS[name])
        if len(value) != rows or (shape is not None and value.shape[1:] != shape):
            raise ValueError(f"column {name}: shape {value.shape}, needs ({rows}, {shape})")
        if value.dtype.kind == "f":
            wrong = ~np.isfinite(value).reshape(rows, *((21, -1) if shape[:1] == (21,) else (1, -1)))
            if partial and name in LABEL_COLUMNS:                  # all NaN: not known
                wrong &= ~np.isnan(value).reshape(wrong.shape).all(2, keepdims=True)
            report(name, wrong.any((1, 2)), "is not finite")
    box = columns["box"]
    report("box", (box[:, 2] - box[:, 0] < 1) | (box[:, 3] - box[:, 1] < 1), "is thinner than a pixel")
    if "label" in columns:
        report("label", (columns["label"] < 0) | (columns["label"] >= labels), f"is outside 0..{labels - 1}")
    if "side" in columns:
        report("side", columns["side"] > 1, "is neither 0 (right) nor 1 (left)")
    if "K" in columns:
        k = columns["K"].astype(np.float64)
        report("K", (k[:, 0, 0] <= 1) | (k[:, 1, 1] <= 1) | (np.abs(k[:, 2] - [0, 0, 1]).max(1) > 1e-6)
               | (np.abs(k).max((1, 2)) > 1e6), "is no pinhole camera in pixels")
        if "size" in columns:
            size = columns["size"].astype(np.float64)
            k = k[columns["label"]] if "label" in columns else k
            focal, centre = k[:, [0, 1], [0, 1]], k[:, :2, 2]
            report("K", ((focal > 50 * size) | (focal < 0.1 * size) | (centre < -size) | (centre > 2 * size)).any(1),
                   "is out of range for the size of its image")
    return count, labels


def report(column, wrong, what):
    if wrong.any():
        raise ValueError(f"column {column}: entry {int(np.argmax(wrong))} {what} ({int(wrong.sum())} such entries)")


class HandIndex:
    """An opened index: `columns` (memory-mapped arrays), `meta` (index.json), `root` (folder of the images)."""

    def __init__(self, path):
        self.path = Path(path)
        header = self.path / "index.json"
        if not header.is_file():
            raise ValueError(f"{path} is no index (no index.json): make one with prepare_data.py or make_synthetic.py")
        try:
            self.meta = json.loads(header.read_text())
            if self.meta["format"] != FORMAT:
                raise ValueError(f"format {self.meta['format']!r}, this code reads {FORMAT!r}")
            self.columns = {name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in self.meta["columns"]}
            for name, value in self.columns.items():
                rows = self.meta["count"] if name in HAND_COLUMNS else self.meta["labels"]
                if len(value) != rows:
                    raise ValueError(f"{name}.npy has {len(value)} rows instead of {rows}")
            self.root = self.path / self.meta["root"]
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(f"{header}: broken index ({error}); prepare it again") from None

    def __reduce__(self):
        return HandIndex, (self.path,)                             # a spawned worker maps the files anew, nothing is copied

    def __len__(self):
        return self.meta["count"]

    def image_path(self, row):
        return self.root / os.fsdecode(bytes(self.columns["image"][row]))

    def mask_path(self, row):
        """The file of a hand's mask, or None."""
        name = os.fsdecode(bytes(self.columns["mask"][row])) if "mask" in self.columns else ""
        return self.root / name if name else None

    def side(self, row):
        return int(self.columns["side"][row]) if "side" in self.columns else 0

    def label(self, row):
        """The label row of a hand: the same number for all images of one pose."""
        return int(self.columns["label"][row]) if "label" in self.columns else int(row)

    def pose_ids(self):
        """(N,) the label row of every hand."""
        return np.asarray(self.columns["label"]) if "label" in self.columns else np.arange(len(self))


def index_fingerprint(tables, points):
    """A short text that tells these tables of columns, in this order, from others: made of boxes, videos and the column `points`."""
    digest = hashlib.sha256(points.encode())
    for columns in tables:
        for name in ("box", "video", "label", points):
            if name in columns:
                digest.update(np.ascontiguousarray(as_stored(name, columns[name])))
    return digest.hexdigest()[:16]


def as_stored(name, value):
    return np.asarray(value, dtype=None if name in ("image", "mask") else DTYPES.get(name, np.float32))


# --------------------------------------------------------------------------------------------------------------- images
def read_image(path, smallest=None):
    """The photograph as an upright RGB PIL image, whatever its mode; (image, scale), scale < 1 where a large JPEG was
    decoded at half, a quarter or an eighth of its size, which is done only while `smallest` pixels a side remain.
    Raises ValueError or OSError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            width = image.width
            if smallest and image.format == "JPEG":
                image.draft("RGB", (smallest, smallest))
            image.load()
            scale = 1 / 2 ** round(math.log2(width / image.width))   # exact: libjpeg rounds the size up, not the scale
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):                  # 16-bit: keep the upper byte, Pillow would clip
                wide = np.asarray(image, dtype=np.float32) / (257 if image.mode.startswith("I") else 1)
                image = Image.fromarray(wide.clip(0, 255).astype(np.uint8))
            elif image.mode in ("P", "PA", "LA", "RGBA") and ("transparency" in image.info or image.mode != "P"):
                image = image.convert("RGBA")
            return image.convert("RGB"), scale
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:                                     # Pillow raises a dozen types for a broken file
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def read_mask(path):
    """The hand's pixels as a grey PIL image, 255 where it is: FreiHAND's pictures, white on black, HO-3D's, where the hand is blue and
    the object green, and `seg` of DexYCB's label files. ValueError names the file."""
    if path.suffix != ".npz":
        return read_image(path)[0].getchannel("B").point(lambda value: 255 * (value > 127))
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            return Image.fromarray(np.uint8(255) * (content["seg"] == 255))
    except Exception as error:                                     # zipfile and numpy raise a dozen types
        raise ValueError(f"{path}: no label file with `seg` ({type(error).__name__}: {error})") from None


def list_images(folder):
    """The image files below a folder, by their suffix, sorted."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def image_size(path):
    """(width, height) of an upright image from its header; ValueError names the file."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception as error:
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def square(box, context):
    """(centre x, centre y, side) in pixels of the square crop whose side is `context` times the longer side of the box."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return (x0 + x1) / 2, (y0 + y1) / 2, context * max(x1 - x0, y1 - y0)


def whole_box(size, box_scale):
    """The box of an image (width, height) that is itself a hand's crop: a view of box_scale times it is the whole image."""
    width, height = size
    half = max(size) / box_scale / 2
    return (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)


def read_boxes(path):
    """CSV with a header image,x0,y0,x1,y1[,side], pixels, side right or left -> {image: [(box, side), ...]}."""
    boxes = {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(line.replace("\0", " ") for line in file)
        if not {"image", "x0", "y0", "x1", "y1"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the first line must be image,x0,y0,x1,y1 or image,x0,y0,x1,y1,side, with commas")
        for number, row in enumerate(reader, 2):
            try:
                box = tuple(float(row[key]) for key in ("x0", "y0", "x1", "y1"))
                side = (row.get("side") or "right").strip().lower()
                if side not in ("right", "left") or not (1 <= box[2] - box[0] < 1e6 and 1 <= box[3] - box[1] < 1e6):
                    raise ValueError
                boxes.setdefault(row["image"], []).append((box, side))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{path}, line {number}: needs image,x0,y0,x1,y1[,side] with x0 < x1, y0 < y1 and side "
                                 "right or left") from None
    return boxes


def crop_canvas(image, centre_x, centre_y, side, size):
    """The square crop of a PIL image, resized to size x size; where it leaves the image it is padded by reflection.

    Returns canvas (size,size,3) u8 and valid (4,) f4: the rectangle x0, y0, x1, y1 of real pixels in canvas coordinates.
    """
    x0, y0 = centre_x - side / 2, centre_y - side / 2
    left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x0 + side), math.ceil(y0 + side)
    if right <= 0 or bottom <= 0 or left >= image.width or top >= image.height or side > 4 * max(image.size):
        raise ValueError("the box lies outside the image or is far larger than it")
    inside = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    pad = ((max(-top, 0), max(bottom - image.height, 0)), (max(-left, 0), max(right - image.width, 0)), (0, 0))
    if any(map(sum, pad)):
        inside = Image.fromarray(np.pad(np.asarray(inside), pad, mode="symmetric"))
    window = (x0 - left, y0 - top, x0 - left + side, y0 - top + side)
    canvas = inside.resize((size, size), Image.Resampling.BILINEAR, box=window, reducing_gap=2.0)
    edges = [(0 - centre_x), (0 - centre_y), (image.width - centre_x), (image.height - centre_y)]
    return np.array(canvas), np.clip(np.array(edges) / (side / 2), -1, 1).astype(np.float32)


def crop_mask(path, width, centre_x, centre_y, side, size):
    """(size,size) bool: the mask at `path` of an image `width` pixels wide, cut as crop_canvas cuts the image."""
    mask = read_mask(path)
    scale = mask.width / width
    return crop_canvas(mask.convert("RGB"), centre_x * scale, centre_y * scale, side * scale, size)[0][..., 0] > 127


# -------------------------------------------------------------------------------------------------------------- dataset
class HandDataset(torch.utils.data.Dataset):
    """Hands of one or more indices as canvases with their labels, right-handed, in canvas coordinates.

    An item is a dict of tensors: canvas (3,S,S) u8, valid (4,), row (), failed () (the row whose image could not be read,
    or -1), crop (3,) centre x, y and side in pixels, mirrored () (1 for a left hand), pose_mean () (1 where the pose's 45
    numbers are offsets to the hand's mean), and of the labels asked for: joints2d and keypoints (21,2) canvas coordinates,
    visible and keypoints_score (21,), joints (21,3) m, vertices (778,3) m, pose (48,), betas (10,),
    each zero where the index or this hand has none, with has_<label> () 1 or 0; of 21 joints some may be unknown or, in a `partial` index,
    not `visible`: known_<label> (21,), and has_joints asks for the wrist; the label mask is (1,S,S) u8, 0 or 255. source (): which index.

    A file that cannot be read never ends a run: with `substitute` the next readable hand takes its place, otherwise the
    canvas is black; either way `failed` tells. `rows` restricts the set to some rows (of the concatenated indices).
    """

    def __init__(self, indices, canvas=256, context=2.0, labels=(), rows=None, substitute=True):
        self.indices, self.canvas, self.context, self.labels = list(indices), canvas, context, tuple(labels)
        self.starts = np.cumsum([0] + [len(index) for index in self.indices])
        self.rows = np.arange(self.starts[-1]) if rows is None else np.asarray(rows)
        self.substitute = substitute

    def __len__(self):
        return len(self.rows)

    def locate(self, row):
        """(index, its row) of a row of the concatenated indices."""
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.indices[which], int(row - self.starts[which])

    def unread(self, rows):
        """One line for the end of a run on the rows whose images could not be read."""
        paths = [index.image_path(local) for index, local in map(self.locate, sorted(rows))]
        return f"{len(paths)} images could not be read and were replaced by the next one: {'; '.join(map(str, paths[:10]))}"

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
        index, local = self.locate(row)
        centre_x, centre_y, side = square(index.columns["box"][local], self.context)
        if blank:
            canvas, valid = np.zeros((self.canvas, self.canvas, 3), np.uint8), np.zeros(4, np.float32)
        else:
            path = index.image_path(local)
            wanted = self.canvas / side                            # a JPEG may shrink while decoding down to this
            image, scale = read_image(path, smallest=int(wanted * image_size(path)[0]) if wanted < 0.5 else None)
            canvas, valid = crop_canvas(image, centre_x * scale, centre_y * scale, side * scale, self.canvas)
        mirrored = index.side(local)
        if mirrored:
            canvas, valid = canvas[:, ::-1], valid[[2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        item = {"canvas": torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1))), "valid": valid, "row": row,
                "failed": failed, "crop": np.float32([centre_x, centre_y, side]), "mirrored": np.float32(mirrored),
                "pose_mean": np.float32(index.meta.get("pose_mean", True)), "source": self.indices.index(index)}
        if "mask" in self.labels:
            path, item["has_mask"] = index.mask_path(local), np.float32(0)
            item["mask"] = torch.zeros(1, self.canvas, self.canvas, dtype=torch.uint8)
            if path and not blank:
                width, item["has_mask"] = image_size(index.image_path(local))[0], np.float32(1)
                mask = crop_mask(path, width, centre_x, centre_y, side, self.canvas)
                item["mask"][0] = torch.from_numpy(255 * np.uint8(mask[:, ::-1] if mirrored else mask))
        for name in (label for label in self.labels if label != "mask"):
            stored = index.columns.get(name)
            value = np.zeros(LABEL_COLUMNS[name], np.float32) if stored is None else np.array(stored[index.label(local)])
            if name == "visible" and stored is None and "joints2d" in index.columns:
                value, stored = np.ones(21, np.float32), True
            if name in ("joints2d", "keypoints"):
                value = (value + 0.5 - np.float32([centre_x, centre_y])) / np.float32(side / 2)
            finite, has = np.isfinite(value), stored is not None
            if LABEL_COLUMNS[name][:1] == (21,):
                known = finite.reshape(21, -1).all(1)
                if name == "joints" and index.meta.get("partial") and "visible" in index.columns:      # flagged as doubtful
                    known &= np.asarray(index.columns["visible"][index.label(local)]) > 0
                    finite = finite & known[:, None]
                item[f"known_{name}"] = known.astype(np.float32) * has
                has = has and (finite[0].all() if name == "joints" else finite.any())
            else:
                has = has and finite.all()
            value = np.where(finite, value, np.float32(0))
            item[name] = mirror(name, value) if mirrored else value
            item[f"has_{name}"] = np.float32(has)
        return item


def mirror(name, value):
    """A label of a left hand as the label of the right hand in the mirrored image, and back (it is its own inverse)."""
    if name in ("joints2d", "keypoints", "joints", "vertices"):
        return value * np.float32([-1] + [1] * (value.shape[-1] - 1))
    if name == "pose":                                             # diag(-1,1,1) R diag(-1,1,1) as axis-angle
        return value * np.tile(np.float32([1, -1, -1]), 16)
    return value


class EpochSampler:
    """The rows of every step of one process, a pure function of (seed, step): resuming starts it at another step.

    Each epoch is a permutation of `count`; batches run on across epochs, so none is short. The global batch of a step is
    the same for any number of processes; process `rank` takes its consecutive share.
    """

    def __init__(self, count, batch, seed, start, stop, rank=0, world=1):
        self.count, self.batch, self.seed, self.start, self.stop = count, batch, seed, start, stop
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.stop):
            rows = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                rows.append(int(order[position % self.count]))
            yield rows[self.share]


class MixSampler(EpochSampler):
    """Rows drawn with replacement from sources of `sizes` (S,), which lie one after the other, in proportion to `shares` (S,)."""

    def __init__(self, sizes, shares, batch, seed, start, stop, rank=0, world=1):
        super().__init__(int(np.sum(sizes)), batch, seed, start, stop, rank, world)
        self.sizes, self.shares = np.asarray(sizes), np.asarray(shares, float)

    def __iter__(self):
        ends, starts = np.cumsum(self.shares) / self.shares.sum(), np.cumsum(self.sizes) - self.sizes
        for step in range(self.start, self.stop):
            source, place = np.random.default_rng([self.seed, step, 9]).random((2, self.batch))
            source = np.searchsorted(ends[:-1], source, side="right")
            yield (starts[source] + (place * self.sizes[source]).astype(int))[self.share].tolist()


def make_sampler(rows, starts, mix, batch, seed, start, stop, rank=0, world=1):
    """Positions in `rows` (M,), ascending rows of concatenated indices that begin at `starts`: an EpochSampler, or with `mix`, a number for
    each index, a MixSampler. ValueError where they do not fit."""
    if mix is None:
        return EpochSampler(len(rows), batch, seed, start, stop, rank, world)
    return MixSampler(check_mix(rows, starts, mix), mix, batch, seed, start, stop, rank, world)


def check_mix(rows, starts, mix):
    """How many of `rows` each index has; ValueError where `mix`, if there is one, does not fit."""
    sizes = np.diff(np.searchsorted(rows, starts))
    if mix and (len(mix) != len(sizes) or min(mix) < 0 or not any(mix)
                or any(share and not size for share, size in zip(mix, sizes, strict=True))):
        raise ValueError(f"--mix {' '.join(map(str, mix))}: needs a number from 0 on for each of the {len(sizes)} --data, and hands where "
                         "it is above 0")
    return sizes


class PairSampler:
    """Rows of each step of an EpochSampler over `anchors` (M,): the hands, then as many neighbours from idx (N,K), -1 where there
    are fewer. neighbour: 1 the nearest, 2 the next, where there is none the last; 0 any at random. Without idx the hands alone."""

    def __init__(self, order, anchors, idx=None, neighbour=1, seed=0):
        self.order, self.anchors, self.idx, self.neighbour, self.seed = order, anchors, idx, neighbour, seed

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for step, positions in enumerate(self.order, self.order.start):
            rows = self.anchors[positions]
            if self.idx is None:
                yield rows.tolist()
                continue
            there = (self.idx[rows] >= 0).sum(1)
            chance = np.random.default_rng([self.seed, step]).random(self.order.batch)[self.order.share]
            which = np.minimum(self.neighbour, there) - 1 if self.neighbour else (chance * there).astype(int)
            yield rows.tolist() + self.idx[rows, which].tolist()


def make_loader(dataset, sampler=None, batch_size=None, workers=0, pin=False):
    """DataLoader over the batches of an EpochSampler, or in order in batches of batch_size."""
    order = {"batch_sampler": sampler} if sampler is not None else {"batch_size": batch_size, "shuffle": False}
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=pin, persistent_workers=False, **order)
