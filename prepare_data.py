"""Hands as downloaded -> an index (data.py describes the format). The images stay where they are.

  freihand ROOT   FreiHAND v2 as unpacked; ROOT holds training/ and evaluation/, and the labels of the evaluation set lie there
                  or in FreiHAND_pub_v2_eval beside or inside it. --split training, evaluation, or train and val: the training
                  set in two parts that share no pose.
  ho3d ROOT       HO-3D v2 or v3: --split train or evaluation. ROOT holds train.txt, evaluation.txt, train/ and evaluation/ (v3's masks
                  in train/SEQUENCE/seg); labels of the evaluation frames, a download of their own since 2024: evaluation_xyz.json and
                  evaluation_verts.json in ROOT. With --mano, training hands have meshes, and the definition of the evaluation
                  joints is found.
  dexycb ROOT     DexYCB: --setup s0 to s3, --split train, val or test. ROOT holds calibration/ and the ten DATE-subject-NN/. With --mano,
                  hands have poses and meshes.
  assemblyhands ROOT   AssemblyHands, the headset's cameras: --split train, val or test. ROOT holds annotations/SPLIT/ and images/.
  interhand ROOT  InterHand2.6M v1.0, 5 or 30 frames a second: --split train, val or test. ROOT holds annotations/SPLIT/ and
                  images/SPLIT/; with --mano, the meshes of annotations/SPLIT/InterHand2.6M_SPLIT_MANO_NeuralAnnot.json.
  folder ROOT     any folder of hand photographs, sub-folders included. Each sub-folder counts as one video. Without --boxes
                  the hand is taken to fill the image, up to the usual margin.
  video ROOT      videos, and folders of frames, anywhere below ROOT: hands are found in one frame of --every and cut out, with side
                  and keypoints, by MediaPipe (requirements-video.txt) or as --detections says. Continues where it was
                  stopped; torchrun shares the videos among processes.
  hand100m ROOT   the annotations of SiMHand (ROOT/annotations/SOURCE/Hand100M_*_SCALE_*.json; --source, --scale) over frames that
                  you have extracted below ROOT; hands are cut out likewise, and the authors' positives written as pairs.npz.

Prints what was kept and what was left out and why, and writes samples.png into the index: look at it.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import layouts
from data import (
    LABEL_COLUMNS,
    SUFFIXES,
    HandIndex,
    crop_canvas,
    crop_mask,
    image_size,
    index_fingerprint,
    list_images,
    read_boxes,
    read_image,
    square,
    whole_box,
    write_index,
)
from draw import draw_joints, grid, save_image
from mano import Mano, mirror_arrays, read_mano, rotmat_from_axis_angle
from runtime import barrier, finish, parser, read_json, run, save_arrays, setup, write_atomically

BOX_SCALE = 1.3                                                    # the networks' view of a box: see finetune_mesh.py
CROP, CONTEXT = 256, 2.0                                           # stored crops: longest side in pixels, and side over the box's
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


# ------------------------------------------------------------------------------------------------- labelled data sets
def labelled(root, args):
    """Columns of a public data set, by its reader in layouts.py."""
    split = args.split or layouts.SPLITS[args.kind][0]
    hands = Hands(args.mano) if args.mano else None
    extra = {"freihand": {"skip_missing": args.skip_missing}, "ho3d": {"hands": hands, "workers": args.workers}, "assemblyhands": {},
             "dexycb": {"setup": args.setup, "hands": hands, "workers": args.workers}, "interhand": {"hands": hands}}[args.kind]
    return usable(*getattr(layouts, args.kind)(root, split, **extra))


def usable(columns, meta, folder, dropped):
    """Without the hands that no picture can be cut out of: what is left out is listed with the rest."""
    box, size = columns["box"], columns["size"]
    span = box[:, 2:] - box[:, :2]
    away = (box[:, 2:] <= 0).any(1) | (box[:, :2] >= size).any(1) | (CONTEXT * span.max(1) > 4 * size.max(1))
    reasons = {"box thinner than a pixel": ~(span >= 1).all(1), "hand outside its image": away}
    if "joints2d" in columns and not meta.get("partial"):
        known = np.isfinite(columns["joints2d"]).all((1, 2))
        reasons["joints behind the camera"] = ~known[columns.get("label", np.arange(len(box)))]
    kept = np.ones(len(box), bool)
    for reason, wrong in reasons.items():
        dropped[reason] = [os.fsdecode(name) for name in columns["image"][wrong & kept]]
        kept &= ~wrong
    if not kept.any():
        raise ValueError(f"{folder}: no hand can be cut out: {', '.join(f'{len(v)} {k}' for k, v in dropped.items() if v)}")
    if not kept.all():
        columns = {name: value if "label" in columns and name in LABEL_COLUMNS else value[kept] for name, value in columns.items()}
    return columns, meta, folder, dropped


class Hands:
    """Meshes of labels that are MANO's numbers: arrays (N,...), metres; left (N,) tells of whose model a row is (default: right ones)."""

    def __init__(self, paths):
        if len(paths) > 2:
            raise ValueError("--mano: one file, MANO_RIGHT.pkl, or two, MANO_RIGHT.pkl MANO_LEFT.pkl")
        right = read_mano(paths[0])
        self.arrays = right, read_mano(paths[1]) if len(paths) > 1 else mirror_arrays(right)

    def angles(self, coefficients, left):
        """PCA coefficients (N,45) -> axis-angles (N,45), the mean pose in them (T17)."""
        both = [hand["hands_mean"].ravel() + coefficients @ hand["hands_components"] for hand in self.arrays]
        return np.where(left[:, None], both[1], both[0])

    def mean(self, left):
        return np.where(left[:, None], *(hand["hands_mean"].ravel() for hand in self.arrays[::-1]))

    @torch.no_grad()
    def vertices(self, pose, betas, trans, left=None, repair=False):
        """(N,778,3) of absolute poses (N,48). repair: with the left model's shapes corrected, which DexYCB's labels have not."""
        left, found = np.zeros(len(pose), bool) if left is None else left, np.empty((len(pose), 778, 3), np.float32)
        for side in (0, 1):
            layer = Mano(self.arrays[side], ("right", "left")[side], repair=repair).double()
            for rows in np.array_split(np.flatnonzero(left == side), max(1, int((left == side).sum()) // 1024)):
                rotmats = rotmat_from_axis_angle(torch.from_numpy(pose[rows].reshape(-1, 16, 3)))
                found[rows] = layer(rotmats, torch.from_numpy(betas[rows]))[0].numpy() + trans[rows, None]
        return found


# --------------------------------------------------------------------------------------------------------------- folder
def folder(root, args):
    """Every image below ROOT that opens, with the boxes and sides of --boxes or the whole image as a right hand's crop."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    boxes = read_boxes(args.boxes) if args.boxes else None
    paths = [path.relative_to(root).as_posix() for path in list_images(root)]
    videos = {name: i for i, name in enumerate(sorted({os.path.dirname(p) for p in paths}))}
    if boxes is not None and args.side != "right":
        raise ValueError("--side does nothing with --boxes, where the column side says it: leave it out")
    if boxes is not None and not set(boxes) & set(paths):
        raise ValueError(f"{args.boxes}: no image below {root} has a box; names are relative to ROOT, as {(paths or ['-'])[0]}, and here "
                         f"{next(iter(boxes), 'there is none')}")
    rows, dropped = [], {"not a readable image": [], "no box": [], "box without an image": sorted(set(boxes or ()) - set(paths))}
    for path in tqdm(paths, desc="images", leave=False):
        try:
            size = image_size(root / path)
        except ValueError as error:
            dropped["not a readable image"].append(str(error))
            continue
        if boxes is not None and path not in boxes:
            dropped["no box"].append(path)
        for box, side in ([(whole_box(size, BOX_SCALE), args.side)] if boxes is None else boxes.get(path, [])):
            rows.append((os.fsencode(path), box, size, side == "left", videos[os.path.dirname(path)]))
    if not rows:
        raise ValueError(f"{root}: no readable image with a hand ({', '.join(f'{len(v)} {k}' for k, v in dropped.items())})")
    image, box, size, side, video = zip(*rows, strict=True)
    columns = {"image": np.array(image), "box": np.array(box), "size": np.array(size), "side": np.array(side),
               "video": np.array(video) if len(videos) > 1 else np.full(len(rows), -1)}
    return usable(columns, {"name": root.name}, root, dropped)


# ---------------------------------------------------------------------------------------------------------------- video
def video(root, args):
    """Hands of the videos and folders of frames below ROOT, cut out."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = read_detections(args.detections) if args.detections else None
    root, out = root.resolve(), args.out.resolve()
    files = [path for path in root.rglob("*") if out not in path.parents and path.is_file()]
    films = sorted(path for path in files if path.suffix.lower() in VIDEOS)
    folders = sorted({path.parent for path in files if path.suffix.lower() in SUFFIXES})
    if not films + folders:
        raise FileNotFoundError(f"{root}: no video ({' '.join(sorted(VIDEOS))}) and no folder of frames below it")
    detect = mediapipe_hands() if found is None else lambda name, image: found.get(name, [])

    def frames(path):
        for name, image in read_frames(path, args.every):
            yield name, image, detect(f"{path.relative_to(root).as_posix()}/{name}".removeprefix("./"), image)
    jobs = [(path.relative_to(root).as_posix(), lambda path=path: frames(path)) for path in films + folders]
    return cut_out(jobs, args, {"name": root.name}, [root, args.every, digest([args.detections] if args.detections else [])])


def read_frames(path, every):
    """(name, RGB image) of one frame in `every` of a video file or a folder of frames; a frame that cannot be read is None."""
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[::every]:
            image = None
            with contextlib.suppress(ValueError, OSError):
                image = read_image(file)[0]
            yield file.name, image
        return
    try:
        import cv2
    except ImportError:
        raise ValueError(f"{path}: reading a video file needs OpenCV, which requirements-video.txt brings; or extract its frames into a "
                         "folder") from None
    film, number = cv2.VideoCapture(str(path)), 0
    while film.grab():
        if number % every == 0:
            good, pixels = film.retrieve()
            yield f"{number:06d}", Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)) if good else None
        number += 1
    film.release()
    if number == 0:
        yield "no frame", None


