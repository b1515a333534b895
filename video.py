"""Frames of videos and of folders, and the hands that a detector sees in them.

Frames are upright RGB images (Pillow). A hand is a dict:

    side        "right" or "left", as the person has it (not as a mirror shows it)
    keypoints   (21,2) pixels of the frame, pixel-centre coordinates, FreiHAND's order of the joints
    score       (21,) confidence from 0 to 1; 0 where a point was not seen

Only Pillow and numpy are needed. Video files need OpenCV, and the detector needs MediaPipe
(requirements-video.txt). Both are imported when they are used.

Example::

    from pathlib import Path
    from PIL import Image
    from video import list_videos, read_frames

    Path("my_videos/a").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (64, 48)).save(f"my_videos/a/{number:06d}.png")
    for path in list_videos("my_videos"):
        names = [name for name, frame in read_frames(path, every=3)]
    assert names == ["000000.png", "000003.png"]

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import csv
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MOST_LOST = 10_000  # frames in a row that cannot be read: a header may declare any number
LARGEST = 0.5  # metres from one side of a hand to the other: beyond it the points are in another unit
OVERLAYS = "overlays.txt"  # in a folder of overlays of predict.py, as in data.py
SMALLEST = 8  # pixels of a hand or a crop below which cut_hand gives none


# ---------------------------------------------------------------------------------------------------- frames
def list_videos(root: Path | str, skip: Path | str | None = None,
                left_out: Counter | None = None) -> list[Path]:
    """The video files anywhere below `root`, sorted, then the folders that hold images, sorted.

    Links to folders are followed, and no folder is taken twice. Left out: what begins with a dot, the folder
    `skip`, such as the one that is written to, and indices (index.json). left_out: counts what was not taken,
    by suffix or kind. FileNotFoundError where there is no such folder, or neither a video nor an image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    left_out = Counter() if left_out is None else left_out
    videos = []
    folders = []
    top = os.path.realpath(root)
    seen = {top} if skip is None else {top, os.path.realpath(skip)}
    _find_videos(str(root), top, seen, videos, folders, left_out)
    if not videos and not folders:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        there = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        raise FileNotFoundError(f"{root}: no video ({suffixes}) and no folder of frames below it "
                                f"({there or 'it is empty'})")
    return sorted(map(Path, videos)) + sorted(map(Path, folders))


def _find_videos(folder, top, seen, videos, folders, left_out):
    """Appends the video files below a folder, and the folders that hold images. No list of frames is kept.

    top: the real path of the first folder; seen: those of all."""
    below = []
    others = Counter()
    has_image = False
    is_index = False
    is_overlays = False
    found = []
    try:
        with os.scandir(folder) as entries:  # it tells files from folders without a look at each
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                is_index = is_index or entry.name == "index.json"
                is_overlays = is_overlays or entry.name == OVERLAYS
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    below.append(entry)
                elif not entry.is_file():
                    others["links that lead nowhere"] += entry.is_symlink()
                elif suffix in VIDEO_SUFFIXES:
                    found.append(entry.path)
                elif suffix in IMAGE_SUFFIXES:
                    has_image = True
                else:
                    others[suffix or "without a suffix"] += 1
    except PermissionError:  # such as lost+found
        left_out["folders that may not be read"] += 1
        return
    if (is_index or is_overlays) and os.path.realpath(folder) != top:
        left_out["indices" if is_index else "folders of overlays of predict.py"] += 1
        return
    left_out.update(others)
    videos += found
    if has_image:
        folders.append(folder)
    for entry in sorted(below, key=lambda entry: entry.name):
        real = os.path.realpath(entry.path)
        is_inside = entry.is_symlink() and real.startswith(top + os.sep)  # taken in its own place
        if real not in seen and not is_inside:
            seen.add(real)
            _find_videos(entry.path, top, seen, videos, folders, left_out)


