"""Scores predicted hands as the data set's official script does, and shows them.

  evaluate.py --data INDEX --checkpoint RUN/last.pt --out DIR     predict every hand of INDEX, then score
  evaluate.py --data INDEX --predictions pred.json --out DIR      score a file made elsewhere
  evaluate.py --compare NAME=DIR/metrics.json ... --out DIR       one table of several runs; several files of
                                                                  one NAME (seeds): mean and deviation

Prediction: an upright view of each hand's box, right-handed -> the mesh network -> mirrored back for left
hands, joints as the labels define them, and with K in the index placed in the camera. A hand outside of its
image (`unseen` in index.json) is predicted as the mean hand. Scores: prediction and label are compared as
submitted, minus the wrist, and after a similarity fit (metrics.py).

Writes metrics.json (millimetres), scores.txt (the official keys; centimetres for FreiHAND and HO-3D), the
leaderboard's files (results.py) and report.html, one page that needs nothing else. --definitions adds
definitions.json, --compare writes table.json. All files appear together at the end; a run that fails leaves
nothing. An index without labels gets its files and no scores, but for what its 2-D points can say."""

import base64
import html
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import metrics
from camera import fit_weak_perspective, place_points
from data import (CONTEXT, HandDataset, HandIndex, canvas_size, crop_canvas, make_loader, read_image,
                  refuse_unread, square)
from draw import BONES, FINGER_COLORS, draw_joints, overlay
from mano import (JOINT_NAMES, TIPS, Mano, hand_fingerprint, labelled_joints, mean_hand, read_mano,
                  weak_perspective)
from model import load_mesh
from results import is_own_zip, read_predictions, warn_of_order, warn_of_units, write_predictions
from runtime import add_device_flags, parser, run, setup
from saving import check_writable, load_checkpoint, read_json, staged_folder, text_table
from synthetic_hand import synthetic_mano
from views import normalise, theta_rotation, warp

# How a prediction may be laid over the truth, by metrics.MEASURES' names.
ALIGNMENTS = {"pa": "similarity fit", "pa_noreflect": "no reflections", "sc_tr": "wrist and one bone",
              "root": "minus the wrist", "abs": "as submitted"}
JOINT_ERRORS = [metrics.MEASURES[kind][0].format("mpjpe") for kind in ALIGNMENTS]
ODDITIES = {"count_not_scored": "more not scored", "count_reboxed": "with their box replaced",
            "count_unseen": "not in their image"}
RESULTS = ("metrics.json", "scores.txt", "report.html", "pred.json", "pred.zip", "pred.txt",
           "pred_world.json", "definitions.json")
TO_MIDDLE_TIP = [0, 9, 10, 11, 12]  # joints from the wrist
HEADLINE = ("pa_mpjpe_mm", "pa_mpvpe_mm", "auc_joints", "auc_vertices", "f_5", "f_15")
COLUMNS = ("joints mm", "mesh mm", "AUC joints", "AUC mesh", "F@5", "F@15")
CARDS = (("pa_mpjpe_mm", "PA-MPJPE, joints", "mm"), ("pa_mpvpe_mm", "PA-MPVPE, mesh", "mm"),
         ("f_5", "F-score at 5 mm", ""), ("f_15", "F-score at 15 mm", ""),
         ("auc_joints", "AUC, joints", ""), ("auc_vertices", "AUC, mesh", ""))