def mediapipe_hands(least=0.5):
    """A detector: (name, image) -> [(left, keypoints (21,2) in pixels, score (21,))], by the models inside MediaPipe's wheel. Its names
    of the sides are those of a mirror image, and are exchanged here; it gives one score for a hand."""
    try:
        import mediapipe
        hands = mediapipe.solutions.hands.Hands(static_image_mode=True, max_num_hands=4, min_detection_confidence=least)
    except (ImportError, AttributeError):
        raise ValueError("video: needs MediaPipe up to 0.10.21, in an environment made with `pip install -r requirements-video.txt`; or "
                         "give another detector's keypoints with --detections") from None

    def detect(name, image):
        seen = hands.process(np.asarray(image))
        pairs = zip(seen.multi_hand_landmarks or (), seen.multi_handedness or (), strict=True)
        return [(side.classification[0].label == "Right",
                 np.array([(point.x, point.y) for point in marks.landmark]) * image.size - 0.5,
                 np.full(21, side.classification[0].score)) for marks, side in pairs]
    return detect


def read_detections(path):
    """{frame: [(left, keypoints (21,2), score (21,))]} of a detector's file. A frame is VIDEO/NAME below ROOT, of a video file NAME being
    the frame's number with six digits.

    .npz: image (M,), side (M,) "right" or "left", keypoints (M,21,2) in pixels, score (M,) or (M,21).
    .csv: the header image,side,score,x0,y0,...,x20,y20. NaN or an empty cell: a point that was not seen.
    ValueError names the file and the entry."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                image, side, keypoints, score = (file[name] for name in ("image", "side", "keypoints", "score"))
            image, side = (list(map(os.fsdecode, texts.tolist())) for texts in (image, side))
        else:
            names = ["score", *(f"{axis}{k}" for k in range(21) for axis in "xy")]
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = [(row["image"], row["side"], np.array([row[name] or "nan" for name in names], np.float32))
                        for row in csv.DictReader(file)]
            image, side, numbers = zip(*rows, strict=True)
            score, keypoints = np.stack(numbers)[:, 0], np.stack(numbers)[:, 1:].reshape(-1, 21, 2)
        keypoints, score = keypoints.astype(np.float64), np.broadcast_to(np.asarray(score, np.float64).T, (21, len(image))).T
    except FileNotFoundError:
        raise FileNotFoundError(f"--detections {path}: no such file") from None
    except Exception as error:                                     # zipfile, csv and numpy raise a dozen types
        raise ValueError(f"--detections {path}: not as `prepare_data.py --help` describes ({type(error).__name__}: {error})") from None
    if keypoints.shape != (len(image), 21, 2) or len(side) != len(image):
        raise ValueError(f"--detections {path}: keypoints have shape {keypoints.shape}, needs ({len(image)}, 21, 2)")
    missing = np.isnan(keypoints).any(2)
    keypoints, score = np.where(missing[..., None], 0, keypoints), np.where(missing, 0, score)
    found = {}
    for row, name in enumerate(image):
        if side[row].lower() not in ("left", "right") or not (np.abs(keypoints[row]) < 1e6).all() or not np.isfinite(score[row]).all():
            raise ValueError(f"--detections {path}: entry {row} has an unknown side or a number that is none")
        found.setdefault(name, []).append((side[row].lower() == "left", keypoints[row], score[row]))
    return found


def digest(paths):
    """A text that changes with the content of the files."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def cut_out(jobs, args, meta, made_of):
    """Columns, meta, folder and what was left out, of the crops of jobs [(video, function -> (name, image, hands))], which are stored
    below --out. Each finished video leaves a file in OUT/parts, so that a second call goes on with the next, if it is `made_of` the
    same; processes take turns."""
    runtime, parts = setup(argparse.Namespace(device="cpu", precision="fp32")), args.out / "parts"
    facts = [str(fact) for fact in made_of] + [name for name, _ in jobs]
    if runtime.is_main:
        parts.mkdir(parents=True, exist_ok=True)
        if not (parts / "job.json").exists():
            write_atomically(parts / "job.json", lambda path: path.write_text(json.dumps(facts)))
    barrier()
    if read_json(parts / "job.json") != facts:
        raise ValueError(f"--out {args.out} was begun with other videos, detections or flags: choose another folder, or delete it")
    mine = range(runtime.rank, len(jobs), runtime.world)
    for number in tqdm(mine, desc="videos", disable=not runtime.is_main):
        part = parts / f"{number:07d}.npz"
        if not part.exists():
            save_arrays(part, **cut_video(*jobs[number], args.out, number))
    barrier()
    if not runtime.is_main:
        finish()
        return None
    merged = [dict(np.load(parts / f"{number:07d}.npz")) for number in range(len(jobs))]
    dropped = {"frame not readable": [str(name) for part in merged for name in part.pop("unread")],
               "hand below 8 pixels": [str(name) for part in merged for name in part.pop("small")],
               "video without a hand": [name for (name, _), part in zip(jobs, merged, strict=True) if not len(part["box"])]}
    columns = {name: np.concatenate([part[name] for part in merged]) for name in merged[0]}
    if not len(columns["box"]):
        raise ValueError(f"no hand was found in {len(jobs)} videos and folders; are the images of --detections named as below ROOT "
                         f"({jobs[0][0]}/...)? Delete --out before the next try")
    finish()
    return columns, meta, args.out, dropped


