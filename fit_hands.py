"""Points of a detector -> labels: the hand model is fitted to the points of each hand.

Photographs without labels teach a mesh network only through a detector's 21 points. Those say little about
depth, and some are wrong. So the hand model is fitted to them first, once, where every fit can be looked at.
finetune_mesh.py then takes the new index as any labelled one. (ours; the idea is that of EFT, arXiv
2004.03686)

The fit is the most probable hand: the sum of these terms, each a squared number of standard deviations, is
made small by Adam.

    points in the image      POINT of the box's side each, less where the detector is unsure; robust
    metric points, if any    SPACE each, after the best scale and shift; robust (column `keypoints3d`)
    pose                     coefficients of the hand model's own principal components, deviation 1
    shape                    betas, deviation 1

Robust: beyond two deviations a point counts by its distance and no longer by the square. Left hands are
fitted as the right hands that a mirror shows. A hand is left out where its median point is farther than
--most-error from the fit. The new index names the same images.

Writes --out, an index with the labels pose, betas, vertices, joints and joints2d, and samples.png in it.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    CONTEXT, HAND_COLUMNS, PACK, HandDataset, HandIndex, canvas_size, mirror, square, write_index,
)
from draw import draw_joints, grid, overlay, save_image
from mano import (
    Mano, axis_angle_from_rotmat, joints_from_vertices, nearest_rotation, read_mano, rotmat_from_6d,
    rotmat_from_axis_angle, weak_perspective,
)
from runtime import check_ranges, parser, run, setup
from saving import check_writable, refuse_files, staged_folder
from synthetic_hand import synthetic_mano

POINT = 0.02  # deviation of a detector's point, as a share of the box's longer side
SPACE = 0.010  # deviation of its metric points, in metres
WRIST = 2.0  # times these of the wrist: MediaPipe's lies some 8 mm towards the little finger (measured)
KNEE = 2.0  # deviations at which a term turns from square to linear
PALM = [0, 1, 5, 9, 13, 17]  # joints that hardly move against each other
DIRECTIONS = 48  # orientations that the fit may start from, where no metric points are known
LABELS = ("keypoints", "keypoints_score", "keypoints3d")
RATES = {"coefficients": 0.05, "orientation": 0.02, "betas": 0.05, "camera": 0.02}  # of Adam
BATCH = 256


# -------------------------------------------------------------------------------------------------------- fit
def fit(hand, arrays, points, score, points3d=None, has_space=None, steps=250):
    """The hand model at points (B,21,2) in [-1,1] of a square, of right hands.

    score (B,21) from 0, not seen, to 1. points3d (B,21,3) metres, camera axes, of which has_space (B,) says
    where they are known. Returns rotmats (B,16,3,3), betas (B,10), vertices (B,778,3) and joints (B,21,3)
    relative to the wrist, camera (B,3), points (B,21,2) of the fit, error (B,): median distance of the points
    that were seen over the box's side, NaN where none was.
    """
    count = len(points)
    seen = (score > 0)[..., None]  # (B, 21, 1)
    middle = (points * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    points = torch.where(seen, points, middle)  # the others may lie anywhere, and make no box larger
    side = (points.amax(1) - points.amin(1)).amax(1).clamp(min=1e-3)  # (B,)
    components = torch.as_tensor(arrays["hands_components"], dtype=torch.float32, device=points.device)
    start, first_camera = first_guess(hand, arrays, points, points3d, has_space)
    doubt = torch.ones(21, device=points.device)
    doubt[0] = WRIST
    state = {"coefficients": torch.zeros(count, len(components)),
             "orientation": start[:, :, :2].transpose(1, 2).reshape(count, 6),
             "betas": torch.zeros(count, 10), "camera": first_camera}
    state = {name: value.to(points.device).clone().requires_grad_() for name, value in state.items()}
    optimizer = torch.optim.Adam([{"params": [value], "lr": RATES[name]} for name, value in state.items()])

    for step in range(steps + 1):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        pose = hand.hands_mean + (state["coefficients"] @ components).unflatten(1, (15, 3))
        fingers = rotmat_from_axis_angle(pose)  # (B, 15, 3, 3)
        rotmats = torch.cat([rotmat_from_6d(state["orientation"])[:, None], fingers], dim=1)
        vertices, _ = hand(rotmats, state["betas"])
        joints = joints_from_vertices(vertices, arrays)
        scale = state["camera"][:, :1].exp()  # a positive number
        camera = torch.cat([scale, state["camera"][:, 1:] / scale], dim=1)
        shown = weak_perspective(joints - joints[:, :1], camera)  # (B, 21, 2)
        distance = (shown - points).norm(dim=2) / side[:, None]  # (B, 21)
        energy = (score * robust(distance / POINT / doubt)).sum(1)
        if points3d is not None:
            away = matched(points3d, joints.detach()) - (joints - joints.mean(1, keepdim=True))
            energy = energy + has_space * robust(away.norm(dim=2) / SPACE / doubt).sum(1)
        energy = energy + (state["coefficients"] ** 2).sum(1) / 2 + (state["betas"] ** 2).sum(1) / 2
        if step < steps:
            optimizer.zero_grad()
            energy.sum().backward()
            optimizer.step()
    found = {"rotmats": rotmats, "betas": state["betas"], "vertices": vertices - joints[:, :1],
             "joints": joints - joints[:, :1], "camera": camera, "points": shown,
             "error": distance.where(seen[..., 0], torch.nan).nanmedian(1).values}
    return {name: value.detach() for name, value in found.items()}


def robust(deviations):
    """Half the square up to KNEE, then a straight line (Huber)."""
    return torch.nn.functional.huber_loss(deviations, torch.zeros_like(deviations), reduction="none",
                                          delta=KNEE)


def matched(points3d, joints):
    """points3d (B,21,3) moved and scaled, not turned, to lie on joints (B,21,3) minus their mean."""
    centred = points3d - points3d.mean(1, keepdim=True)
    target = joints - joints.mean(1, keepdim=True)
    scale = (centred * target).sum((1, 2)) / (centred ** 2).sum((1, 2)).clamp(min=1e-9)
    return centred * scale.clamp(min=0.2)[:, None, None]


def first_guess(hand, arrays, points, points3d, has_space):
    """Orientations (B,3,3) and cameras (B,3) = log scale, x, y from which the fit starts.

    Where metric points are known, the rotation that lays the mean hand's palm on theirs. Elsewhere the best
    of DIRECTIONS by the palm in the image: the turn in the image plane has a closed form."""
    fingers = rotmat_from_axis_angle(hand.hands_mean)
    rest = torch.cat([torch.eye(3, device=points.device)[None], fingers])[None]
    vertices, _ = hand(rest, torch.zeros(1, 10, device=points.device))
    joints = joints_from_vertices(vertices, arrays)[0]  # (21, 3)
    joints = joints - joints[0]
    palm = joints[PALM] - joints[PALM].mean(0)  # (6, 3)
    target = points[:, PALM] - points[:, PALM].mean(1, keepdim=True)  # (B, 6, 2)

    tried = spread_rotations(DIRECTIONS).to(points.device)  # (D, 3, 3)
    flat = torch.view_as_complex((palm @ tried.transpose(1, 2))[..., :2].contiguous())  # (D, 6)
    wanted = torch.view_as_complex(target.contiguous())  # (B, 6)
    factor = (wanted[:, None] * flat.conj()).sum(2) / (flat.abs() ** 2).sum(1)  # (B, D): scale and turn
    misfit = (wanted[:, None] - factor[..., None] * flat).abs().square().sum(2)  # (B, D)
    best = misfit.argmin(1)
    turn = factor.gather(1, best[:, None]).angle()  # (B, 1)
    about_z = rotmat_from_axis_angle(turn * torch.tensor([0.0, 0, 1], device=turn.device))
    rotation = about_z @ tried[best]  # (B, 3, 3)
    if points3d is not None:
        in_space = points3d[:, PALM] - points3d[:, PALM].mean(1, keepdim=True)
        by_palm = nearest_rotation(in_space.transpose(1, 2) @ palm)
        rotation = torch.where(has_space[:, None, None] > 0, by_palm, rotation)
    seen = (palm @ rotation.transpose(1, 2))[..., :2]  # (B, 6, 2)
    scale = (seen * target).sum((1, 2)) / (seen ** 2).sum((1, 2)).clamp(min=1e-9)
    scale = scale.clamp(min=1.0)
    middle = (joints[PALM].mean(0) @ rotation.transpose(1, 2))[:, :2]  # (B, 2)
    shift = points[:, PALM].mean(1) - scale[:, None] * middle
    return rotation, torch.cat([scale.log()[:, None], shift], dim=1)


def spread_rotations(count):
    """(count,3,3) rotations whose third row, the direction they are seen from, is spread over the sphere."""
    number = torch.arange(count) + 0.5
    height = 1 - 2 * number / count
    angle = number * math.pi * (3 - math.sqrt(5))  # the golden angle
    radius = (1 - height ** 2).sqrt()
    z = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    helper = torch.where(z[:, :1].abs() < 0.9, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
    x = torch.nn.functional.normalize(torch.linalg.cross(helper, z), dim=1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=1)


# -------------------------------------------------------------------------------------------------- the index
def read_points(index):
    """keypoints (N,21,2) of all hands in canvas coordinates, their score (N,21), and keypoints3d (N,21,3) or
    None: of right hands, mirrored where the hand is a left one."""
    labels = index.pose_ids()
    columns = {name: np.array(index.columns[name][labels], np.float32)
               for name in LABELS if name in index.columns}
    middle_x, middle_y, side = square(index.columns["box"], CONTEXT)
    middle = np.stack([middle_x, middle_y], axis=1)[:, None]
    points = ((columns["keypoints"] + 0.5 - middle) / (side[:, None, None] / 2)).astype(np.float32)
    score = columns.get("keypoints_score", np.ones(points.shape[:2], np.float32))
    score = np.where(np.isfinite(points).all(2), score, 0).astype(np.float32)
    points = np.nan_to_num(points)
    points3d = columns.get("keypoints3d")
    left = is_left(index)
    points[left] = mirror("keypoints", points[left])
    if points3d is not None:
        points3d[left] = mirror("keypoints3d", points3d[left])
    return points, score, points3d


def is_left(index):
    """(N,) True for left hands."""
    return index.columns["side"] == 1 if "side" in index.columns else np.zeros(len(index), bool)


def labels_of(found, index, rows, hands_mean):
    """What `fit` found for the hands `rows` of an index, as its label columns: mirrored back, in pixels."""
    fingers = axis_angle_from_rotmat(found["rotmats"].double()).flatten(1)  # (R, 48)
    fingers[:, 3:] -= hands_mean.double().flatten()
    labels = {"pose": fingers, "betas": found["betas"], "vertices": found["vertices"],
              "joints": found["joints"], "joints2d": found["points"]}
    labels = {name: value.cpu().numpy().astype(np.float32) for name, value in labels.items()}
    left = is_left(index)[rows]
    for name in ("pose", "vertices", "joints", "joints2d"):
        labels[name][left] = mirror(name, labels[name][left])
    middle_x, middle_y, side = (value[rows, None] for value in square(index.columns["box"], CONTEXT))
    half = side / 2
    x = labels["joints2d"][..., 0] * half + middle_x - 0.5
    y = labels["joints2d"][..., 1] * half + middle_y - 0.5
    return labels | {"joints2d": np.stack([x, y], axis=2).astype(np.float32)}


def save_samples(path, index, found, rows, faces, count=40):
    """`count` hands from all over: the detector's points, and the fitted mesh, right hands."""
    dataset = HandDataset([index], canvas_size(224), CONTEXT, ("keypoints",), rows, substitute=False)
    tiles = []
    for place in np.unique(np.linspace(0, len(rows) - 1, count).astype(int)):
        hand = dataset[place]
        canvas = hand["canvas"].numpy().transpose(1, 2, 0)
        size = len(canvas)
        tiles.append(draw_joints(canvas, (np.asarray(hand["keypoints"]) + 1) * size / 2 - 0.5))
        vertices, camera = found["vertices"][place][None], found["camera"][place][None]
        seen = (weak_perspective(vertices, camera) + 1) * size / 2
        mesh = torch.cat([seen, vertices[..., 2:]], dim=2)[0].cpu().numpy()
        tiles.append(overlay(canvas, mesh, faces))
    save_image(path, grid(tiles, 10, ["detector", "fit"] * (len(tiles) // 2), cell=144))


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", required=True, metavar="INDEX", help="hands with keypoints of a detector")
    cli.add_argument("--out", required=True, type=Path, help="index to write")
    cli.add_argument("--mano", metavar="FILE", help="MANO_RIGHT.pkl or .npz (default: the synthetic hand)")
    cli.add_argument("--most-error", type=float, default=0.05,
                     help="share of the box's side by which the median point may miss (default .05)")
    cli.add_argument("--steps", type=int, default=250, help="steps of Adam (default 250)")
    cli.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"],
                     help="device of the fits. auto: cuda where there is one")
    return cli


def main(argv=None):
    args = flags().parse_args(argv)
    check_ranges(args, {"most_error": (0, 1), "steps": (1, 10**5)})
    runtime = setup(argparse.Namespace(device=args.device, precision="fp32"), alone=True)
    index = HandIndex(args.data)
    if "keypoints" not in index.columns:
        raise ValueError(f"--data {args.data}: no keypoints in this index; prepare_data.py video finds them")
    refuse_files(args.out)
    check_writable(args.out)
    arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    hand = Mano(arrays).to(runtime.device)
    points, score, points3d = (None if value is None else torch.from_numpy(value).to(runtime.device)
                               for value in read_points(index))
    parts = []
    for start in tqdm(range(0, len(points), BATCH), unit_scale=BATCH, unit="hand"):
        some = slice(start, start + BATCH)
        space = {}
        if points3d is not None:
            has_space = points3d[some].isfinite().all(2).all(1).float()
            space = {"points3d": points3d[some].nan_to_num(), "has_space": has_space}
        parts.append(fit(hand, arrays, points[some], score[some], **space, steps=args.steps))
    found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    error = found["error"].numpy()
    rows = np.flatnonzero(error <= args.most_error)  # not NaN, where no point was seen
    if not len(rows):
        raise ValueError(f"--data {args.data}: no fit is nearer than --most-error {args.most_error:g}")
    found = {name: value[rows] for name, value in found.items()}
    columns = {}
    for name, value in index.columns.items():
        if name in LABELS:
            value = np.asarray(value)[index.pose_ids()[rows]]
            if np.isfinite(value).all():  # an index of fits has no gaps
                columns[name] = value
        elif name in HAND_COLUMNS and name != "label":
            columns[name] = np.asarray(value)[rows]
    columns |= labels_of(found, index, rows, hand.hands_mean.cpu())
    meta = {name: value for name, value in index.meta.items() if name in ("name", "packs", "video_names")}
    with staged_folder(args.out) as folder:
        write_index(folder, columns, meta | {"joints": "freihand", "pose_mean": True, "fitted": True},
                    index.root.resolve())
        for number in range(len(meta.get("packs", ()))):
            (folder / PACK.format(number)).symlink_to((index.path / PACK.format(number)).resolve())
        save_samples(folder / "samples.png", index, found, rows, hand.faces.cpu().numpy())
    print(f"{args.out}: {len(rows)} of {len(error)} hands fitted; the median point is "
          f"{100 * np.nanmedian(error):.1f} % of the box's side away; look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main)