# ------------------------------------------------------------------------------------------------- prediction
@torch.no_grad()
def predict_index(net, index, arrays, definition, box_scale, tta, batch_size, runtime):
    """Every hand of the index, in its order: joints (N,21,3), vertices (N,778,3) and the hand model's own
    joints (N,21,3), metres, as the image shows them; and where the view's camera sees the joints (N,21,2), in
    pixels of the photograph (its left upper corner is 0, 0).

    definition: of the joints, as in index.json. box_scale: side of a view over the box. tta: views a hand.
    With K in the index the hand stands in the camera frame; without K it is relative to its wrist. ValueError
    names the first image that cannot be read: a blank one would be scored as a bad prediction."""
    size = net.encoder.config["image_size"]
    zoom = box_scale / CONTEXT
    dataset = HandDataset([index], canvas_size(size, box_scale), substitute=False)
    mean_joints, mean_vertices = mean_hand(arrays, "ho3d")  # about the kinematic wrist, as the network's
    points = np.zeros((len(index), 21 + 778 + 21, 3), np.float32)
    pixels = np.zeros((len(index), 21, 2), np.float32)
    for batch in tqdm(make_loader(dataset, batch_size=batch_size, workers=runtime.workers), desc="predict"):
        for row in batch["failed"][batch["failed"] >= 0].tolist():
            refuse_unread(index, row)
        rows = batch["row"].numpy()
        left = batch["mirrored"] > 0  # (B,) the canvas of a left hand shows a right one
        hand = predict_views(net, batch["canvas"].to(runtime.device), zoom, size, runtime, tta)
        unseen = torch.from_numpy(np.isin(rows, index.meta.get("unseen", [])))  # (B,)
        hand["joints"][unseen] = torch.from_numpy(mean_joints - mean_joints[:, :1])
        hand["vertices"][unseen] = torch.from_numpy(mean_vertices - mean_joints[:, :1])
        joints = labelled_joints(hand["vertices"], hand["joints"], arrays, definition, left)
        found = torch.cat([joints, hand["vertices"], hand["joints"]], 1)  # (B, 820, 3) relative to the wrist
        found, camera = mirror_back(found, hand["camera"], left)
        seen = seen_in_photograph(found[:, :21], camera, batch["crop"], zoom)
        if "K" in index.columns:
            found = found + wrist_in_camera(index, rows, found[:, :21], seen)
        points[rows] = found.numpy()
        pixels[rows] = seen.numpy()
    return points[:, :21], points[:, 21:-21], points[:, -21:], pixels


def mirror_back(points, camera, left):
    """Points (B,P,3) and cameras (B,3) of right hands, as the network predicts them -> as the image shows
    them: x changes its sign where `left` (B,) is True."""
    one = torch.ones(len(left))
    sign = torch.where(left, -1.0, 1.0)
    return points * torch.stack([sign, one, one], 1)[:, None], camera * torch.stack([one, sign, one], 1)


def seen_in_photograph(joints, camera, crop, zoom):
    """Where joints (B,21,3) lie in the photograph: pixels (B,21,2).

    camera (B,3): weak perspective of the view. crop (B,3): centre and side of the canvas, in pixels."""
    half = crop[:, 2, None, None] * zoom / 2  # of the view, in pixels of the photograph
    return crop[:, None, :2] + half * weak_perspective(joints, camera)


def wrist_in_camera(index, rows, joints, pixels):
    """The wrists (B,1,3) in the camera frame, metres, by the intrinsics K of the index: where joints (B,21,3)
    about the wrist lie over their pixels (B,21,2)."""
    K = index.columns["K"][index.pose_ids()[rows]]  # (B, 3, 3)
    hands = zip(joints.numpy(), pixels.numpy(), K, strict=True)
    places = [place_points(*hand) if np.isfinite(hand[2]).all() else np.full(3, np.nan) for hand in hands]
    return torch.tensor(np.array(places))[:, None]


def predict_views(net, canvas, zoom, size, runtime, tta):
    """The network's last estimate, a dict on the CPU, for the upright hands of canvases (B,3,H,W).

    tta above 1: mesh and joints are means over views turned by -30 to 30 degrees, turned back and laid upon
    each other by the wrist; the camera stays the upright view's."""
    if tta == 1:
        return predict_view(net, canvas, 0.0, zoom, size, runtime)
    sums = {"vertices": 0, "joints": 0}
    for degrees in np.linspace(-30, 30, tta):
        hand = predict_view(net, canvas, degrees, zoom, size, runtime)
        back = theta_rotation(turned_theta(degrees, zoom, len(canvas)))  # canvas to view; points are rows
        for name in sums:
            sums[name] = sums[name] + (hand[name] - hand["joints"][:, :1]) @ back / tta
        if degrees == 0:
            upright = hand
    return upright | {name: value + upright["joints"][:, :1] for name, value in sums.items()}


def predict_view(net, canvas, degrees, zoom, size, runtime):
    theta = turned_theta(degrees, zoom, len(canvas)).to(runtime.device)
    with runtime.autocast():
        estimate = net(normalise(warp(canvas, theta, size)))[-1]
    return {name: value.float().cpu() for name, value in estimate.items()}


