"""Scores predicted hands as the data set's official script does, and shows them.

  evaluate.py --data INDEX --checkpoint RUN/last.pt --out DIR     predict every hand of INDEX, then score
  evaluate.py --data INDEX --predictions pred.json --out DIR      score a file made elsewhere
  evaluate.py --data INDEX --probe ENCODER --out DIR              what frozen features tell, without fine-tuning (below)
  evaluate.py --compare NAME=DIR/metrics.json ... --out DIR       one table of several runs; a NAME given several times
                                                                  (seeds, say) becomes mean and standard deviation

Writes metrics.json (millimetres), scores.txt (the official keys; centimetres for FreiHAND and HO-3D), pred.json and
pred.zip (the submission: [joints, vertices] in metres, in the order of INDEX, or of the official list where the index knows it;
FreiHAND's joint order and x right, y down, z forward, for HO-3D its own order and x right, y up), for DexYCB and AssemblyHands
pred.txt and pred_world.json in place of meshes, and report.html, one page that needs nothing else. --predictions takes each of these
files. An index without labels gets its submission and no scores.
--compare writes table.json.

--probe: ridge regression and the nearest neighbour from features of the frozen encoder (class token, mean of the patches,
both) to the pose: joints aligned to the mean hand (PA-MPJPE, no reflections), joints minus the wrist, orientation in the image, bend of
the fingers; fitted on --probe-train, or on half of the videos of INDEX. INDEX may also be a folder of class sub-folders of
images (or an index of one without labels): leave-one-out k-NN accuracy. Beside them the same network untrained, and
raw pixels. Writes metrics.json. All files appear together at the end; a run that fails leaves nothing.
"""

import base64
import contextlib
import html
import io
import json
import math
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

import metrics
from data import (
    HandDataset,
    HandIndex,
    crop_canvas,
    image_size,
    list_images,
    make_loader,
    read_image,
    square,
    whole_box,
    write_index,
)
from draw import BONES, FINGER_COLORS, draw_joints, overlay
from mano import (
    FREIHAND_TO_MANO,
    JOINT_NAMES,
    MANO_TO_FREIHAND,
    Mano,
    crop_to_full_camera,
    hand_fingerprint,
    labelled_joints,
    read_mano,
    rotmat_from_axis_angle,
)
from model import build_encoder, load_encoder, load_mesh
from runtime import add_device_flags, load_checkpoint, parser, read_json, run, setup
from synthetic_hand import synthetic_mano
from views import centre_theta, normalise, theta_rotation, warp

CONTEXT = 2.0                              # canvas over box, as in training
PROBE_SCALE, PROBE_HANDS = 1.3, 10_000     # side of the probe's views over the box; labelled hands that it looks at
FLIP = np.array([1.0, -1.0, -1.0])         # OpenCV's camera axes to HO-3D's and back
TIP_FIRST = [4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17, 0]        # FreiHAND's order to AssemblyHands'
PLACED = {"abs": "as submitted", "root": "minus the wrist"}
CARDS = (("pa_mpjpe_mm", "PA-MPJPE, joints", "mm"), ("pa_mpvpe_mm", "PA-MPVPE, mesh", "mm"),
         ("f_5", "F-score at 5 mm", ""), ("f_15", "F-score at 15 mm", ""),
         ("auc_joints", "AUC, joints", ""), ("auc_vertices", "AUC, mesh", ""))
COLUMNS = ("joints mm", "mesh mm", "AUC joints", "AUC mesh", "F@5", "F@15")


