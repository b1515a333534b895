"""Hands as downloaded -> an index (data.py describes the format). The images stay where they are.

  freihand ROOT   FreiHAND v2 as unpacked; ROOT holds training/ and evaluation/, and the labels of the evaluation set lie there
                  or in FreiHAND_pub_v2_eval beside or inside it. --split training, evaluation, or train and val: the training
                  set in two parts that share no pose.
  folder ROOT     any folder of hand photographs, sub-folders included. Each sub-folder counts as one video. Without --boxes
                  the hand is taken to fill the image, up to the usual margin.

Prints what was kept and what was left out and why, and writes samples.png into the index: look at it.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import LABEL_COLUMNS, HandIndex, crop_canvas, image_size, list_images, read_boxes, read_image, square, whole_box, write_index
from draw import draw_joints, grid, save_image
from runtime import parser, run

BOX_SCALE = 1.3                                                    # the networks' view of a box: see finetune_mesh.py


# ------------------------------------------------------------------------------------------------------------- FreiHAND
def freihand(root, args):
    """Columns and meta of one split. Labels are metres in the camera frame, all hands right (datasets by Zimmermann et al.)."""
    part = "evaluation" if args.split == "evaluation" else "training"
    labels = {name: read_labels(find(root, f"{part}_{name}.json"), shape)
              for name, shape in (("K", (3, 3)), ("xyz", (21, 3)), ("verts", (778, 3)), ("mano", (61,)), ("scale", ()))}
    count = len(labels["K"])
    for name, value in labels.items():
        if len(value) != count:
            raise ValueError(f"{find(root, f'{part}_{name}.json')}: {len(value)} entries, but {part}_K.json has {count}")
    folder = find(root, f"{part}/rgb").parent.parent
    names = {entry.name for entry in tqdm(os.scandir(folder / part / "rgb"), desc="images", leave=False)}
    last = max((int(name[:-4]) for name in names if name[:-4].isdigit()), default=-1)
    versions = min(max(1, -(-(last + 1) // count)), 4)             # image i + count * k shows label i (T8)
    image = [f"{i:08d}.jpg" for i in range(count * versions)]
    present = np.array([name in names for name in image])
    if not present.all() and not args.skip_missing:
        raise ValueError(f"{folder / part / 'rgb' / image[int(np.argmin(present))]}: missing, as are {(~present).sum() - 1} others; "
                         "complete the download, or leave them out with --skip-missing")
    size = image_size(folder / part / "rgb" / image[int(np.argmax(present))])
    check_intrinsics(labels["K"], size, find(root, f"{part}_K.json"))
    joints2d = project(labels["xyz"], labels["K"])
    columns = {"K": labels["K"], "joints": labels["xyz"], "joints2d": joints2d, "vertices": labels["verts"],
               "pose": labels["mano"][:, :48], "betas": labels["mano"][:, 48:58], "scale": labels["scale"]}
    label = np.tile(np.arange(count), versions)
    kept = present & split_rows(label, args.split)
    if not kept.any():
        raise ValueError(f"--split {args.split}: no hands are left in it ({count} labels; val is every 20th)")
    columns = {name: value[np.unique(label[kept])] for name, value in columns.items()}
    label = np.unique(label[kept], return_inverse=True)[1]
    columns |= {"image": np.array([f"{part}/rgb/{name}" for name, keep in zip(image, kept, strict=True) if keep], dtype="S"),
                "label": label, "box": tight_boxes(columns["joints2d"])[label],
                "size": np.tile(np.int32(size), (len(label), 1))}
    meta = {"name": f"freihand-{args.split}", "joints": "freihand", "pose_mean": True, "protocol": "freihand"}
    dropped = {"image missing": [str(folder / part / "rgb" / name) for name in np.array(image)[~present]]}
    return columns, meta, folder, dropped


def split_rows(label, split):
    """Rows of --split train or val: val is every 20th block of 100 poses, because neighbours in the list may show the same
    moment from two cameras (ours; FreiHAND has no official validation set)."""
    held_out = label // 100 % 20 == 19 if label.max() >= 1900 else label % 20 == 19
    return {"train": ~held_out, "val": held_out}.get(split, np.ones(len(label), bool))


def find(root, name):
    """The file or folder `name` of FreiHAND, in ROOT or in the folder that the evaluation labels unpack to."""
    places = [root, root / "FreiHAND_pub_v2", root / "FreiHAND_pub_v2_eval", root.parent / f"{root.name}_eval",
              root.parent / "FreiHAND_pub_v2_eval"]
    for place in places:
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(f"{root / name}: not there (nor in FreiHAND_pub_v2_eval beside it): ROOT must be FreiHAND v2 as unpacked")


def read_labels(path, shape):
    """A JSON list of equal nested lists -> (N, *shape) float64, read entry by entry: training_verts.json takes gigabytes as
    Python floats. ValueError names the file and the entry that is broken, of another shape or not finite."""
    entries = []
    for value in tqdm(stream_json(path), desc=path.name, leave=False):
        try:
            entry = np.asarray(value, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{path}: entry {len(entries)} is not a list of numbers of shape {shape}") from None
        if entry.size != int(np.prod(shape)) or entry.shape[-len(shape):] != shape and shape:
            raise ValueError(f"{path}: entry {len(entries)} has shape {entry.shape}, needs {shape}")
        if not np.isfinite(entry).all():
            raise ValueError(f"{path}: entry {len(entries)} is not finite")
        entries.append(entry.reshape(shape))
    if not entries:
        raise ValueError(f"{path}: no entries")
    return np.stack(entries)


def stream_json(path, chunk=1 << 24):
    """The elements of a top-level JSON list, one at a time; ValueError names the file and the broken entry."""
    decoder, between, count = json.JSONDecoder(), re.compile(r"[\s,]*"), 0
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{path}: not a JSON list")
        at = 1
        while True:
            at = between.match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                value, end = decoder.raw_decode(text, at)
                whole = end < len(text)                            # otherwise a number may go on in the next chunk
            except RecursionError:
                raise ValueError(f"{path}: broken JSON at entry {count}: nested too deeply") from None
            except json.JSONDecodeError as error:
                whole = False
                if error.pos < len(text) - 100:                    # not merely cut by the end of the chunk
                    raise ValueError(f"{path}: broken JSON at entry {count}") from None
            if whole:
                yield value
                count, at = count + 1, end
                continue
            more = file.read(chunk)
            if not more:
                raise ValueError(f"{path}: broken JSON at entry {count}: is the file whole?")
            text, at = text[at:] + more, 0


def check_intrinsics(K, size, path):
    """ValueError that names the entry where K is no pinhole camera for an image of this (width, height)."""
    focal, centre = K[:, [0, 1], [0, 1]], K[:, :2, 2]
    wrong = (focal < 0.1 * np.array(size)) | (focal > 50 * np.array(size)) | (centre < -np.array(size)) | (centre > 2 * np.array(size))
    wrong = wrong.any(1) | (np.abs(K[:, 2] - [0, 0, 1]).max(1) > 1e-6)
    if wrong.any():
        raise ValueError(f"{path}: entry {int(np.argmax(wrong))} is no camera for an image of {size[0]} x {size[1]} pixels")


def project(points, K):
    """(N,P,3) metres -> (N,P,2) pixel-centre coordinates."""
    image = points @ K.transpose(0, 2, 1)
    return image[..., :2] / image[..., 2:]


def tight_boxes(joints2d):
    """(N,4) boxes in pixel-edge coordinates around (N,21,2) joints."""
    return np.concatenate([joints2d.min(1), joints2d.max(1)], axis=1) + 0.5


# --------------------------------------------------------------------------------------------------------------- folder
def folder(root, args):
    """Every image below ROOT that opens, with the boxes and sides of --boxes or the whole image as a right hand's crop."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    boxes = read_boxes(args.boxes) if args.boxes else None
    paths = [path.relative_to(root).as_posix() for path in list_images(root)]
    videos = {name: i for i, name in enumerate(sorted({os.path.dirname(p) for p in paths}))}
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
    return columns, {"name": root.name}, root, dropped