def turned_theta(degrees, zoom, batch):
    """The view (B,2,3) in the middle of the canvas, `zoom` of its side, turned."""
    phi = torch.tensor(math.radians(degrees))
    rows = [torch.stack([phi.cos(), -phi.sin(), 0 * phi]), torch.stack([phi.sin(), phi.cos(), 0 * phi])]
    return (torch.stack(rows) * zoom).expand(batch, 2, 3)


# ----------------------------------------------------------------------------------------------------- labels
def read_labels(index, protocol, required=True):
    """The labels as keyword arguments of metrics.per_sample_errors, and a note on hands without mesh.

    Meshes are scored if every hand has one. Without any label: ValueError, or {} if none is required."""
    columns = index.columns
    if "joints" not in columns or np.isnan(columns["joints"]).all():
        if not required:
            return {}, ""
        raise ValueError(f"{index.path} has no labels (column `joints`) to score; predict.py shows hands")
    rows = index.pose_ids()
    labels = {"gt_joints": np.asarray(columns["joints"][rows], np.float64), "gt_vertices": None}
    if protocol == "dexycb":  # whose toolkit rounds its labels so
        labels["gt_joints"] = np.float64(columns["joints"][rows] * np.float32(1000)) / 1000
    note = ""
    if "vertices" in columns:
        lacking = int(np.isnan(columns["vertices"][:, 0, 0]).sum())
        if lacking:
            note = f", joints alone: {lacking} of them have no mesh"
        else:
            labels["gt_vertices"] = columns["vertices"][rows]
    if protocol in metrics.WITH_GAPS:
        labels["side"] = np.array([index.side(row) for row in range(len(index))])
        if "visible" in columns:
            labels["valid"] = columns["visible"][rows] > 0
    return labels, note


# ----------------------------------------------------------------------------------------------------- tables
def score_definitions(joints, vertices, chain, arrays, labels, protocol):
    """{name: {"pa_mpjpe_mm": ..., ...}}: the same meshes with their joints by every published definition,
    against the labels as they are. The first row is the joints (N,21,3) as predicted.

    chain (N,21,3): the hand model's own joints; None: a file of results lacks them, and they do not follow
    from vertices (N,778,3). ValueError where the meshes are not of this hand model, or there are none."""
    if vertices is None:
        raise ValueError("--definitions: the file of results has no meshes to take joints from")
    found = {"as predicted": joints}
    meshes = torch.from_numpy(np.asarray(vertices, np.float64))
    own = torch.zeros(len(meshes), 21, 3) if chain is None else torch.from_numpy(chain)
    for source in ("regressed",) if chain is None else ("regressed", "kinematic"):
        for name, tips in TIPS.items():
            definition = " ".join(map(str, (source, *tips)))
            found[f"{source}, {name}"] = labelled_joints(meshes, own.double(), arrays, definition).numpy()
    apart = np.linalg.norm(found["regressed, freihand"] - joints, axis=2).mean()
    if apart > 0.02:
        raise ValueError(f"--definitions: the joints lie {1000 * apart:.0f} mm from those of their meshes: "
                         "name the hand model of these meshes with --mano")
    scores = {}
    for name, points in found.items():
        errors = metrics.per_sample_errors(points, None, protocol=protocol, **labels | {"gt_vertices": None})
        table = metrics.summarise(errors, protocol)
        scores[name] = {key: table[key] for key in JOINT_ERRORS if key in table}
    return scores


def definition_rows(scores):
    """[(name, texts)] of score_definitions."""
    return [(name, _texts(row, JOINT_ERRORS)) for name, row in scores.items()]


def table_rows(table, protocol):
    """[(name, six texts)]: a row for each way to lay the prediction over the truth, then the mean hand."""
    f_scores = {"pa": ("f_5", "f_15"), metrics.PROTOCOLS[protocol]: ("f_5_unaligned", "f_15_unaligned")}
    rows = []
    for kind, name in ALIGNMENTS.items():
        distance, area = metrics.MEASURES[kind]
        keys = [distance.format("mpjpe"), distance.format("mpvpe"),
                area.format("joints"), area.format("vertices"), *f_scores.get(kind, ("", ""))]
        rows.append((name, _texts(table, keys)))
    rows.append(("mean hand, similarity fit", _texts(table, [f"mean_hand_{key}" for key in HEADLINE])))
    return [(name, texts) for name, texts in rows if any(texts)]


def _texts(table, keys):
    """The numbers of a dict as text, "" where it has none."""
    return ["" if key not in table else f"{table[key]:.{2 if key.endswith('mm') else 3}f}" for key in keys]