def cut_video(name, frames, out, number):
    """The crops of one video, written below `out`, as columns. A crop is a square of twice the box without what lies outside the frame,
    made smaller where its longer side has more than CROP pixels; never distorted."""
    rows, unread, small = [], [], []
    folder = out / "images" / f"{number:07d}"
    for count, (frame, image, hands) in enumerate(frames()):
        if image is None:
            unread.append(f"{name}/{frame}")
            continue
        for k, (left, keypoints, score, *hand) in enumerate(hands):
            there = keypoints[score > 0]
            if len(there) < 2 or np.ptp(there, axis=0).max() < 8:
                small.append(f"{name}/{frame}")
                continue
            box = np.concatenate([there.min(0), there.max(0)]) + 0.5
            x, y, side = square(box, CONTEXT)
            low = np.maximum([x - side / 2, y - side / 2], 0).round()
            high = np.minimum([x + side / 2, y + side / 2], image.size).round()
            if ((high - low) < 8).any():
                small.append(f"{name}/{frame}")
                continue
            scale = min(1.0, CROP / (high - low).max())
            size = np.maximum(((high - low) * scale).round(), 1).astype(int)
            scale = size / (high - low)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{count:06d}_{k}.jpg"
            image.resize(tuple(map(int, size)), Image.Resampling.BILINEAR, box=(*low, *high), reducing_gap=2.0).save(path, quality=92)
            rows.append({"image": os.fsencode(path.relative_to(out)), "box": (box - np.tile(low, 2)) * np.tile(scale, 2),
                         "size": size, "side": left, "video": number, "keypoints": (keypoints + 0.5 - low) * scale - 0.5,
                         "keypoints_score": score, "hand": hand[0] if hand else -1})
    shapes = {"image": ("S1", ()), "box": (float, (4,)), "size": (int, (2,)), "side": (bool, ()), "video": (int, ()),
              "keypoints": (float, (21, 2)), "keypoints_score": (float, (21,)), "hand": (int, ())}
    columns = {column: np.array([row[column] for row in rows] or np.zeros((0, *shape)), None if column == "image" and rows else dtype)
               for column, (dtype, shape) in shapes.items()}
    return columns | {"unread": np.array(unread, dtype=str), "small": np.array(small, dtype=str)}