# ---------------------------------------------------------------------------------------------------------------- main
def contact_sheet(index, path, count=24, size=192):
    """Pictures of evenly spaced hands with their joints, to see a wrong convention at once."""
    tiles, names = [], []
    for row in np.unique(np.linspace(0, len(index) - 1, count).astype(int)):
        centre_x, centre_y, side = square(index.columns["box"][row], BOX_SCALE)
        try:
            tile, _ = crop_canvas(read_image(index.image_path(row))[0], centre_x, centre_y, side, size)
        except (ValueError, OSError):
            continue
        if "joints2d" in index.columns:
            joints = np.array(index.columns["joints2d"][index.label(row)])
            tile = draw_joints(tile, (joints + 0.5 - [centre_x - side / 2, centre_y - side / 2]) * (size / side) - 0.5)
        tiles.append(tile)
        names.append(f"{row} {'left' if index.side(row) else 'right'}")
    if tiles:
        save_image(path, grid(tiles, min(6, len(tiles)), names))


def main(argv=None):
    cli = parser(__doc__)
    cli.add_argument("kind", choices=["freihand", "folder"], help="what ROOT is")
    cli.add_argument("root", type=Path, metavar="ROOT", help="folder as unpacked from the download")
    cli.add_argument("--out", type=Path, required=True, help="folder of the index; must not hold one yet")
    cli.add_argument("--split", default="training", choices=["training", "evaluation", "train", "val"],
                     help="freihand: which part (default training; train and val part it by pose, 19 to 1)")
    cli.add_argument("--skip-missing", action="store_true", help="freihand: leave out labels whose image is missing instead of refusing")
    cli.add_argument("--boxes", type=Path, help="folder: CSV image,x0,y0,x1,y1[,side], pixels, image relative to ROOT")
    cli.add_argument("--side", default="right", choices=["right", "left"], help="folder: side of all hands without --boxes")
    args = cli.parse_args(argv)
    if (args.out / "index.json").exists():
        raise ValueError(f"--out {args.out} already holds an index: choose another folder or delete it first")
    columns, meta, images, dropped = {"freihand": freihand, "folder": folder}[args.kind](args.root, args)
    write_index(args.out, columns, meta, root=images.resolve())
    index = HandIndex(args.out)
    contact_sheet(index, args.out / "samples.png")
    left = int(np.sum(index.columns["side"])) if "side" in index.columns else 0
    labels = f"{index.meta['labels']} labels" if set(LABEL_COLUMNS) & set(columns) else "no labels"
    print(f"{args.out}: {len(index)} hands ({left} left), {labels}; look at {args.out / 'samples.png'}")
    for reason, names in dropped.items():
        if names:
            print(f"left out, {reason}: {len(names)}: {'; '.join(names[:10])}{' ...' if len(names) > 10 else ''}")


if __name__ == "__main__":
    run(main)