def read_rgb(path: Path | str) -> Image.Image:
    """An image as Pillow reads it, upright and in RGB; OSError or ValueError for a damaged file."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_frames(path: Path | str, every: int = 1,
                read_image: Callable[[Path], Image.Image] = read_rgb) -> Iterator[tuple]:
    """Yields (name, frame) for one frame in `every` of a video file or a folder of frames.

    Files of a folder come in the order of their names, 9.png before 10.png.
    name: the file's name in a folder, else the frame's number with six digits. frame: an RGB image, or None
    for a frame that cannot be read. A video is read on to the end that it declares; where frames are missing,
    the last name says how many there were, as "only 7 of 20 frames", with None. read_image decodes the files
    of a folder; it raises OSError or ValueError for one that it cannot read. ValueError where a video file
    needs OpenCV and there is none.
    """
    path = Path(path)
    if path.is_dir():
        return _frames_of_folder(path, every, read_image)
    return _frames_of_video(path, every)


def _frames_of_folder(folder, every, read_image):
    names = [name for name in sorted(os.listdir(folder))
             if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part
                                 for part in re.split(r"(\d+)", name)])
    for name in names[::every]:
        try:
            frame = read_image(folder / name)
        except (ValueError, OSError):
            frame = None
        yield name, frame


def _cv2(path):
    """OpenCV; ValueError where there is none."""
    try:
        import cv2
    except ImportError:
        raise ValueError(f"{path}: a video file needs OpenCV, which is in requirements-video.txt; or extract "
                         "its frames into a folder") from None
    return cv2


def _frames_of_video(path, every):
    cv2 = _cv2(path)
    video = cv2.VideoCapture(str(path))
    declared = int(max(0, min(video.get(cv2.CAP_PROP_FRAME_COUNT), 1e9)))  # 0: not said
    number = 0  # of the next frame
    read = 0
    lost = 0  # frames in a row
    while lost < MOST_LOST:
        if video.grab():
            read += 1
            lost = 0
            if number % every == 0:
                readable, pixels = video.retrieve()
                frame = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)) if readable else None
                yield f"{number:06d}", frame
        elif number >= declared:
            break
        else:
            lost += 1
        number += 1
    video.release()
    if read < declared or read == 0:
        yield f"only {read} of {declared} frames", None


def frame_rate(path: Path | str) -> float | None:
    """Frames a second of a video file, as its header says; None where that says nothing of use."""
    video = _cv2(path).VideoCapture(str(path))
    rate = video.get(_cv2(path).CAP_PROP_FPS)
    video.release()
    return rate if 1 <= rate <= 1000 else None


class OverlayWriter:
    """Writes drawn frames into a folder that it makes with the first: frames of a video file as overlay.mp4,
    those of a folder each as a JPEG. A file OVERLAYS names them: see overlay_names. It is a context."""

    def __init__(self, folder: Path, source: Path, rate: float):
        self.folder = folder
        self.source = source
        self.rate = rate
        self.video = None
        self.names = []  # of what it wrote

    def __enter__(self):
        return self

    def add(self, name: str, frame: np.ndarray):
        """The next frame (H,W,3), RGB. name: as read_frames gives it."""
        self.folder.mkdir(exist_ok=True)
        if self.source.is_dir():
            path = (self.folder / name).with_suffix(".jpg")
            Image.fromarray(frame).save(path, quality=90)
            self.names.append(path.name)
            return
        cv2 = _cv2(self.source)
        if self.video is None:
            height, width, _ = frame.shape
            self.names = ["overlay.mp4"]
            path = str(self.folder / "overlay.mp4")
            rate = round(self.rate, 2 if self.rate < 600 else 0)  # MPEG-4 counts in 1/65535 at the finest
            self.video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
            if not self.video.isOpened():
                raise ValueError(f"{self.source}: this OpenCV writes no MP4 of it; --no-overlays leaves it "
                                 "out")
        self.video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def __exit__(self, *_):
        if self.video:
            self.video.release()
        if self.folder.exists():
            lines = [f"frames of {self.source}, drawn by predict.py", *self.names, ""]
            (self.folder / OVERLAYS).write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")


def overlay_names(folder: Path) -> list[str]:
    """What an OverlayWriter says that it wrote into a folder; FileNotFoundError where none did."""
    return (folder / OVERLAYS).read_text(encoding="utf-8", errors="surrogateescape").split("\n")[1:]


# ----------------------------------------------------------------------------------------------------- hands
def hand_box(hand: dict) -> np.ndarray | None:
    """The tight box (4,) x0, y0, x1, y1 around the points that were seen, in pixel-edge coordinates.

    None where fewer than two points were seen.
    """
    points = hand["keypoints"][hand["score"] > 0]
    if len(points) < 2:
        return None
    return np.concatenate([points.min(0), points.max(0)]) + 0.5


def cut_hand(frame: Image.Image, hand: dict, context: float, longest: int) -> tuple | None:
    """The crop of a hand and {box (4,), keypoints (21,2), score (21,)} in the crop's pixels.

    The crop is a square of `context` times the hand's box, without what lies outside the frame. It is made
    smaller where its longer side has more than `longest` pixels, and never distorted. None where the hand or
    the crop has fewer than SMALLEST pixels, or the box would be thinner than one.
    """
    box = hand_box(hand)
    if box is None or (box[2:] - box[:2]).max() < SMALLEST:
        return None
    centre = (box[:2] + box[2:]) / 2
    half = context * (box[2:] - box[:2]).max() / 2
    low = np.maximum(centre - half, 0).round()  # (2,) pixels of the frame
    high = np.minimum(centre + half, frame.size).round()
    extent = high - low
    if (extent < SMALLEST).any():
        return None
    size = np.maximum((extent * min(1.0, longest / extent.max())).round(), 1).astype(int)
    scale = size / extent
    if ((box[2:] - box[:2]) * scale < 1).any():  # few points, one above the other: an index takes no such box
        return None
    crop = frame.resize(size.tolist(), Image.Resampling.BILINEAR, box=(*low, *high), reducing_gap=2.0)
    return crop, {"box": (box - np.tile(low, 2)) * np.tile(scale, 2),
                  "keypoints": (hand["keypoints"] + 0.5 - low) * scale - 0.5, "score": hand["score"]}


def mediapipe_detector(least: float = 0.3) -> Callable[[Image.Image], list[dict]]:
    """A function from an RGB image to its hands, by the models inside MediaPipe's wheel.

    least: the lowest confidence of a hand. At MediaPipe's own .5 it misses fast hands; at .3 no more are
    false (ours: on 879 photographs, 450 frames). MediaPipe calls a hand as a mirror shows it, so the sides
    are exchanged here. It gives one score for a hand, which all of the hand's points get. ValueError where
    MediaPipe is missing or too new.
    """
    try:
        import mediapipe
        detector = mediapipe.solutions.hands.Hands(static_image_mode=True, max_num_hands=4,
                                                   min_detection_confidence=least)
    except (ImportError, AttributeError):
        raise ValueError("the detector needs MediaPipe up to 0.10.21, in an environment made with `pip "
                         "install -r requirements-video.txt`; or give what another detector saw "
                         "(--detections; predict.py --boxes)") from None
    sides_in_mirror = {"Right": "left", "Left": "right"}

    def detect(image):
        result = detector.process(np.asarray(image))
        hands = []
        for landmarks, sides in zip(result.multi_hand_landmarks or (), result.multi_handedness or (),
                                    strict=True):
            points = np.array([(point.x, point.y) for point in landmarks.landmark])  # (21,2), in [0,1]
            side = sides.classification[0]
            hands.append({"side": sides_in_mirror[side.label], "keypoints": points * image.size - 0.5,
                          "score": np.full(21, side.score)})
        return hands

    return detect


# ---------------------------------------------------------------------------------------- detections in files
def read_detections(path: Path | str, world: Path | str | None = None) -> dict[str, list[dict]]:
    """The hands that any detector wrote into a file, as {frame: [hand, ...]}.

    A frame is called VIDEO/NAME below the folder of the videos; NAME is as read_frames gives it. Names have
    composed letters (frame_key). The header of a .csv is read without case and blanks; a line on stderr names
    columns that are not known.

      .npz   image (M,), side (M,) "right" or "left", keypoints (M,21,2) pixels, score (M,) or (M,21)
      .csv   the header image,side,score,x0,y0,...,x20,y20; a point is not seen where a cell is NaN or empty

    world: a .npy (M,21,3) with the points in space of the same entries: metres, x right, y down, z away from
    the camera. Each hand then has keypoints3d (21,3).

    FileNotFoundError, or a ValueError that names the file and, where one is wrong, the entry.
    """
    path = Path(path)
    try:
        images, sides, keypoints, scores = _read_npz(path) if path.suffix == ".npz" else _read_csv(path)
        scores = np.broadcast_to(scores.T, (21, len(images))).T  # one score for a hand is that of its points
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of detections") from None
    except Exception as error:  # zipfile, csv and numpy raise a dozen types
        raise ValueError(f"{path}: needs image, side, score and 21 points for each hand, as the help of "
                         f"--detections describes ({type(error).__name__}: {error})") from None
    count = len(images)
    if keypoints.shape != (count, 21, 2) or len(sides) != count:
        raise ValueError(f"{path}: keypoints have shape {keypoints.shape}, needed ({count}, 21, 2)")
    points3d = None if world is None else _read_world(world, count)
    missing = np.isnan(keypoints).any(2)  # (M,21)
    keypoints = np.where(missing[..., None], 0, keypoints)
    scores = np.where(missing, 0, scores)
    hands = {}
    for entry, image in enumerate(images):
        side = sides[entry].strip().lower()
        finite = (np.abs(keypoints[entry]) < 1e6).all() and np.isfinite(scores[entry]).all()
        if side not in ("left", "right") or not finite:
            raise ValueError(f"{path}: entry {entry} needs side right or left, and finite numbers")
        hand = {"side": side, "keypoints": keypoints[entry], "score": scores[entry]}
        if world is not None:
            hand["keypoints3d"] = points3d[entry]
        hands.setdefault(frame_key(image), []).append(hand)
    return hands


def _read_world(path, count):
    """Points in space (M,21,3) of `count` entries; ValueError names the file and its first wrong entry."""
    try:
        points = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of points in space") from None
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: no .npy array ({type(error).__name__})") from None
    if not isinstance(points, np.ndarray) or points.shape != (count, 21, 3) or points.dtype.kind != "f":
        raise ValueError(f"{path}: needs numbers of the shape ({count}, 21, 3), a row for each detection")
    wrong = ~(np.ptp(points, axis=1).max(1) < LARGEST)  # so also where one is NaN
    if wrong.any():
        raise ValueError(f"{path}: entry {int(np.argmax(wrong))} is no hand in metres ({wrong.sum()} such)")
    return points.astype(np.float32)


def frame_key(name: str) -> str:
    """A frame's name without ./ and blanks around it, with composed letters (NFC; macOS parts them)."""
    return unicodedata.normalize("NFC", name.strip().replace(os.sep, "/").removeprefix("./"))


def _read_npz(path):
    """images and sides as lists of text, keypoints (M,21,2), scores (M,) or (M,21)."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
        images = [os.fsdecode(text) for text in content["image"].tolist()]
        sides = [os.fsdecode(text) for text in content["side"].tolist()]
        return images, sides, content["keypoints"].astype(float), content["score"].astype(float)


def _read_csv(path):
    """images and sides as lists of text, keypoints (M,21,2), scores (M,)."""
    cells = ["score"]
    for point in range(21):
        cells += [f"x{point}", f"y{point}"]
    images, sides, numbers = [], [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = [name.strip().lower() for name in reader.fieldnames or ()]
        needed = {"image", "side", *cells}
        unknown = sorted(set(header) - needed)
        if unknown and needed <= set(header):
            print(f"warning: {path}: not read: column {', '.join(unknown)}", file=sys.stderr)
        reader.fieldnames = header
        for row in reader:
            images.append(row["image"])
            sides.append(row["side"])
            numbers.append(np.array([row[cell] or "nan" for cell in cells], np.float32))
    numbers = np.stack(numbers).astype(np.float64)  # (M,43)
    return images, sides, numbers[:, 1:].reshape(-1, 21, 2), numbers[:, 0]