# ------------------------------------------------------------------------------------------------------------- Hand100M
def hand100m(root, args):
    """Hands of SiMHand's own annotations, cut out of the frames, and the authors' positives as pairs. Frames are found below ROOT by the
    end of `file_name`, whatever the authors' prefix; a video is the folder of its frames."""
    files = sorted((root / "annotations" / args.source).glob(f"Hand100M_*_{args.scale}_*.json"))
    if len(files) != 1:
        raise FileNotFoundError(f"{root / 'annotations' / args.source}: {len(files)} files Hand100M_*_{args.scale}_*.json instead of one; "
                                "check ROOT, --source and --scale")
    content, videos, positives, where = read_json(files[0]), {}, {}, "images"
    try:
        frames = {image["id"]: image["file_name"] for image in content["images"]}
        for entry, hand in enumerate(content["annotations"]):
            where = f"annotation {entry}"
            number, frame = int(hand["hand_id"]), frames[hand["image_id"]]
            box = np.array(json.loads(hand["boxes"]), float)
            points = np.array(hand["keypoint_25d"], np.float32).reshape(21, 3)[:, :2].copy()
            if box.shape != (4,) or not (np.abs(box) < 1e6).all() or not (box[2:] > box[:2]).all() or not (np.abs(points) < 100).all() or (
                    hand["left_right"] not in ("Left", "Right") or not 0 <= number < 2**62):
                raise ValueError("box, keypoints, side or hand_id")
            videos.setdefault(os.path.dirname(frame), {}).setdefault(frame, []).append((hand["left_right"] == "Left", box, points, number))
            if hand.get("positive_sample"):
                positives[number] = int(hand["positive_sample"][0]), float(hand["distance"][0])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{files[0]}: {where} is not as the authors' files have it ({type(error).__name__}: {error})") from None
    del content

    def frames_of(hands):
        for name, seen in sorted(hands.items()):
            image = None
            with contextlib.suppress(ValueError, OSError):
                image = read_image(locate_frame(root, name))[0]
            yield name.rpartition("/")[2], image, [] if image is None else [in_frame(*hand, image.size) for hand in seen]
    jobs = [(name, lambda hands=hands: frames_of(hands)) for name, hands in sorted(videos.items())]
    made = cut_out(jobs, args, {"name": f"hand100m-{args.source}-{args.scale}"}, [root.resolve(), *digest(files)])
    if made is None:
        return None
    row = {int(number): k for k, number in enumerate(made[0]["hand"])}
    pairs = [positives.get(number, (None, np.inf)) for number in row]
    idx = np.array([[row.get(other, -1)] for other, _ in pairs], np.int32)
    return *made, {"idx": idx, "dist": np.where(idx >= 0, [[far] for _, far in pairs], np.inf).astype(np.float32)}