def main(argv=None):
    cli = parser(__doc__)
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="RUN/last.pt of finetune_mesh.py: predict with its averaged weights")
    source.add_argument("--predictions", help="a file of results: pred.json, or it in a .zip, [joints (N,21,3), vertices (N,778,3)] or "
                        "[joints, []] in metres, in the order and frame of --protocol; dexycb also pred.txt, a line an image: its number "
                        "in the split, from 0, and 21 x 3 numbers in mm, commas, no header; assemblyhands also the challenge's JSON")
    source.add_argument("--probe", metavar="ENCODER", help="an encoder.pt, or weights as --init of finetune_mesh.py takes them")
    source.add_argument("--compare", nargs="+", metavar="NAME=metrics.json", help="print one table of several runs")
    cli.add_argument("--data", help="the index to score; needed unless --compare")
    cli.add_argument("--probe-train", metavar="INDEX", help=f"labelled hands to fit the probe on, {PROBE_HANDS:,} at most")
    cli.add_argument("--image-size", type=int, help="of the probe's views (default: the encoder's own)")
    cli.add_argument("--out", required=True, help="folder for the results")
    cli.add_argument("--protocol", choices=list(metrics.PROTOCOLS),
                     help="how hands are scored and --predictions is read (default: as the index says, else freihand)")
    cli.add_argument("--mano", help="official MANO_RIGHT.pkl or an .npz of it; default: the synthetic hand")
    cli.add_argument("--batch-size", type=int, default=32, help="hands at a time (default 32)")
    cli.add_argument("--tta", type=int, default=1, metavar="N",
                     help="test-time augmentation: the mean over N views turned by -30 to 30 degrees, odd (default 1: the upright one)")
    add_device_flags(cli)
    args = cli.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if args.tta < 1 or args.tta % 2 == 0:
        raise ValueError(f"--tta {args.tta}: must be odd, so that the upright view is among them")
    only = {"probe_train": args.probe, "image_size": args.probe, "tta": args.checkpoint, "mano": not args.compare}
    for name, used in only.items():
        if not used and getattr(args, name) != cli.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: leave it out")
    if args.predictions and out.resolve() in Path(args.predictions).resolve().parents:
        raise ValueError(f"--out {out} holds --predictions {args.predictions}, which would be overwritten: choose another folder")
    if args.compare:
        return compare(args.compare, out)
    if not args.data:
        raise ValueError("--data is missing: name the index to score")
    if args.probe:
        return probe(args, out)
    index, arrays = HandIndex(args.data), read_mano(args.mano) if args.mano else synthetic_mano()
    protocol = args.protocol or index.meta.get("protocol", "freihand")
    definition = index.meta.get("joints", "freihand")
    labels, unlabelled = read_labels(index, protocol, args.checkpoint)
    facts = {"data": f"{index.meta.get('name', 'hands')} ({args.data})", "predicted by": args.checkpoint or args.predictions,
             "crop": "made elsewhere, unknown"}
    if args.predictions:
        pred = read_predictions(args.predictions, index, protocol)
        warn_of_units(pred[0], labels["gt_joints"], args.predictions)
        labels["gt_vertices"] = None if pred[1] is None else labels["gt_vertices"]
    mean = [np.broadcast_to(points, (len(index), *points.shape[1:])) for points in mean_hand(arrays, definition)]
    if labels:                                                     # before hours of prediction: refuses labels that cannot be scored
        baseline = metrics.per_sample_errors(*mean, protocol=protocol, **labels)
    if args.checkpoint:
        pred, box_scale = predict_index(args, index, arrays, definition)
        pred = [np.round(points.astype(np.float64), 7) for points in pred]     # what pred.json holds is what is scored
        facts["crop"] = f"the index' box ({index.meta.get('box', 'as it was given')}), squared, x {box_scale:g}"
        facts["views"] = f"{args.tta}" + (" (test-time augmentation)" if args.tta > 1 else "")
    if not labels:
        with staged(out) as folder:
            write_predictions(folder, pred, protocol, index)
        print(f"{index.path} has no labels: nothing was scored; predictions are in {out}")
        return
    try:
        errors = metrics.per_sample_errors(*pred, protocol=protocol, **labels)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint or args.predictions}: {error}") from None
    table = metrics.summarise(errors, protocol)
    keys = ("pa_mpjpe_mm", "pa_mpvpe_mm", "auc_joints", "auc_vertices", "f_5", "f_15")
    table |= {f"mean_hand_{key}": value for key, value in metrics.summarise(baseline, protocol).items() if key in keys}
    table |= {"views": args.tta} if args.tta > 1 else {}
    facts |= {"protocol": protocol, "hands": f"{table['count']}" + unlabelled,
              "joints": f"FreiHAND order, definition “{definition}”, root is the wrist",
              "hand model": args.mano or "the synthetic hand",
              "reflected": ", ".join(f"{table[key]} ({key[10:]})" for key in table if key.startswith("reflected"))}
    with staged(out) as folder:
        (folder / "metrics.json").write_text(json.dumps(table, indent=1))
        scores = metrics.official_scores(table, protocol)
        (folder / "scores.txt").write_text("".join(f"{key}: {value:f}\n" for key, value in scores.items()))
        write_predictions(folder, pred, protocol, index)
        page = report(index, arrays["f"], pred, labels, errors, baseline, table, facts)
        (folder / "report.html").write_text(page, encoding="utf-8")
    print(text_table(COLUMNS, table_rows(table, protocol)))
    print("\n".join(f"{key:>14}: {value}" for key, value in facts.items()))
    print(*(f"{key} {table[key]:.2f} " for key in keys[:2] if key in table), f"-> {out / 'report.html'}")


# ------------------------------------------------------------------------------------------------- labels, predictions
def read_labels(index, protocol, predicting=False):
    """The index' labels, one row a hand, as the keyword arguments of metrics.per_sample_errors, and a note on what they lack. Meshes are
    scored where every hand has one. Without any label {} where hands are to be predicted, else ValueError."""
    rows = index.pose_ids()
    if "joints" not in index.columns or np.isnan(index.columns["joints"]).all():
        if predicting:
            return {}, ""
        raise ValueError(f"{index.path} has no labels (column `joints`) to score against; predict.py shows hands")
    labels, note = {"gt_joints": np.asarray(index.columns["joints"][rows], np.float64), "gt_vertices": None}, ""
    if "vertices" in index.columns:
        lacking = int(np.isnan(index.columns["vertices"][:, 0, 0]).sum())
        if lacking:
            note = f", joints alone: {lacking} of them have no mesh"
        else:
            labels["gt_vertices"] = index.columns["vertices"][rows]
    if protocol == "assemblyhands":
        labels["side"] = np.array([index.side(row) for row in range(len(index))])
        if "visible" in index.columns:
            labels["valid"] = index.columns["visible"][rows] > 0
    return labels, note