def compare(entries, out):
    """Prints one table of several metrics.json and writes table.json. Runs of one name are averaged."""
    groups = {}
    mean = None
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise ValueError(f"--compare {entry}: write NAME=path/to/metrics.json")
        table = read_json(path)
        if not isinstance(table, dict) or not {"pa_mpjpe_mm", "count"} <= set(table):
            raise ValueError(f"{path}: no metrics.json of evaluate.py (pa_mpjpe_mm or count is missing)")
        for key, value in table.items():
            is_compared = key in (*HEADLINE, "count") or key.startswith("mean_hand_")
            if is_compared and type(value) not in (int, float):
                raise ValueError(f"{path}: {key} is no number")
        groups.setdefault(name, []).append(table)
        mean_keys = [key for key in table if key.startswith("mean_hand_")]
        hand = {key.removeprefix("mean_hand_"): table[key] for key in mean_keys}
        mean = mean or hand
        first = next(iter(groups.values()))[0]
        alike = hand.keys() == mean.keys() and all(abs(hand[key] - mean[key]) < 1e-6 for key in hand)
        if not alike or table["count"] != first["count"]:
            raise ValueError(f"{path}: scored on other hands than the first file; compare runs on one set")
    table = {"mean_hand": mean} if mean else {}
    for name, runs in groups.items():
        table[name] = _mean_and_deviation(runs)
    rows = []
    for name, values in table.items():
        texts = []
        for key in HEADLINE:
            digits = 2 if key.endswith("mm") else 3
            deviation = f" ± {values[key + '_std']:.{digits}f}" if key + "_std" in values else ""
            texts.append(f"{values[key]:.{digits}f}{deviation}" if key in values else "")
        rows.append((name, texts))
    with staged_folder(out) as folder:
        (folder / "table.json").write_text(json.dumps(table, indent=1))
    print(text_table(COLUMNS, rows))
    print(f"after the leaderboards' similarity fit, {first['count']} hands  -> {out}/table.json")


def _mean_and_deviation(runs):
    """{key: mean over the runs}, with several runs also key_std (n - 1) and `runs`."""
    keys = [key for key in runs[0] if not key.startswith("mean_hand_")
            and all(type(one.get(key)) in (int, float) for one in runs)]
    found = {key: float(np.mean([one[key] for one in runs])) for key in keys}
    if len(runs) > 1:
        found |= {f"{key}_std": float(np.std([one[key] for one in runs], ddof=1)) for key in keys}
        found["runs"] = len(runs)
    return found


# ----------------------------------------------------------------------------------------------------- report
def report(index, faces, pred, labels, errors, baseline, table, definitions, facts):
    """report.html as one string: the template beside this file, filled with text, pictures and numbers.

    errors, baseline: metrics.per_sample_errors of the prediction and of the mean hand. definitions: of
    score_definitions, or {}."""
    part = "vertices" if "pa_vertices" in errors else "joints"
    distance = errors["pa_vertices"] if part == "vertices" else _row_mean(errors["pa_joints"])
    score = 1000 * distance  # (n,) mm
    scored = max(1, np.isfinite(score).sum())  # a hand with too few joints to align has NaN and comes last
    order = np.argsort(score, kind="stable")[:scored]
    cases, pictures = [], ""
    for name, rank in (("best", 0), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("95 %", 0.95),
                       ("worst", 1)):
        which = order[round(rank * (len(order) - 1))]
        row = int(errors["row"][which])
        case, images, note = show_case(index, faces, pred, labels, row, part)
        cases.append(case | {"name": f"{name}, {score[which]:.1f} mm"})
        cells = [f'<td><img src="{_data_uri(image)}" alt="{name}: {caption}"></td>'
                 for caption, image in images.items()]
        head = f"{name}<br><b>{score[which]:.1f} mm</b><br>hand {row}"
        pictures += f"<tr><th>{head}</th>{''.join(cells)}</tr>"
    cards = [f"<div><b>{table[key]:.{2 if unit else 3}f}</b><i>{unit}</i><span>{label}</span></div>"
             for key, label, unit in CARDS if key in table]
    numbers = _numbers(faces, part, cases, score[order], errors, baseline, facts["protocol"])
    slots = {"TITLE": html.escape(index.meta.get("name", "hands")), "NOTE": note, "PICTURES": pictures,
             "CARDS": "".join(cards),
             "FACTS": "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(fact))}</dd>"
                              for name, fact in facts.items()),
             "HEADS": "".join(f"<th>{caption}</th>" for caption in images),
             "TABLE": _html_table(COLUMNS, table_rows(table, facts["protocol"])),
             "HIDE": "" if definitions else "hidden",
             "DEFINITIONS": _html_table(ALIGNMENTS.values(), definition_rows(definitions)),
             "NUMBERS": json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")}
    page = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    for name, value in slots.items():
        page = page.replace("{{" + name + "}}", value)
    return page