def in_frame(left, box, points, number, size):
    """A hand of Hand100M in pixels of its frame: its keypoints are in [0,1] of the square 1.3 times the box, clipped to the frame."""
    x0, y0, x1, y1 = box.astype(int)
    half = 1.3 * max(x1 - x0, y1 - y0) / 2
    middle = np.array([x0 + x1, y0 + y1]) / 2
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return left, low + points * (high - low) - 0.5, np.ones(21), number


def locate_frame(root, name):
    """The file below ROOT that the authors call `name`, with or without their leading folders."""
    parts = Path(name).parts
    for start in range(len(parts)):
        path = root.joinpath(*parts[start:])
        if ".." not in parts and not Path(*parts[start:]).is_absolute() and path.is_file():
            return path
    raise FileNotFoundError(f"{root / name}: no such frame")


# ---------------------------------------------------------------------------------------------------------------- main
def contact_sheet(index, path, count=24, size=192):
    """Pictures of evenly spaced hands with their joints and masks, to see a wrong convention at once."""
    tiles, names = [], []
    for row in np.unique(np.linspace(0, len(index) - 1, count).astype(int)):
        centre_x, centre_y, side = square(index.columns["box"][row], BOX_SCALE)
        try:
            image = read_image(index.image_path(row))[0]
            tile, _ = crop_canvas(image, centre_x, centre_y, side, size)
            if index.mask_path(row):                               # what is not the hand, darker
                mask = crop_mask(index.mask_path(row), image.width, centre_x, centre_y, side, size)
                tile = np.where(mask[..., None], tile, tile // 2)
        except (ValueError, OSError):
            continue
        points = "joints2d" if "joints2d" in index.columns else "keypoints"
        if points in index.columns:
            joints = np.array(index.columns[points][index.label(row)])
            tile = draw_joints(tile, (joints + 0.5 - [centre_x - side / 2, centre_y - side / 2]) * (size / side) - 0.5)
        tiles.append(tile)
        names.append(f"{row} {'left' if index.side(row) else 'right'}")
    if tiles:
        save_image(path, grid(tiles, min(6, len(tiles)), names))


def main(argv=None):
    cli = parser(__doc__)
    kinds = dict.fromkeys(layouts.SPLITS, labelled) | {"folder": folder, "video": video, "hand100m": hand100m}
    cli.add_argument("kind", choices=list(kinds), help="what ROOT is")
    cli.add_argument("root", type=Path, metavar="ROOT", help="folder as unpacked from the download")
    cli.add_argument("--out", type=Path, required=True, help="folder of the index; must not hold one yet")
    cli.add_argument("--split", choices=sorted({split for splits in layouts.SPLITS.values() for split in splits}),
                     help="which part of a data set (default: its training set; freihand: train and val part training by pose, 19 to 1)")
    cli.add_argument("--setup", default="s0", choices=["s0", "s1", "s2", "s3"],
                     help="dexycb: what the test has not been trained on: nothing (default), subjects, views, objects")
    cli.add_argument("--mano", nargs="+", metavar="FILE", help="MANO_RIGHT.pkl [MANO_LEFT.pkl] for labels that are MANO's numbers: "
                     "ho3d, dexycb, interhand (without the second the right hand is mirrored, which DexYCB's left labels are not)")
    cli.add_argument("--workers", type=int, default=0, help="ho3d, dexycb: processes that read (default 0: one a core)")
    cli.add_argument("--skip-missing", action="store_true", help="freihand: leave out labels whose image is missing instead of refusing")
    cli.add_argument("--boxes", type=Path, help="folder: CSV image,x0,y0,x1,y1[,side], pixels, image relative to ROOT")
    cli.add_argument("--side", default="right", choices=["right", "left"], help="folder: side of all hands without --boxes")
    cli.add_argument("--every", type=int, default=30, help="video: one frame in this many (default 30, as SiMHand)")
    cli.add_argument("--detections", type=Path, help="video: a detector's keypoints, .npz with image (VIDEO/FRAME below ROOT), side, "
                     "keypoints (M,21,2) in pixels in FreiHAND's order and score, (M,) or (M,21); or .csv "
                     "image,side,score,x0,y0,...,x20,y20; an empty cell is a point that was not seen; a frame of a video file is its "
                     "number with six digits")
    cli.add_argument("--source", default="Ego4D", choices=["Ego4D", "100DOH"], help="hand100m: whose videos (default Ego4D)")
    cli.add_argument("--scale", default="50k", choices=["50k", "100k", "500k", "1m"], help="hand100m: which of the authors' files")
    args = cli.parse_args(argv)
    taken = {"folder": "boxes side", "video": "every detections", "hand100m": "source scale", "freihand": "split skip_missing",
             "ho3d": "split mano workers", "dexycb": "split setup mano workers", "assemblyhands": "split", "interhand": "split mano"}
    for name, value in vars(args).items():
        if name not in ("kind", "root", "out", *taken[args.kind].split()) and value != cli.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing for {args.kind}: leave it out")
    if args.every < 1:
        raise ValueError("--every must be at least 1")
    if (args.out / "index.json").exists():
        raise ValueError(f"--out {args.out} already holds an index: choose another folder or delete it first")
    if args.out.exists() and not (args.out.is_dir() and (args.kind in ("video", "hand100m") or not any(args.out.iterdir()))):
        raise ValueError(f"--out {args.out}: there are files already; choose another folder")
    made = kinds[args.kind](args.root, args)
    if made is None:                                               # process 0 writes the index
        return
    columns, meta, images, dropped, *pairs = made
    columns.pop("hand", None)
    if pairs:                                                      # before the index, which closes the job
        save_arrays(args.out / "pairs.npz", **pairs[0], fingerprint=index_fingerprint([columns], "keypoints"))
    write_index(args.out, columns, meta, root="." if images == args.out else images.resolve())
    index = HandIndex(args.out)
    contact_sheet(index, args.out / "samples.png")
    left = int(np.sum(index.columns["side"])) if "side" in index.columns else 0
    labels = f"{index.meta['labels']} labels" if (set(LABEL_COLUMNS) - {"keypoints", "keypoints_score"}) & set(columns) else "no labels"
    videos = len(set(np.unique(index.columns["video"])) - {-1}) if "video" in index.columns else 0
    print(f"{args.out}: {len(index)} hands ({left} left){f' of {videos} videos' if videos else ''}, {labels}; look at "
          f"{args.out / 'samples.png'}")
    if "found" in index.meta:
        print(f"joints: {index.meta['found']}")
    for reason, names in dropped.items():
        if names:
            print(f"left out, {reason}: {len(names)}: {'; '.join(names[:10])}{' ...' if len(names) > 10 else ''}")


if __name__ == "__main__":
    run(main)