def mean_hand(arrays, definition):
    """Joints (1,21,3) and vertices (1,778,3) of the hand at its mean pose with zero betas: what guessing scores."""
    hand = Mano(arrays)
    rotmats = torch.cat([torch.eye(3)[None], rotmat_from_axis_angle(hand.hands_mean)])[None]      # (1, 16, 3, 3)
    vertices, joints = hand(rotmats, torch.zeros(1, 10))
    return labelled_joints(vertices, joints, arrays, definition).numpy(), vertices.numpy()


@torch.no_grad()
def predict_index(args, index, arrays, definition):
    """Every hand of the index, in its order: joints (N,21,3), vertices (N,778,3), metres, as the image shows them; and
    the side of a view over that of the box.

    Left hands are predicted as right ones in the mirrored image and mirrored back. With K in the index the hand stands
    in the camera frame at the depth that its size in the image implies; without, it is relative to its wrist.
    ValueError that names the first image that cannot be read: a blank one would be scored as a bad prediction.
    """
    runtime, state = setup(args), load_checkpoint(args.checkpoint, "mesh")
    if state["hand"] != hand_fingerprint(arrays):
        raise ValueError(f"{args.checkpoint} was trained with another hand model: pass the same file with --mano "
                         "(none for the synthetic hand)")
    net, zoom = load_mesh(state, Mano(arrays)).to(runtime.device), state["box_scale"] / CONTEXT
    size = net.encoder.config["image_size"]
    dataset = HandDataset([index], size * 8 // 7, CONTEXT, substitute=False)
    joints, vertices = np.zeros((len(index), 21, 3), np.float32), np.zeros((len(index), 778, 3), np.float32)
    for batch in tqdm(make_loader(dataset, batch_size=args.batch_size, workers=runtime.workers), desc="predict"):
        failed = batch["failed"][batch["failed"] >= 0]
        if len(failed):
            name_unread(index, int(failed[0]))
        hand = predict_views(net, batch["canvas"].to(runtime.device), zoom, size, runtime, args.tta)
        sign = 1 - 2 * batch["mirrored"].float()                             # -1: mirror a left hand back
        points = torch.cat([labelled_joints(hand["vertices"], hand["joints"], arrays, definition, sign < 0), hand["vertices"]], 1)
        points[..., 0] *= sign[:, None]
        rows = batch["row"].numpy()
        if "K" in index.columns:
            camera = hand["camera"] * torch.stack([torch.ones_like(sign), sign, torch.ones_like(sign)], 1)
            K = torch.from_numpy(np.array(index.columns["K"][index.pose_ids()[rows]]))
            points = points + crop_to_full_camera(camera, batch["crop"][:, :2], batch["crop"][:, 2] * zoom, K)[:, None]
        joints[rows], vertices[rows] = points[:, :21].numpy(), points[:, 21:].numpy()
    return (joints, vertices), state["box_scale"]


def predict_views(net, canvas, zoom, size, runtime, count):
    """The network's hand for canvases (B,3,H,W) seen upright, on the CPU. With a `count` above 1 its mesh and joints are means over views
    turned by -30 to 30 degrees, turned back and laid upon each other by the wrist; the camera stays the upright view's."""
    sums = {}
    for degrees in np.linspace(-30, 30, count) if count > 1 else (0.0,):
        turn = torch.tensor([math.radians(degrees)])
        theta = torch.stack([turn.cos(), -turn.sin(), 0 * turn, turn.sin(), turn.cos(), 0 * turn], 1).view(1, 2, 3) * zoom
        theta = theta.expand(len(canvas), 2, 3).to(runtime.device)
        with runtime.autocast():
            seen = {key: value.float().cpu() for key, value in net(normalise(warp(canvas, theta, size)))[-1].items()}
        back = theta_rotation(theta.cpu())                         # canvas to view; points are rows
        for key in ("vertices", "joints"):
            sums[key] = sums.get(key, 0) + (seen[key] - seen["joints"][:, :1]) @ back / count
        if degrees == 0:
            upright = seen
    return upright | {key: value + upright["joints"][:, :1] for key, value in sums.items()} if count > 1 else upright


def name_unread(index, row):
    """ValueError that says why the image of a row could not be used."""
    read_image(index.image_path(row))
    raise ValueError(f"{index.image_path(row)}: its box lies outside the image")


def read_predictions(path, index, protocol):
    """Joints (N,21,3) and vertices (N,778,3) or None from a submission file: DexYCB's text, the AssemblyHands challenge's JSON, or
    [joints, vertices] with an entry for each hand of the index or for each of the official list. ValueError names file and mend."""
    if protocol == "dexycb" and Path(path).suffix not in (".json", ".zip"):
        return read_dexycb(path, index), None
    content, count = read_zipped(path) if Path(path).suffix == ".zip" else read_json(path), len(index)
    if protocol == "assemblyhands" and isinstance(content, dict):
        return from_world(path, content, index), None
    if not isinstance(content, list) or len(content) not in (1, 2):
        raise ValueError(f"{path}: needs [joints, vertices], two lists with one entry a hand")
    points = []
    for name, number, entries in zip(("joints", "vertices"), (21, 778), content, strict=False):
        if name == "vertices" and not entries:
            break
        entries = entries if isinstance(entries, list) else []
        if len(entries) == index.meta.get("frames") != count:      # the index lacks some of the official list
            entries = [entries[k] for k in index.columns["number"]]
        if len(entries) != count:
            raise ValueError(f"{path}: {len(entries)} entries of {name}, but the index has {count} hands")
        array = as_array(entries)
        if array is None or array.shape != (count, number, 3):
            wrong = next((i for i, hand in enumerate(entries) if np.shape(as_array(hand)) != (number, 3)), 0)
            raise ValueError(f"{path}: {name} of hand {wrong} are not {number} points of 3 numbers")
        points.append(array)
    joints, vertices = points if len(points) == 2 else (points[0], None)
    if protocol == "ho3d":
        joints = joints[:, list(MANO_TO_FREIHAND)] * FLIP
        vertices = None if vertices is None else vertices * FLIP
    return joints, vertices


def read_zipped(path):
    """The JSON of a pred.zip's pred.json."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("pred.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no zipped pred.json ({error})") from None


def warn_of_units(pred, true, path):
    """A line on what a fit would hide: predictions in other units, or behind the camera where the labels stand before it."""
    size, wanted = (np.nanmedian(np.linalg.norm(points - points[:, :1], axis=2)) for points in (pred, true))
    if not 0.2 < size / max(wanted, 1e-9) < 5:
        print(f"warning: {path}: hands are {size / max(wanted, 1e-9):.3g} times as large as the labels'; are they in metres "
              "(pred.txt: mm)?")
    if np.median(pred[:, 0, 2]) < 0 < np.nanmedian(true[:, 0, 2]):
        print(f"warning: {path}: hands lie behind the camera; is it in the frame of another --protocol?")


def read_dexycb(path, index):
    """Joints (N,21,3) from the toolkit's text: a line for each image, its number in the split and 63 numbers in mm."""
    found = {}
    try:
        for text in Path(path).read_text().splitlines():
            number, *values = map(float, text.split(","))
            found[int(number)] = np.reshape(values, (21, 3)) / 1000
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, OSError):
        raise ValueError(f"{path}: line {len(found) + 1} is not an image's number and 63 others in mm, with commas") from None
    wanted = np.asarray(index.columns.get("number", np.arange(len(index)))).tolist()
    missing = [number for number in wanted if number not in found]
    if missing:
        raise ValueError(f"{path}: image {missing[0]} is missing, as are {len(missing) - 1} others that show a hand")
    return np.array([found[number] for number in wanted])