def _html_table(columns, rows):
    """Head and body of a table, of [(name, texts)]."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = ""
    for name, texts in rows:
        kind = "mean" if name.startswith("mean") else ""
        cells = "".join(f"<td>{text}</td>" for text in texts)
        body += f'<tr class="{kind}"><th>{name}</th>{cells}</tr>'
    return f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"


def _numbers(faces, part, cases, score, errors, baseline, protocol):
    """What the page's script draws: meshes that turn, errors by joint, their histogram and curves."""
    placed = metrics.PROTOCOLS[protocol]
    most = np.quantile(score, 0.99) * 1.15
    counts, edges = np.histogram(score.clip(max=most), bins=min(40, max(8, len(score) // 8)))
    curves = {"aligned": errors["pa_joints"], ALIGNMENTS[placed]: errors[f"{placed}_joints"],
              "mean hand, aligned": baseline["pa_joints"]}
    joints = [[name.replace("_", " "), _css_color((i - 1) // 4) if i else "#6b7685"]
              for i, name in enumerate(JOINT_NAMES)]
    marks = [["median", float(np.median(score))], ["95 %", float(np.quantile(score, 0.95))]]
    return {"faces": np.ravel(faces).tolist() if part == "vertices" else [], "cases": cases, "part": part,
            "bones": [[a, b, _css_color(finger)] for a, b, finger in BONES], "joints": joints,
            "by_joint": [(1000 * _row_mean(e["pa_joints"].T)).round(3).tolist() for e in (errors, baseline)],
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist(), "marks": marks},
            "curves": [[name, metrics.pck_curve(values)[1].round(4).tolist()]
                       for name, values in curves.items()]}


def _css_color(finger):
    return "rgb({},{},{})".format(*FINGER_COLORS[finger])


def _row_mean(values):
    """Mean of every row over what is not NaN; NaN where a row has nothing."""
    known = ~np.isnan(values)
    mean = np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1)
    return np.where(known.any(1), mean, np.nan)


def show_case(index, faces, pred, labels, row, part, size=256):
    """One hand of the report: points for the view that turns, pictures by caption, a note on the pictures."""
    truth = {"joints": np.asarray(labels["gt_joints"][row], np.float64)}
    guess = {"joints": pred[0][row]}
    if part == "vertices":
        truth["vertices"] = np.asarray(labels["gt_vertices"][row], np.float64)
        guess["vertices"] = pred[1][row]
    known = np.isfinite(truth["joints"]).all(1)
    fitted = {"joints": np.full((21, 3), np.nan)}
    fitted["joints"][known] = metrics.procrustes(guess["joints"][known], truth["joints"][known], reflect=True)
    if part == "vertices":
        fitted["vertices"] = metrics.procrustes(guess["vertices"], truth["vertices"], reflect=True)
    centre = np.nanmean(truth[part], axis=0)
    values = {"pred": fitted[part] - centre, "true": truth[part] - centre,
              "error": np.linalg.norm(fitted[part] - truth[part], axis=1)}
    case = {}
    for name, value in values.items():
        tenths_of_mm = np.round(1e4 * np.nan_to_num(value)).astype(int)
        case[name] = tenths_of_mm.ravel().tolist()

    centre_x, centre_y, side = square(index.columns["box"][row], 1.6)
    try:
        image = crop_canvas(read_image(index.open_image(row))[0], centre_x, centre_y, side, size)[0]
    except (OSError, ValueError):  # a prediction file can be scored without the photographs
        image = np.full((size, size, 3), 225, np.uint8)
    project, is_true_camera = image_camera(index, row, truth["joints"])
    if project is None:
        note = "Without K and 2D joints in the index nothing is drawn on the photographs."
        return case, {"photograph": image}, note
    in_place = is_true_camera and guess["joints"][:, 2].min() > 0.05
    images = {"photograph": image}
    corner = [centre_x - side / 2, centre_y - side / 2]
    for caption, hand, color in (("prediction", guess if in_place else fitted, (92, 148, 240)),
                                 ("truth", truth, (104, 190, 130))):
        points = {name: project(value) for name, value in hand.items()}
        for value in points.values():  # pixel edges of the photograph -> of the crop
            value[:, :2] = (value[:, :2] - corner) * size / side
        if part == "vertices":
            images[f"{caption}, mesh"] = overlay(image, points["vertices"], faces, color)
        images[f"{caption}, joints"] = draw_joints(image, points["joints"][:, :2] - 0.5)
    note = ("Predictions are drawn where they were placed in the camera." if in_place else
            "Predictions are drawn after the similarity fit: the file or the index does not say where they "
            "stand.")
    return case, images, note


def image_camera(index, row, joints):
    """A function (N,3) metres -> (N,3): x, y in pixel edges and depth; and whether it is the true camera.

    By K, else by the weak perspective that fits the labelled 2-D joints, else (None, False)."""
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
    pixels = index.columns["joints2d"][label][known] + 0.5  # (n, 2), pixel edges
    scale, shift = fit_weak_perspective(joints[known], pixels)
    return lambda points: np.concatenate([scale * points[:, :2] + shift, points[:, 2:]], 1), False


def _data_uri(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint",
                        help="RUN/last.pt of finetune_mesh.py: predict with its averaged weights")
    source.add_argument("--predictions", metavar="FILE",
                        help="file of results in the joint order and frame of --protocol: pred.json or .zip, "
                             "[joints (N,21,3), vertices (N,778,3) or []] in metres; dexycb also pred.txt in "
                             "mm, assemblyhands the challenge's JSON (formats: top of results.py)")
    source.add_argument("--compare", nargs="+", metavar="NAME=metrics.json",
                        help="runs to print in one table")
    cli.add_argument("--data", metavar="INDEX", help="index to score; needed unless --compare")
    cli.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    cli.add_argument("--protocol", choices=list(metrics.PROTOCOLS),
                     help="how hands are scored and --predictions is read (default: as the index says, else "
                          "freihand)")
    cli.add_argument("--mano", metavar="FILE",
                     help="official MANO_RIGHT.pkl or an .npz of it (default: the synthetic hand)")
    cli.add_argument("--batch-size", type=int, default=32, help="hands at a time (default 32)")
    cli.add_argument("--definitions", action="store_true",
                     help="one more table: the same meshes with their joints by every published definition")
    cli.add_argument("--tta", type=int, default=1, metavar="N",
                     help="views a hand, an odd number, turned by -30 to 30 degrees; their mean is taken "
                          "(test-time augmentation; default 1: the upright view)")
    add_device_flags(cli)
    return cli


def check_flags(cli, args):
    """ValueError where a flag is out of its range, does nothing, or would overwrite what it reads."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    if args.tta < 1 or args.tta % 2 == 0:
        raise ValueError(f"--tta {args.tta}: must be odd, so that the upright view is among them")
    idle = () if args.checkpoint else ("tta",)
    idle += ("data", "mano", "definitions", "protocol") if args.compare else ()
    for name in idle:
        if getattr(args, name) != cli.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: leave it out")
    if args.predictions and args.out.resolve() in Path(args.predictions).resolve().parents:
        raise ValueError(f"--out {args.out} holds --predictions {args.predictions}, which would be "
                         "overwritten: choose another folder")
    _refuse_others_files(args)
    check_writable(args.out)
    if not args.data and not args.compare:
        raise ValueError("--data is missing: name the index to score")


def _refuse_others_files(args):
    """ValueError where a result would replace a file that this command did not write."""
    there = [name for name in (("table.json",) if args.compare else RESULTS) if (args.out / name).exists()]
    if args.compare:
        is_own = bool(there) and _is_own_table(args.out / "table.json")
    else:
        is_own = is_own_zip(args.out / "pred.zip")
    if there and not is_own:
        raise ValueError(f"--out {args.out}: {there[0]} is there already and was not written by this version "
                         "of evaluate.py: choose another folder")


def _is_own_table(path):
    """True for a table.json of --compare."""
    try:
        table = read_json(path)
    except (ValueError, OSError):
        return False
    rows = table.values() if isinstance(table, dict) else [None]
    return all(isinstance(row, dict) and "pa_mpjpe_mm" in row for row in rows)


def predict_with_checkpoint(args, index, arrays, definition):
    """predict_index with the network of --checkpoint: joints and vertices, which are rounded, so that the
    file holds what is scored; the hand model's own joints; the joints' pixels; facts for the report."""
    runtime = setup(args, alone=True)
    state = load_checkpoint(args.checkpoint, "mesh")
    if state.get("hand") != hand_fingerprint(arrays):
        raise ValueError(f"{args.checkpoint} was trained with another hand model: pass the same file "
                         "with --mano (none for the synthetic hand)")
    net = load_mesh(state, Mano(arrays)).to(runtime.device)
    *pred, chain, pixels = predict_index(net, index, arrays, definition, state["box_scale"], args.tta,
                                         args.batch_size, runtime)
    pred = [np.round(points.astype(np.float64), 7) for points in pred]
    kind = index.meta.get("box", "as it was given")
    return pred, chain, pixels, {
        "crop": f"the index' box ({kind}), squared, x {state['box_scale']:g}",
        "views": f"{args.tta}" + (" (test-time augmentation)" if args.tta > 1 else "")}


def image_errors(index, pixels):
    """How far pixels (N,21,2) of joints lie from the index' joints2d, or without those from its keypoints (a
    detector's points, no truth), over the longer side of the hand's box (ours): `image_median_percent` over
    all points that are known, `image_within_10`, the share within 10 percent, and `image_points`, how many.
    Hidden points count where they are known, hands outside of their image do not. {} where none is known."""
    columns = [name for name in ("joints2d", "keypoints") if name in index.columns]
    name = next((name for name in columns if np.isfinite(index.columns[name]).any()), None)
    if name is None:
        return {}
    labels = index.pose_ids()
    away = np.linalg.norm(index.columns[name][labels] + 0.5 - pixels, axis=2)  # (N, 21), NaN where not known
    if name == "keypoints" and "keypoints_score" in index.columns:
        away = np.where(index.columns["keypoints_score"][labels] > 0, away, np.nan)
    away[index.meta.get("unseen", [])] = np.nan
    box = np.asarray(index.columns["box"], np.float64)
    away = away / (box[:, 2:] - box[:, :2]).max(1, keepdims=True)
    away = away[np.isfinite(away)]
    if not len(away):
        return {}
    return {"image_median_percent": 100 * float(np.median(away)),
            "image_within_10": float((away < 0.1).mean()), "image_points": len(away)}


def wrist_errors(joints, truth):
    """Where the wrist stands before the camera (ours), medians: `wrist_cm`, how far joints (N,21,3) have it
    from the true ones, both in the camera frame; `wrist_true_size_cm`, the same if the hand's size were
    known; `wrist_depth_cm`, its distance. A hand of f times the size fills the same pixels f times as far.
    {} where no hand is labelled so far."""
    size, true_size = (np.linalg.norm(np.diff(points[:, TO_MIDDLE_TIP], axis=1), axis=2).sum(1)  # (N,)
                       for points in (joints, truth))
    wrist, true_wrist = joints[:, 0], truth[:, 0]
    ways = {"wrist_cm": wrist - true_wrist, "wrist_depth_cm": true_wrist,
            "wrist_true_size_cm": wrist * (true_size / size)[:, None] - true_wrist}
    known = np.isfinite(np.concatenate(list(ways.values()), axis=1)).all(1)
    if not known.any():
        return {}
    return {name: float(100 * np.median(np.linalg.norm(way[known], axis=1))) for name, way in ways.items()}


def score_mean_hand(index, arrays, definition, labels, protocol):
    """metrics.per_sample_errors of the hand model's mean hand, predicted for every hand of the index."""
    joints, vertices = mean_hand(arrays, definition)  # (1, 21, 3), (1, 778, 3)
    pred = [np.broadcast_to(points, (len(index), *points.shape[1:])) for points in (joints, vertices)]
    return metrics.per_sample_errors(*pred, protocol=protocol, **labels)


def main(argv=None):
    cli = flags()
    args = cli.parse_args(argv)
    check_flags(cli, args)
    if args.compare:
        return compare(args.compare, args.out)
    index = HandIndex(args.data)
    arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    protocol = args.protocol or index.meta.get("protocol", "freihand")
    definition = index.meta.get("joints", "freihand")
    labels, label_note = read_labels(index, protocol, required=args.predictions or args.definitions)
    source = args.checkpoint or args.predictions
    facts = {"data": f"{index.meta.get('name', 'hands')} ({args.data})", "predicted by": source}

    if args.predictions:
        pred = read_predictions(args.predictions, index, protocol)
        chain = None
        warn_of_units(pred[0], labels["gt_joints"], source)
        labels["gt_vertices"] = None if pred[1] is None else labels["gt_vertices"]
        if labels["gt_vertices"] is not None:
            warn_of_order(*pred, labels["gt_joints"], labels["gt_vertices"], source)
        facts["crop"] = "made elsewhere, unknown"
    if labels:  # before hours of prediction: labels that cannot be scored are refused here
        baseline = score_mean_hand(index, arrays, definition, labels, protocol)
    if args.checkpoint:
        pred, chain, pixels, more_facts = predict_with_checkpoint(args, index, arrays, definition)
        facts |= more_facts
        in_image = image_errors(index, pixels)
        if in_image:
            facts["in the image"] = ("{image_points} points {image_median_percent:.2f} % of the box off "
                                     "(median), {image_within_10:.1%} within 10 %".format(**in_image))
    if not labels:
        with staged_folder(args.out) as folder:
            write_predictions(folder, *pred, protocol, index)
            if in_image:
                (folder / "metrics.json").write_text(json.dumps({"count": len(index)} | in_image, indent=1))
        found = f"in the image: {facts['in the image']}" if in_image else "nothing was scored"
        print(f"{index.path} has no joints in space; {found}; predictions are in {args.out}")
        return

    try:
        errors = metrics.per_sample_errors(*pred, protocol=protocol, **labels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    table = metrics.summarise(errors, protocol)
    mean_table = metrics.summarise(baseline, protocol)
    table |= {f"mean_hand_{key}": mean_table[key] for key in mean_table if key in HEADLINE}
    if args.checkpoint:
        table |= in_image
        if "K" in index.columns:  # others' results may be relative to the wrist
            table |= wrist_errors(pred[0], labels["gt_joints"])
    table |= {"views": args.tta} if args.tta > 1 else {}
    odd_ones = len(index) - table["count"], *(len(index.meta.get(name, ())) for name in ("reboxed", "unseen"))
    table |= dict(zip(ODDITIES, odd_ones, strict=True))
    odd_ones = "".join(f", {table[key]} {text}" for key, text in ODDITIES.items() if table[key])
    definitions = {}
    if args.definitions:
        definitions = score_definitions(*pred, chain, arrays, labels, protocol)
    facts |= {"protocol": protocol, "hands": f"{table['count']}{label_note}{odd_ones}",
              "joints": f"FreiHAND order, definition “{definition}”, root is the wrist",
              "hand model": args.mano or "the synthetic hand",
              "reflected": ", ".join(f"{table[key]} ({key[10:]})"
                                     for key in table if key.startswith("reflected"))}
    if "wrist_cm" in table:
        facts |= {"wrist": "{wrist_cm:.1f} cm off, {wrist_true_size_cm:.1f} if the hand's size were known, "
                           "{wrist_depth_cm:.0f} cm from the camera (medians)".format(**table)}
    with staged_folder(args.out) as folder:
        (folder / "metrics.json").write_text(json.dumps(table, indent=1))
        scores = metrics.official_scores(table, protocol)
        (folder / "scores.txt").write_text("".join(f"{key}: {value:f}\n" for key, value in scores.items()))
        write_predictions(folder, *pred, protocol, index)
        if definitions:
            (folder / "definitions.json").write_text(json.dumps(definitions, indent=1))
        page = report(index, arrays["f"], pred, labels, errors, baseline, table, definitions, facts)
        (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")  # odd names
    print(text_table(COLUMNS, table_rows(table, protocol)))
    if definitions:
        print(text_table(tuple(ALIGNMENTS.values()), definition_rows(definitions)))
    print("\n".join(f"{key:>14}: {value}" for key, value in facts.items()))
    headline = [f"{key} {table[key]:.2f} " for key in HEADLINE[:2] if key in table]
    print(*headline, f"-> {args.out / 'report.html'}")


if __name__ == "__main__":
    run(main)
