"""Hands as downloaded -> an index (data.py describes the format). The images stay where they are, unless the
index is packed.

  freihand ROOT   FreiHAND v2 as unpacked: training/ and evaluation/; the evaluation labels lie there, or
        in FreiHAND_pub_v2_eval beside or inside it. --split training, evaluation, or train and val: the
        training set in two parts that share no pose.
  ho3d ROOT   HO-3D v2 or v3 as unpacked: --split train or evaluation. The labels of the evaluation frames
        are a download of their own since 2024: evaluation_xyz.json and evaluation_verts.json in ROOT.
        With --mano, training hands have meshes, and the definition of the evaluation joints is found.
  dexycb ROOT   DexYCB, with calibration/ and the ten DATE-subject-NN/: --setup s0 to s3, --split train,
        val or test. With --mano, hands have poses and meshes.
  assemblyhands ROOT   AssemblyHands, the headset's cameras, with annotations/SPLIT/ and images/: --split
        train, val or test.
  interhand ROOT   InterHand2.6M v1.0, 5 or 30 frames a second, with annotations/SPLIT/ and images/SPLIT/:
        --split train, val or test. With --mano, hands have the meshes of SPLIT_MANO_NeuralAnnot.json.
  hand100m ROOT   the annotations of SiMHand's authors (ROOT/annotations/SOURCE/Hand100M_*_SCALE_*.json;
        --source, --scale) over frames that you have extracted below ROOT. Hands are cut out as from
        videos, and the authors' positives are written as pairs.npz.
  folder ROOT   any folder of hand photographs, sub-folders included. Each sub-folder counts as one video.
        Without --boxes the hand is taken to fill the image, up to the usual margin. --joints brings labels of
        your own, for finetune_mesh.py; boxes are then drawn around the points.
  video ROOT   videos, and folders of frames, anywhere below ROOT. Hands are found in one frame of --every
        and cut out, with side and keypoints, by MediaPipe (requirements-video.txt) or as --detections
        says. A stopped command goes on when it is given again. torchrun shares the videos among processes.
  pack ROOT   an index, whose images and masks are copied into a few large files in a new one: for millions of
        hands, where files of their own are slow to copy and to open.

Prints what was kept, what was left out and why, and writes samples.png into the index: look at it.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import layouts
from data import (
    CONTEXT,
    LABEL_COLUMNS,
    PAIRS_FORMAT,
    HandIndex,
    counts_text,
    crop_canvas,
    crop_mask,
    image_size,
    index_fingerprint,
    list_images,
    match_boxes,
    pack_files,
    read_boxes,
    read_image,
    square,
    whole_box,
    write_index,
)
from draw import draw_joints, grid, save_image
from mano import TIPS, Mano, mirror_arrays, read_mano, rotmat_from_axis_angle, side_of
from runtime import barrier, finish, parser, run, setup
from saving import read_json, refuse_files, save_arrays, staged_folder, write_atomically
from video import (
    SMALLEST, cut_hand, frame_key, list_videos, mediapipe_detector, read_detections, read_frames,
)

BOX_SCALE = 1.3  # the usual view of a box: finetune_mesh.py's default
CROP = 256  # longest side of a hand cut out of a frame, pixels
PARTS_FORMAT = 2  # of OUT/parts; what an older version began there is not continued


# ----------------------------------------------------------------------------------------- labelled data sets
def from_data_set(root, args):
    """Columns of a public data set, by its reader in layouts.py."""
    split = args.split or layouts.SPLITS[args.kind][0]
    mano = ManoModels(args.mano) if args.mano else None
    options = {"freihand": {"skip_missing": args.skip_missing}, "assemblyhands": {},
               "interhand": {"mano": mano}, "ho3d": {"mano": mano, "workers": args.workers},
               "dexycb": {"mano": mano, "workers": args.workers, "setup": args.setup}}
    found = getattr(layouts, args.kind)(root, split, **options[args.kind])
    return keep_all(*found) if split in layouts.SCORED else drop_uncroppable(*found)


def keep_all(columns, meta, folder, dropped):
    """The four with every hand, because the official scripts score every hand, whatever its box.

    A box that no picture can be cut out of is cut to its image; one outside of it gives way to that of the
    labelled joints. meta `reboxed`: such rows. meta `unseen`: rows for which both lie outside. Their box is
    the whole image, and evaluate.py predicts the mean hand."""
    size = columns["size"]
    boxes = [columns["box"]]
    if "joints2d" in columns:
        label = columns.get("label", np.arange(len(size)))
        boxes.insert(0, layouts.tight_boxes(columns["joints2d"])[label])
        if np.isnan(columns["joints2d"]).any():  # behind the camera
            meta["partial"] = True
    seen = np.zeros(len(size), bool)
    best = np.concatenate([0 * size, size], axis=1)  # (N, 4) the whole image
    for box in boxes:  # from the worst to the best
        low = np.clip(box[:, :2], 0, size - 1)
        inside = np.concatenate([low, np.clip(box[:, 2:], low + 1, size)], axis=1)
        is_usable = ~_is_outside(box, size) & ((box[:, 2:] - box[:, :2]).max(1) >= 1)
        best = np.where(is_usable[:, None], inside, best)
        seen |= is_usable
    faulty = np.any(_box_faults(columns["box"], size), axis=0)
    columns["box"] = np.where(faulty[:, None], best, columns["box"])
    if (faulty & ~seen).all():
        raise ValueError(f"{folder}: no hand lies in its image")
    meta["reboxed"] = np.flatnonzero(faulty & seen).tolist()
    meta["unseen"] = np.flatnonzero(faulty & ~seen).tolist()
    return columns, meta, folder, dropped


def _box_faults(box, size):
    """Where (N,) a box is thinner than a pixel, and where it lies outside its image or is far larger."""
    sides = box[:, 2:] - box[:, :2]
    too_large = CONTEXT * sides.max(1) > 4 * size.max(1)
    return ~(sides >= 1).all(1), _is_outside(box, size) | too_large


def _is_outside(box, size):
    return (box[:, 2:] <= 0).any(1) | (box[:, :2] >= size).any(1)


def drop_uncroppable(columns, meta, folder, dropped):
    """The four without the hands that no picture can be cut out of, which are added to `dropped`."""
    box = columns["box"]
    thin, outside = _box_faults(box, columns["size"])
    reasons = {"box thinner than a pixel": thin, "hand outside its image": outside}
    if "joints2d" in columns and not meta.get("partial"):
        known = np.isfinite(columns["joints2d"]).all((1, 2))
        reasons["joints behind the camera"] = ~known[columns.get("label", np.arange(len(box)))]
    kept = np.ones(len(box), bool)
    for reason, wrong in reasons.items():
        dropped[reason] = [os.fsdecode(name) for name in columns["image"][wrong & kept]]
        kept &= ~wrong
    if not kept.any():
        raise ValueError(f"{folder}: no hand can be cut out: {_counts(dropped)}")
    for name in columns:
        row_is_label = "label" in columns and name in LABEL_COLUMNS
        if not row_is_label and not kept.all():
            columns[name] = columns[name][kept]
    return columns, meta, folder, dropped


def _counts(dropped):
    return ", ".join(f"{len(names)} {reason}" for reason, names in dropped.items() if names)


class ManoModels:
    """MANO's two models, for labels that are MANO's numbers. left (N,): True where a row is a left hand's.

    paths: MANO_RIGHT.pkl, or it and MANO_LEFT.pkl; without the second, the right model is mirrored.
    """

    def __init__(self, paths):
        if len(paths) > 2:
            raise ValueError("--mano: one file, MANO_RIGHT.pkl, or two, MANO_RIGHT.pkl MANO_LEFT.pkl")
        right = read_mano(paths[0])
        self.arrays = right, read_mano(paths[1]) if len(paths) > 1 else mirror_arrays(right)
        for path, arrays, side in zip(paths, self.arrays, ("right", "left"), strict=False):
            if side_of(arrays) not in (side, None):
                raise ValueError(f"--mano {path}: a {side_of(arrays)} hand's, where the {side} one's is "
                                 "needed: give MANO_RIGHT.pkl, then MANO_LEFT.pkl")

    def mean_fingers(self, left):
        """The 45 axis-angle numbers of each row's mean pose (N,45)."""
        right_mean, left_mean = (arrays["hands_mean"].ravel() for arrays in self.arrays)
        return np.where(left[:, None], left_mean, right_mean)

    def fingers_from_coefficients(self, coefficients, left):
        """PCA coefficients (N,45) -> axis-angle numbers (N,45), with the mean pose in them."""
        of_right, of_left = (arrays["hands_mean"].ravel() + coefficients @ arrays["hands_components"]
                             for arrays in self.arrays)
        return np.where(left[:, None], of_left, of_right)

    @torch.no_grad()
    def vertices(self, pose, betas, trans, left=None, repair=False):
        """Meshes (N,778,3), metres, of absolute poses (N,48), betas (N,10) and translations (N,3).

        left: None where all are right. repair: correct the left model's shapes, as DexYCB's labels do not.
        """
        left = np.zeros(len(pose), bool) if left is None else left
        vertices = np.empty((len(pose), 778, 3), np.float32)
        for side, name in enumerate(("right", "left")):
            layer = Mano(self.arrays[side], name, repair=repair).double()
            rows = np.flatnonzero(left == side)
            for some in np.array_split(rows, max(1, len(rows) // 1024)):
                rotmats = rotmat_from_axis_angle(torch.from_numpy(pose[some].reshape(-1, 16, 3)))
                meshes, _ = layer(rotmats, torch.from_numpy(betas[some]))
                vertices[some] = meshes.numpy() + trans[some, None]
        return vertices


# ---------------------------------------------------------------------------------------------------- folder
def from_folder(root, args):
    """Every image below ROOT that opens, with its hands of --boxes or as a whole."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    left_out = Counter()
    images = list_images(root, skip=args.out, left_out=left_out)
    _print_left_out(root, left_out)
    paths = [path.relative_to(root).as_posix() for path in images]
    hands_of, labels_of = [[(None, None)]] * len(images), None
    dropped = {}
    if args.boxes:
        hands_of, dropped["box without an image"] = _match(read_boxes(args.boxes), images, root, args.boxes)
    if args.joints:
        labels_of, dropped["joints without an image"] = _match(layouts.own_joints(args.joints), images, root,
                                                               args.joints)
    folders = sorted({os.path.dirname(path) for path in paths})
    video_of_folder = {folder: video for video, folder in enumerate(folders)}
    rows = []
    dropped |= {"not a readable image": [], "no box": [], "no joints": []}
    for number, path in enumerate(tqdm(paths, desc="images", leave=False)):
        try:
            size = image_size(root / path)
        except ValueError as error:
            dropped["not a readable image"].append(str(error))
            continue
        hands = [{"box": box, "side": side} for box, side in hands_of[number]]
        if not hands:
            dropped["no box"].append(path)
        elif args.joints:
            hands = _with_joints(hands, labels_of[number], path, args)
            if not hands:
                dropped["no joints"].append(path)
        for hand in hands:
            box = whole_box(size, BOX_SCALE) if hand["box"] is None else hand["box"]
            rows.append(hand | {"image": os.fsencode(path), "size": size, "box": box})
            rows[-1]["side"] = (hand["side"] or args.side) == "left"
            rows[-1]["video"] = video_of_folder[os.path.dirname(path)] if len(folders) > 1 else -1
    if not rows:
        raise ValueError(f"{root}: no readable image with a hand ({_counts(dropped)})")
    columns = _columns(rows)
    meta = {"name": root.name}
    for name in {"joints", "joints2d"} & set(columns):
        unknown = np.isnan(columns[name])
        if unknown.all():
            del columns[name]
        elif unknown.any():
            meta["partial"] = True
    if "joints" in columns:
        meta["joints"] = args.definition
        if np.isnan(columns["joints"]).any():
            meta["protocol"] = "assemblyhands"  # which scores the joints that are known
    if args.joints and not args.boxes:
        meta["box"] = "drawn around the labelled joints"
    return drop_uncroppable(columns, meta, root, dropped)


def _match(hands, images, root, path):
    """match_boxes of images below root; ValueError where no image has a hand of the file `path`."""
    matched = match_boxes(hands, [(image, root) for image in images], path)
    if not any(matched[0]):
        here = next((image.relative_to(root).as_posix() for image in images), "-")
        raise ValueError(f"{path}: no image below {root} is in it; names are as below ROOT, as {here}, but "
                         f"here {next(iter(hands), 'there is none')}")
    return matched


def _with_joints(hands, labels, path, args):
    """The hands of an image with what --joints says of them; its n-th line of an image is its n-th box.

    Without --boxes the box is around the points, and None where there are none. Lines without a known point
    are left out. ValueError where boxes and lines do not fit."""
    if not args.boxes:
        hands = [{"box": None, "side": None}] * len(labels)
    if labels and len(labels) != len(hands):
        raise ValueError(f"{args.joints}, line {labels[0][3]}: {path} has {len(labels)} lines there and "
                         f"{len(hands)} in {args.boxes}: one of each for a hand, in the same order")
    labelled = []
    for hand, (side, points, points3d, line) in zip(hands, labels, strict=False):
        if hand["side"] and side and hand["side"] != side:
            raise ValueError(f"{args.joints}, line {line}: a {side} hand, but a {hand['side']} one in "
                             f"{args.boxes}: lines and boxes of an image come in the same order")
        box = hand["box"]
        if box is None and np.isfinite(points).any():
            box = layouts.tight_boxes(points[None])[0]
        if np.isfinite(points).any() or np.isfinite(points3d).any():
            labelled.append({"box": box, "side": side or hand["side"], "joints2d": points,
                             "joints": points3d})
    return labelled


def _print_left_out(root, left_out):
    if counts_text(left_out):
        print(f"{root}: not taken: {counts_text(left_out)}")


def _columns(rows):
    """Dicts with the same names -> a dict of arrays with a row each."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


# ------------------------------------------------------------------------------- hands cut out of many frames
def from_videos(root, args):
    """Hands of the videos and folders of frames below ROOT, cut out."""
    typed = root
    root = root.resolve()
    detections = read_detections(args.detections, args.world) if args.detections else None
    left_out = Counter()
    paths = list_videos(root, skip=args.out, left_out=left_out)
    if int(os.environ.get("RANK", 0)) == 0:
        _print_left_out(root, left_out)
    detector = mediapipe_detector() if detections is None else None

    def frames_with_hands(path, video):
        for name, frame in read_frames(path, args.every, lambda file: read_image(file)[0]):
            if frame is None:
                yield name, None, []
            elif detections is None:
                yield name, frame, detector(frame)
            else:
                below = frame_key(f"{video}/{name}")
                as_typed = frame_key(f"{typed}/{below}")
                yield name, frame, detections.get(below) or detections.get(as_typed, [])

    videos = {}
    for path in paths:
        video = path.relative_to(root).as_posix()
        videos[video] = frames_with_hands(path, video)
    facts = [root, args.every]
    if args.detections:
        facts.append(hashlib.sha256(args.detections.read_bytes()).hexdigest())
    if args.world:
        facts.append(hashlib.sha256(args.world.read_bytes()).hexdigest())
    columns, dropped = cut_videos(videos, args.out, facts)
    return columns, {"name": root.name}, args.out, dropped


def from_hand100m(root, args):
    """Hands of SiMHand's own annotations, cut out of the frames; the authors' positives become pairs.npz.

    A video is the folder of its frames.
    """
    path, hands_of_videos, positives = layouts.hand100m(root, args.source, args.scale)

    def frames_with_hands(hands_of_frames):
        for name, hands in sorted(hands_of_frames.items()):
            try:
                frame, _ = read_image(layouts.find_hand100m_frame(root, name))
            except (ValueError, OSError):
                yield os.path.basename(name), None, []
                continue
            seen = [{"side": hand["side"], "hand_id": hand["hand_id"], "score": np.ones(21),
                     "keypoints": layouts.hand100m_in_frame(hand, frame.size)} for hand in hands]
            yield os.path.basename(name), frame, seen

    videos = {name: frames_with_hands(hands) for name, hands in sorted(hands_of_videos.items())}
    facts = [root.resolve(), hashlib.sha256(path.read_bytes()).hexdigest()]
    columns, dropped = cut_videos(videos, args.out, facts)
    hand_ids = columns.pop("hand_id").tolist()
    pairs = _positives_as_pairs(hand_ids, positives)
    save_arrays(args.out / "pairs.npz", **pairs, format=np.int64(PAIRS_FORMAT),
                fingerprint=index_fingerprint([columns], "keypoints"))
    return columns, {"name": f"hand100m-{args.source}-{args.scale}"}, args.out, dropped


def _positives_as_pairs(hand_ids, positives):
    """idx (N,1) and dist (N,1) as mine_pairs.py has them; -1 and infinity where the positive is not here."""
    row_of_hand = {hand_id: row for row, hand_id in enumerate(hand_ids)}
    idx = np.full((len(hand_ids), 1), -1, np.int32)
    dist = np.full((len(hand_ids), 1), np.inf, np.float32)
    for row, hand_id in enumerate(hand_ids):
        positive, distance = positives.get(hand_id, (None, None))
        if positive in row_of_hand:
            idx[row] = row_of_hand[positive]
            dist[row] = distance
    return {"idx": idx, "dist": dist}


def cut_videos(videos, out, facts):
    """Columns of the hands of all videos and what was left out; all processes but 0 end here.

    videos: {name: iterator of (frame's name, frame or None, hands as in video.py)}. Crops are stored below
    `out`. Each finished video leaves a file in OUT/parts, so that a second call goes on with the next one,
    provided that `facts`, a list of anything, are the same. The processes take the videos in turns.
    """
    runtime = setup(argparse.Namespace(device="cpu", precision="fp32"))
    names = list(videos)
    job = out / "parts" / "job.json"
    facts = [f"format {PARTS_FORMAT}", *map(str, facts), *names]
    if runtime.is_main and not job.exists():
        job.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job, lambda path: path.write_text(json.dumps(facts)))
    barrier()
    if read_json(job) != facts:
        raise ValueError(f"--out {out} was begun with other videos, detections or flags, or by an older "
                         "version: choose another folder, or delete it")
    parts = [out / "parts" / f"{number:07d}.npz" for number in range(len(names))]
    turns = range(runtime.rank, len(names), runtime.world)
    for number in tqdm(turns, desc="videos", disable=not runtime.is_main):
        if not parts[number].exists():
            save_arrays(parts[number], **cut_video(names[number], videos[names[number]], out, number))
    barrier()
    finish()
    if not runtime.is_main:
        sys.exit(0)  # process 0 writes the index
    return _merge(parts, names)


def _merge(parts, names):
    """The part files of all videos -> columns and what was left out."""
    unread = []
    small = []
    empty = []
    with_hands = []
    for path, name in zip(parts, names, strict=True):
        with np.load(path) as file:
            part = dict(file)
        unread += part.pop("unread").tolist()
        small += part.pop("small").tolist()
        if part:
            with_hands.append(part)
        else:
            empty.append(name)
    if not with_hands:
        raise ValueError(f"no hand was found in {len(names)} videos and folders. Name the images of "
                         f"--detections as below ROOT ({names[0]}/...), and delete --out before that")
    columns = {name: np.concatenate([part[name] for part in with_hands]) for name in with_hands[0]}
    return columns, {"frame not readable": unread, f"hand below {SMALLEST} pixels": small,
                     "video without a hand": empty}


def cut_video(name, frames, out, number):
    """Writes the crops of one video below `out`; returns their columns and the frames that gave none."""
    rows = []
    unread = []
    small = []
    folder = out / "images" / f"{number:07d}"
    for count, (frame_name, frame, hands) in enumerate(frames):
        if frame is None:
            unread.append(f"{name}/{frame_name}")
        for k, hand in enumerate(hands):
            cut = cut_hand(frame, hand, CONTEXT, CROP)
            if cut is None:
                small.append(f"{name}/{frame_name}")
                continue
            crop, labels = cut
            path = folder / f"{count:06d}_{k}.jpg"
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(path, quality=92)
            rows.append({"image": os.fsencode(path.relative_to(out)), "video": number, "size": crop.size,
                         "side": hand["side"] == "left", "box": labels["box"],
                         "keypoints": labels["keypoints"], "keypoints_score": labels["score"]})
            rows[-1] |= {name: hand[name] for name in ("hand_id", "keypoints3d") if name in hand}
    columns = _columns(rows) if rows else {}
    return columns | {"unread": np.array(unread, dtype=str), "small": np.array(small, dtype=str)}


# --------------------------------------------------------------------------------------------- packed indices
def from_index(root, args):
    """The hands of an index, whose images and masks go to packs in OUT."""
    index = HandIndex(root)
    if "packs" in index.meta:
        raise ValueError(f"{root} is packed already: copy its folder")
    return index.columns, index.meta, index.root, {}


def make_index(args, out):
    """Writes the index into `out`, with its packs and pictures; returns columns and what was left out."""
    columns, meta, images, dropped = MAKERS[args.kind](args.root, args)
    root = "." if images == args.out else images.resolve()
    if args.pack or args.kind == "pack":
        places, sizes, missing = pack_files(columns, images, out)
        columns = columns | places
        meta = meta | {"packs": sizes}
        root = "."
        dropped["image or mask missing, of a hand that is kept"] = missing
    write_index(out, columns, meta, root)
    if args.pack:
        shutil.rmtree(out / "images")  # the crops, which only this command wrote
    contact_sheet(HandIndex(out), out / "samples.png")
    return columns, dropped


# ------------------------------------------------------------------------------------------------------ main
def contact_sheet(index, path, count=24, size=192):
    """Pictures of evenly spaced hands with their joints and masks, which show a wrong convention at once."""
    tiles = []
    names = []
    for row in np.unique(np.linspace(0, len(index) - 1, count).astype(int)):
        centre_x, centre_y, side = square(index.columns["box"][row], BOX_SCALE)
        try:
            image, _ = read_image(index.open_image(row))
            tile, _ = crop_canvas(image, centre_x, centre_y, side, size)
            mask = index.open_mask(row)
            if mask:  # what is not the hand, darker
                mask = crop_mask(mask, image.width, centre_x, centre_y, side, size)
                tile = np.where(mask[..., None], tile, tile // 2)
        except (ValueError, OSError):
            continue
        column = "joints2d" if "joints2d" in index.columns else "keypoints"
        if column in index.columns:
            points = np.array(index.columns[column][index.label(row)]) + 0.5  # (21,2), pixel-edge coordinates
            corner = [centre_x - side / 2, centre_y - side / 2]
            tile = draw_joints(tile, (points - corner) * (size / side) - 0.5)
        tiles.append(tile)
        names.append(f"{row} {'left' if index.side(row) else 'right'}")
    if tiles:
        save_image(path, grid(tiles, min(6, len(tiles)), names))


def report(index, columns, dropped):
    """Prints what was kept, and what was left out and why."""
    left = int(np.sum(index.columns["side"])) if "side" in index.columns else 0
    videos = len(set(np.unique(index.columns["video"])) - {-1}) if "video" in index.columns else 0
    labelled = {"joints2d", "joints", "vertices", "pose", "betas"} & set(columns)
    labels = f"{index.meta['labels']} labels" if labelled else "no labels"
    of_videos = f" of {videos} videos" if videos else ""
    print(f"{index.path}: {len(index)} hands ({left} left){of_videos}, {labels}; look at "
          f"{index.path / 'samples.png'}")
    if "found" in index.meta:
        print(f"joints: {index.meta['found']}")
    for row_list, reason in (("reboxed", "its box had to be cut"), ("unseen", "it is not in its image")):
        names = [index.image_name(row) for row in index.meta.get(row_list, ())]
        if names:
            print(f"kept, since it is scored, though {reason}: {len(names)}: {'; '.join(names[:10])}")
    for reason, names in dropped.items():
        if names:
            more = " ..." if len(names) > 10 else ""
            print(f"left out, {reason}: {len(names)}: {'; '.join(names[:10])}{more}")


MAKERS = dict.fromkeys(layouts.SPLITS, from_data_set)
MAKERS |= {"folder": from_folder, "video": from_videos, "hand100m": from_hand100m, "pack": from_index}
FLAGS = {"freihand": {"split", "skip_missing"}, "ho3d": {"split", "mano", "workers"},
         "dexycb": {"split", "setup", "mano", "workers"}, "assemblyhands": {"split"},
         "interhand": {"split", "mano"}, "folder": {"boxes", "side", "joints", "definition"},
         "video": {"every", "detections", "world", "pack"},
         "hand100m": {"source", "scale", "pack"}, "pack": set()}


def flags():
    splits = sorted({split for splits in layouts.SPLITS.values() for split in splits})
    cli = parser(__doc__)
    cli.add_argument("kind", choices=list(MAKERS), help="what ROOT is")
    cli.add_argument("root", type=Path, metavar="ROOT",
                     help="folder as unpacked from the download; pack: an index")
    cli.add_argument("--out", type=Path, required=True, help="folder of the index; must not hold one yet")
    cli.add_argument("--split", choices=splits,
                     help="part of a data set (default: its training set; freihand: train and val part "
                          "training by pose, 19 to 1)")
    cli.add_argument("--setup", default="s0", choices=["s0", "s1", "s2", "s3"],
                     help="dexycb: what is new in the test: nothing (default), subjects, views, objects")
    cli.add_argument("--mano", nargs="+", metavar="FILE",
                     help="ho3d, dexycb, interhand: MANO_RIGHT.pkl [MANO_LEFT.pkl], for labels that are "
                          "MANO's numbers. Without the second the right one is mirrored, which is not the "
                          "model of DexYCB's left labels")
    cli.add_argument("--workers", type=int, default=0,
                     help="ho3d, dexycb: processes that read (default 0: one a core)")
    cli.add_argument("--skip-missing", action="store_true",
                     help="freihand: leave out labels whose image is missing, instead of refusing")
    cli.add_argument("--boxes", type=Path,
                     help="folder: CSV image,x0,y0,x1,y1[,side], pixels, image relative to ROOT or with ROOT")
    cli.add_argument("--joints", type=Path,
                     help="folder: CSV of your own labels, image,side,x0,y0,...,x20,y20 in pixels of the "
                          "upright image and/or X0,Y0,Z0,...,X20,Y20,Z20 in metres (right, down, away), in "
                          "FreiHAND's order. An empty cell is not known. A line is a hand")
    cli.add_argument("--definition", default="freihand",
                     choices=sorted({*TIPS, "assemblyhands", "interhand"}),
                     help="folder: how X, Y, Z of --joints are defined (default freihand; mano.py)")
    cli.add_argument("--side", default="right", choices=["right", "left"],
                     help="folder: side of the hands where --boxes or --joints do not say (default right)")
    cli.add_argument("--every", type=int, default=30,
                     help="video: frames from one that is read to the next (default 30, as SiMHand)")
    cli.add_argument("--detections", type=Path,
                     help="video: a detector's keypoints. .npz with image (VIDEO/FRAME below ROOT; a frame "
                          "of a video file is its number with six digits), side, keypoints (M,21,2) in "
                          "pixels in FreiHAND's order, and score, (M,) or (M,21); or .csv "
                          "image,side,score,x0,y0,...,x20,y20. An empty cell is a point that was not seen")
    cli.add_argument("--world", type=Path,
                     help="video: the detector's points in space, .npy (M,21,3) with a row for each entry of "
                          "--detections: metres, x right, y down, z away. They become keypoints3d")
    cli.add_argument("--source", default="Ego4D", choices=["Ego4D", "100DOH"],
                     help="hand100m: whose videos (default Ego4D)")
    cli.add_argument("--scale", default="50k", choices=["50k", "100k", "500k", "1m"],
                     help="hand100m: which of the authors' files (default 50k)")
    cli.add_argument("--pack", action="store_true",
                     help="video, hand100m: keep the hands in a few large files, as `pack` does. The single "
                          "files go once these are written")
    return cli


def check_flags(cli, args):
    """ValueError for a flag that does nothing here, and for a folder that is in use."""
    for name, value in vars(args).items():
        if name not in {"kind", "root", "out"} | FLAGS[args.kind] and value != cli.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing for {args.kind}: leave it out")
    if args.every < 1:
        raise ValueError("--every must be at least 1")
    if args.workers < 0:
        raise ValueError("--workers must be at least 0 (0: one a core)")
    if args.definition != "freihand" and not args.joints:
        raise ValueError("--definition says how --joints are defined: give it, or leave --definition out")
    if args.world and not args.detections:
        raise ValueError("--world needs --detections, whose rows it goes with")
    if (args.out / "index.json").exists():
        raise ValueError(f"--out {args.out} already holds an index: choose another folder or delete it first")
    content = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    begun = args.kind in ("video", "hand100m") and (
        content == {"parts"} or (args.out / "parts" / "job.json").is_file())
    if not begun:
        refuse_files(args.out)


def main(argv=None):
    cli = flags()
    args = cli.parse_args(argv)
    check_flags(cli, args)
    if args.kind in ("video", "hand100m"):  # whose crops grow in OUT, so that a killed call goes on
        columns, dropped = make_index(args, args.out)
    else:
        with staged_folder(args.out) as folder:
            columns, dropped = make_index(args, folder)
    report(HandIndex(args.out), columns, dropped)


if __name__ == "__main__":
    run(main)