def from_world(path, content, index):
    """Joints (N,21,3) in each hand's camera from the AssemblyHands challenge's JSON, as `to_world` writes it."""
    joints = np.empty((len(index), 21, 3))
    for row in range(len(index)):
        sequence, frame, outside = world_of(index, row)
        try:
            world = np.reshape(content["annotations"][sequence][frame]["world_coord"], (2, 21, 3))[index.side(row)] / 1000
            joints[row, TIP_FIRST] = world @ outside[:, :3].T + outside[:, 3]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: {sequence} {frame} is missing, or not 42 points") from None
    return joints


def as_array(nested):
    """Nested lists as float64, None where they are ragged or hold something else than numbers."""
    try:
        return np.asarray(nested, np.float64)
    except (TypeError, ValueError):
        return None


def write_predictions(folder, pred, protocol, index):
    """pred.json and pred.zip in the form of FreiHAND's and HO-3D's leaderboards, hand by hand, and zeros for what the official list has and
    the index has not; for DexYCB the text that its toolkit scores and for AssemblyHands the challenge's file, and no meshes."""
    joints, vertices = pred
    numbers = np.asarray(index.columns.get("number", np.arange(len(index))))
    count = max(index.meta.get("frames", 0), len(index))
    if protocol == "dexycb":                                       # number of the frame in its split, 63 numbers in mm
        with open(folder / "pred.txt", "w") as file:
            for number, hand in zip(numbers, joints.reshape(-1, 63), strict=True):
                file.write(",".join([str(number), *(f"{1000 * value:.4f}" for value in hand)]) + "\n")
        numbers, count, vertices = np.arange(len(index)), len(index), None
    elif protocol == "assemblyhands":
        vertices = None
        if "extrinsics" in index.columns:
            (folder / "pred_world.json").write_text(json.dumps(to_world(index, joints)))
    elif protocol == "ho3d":
        joints, vertices = joints[:, list(FREIHAND_TO_MANO)] * FLIP, None if vertices is None else vertices * FLIP
    rows = dict(zip(numbers.tolist(), range(len(index)), strict=True))
    with open(folder / "pred.json", "w") as file:
        for start, points in (("[[", joints), ("], [", vertices)):
            file.write(start)
            for number in range(count if points is not None else 0):
                hand = points[rows[number]] if number in rows else 0 * points[0]
                file.write((", " if number else "") + json.dumps(hand.tolist()))
        file.write("]]")
    with zipfile.ZipFile(folder / "pred.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "pred.json", "pred.json")


def world_of(index, row):
    """Sequence, frame and extrinsics (3,4) of a hand of AssemblyHands, whose images are SEQUENCE/CAMERA/FRAME.jpg."""
    sequence, _, frame = os.fsdecode(bytes(index.columns["image"][row])).removesuffix(".jpg").rsplit("/", 3)[-3:]
    return sequence, frame, np.asarray(index.columns["extrinsics"][index.label(row)], np.float64)


def to_world(index, joints):
    """The challenge's {"annotations": {sequence: {frame: {"world_coord": 42 x 3}}}} in mm, right hand first and tip first, zeros where
    there is no hand, in every frame of the official file; the mean of the cameras that see it."""
    sums = {sequence: {frame: np.zeros((2, 21, 4)) for frame in frames} for sequence, frames in index.meta.get("sequences", {}).items()}
    for row in range(len(index)):
        sequence, frame, outside = world_of(index, row)
        world = (joints[row] - outside[:, 3]) @ outside[:, :3]
        total = sums.setdefault(sequence, {}).setdefault(frame, np.zeros((2, 21, 4)))
        total[index.side(row)] += np.c_[1000 * world[TIP_FIRST], np.ones(21)]
    return {"annotations": {sequence: {frame: {"world_coord": (hands[..., :3] / np.maximum(hands[..., 3:], 1)).reshape(42, 3).tolist()}
                                       for frame, hands in frames.items()} for sequence, frames in sums.items()}}


@contextlib.contextmanager
def staged(out):
    """A temporary folder beside `out` whose files move into it only when the block has ended well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        out.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- tables
def table_rows(table, protocol):
    """[(name, six texts)]: one row for each way of laying the prediction over the truth, the mean hand last."""
    placed = metrics.PROTOCOLS[protocol]
    f = {kind: ("f_5_unaligned", "f_15_unaligned") if kind == placed else () for kind in ("root", "abs")}
    rows = [("similarity fit (leaderboards)", "pa_{}_mm", "auc_{}", ("f_5", "f_15")),
            ("  the same, no reflections", "pa_{}_noreflect_mm", "auc_{}_noreflect", ()),
            ("wrist and one bone", "sc_tr_{}_mm", "auc_{}_sc_tr", ()),
            ("minus the wrist", "root_{}_mm", "auc_{}_root", f["root"]),
            ("as submitted, depth included", "abs_{}_mm", "auc_{}_abs", f["abs"]),
            ("mean hand, the same fit", "mean_hand_pa_{}_mm", "mean_hand_auc_{}", ("mean_hand_f_5", "mean_hand_f_15"))]
    out = []
    for name, distance, area, shares in rows:
        keys = [*map(distance.format, ("mpjpe", "mpvpe")), *map(area.format, ("joints", "vertices"))]
        values = [table.get(key) for key in (*keys, *(shares or ("", "")))]
        if any(value is not None for value in values):
            out.append((name, ["" if v is None else f"{v:.2f}" if i < 2 else f"{v:.3f}" for i, v in enumerate(values)]))
    return out


def text_table(columns, rows):
    lines = [["", *columns], *([name, *values] for name, values in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w)
                               for i, (cell, w) in enumerate(zip(cells, widths, strict=True))).rstrip() for cells in lines)


def compare(entries, out):
    """Prints one table of several metrics.json and writes table.json; runs of one name become mean +- deviation."""
    groups, mean = {}, None
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise ValueError(f"--compare {entry}: write NAME=path/to/metrics.json")
        table = read_json(path)
        if not isinstance(table, dict) or not {"pa_mpjpe_mm", "count"} <= set(table):
            raise ValueError(f"{path}: no metrics.json of evaluate.py (pa_mpjpe_mm or count is missing)")
        groups.setdefault(name, []).append(table)
        hand = {key.removeprefix("mean_hand_"): value for key, value in table.items() if key.startswith("mean_hand_")}
        mean = mean or hand
        same = hand.keys() == mean.keys() and all(abs(hand[key] - mean[key]) < 1e-6 for key in hand)      # protocols round otherwise
        if not same or table["count"] != next(iter(groups.values()))[0]["count"]:
            raise ValueError(f"{path}: scored on other hands than the first file; compare runs on one data set")
    table, rows = {"mean_hand": mean} if mean else {}, []
    for name, runs in groups.items():
        shared = [key for key in runs[0] if not key.startswith("mean_hand_") and all(key in r for r in runs)]
        table[name] = {key: float(np.mean([r[key] for r in runs])) for key in shared}
        if len(runs) > 1:
            table[name] |= {f"{key}_std": float(np.std([r[key] for r in runs], ddof=1)) for key in shared}
            table[name]["runs"] = len(runs)
    for name, values in table.items():
        texts = []
        for key in ("pa_mpjpe_mm", "pa_mpvpe_mm", "auc_joints", "auc_vertices", "f_5", "f_15"):
            digits = 2 if key.endswith("mm") else 3
            spread = f" ± {values[key + '_std']:.{digits}f}" if key + "_std" in values else ""
            texts.append(f"{values[key]:.{digits}f}{spread}" if key in values else "")
        rows.append((name, texts))
    with staged(out) as folder:
        (folder / "table.json").write_text(json.dumps(table, indent=1))
    print(text_table(COLUMNS, rows))
    print(f"after the leaderboards' similarity fit, {runs[0]['count']} hands  -> {out}/table.json")


# ---------------------------------------------------------------------------------------------------------------- probe
def probe(args, out):
    """Prints what frozen features tell, of the encoder, of the same network untrained and of raw pixels."""
    if args.image_size is not None and not 16 <= args.image_size <= 4096:
        raise ValueError(f"--image-size {args.image_size}: must lie in 16 .. 4096")
    runtime, encoder = setup(args), load_encoder(args.probe, args.image_size)
    torch.manual_seed(0)
    networks = {"probe": encoder, "untrained": build_encoder(encoder.arch, **encoder.config)}
    size = encoder.config["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        index = HandIndex(args.data) if (Path(args.data) / "index.json").is_file() else class_folders(args.data, folder)
        labels = {"joints", "joints2d"} & set(index.columns)
        if len(labels) == 1 or (args.probe_train and not labels):
            missing = " and no ".join(sorted({"joints", "joints2d"} - labels))
            raise ValueError(f"--data {args.data} has no {missing}: a pose probe needs both")
        probe_one = probe_poses if labels else probe_classes
        table, facts = probe_one(args, index, networks, size, runtime)
    flat = {f"{name}_{feature}_{key}": value for (name, feature), values in table.items() for key, value in values.items()} | facts
    flat |= {key: flat[f"probe_both_{key}"] for key in table["probe", "both"]}
    with staged(out) as folder:
        (folder / "metrics.json").write_text(json.dumps(flat, indent=1))
    keys = list(table["probe", "both"])
    rows = [(f"{name}, {feature}", [f"{values[key]:.2f}" if key.endswith("mm") else f"{values[key]:.3f}" for key in keys])
            for (name, feature), values in table.items()]
    print(text_table(keys, rows))
    print(", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()),
          f"-> {out / 'metrics.json'}")


def class_folders(path, folder):
    """An index, written to `folder`, of the images in the sub-folders of `path`, each image one whole crop."""
    images = list_images(path) if Path(path).is_dir() else []
    if len({image.parent for image in images}) < 2:
        raise ValueError(f"--data {path}: neither an index nor a folder of class sub-folders with images")
    columns = {"image": np.array([os.fsencode(image.relative_to(path)) for image in images]),
               "box": [whole_box(image_size(image), PROBE_SCALE) for image in images]}
    write_index(Path(folder) / "index", columns, {"name": Path(path).name}, root=Path(path).resolve())
    return HandIndex(Path(folder) / "index")


def probe_classes(args, index, networks, size, runtime):
    """Leave-one-out k-NN accuracy, the classes being the images' folders."""
    classes = np.array([str(index.image_path(row).parent) for row in range(len(index))])
    count = len(set(classes.tolist()))
    if count < 2:
        raise ValueError(f"{index.path}: no joints, and all images in one folder: nothing to probe")
    x, _ = read_features(args, networks, index, np.arange(len(index)), size, runtime, every=True)
    table = {key: {"knn_accuracy": metrics.leave_one_out(features, classes)} for key, features in x.items()}
    return table, {"count": len(index), "classes": count, "neighbours": min(10, len(index) - 1)}


def probe_poses(args, index, networks, size, runtime):
    """metrics.probe_pose of every feature, fitted on --probe-train, else on half of the hands, no pose and no video in both halves."""
    rows, train, train_rows = np.arange(len(index)), index, None
    if args.probe_train:
        train = HandIndex(args.probe_train)
        if not {"joints", "joints2d"} <= set(train.columns):
            raise ValueError(f"--probe-train {args.probe_train}: no labels `joints` and `joints2d`")
        if train.image_path(0).resolve() == index.image_path(0).resolve() or (
                train.meta.get("joints", "freihand") != index.meta.get("joints", "freihand")):
            raise ValueError(f"--probe-train {args.probe_train}: the hands of --data themselves, or joints of another definition")
        train_rows = np.arange(len(train))
    else:
        groups = hand_groups(index)
        first = np.isin(groups, np.random.default_rng(0).permutation(np.unique(groups))[::2])
        rows, train_rows = np.flatnonzero(~first), np.flatnonzero(first)
    rows, train_rows = (some[np.linspace(0, len(some) - 1, min(len(some), PROBE_HANDS)).astype(int)] for some in (rows, train_rows))
    (train_x, train_labels), (x, labels) = (read_features(args, networks, source, chosen, size, runtime)
                                            for source, chosen in ((train, train_rows), (index, rows)))
    count, train_count = len(labels[0]), len(train_labels[0])
    if min(count, train_count) < 10:
        raise ValueError(f"{train_count} hands to fit the probe on and {count} to test it on: at least 10 are needed")
    mean = mean_hand(read_mano(args.mano) if args.mano else synthetic_mano(), index.meta.get("joints", "freihand"))[0][0]                        # (21, 3)
    table = {key: metrics.probe_pose(train_x[key], *train_labels, x[key], *labels, mean) for key in x}
    guess = metrics.procrustes(np.broadcast_to(mean, labels[0].shape), labels[0])
    return table, {"count": count, "train_count": train_count, "unread": len(rows) + len(train_rows) - count - train_count,
                   "mean_hand_pa_mpjpe_mm": float(1000 * np.linalg.norm(guess - labels[0], axis=-1).mean())}


def hand_groups(index):
    """(N,) numbers of the groups that may not part: hands of one video or of one pose, and whatever these connect."""
    poses = index.pose_ids()
    videos = np.asarray(index.columns["video"]) if "video" in index.columns else np.full(len(index), -1)
    nodes = np.where(videos < 0, poses, poses.max() + 1 + videos)
    links = coo_matrix((np.ones(len(index)), (poses, nodes)), shape=[max(poses.max(), nodes.max()) + 1] * 2)
    return connected_components(links, directed=False)[1][poses]


@torch.no_grad()
def read_features(args, networks, index, rows, size, runtime, every=False):
    """({(network, feature): (N,D)}, labels) of some rows in upright views of the box: features `class`, `mean` of the patches (of a
    ResNet the pooled map twice) and `both`, and of ("pixels", "raw") the view at 16 x 16 pixels; labels are
    joints (N,21,3) and joints2d (N,21,2), zeros where the index has none. An image that cannot be read is left out, or, with
    `every`, ends the probe with a ValueError that names it."""
    dataset = HandDataset([index], size * 8 // 7, CONTEXT, ("joints", "joints2d"), rows, substitute=False)
    x, labels, pixels = {name: [] for name in networks}, [[], []], []
    networks = {name: net.to(runtime.device).eval() for name, net in networks.items()}
    for batch in tqdm(make_loader(dataset, batch_size=args.batch_size, workers=runtime.workers), desc="features"):
        good = batch["failed"] < 0
        if every and not bool(good.all()):
            name_unread(index, int(batch["failed"].max()))
        theta = centre_theta(int(good.sum()), PROBE_SCALE / CONTEXT).to(runtime.device)
        views = warp(batch["canvas"][good].to(runtime.device), theta, size)
        pixels.append(F.interpolate(views, 16, mode="area").flatten(1).cpu())
        for name, net in networks.items():
            with runtime.autocast():
                summary, feature_map = net.features(normalise(views))
            x[name].append(torch.cat([summary, feature_map.mean((2, 3))], 1).float().cpu())
        for part, name in zip(labels, ("joints", "joints2d"), strict=True):
            part.append(batch[name][good].double().numpy())
    found = {}
    for name, parts in x.items():
        both = torch.cat(parts).double().numpy()
        summary, mean = np.split(both, 2, axis=1)
        found |= {(name, "class"): summary, (name, "mean"): mean, (name, "both"): both}
    flat = torch.cat(pixels).double().numpy()
    return found | {("pixels", "raw"): flat}, [np.concatenate(part) for part in labels]


# --------------------------------------------------------------------------------------------------------------- report
def report(index, faces, pred, labels, errors, baseline, table, facts):
    """The whole of report.html as one string: the template beside this file, filled with text, pictures and numbers."""
    part = "vertices" if "pa_vertices" in errors else "joints"
    score = 1000 * (errors["pa_vertices"] if part == "vertices" else row_mean(errors["pa_joints"]))   # (n,) mm
    order = np.argsort(score, kind="stable")[:max(1, np.isfinite(score).sum())]               # too few joints to align: NaN, last
    scored = score[order]
    cases, pictures = [], ""
    for name, share in (("best", 0), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("95 %", 0.95), ("worst", 1)):
        which = order[round(share * (len(order) - 1))]
        case, images, note = show_case(index, faces, pred, labels, int(errors["row"][which]), part)
        cases.append(case | {"name": f"{name}, {score[which]:.1f} mm"})
        cells = [f'<td><img src="{data_uri(image)}" alt="{name}: {caption}"></td>' for caption, image in images.items()]
        head = f"{name}<br><b>{score[which]:.1f} mm</b><br>hand {errors['row'][which]}"
        pictures += f"<tr><th>{head}</th>{''.join(cells)}</tr>"
    protocol, placed = facts["protocol"], metrics.PROTOCOLS[facts["protocol"]]
    counts, edges = np.histogram(scored.clip(max=np.quantile(scored, 0.99) * 1.15), bins=min(40, max(8, len(scored) // 8)))
    curves = {"aligned": errors["pa_joints"], PLACED[placed]: errors[f"{placed}_joints"],
              "mean hand, aligned": baseline["pa_joints"]}
    numbers = {"faces": np.ravel(faces).tolist() if part == "vertices" else [], "cases": cases, "part": part,
               "bones": [[a, b, css_color(finger)] for a, b, finger in BONES],
               "joints": [[name.replace("_", " "), css_color((i - 1) // 4) if i else "#6b7685"]
                          for i, name in enumerate(JOINT_NAMES)],
               "by_joint": [(1000 * row_mean(e["pa_joints"].T)).round(3).tolist() for e in (errors, baseline)],
               "histogram": {"counts": counts.tolist(), "edges": edges.tolist(),
                             "marks": [["median", float(np.median(scored))], ["95 %", float(np.quantile(scored, 0.95))]]},
               "curves": [[name, metrics.pck_curve(values)[1].round(4).tolist()] for name, values in curves.items()]}
    slots = {"TITLE": html.escape(index.meta.get("name", "hands")), "NOTE": note, "PICTURES": pictures,
             "CARDS": "".join(f"<div><b>{table[key]:.{2 if unit else 3}f}</b><i>{unit}</i><span>{label}</span></div>"
                              for key, label, unit in CARDS if key in table),
             "FACTS": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()),
             "HEAD": "".join(f"<th>{column}</th>" for column in COLUMNS),
             "HEADS": "".join(f"<th>{caption}</th>" for caption in images),
             "TABLE": "".join(f"<tr><th>{name}</th>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
                              for name, values in table_rows(table, protocol)),
             "NUMBERS": json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")}
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    for name, value in slots.items():
        page = page.replace("{{" + name + "}}", value)
    return page


def css_color(finger):
    return "rgb({},{},{})".format(*FINGER_COLORS[finger])


def row_mean(values):
    """Mean of every row over what is not NaN (NaN where a row has nothing)."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def show_case(index, faces, pred, labels, row, part, size=256):
    """One hand for the report: its points for the view that turns, pictures of prediction and truth, a note on them."""
    truth = {"joints": np.asarray(labels["gt_joints"][row], np.float64)}
    guess = {"joints": pred[0][row]}
    if part == "vertices":
        truth["vertices"], guess["vertices"] = np.asarray(labels["gt_vertices"][row], np.float64), pred[1][row]
    known = np.isfinite(truth["joints"]).all(1)
    fitted = {"joints": np.full((21, 3), np.nan)}
    fitted["joints"][known] = metrics.procrustes(guess["joints"][known], truth["joints"][known], reflect=True)
    if part == "vertices":
        fitted["vertices"] = metrics.procrustes(guess["vertices"], truth["vertices"], reflect=True)
    error = np.linalg.norm(fitted[part] - truth[part], axis=1)
    centre = np.nanmean(truth[part], axis=0)
    values = {"pred": fitted[part] - centre, "true": truth[part] - centre, "error": error}     # as whole tenths of mm
    case = {key: np.round(1e4 * np.nan_to_num(value)).astype(int).ravel().tolist() for key, value in values.items()}

    centre_x, centre_y, side = square(index.columns["box"][row], 1.6)
    try:
        image = crop_canvas(read_image(index.image_path(row))[0], centre_x, centre_y, side, size)[0]
    except (OSError, ValueError):                       # a prediction file can be scored without the photographs
        image = np.full((size, size, 3), 225, np.uint8)
    project, placed = image_camera(index, row, truth["joints"])
    if project is None:
        return case, {"photograph": image}, "Without K and 2D joints in the index nothing is drawn on the photographs."
    in_place = placed and guess["joints"][:, 2].min() > 0.05
    drawn = guess if in_place else fitted
    images = {"photograph": image}
    for caption, hand, color in (("prediction", drawn, (92, 148, 240)), ("truth", truth, (104, 190, 130))):
        points = {key: project(value) for key, value in hand.items()}
        for value in points.values():                   # pixel edges of the photograph -> of the crop
            value[:, :2] = (value[:, :2] - [centre_x - side / 2, centre_y - side / 2]) * size / side
        if part == "vertices":
            images[f"{caption}, mesh"] = overlay(image, points["vertices"], faces, color)
        images[f"{caption}, joints"] = draw_joints(image, points["joints"][:, :2] - 0.5)
    note = ("Predictions are drawn where they were placed in the camera." if in_place else
            "Predictions are drawn after the similarity fit: the file or the index does not say where they stand.")
    return case, images, note


def image_camera(index, row, joints):
    """(function from (N,3) metres to (N,3) = x, y in pixel edges and depth; True where that is the true camera): by K,
    else by the weak perspective that fits the labelled 2D joints, else (None, False)."""
    label = index.label(row)
    if "K" in index.columns:
        K = np.asarray(index.columns["K"][label], np.float64)

        def pinhole(points):
            flat = points @ K.T
            return np.concatenate([flat[:, :2] / flat[:, 2:] + 0.5, points[:, 2:]], 1)
        return pinhole, True
    if "joints2d" not in index.columns:
        return None, False
    known = np.isfinite(joints).all(1)
    seen, flat = index.columns["joints2d"][label][known] + 0.5, joints[known, :2]
    centre, root = seen.mean(0), flat.mean(0)
    scale = ((seen - centre) * (flat - root)).sum() / max(((flat - root) ** 2).sum(), 1e-12)
    return lambda points: np.concatenate([scale * (points[:, :2] - root) + centre, points[:, 2:]], 1), False


def data_uri(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    run(main)
