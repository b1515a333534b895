"""Supervised mesh training: an encoder and the PyMAF head regress MANO from one view of a hand.

The encoder is fresh, or pre-trained by any script here or elsewhere. The head is PyMAF's (arXiv 2103.16507,
MeshHead in model.py), fresh or of an earlier run. Reads indices (data.py); writes RUN/config.json, log.jsonl,
last.pt, encoder.pt and samples/*.png. One step:

    canvas -> view (theta, colour) -> encoder -> feature map -> T estimates, each a correction of the last one
    labels -> the same view: 2-D points by the inverse of theta, 3-D ones turned with the content

    the loss         of each estimate                                       is compared with
    rotations        16 rotation matrices                                   the labels, turned like the view
    joint_maps       maps of the joints                             the 2-D joints, with --joint-maps
    articulation     vertices in the hand's own frame, without orientation  the labels in their own frame
    betas            10 shape numbers                                       the labels
    camera           size of the true joints by its scale, place by its shift  the 2-D joints in the view
    joints2d         estimated joints through that camera, held fixed       the 2-D joints in the view
    joints           joints, relative to the wrist                          the labels, turned like the view
    vertices         vertices, relative to the wrist                        the labels, turned like the view

Left hands come mirrored. The average of the weights (EMA) is what is validated, saved for use and exported.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache import cache_canvases
from data import (
    CONTEXT, HandDataset, HandIndex, UnreadImages, canvas_size, check_mix,
    index_fingerprint, make_loader, make_sampler, mirror, square,
)
from draw import draw_joints, grid, overlay, save_curves, save_image
from mano import (
    Mano, hand_fingerprint, labelled_joints, nearest_rotation, read_mano, rotmat_from_axis_angle,
    weak_perspective,
)
from metrics import procrustes
from model import (
    ARCHS, HandMesh, MeshHead, choose_encoder, is_resnet, joint_map_loss, read_weights,
)
from runtime import (
    adamw, add_init_flags, add_training_flags, batch_parts, check_ranges, cores, cosine, ema_update, feed,
    finish, generator, param_groups, parser, run, set_lr, setup, total_steps, update,
)
from saving import (
    FORMATS, Log, Saves, announce, check_run, is_due, is_restart, read_json, restore, save_checkpoint,
    start_run,
)
from synthetic_hand import synthetic_mano
from views import (
    apply_color, apply_cover, apply_strong_color, apply_theta, choose_finer, invert_theta, normalise,
    random_color, random_cover, random_theta, rows_to_blur, strong_color, theta_rotation, to_pixels, to_rgb,
    upright_views, warp,
)

LABELS = ("joints2d", "visible", "joints", "vertices", "pose", "betas")
# 60 for the rotations is HongwenZhang/PyMAF-X's (core/trainer.py, hand_only); the others are ours. The camera
# and betas have losses of their own: while the orientation is wrong, a small hand far away fits the points
# best. articulation weighs most: it teaches the fingers before the orientation is known.
WEIGHTS = {
    "rotations": 60.0,
    "betas": 1.0,
    "camera": 2.0,
    "joints2d": 3.0,
    "joints": 30.0,
    "vertices": 30.0,
    "articulation": 500.0,
}
JOINT_MAPS = 10.0  # weight of the loss of --joint-maps (ours)
# Of an encoder that --init brings without its head:
LAYER_DECAY = 0.75  # rate of a block over that of the next one (ViTPose)
RESNET_RATE = 0.1  # rate of a ResNet over the head's (ours)
WEIGHT_DECAY = 0.05  # not on 1-D tensors (MAE)
WARMUP = 0.05  # share of the steps in which the rate rises (MAE)
CLIP = 1.0  # largest norm of the gradient (ViTPose)
# Random streams: of (seed, step, stream), of DROPOUT also of the process.
THETA, COLOR, DROPOUT, LIGHT, FACTORS, BLUR, COVER = range(7)
FRACTION = 77  # random stream of --label-fraction
FRESH = {"image_size": 224, "head_width": 256, "head_hidden": 1024, "iterations": 3, "joint_maps": False,
         "box_scale": 1.3}
HEAD_FLAGS = {"head_width": "width", "head_hidden": "hidden", "iterations": "iterations",
              "joint_maps": "joint_maps"}  # and what MeshHead calls them
OLD_HEAD = {"scale_bound": 0, "hidden": 1024, "joint_maps": False, "laterals": []}  # older networks say none
LIKE = "default: that of --resume, or of a mesh run in --init, else"
CHARTS = {"loss": ("loss",), "val_pa_mpvpe_mm": ("val_pa_mpvpe_mm", "val_pa_mpjpe_mm")}


# ----------------------------------------------------------------------------------------------------- losses
def mesh_losses(estimates, joints, target):
    """Losses by the names of WEIGHTS, and joint_maps where the head has them, each the mean over the T
    estimates of MeshHead.

    joints: list of (B,21,3), the joints of each estimate as the labels define them. target: of make_target.
    """
    steps = [estimate_losses(*estimate, target) for estimate in zip(estimates, joints, strict=True)]
    names = [*WEIGHTS, "joint_maps"] if "joint_maps" in steps[0] else WEIGHTS
    return {name: sum(losses[name] / len(steps) for losses in steps) for name in names}


def estimate_losses(estimate, joints, target):
    """The losses of one estimate, each a mean over what is labelled. joints (B,21,3) of it, in metres.

    L1 on points, because the metric is a distance (ours); squares on rotations and betas (PyMAF).
    """
    has_joints = target["has_joints"]  # (B,)
    has_mesh = target["has_vertices"] * has_joints
    known = target["known_joints"] * has_joints[:, None]  # (B, 21)
    known2d = target["known_joints2d"] * target["has_joints2d"][:, None]  # (B, 21)
    visible = target["visible"][..., None]  # (B, 21, 1)

    true_wrist = target["joints"][:, :1]
    from_wrist = target["joints"] - true_wrist  # (B, 21, 3)
    vertices = estimate["vertices"]  # (B, 778, 3)
    camera = estimate["camera"]

    # The camera learns from the true joints. The joints then move under a fixed camera, which cannot shrink
    # them; only where no true joints are known, the camera learns from the estimated ones.
    fixed_camera = torch.where(has_joints[:, None] > 0, camera.detach(), camera)
    points = weak_perspective(joints, fixed_camera)  # (B, 21, 2)
    # Its scale learns from the points about their middle, its shift under a fixed scale. If both learned from
    # the same distances, the scale would get too small: it makes up for a wrist at a wrong place.
    shown = (known2d * known)[..., None] * visible  # (B, 21, 1)
    flat, seen = from_wrist[..., :2], target["joints2d"]
    middle, seen_middle = weighted_mean(flat, shown), weighted_mean(seen, shown)
    sizes = camera[:, None, :1] * (flat - middle) - (seen - seen_middle)  # (B, 21, 2)
    held_scale = torch.cat([camera[:, :1].detach(), camera[:, 1:]], dim=1)
    places = weak_perspective(from_wrist, held_scale) - seen  # (B, 21, 2)
    inside = (target["joints2d"].abs() < 1).all(2) * known2d  # (B, 21)
    maps = {}
    if "joint_maps" in estimate:
        misses = joint_map_loss(estimate["joint_maps"], target["joints2d"])  # (B, 21)
        maps = {"joint_maps": masked_mean(misses[..., None], inside)}
    rotation = estimate["rotmats"] - target["rotmats"]
    upright = (vertices - joints[:, :1]) @ estimate["rotmats"][:, 0]  # R^T v, in the hand's own frame

    return maps | {
        "rotations": masked_mean(rotation ** 2, target["has_pose"]),
        "articulation": masked_mean((upright - target["upright"]).abs(), target["has_pose"] * has_mesh),
        "betas": masked_mean((estimate["betas"] - target["betas"]) ** 2, target["has_betas"]),
        "camera": masked_mean((sizes.abs() + places.abs()) * visible, known2d * known),
        "joints2d": masked_mean((points - target["joints2d"]).abs() * visible, known2d),
        "joints": masked_mean((joints - joints[:, :1] - target["joints"] + true_wrist).abs(), known),
        "vertices": masked_mean((vertices - joints[:, :1] - target["vertices"] + true_wrist).abs(), has_mesh),
    }


def weighted_mean(points, weights):
    """Mean (B,1,C) of points (B,P,C) by weights (B,P,1); 0 without any."""
    return (points * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-9)


def masked_mean(values, has):
    """Mean over the entries of values (B,...) or (B,P,...) where has (B,) or (B,P) is 1; 0 without any."""
    per_entry = values.flatten(has.ndim).mean(has.ndim)
    return (per_entry * has).sum() / has.sum().clamp(min=1)


def defined_joints(estimate, target, arrays, definitions):
    """Joints (B,21,3) of an estimate, for each hand as the labels of its source define them.

    arrays: of the hand. definitions: {name in mano.labelled_joints: (S,) bool, which sources use it}.
    """
    was_left = target["mirrored"] > 0
    vertices, kinematic = estimate["vertices"], estimate["joints"]
    joints = None
    for name, sources in definitions.items():
        others = joints
        joints = labelled_joints(vertices, kinematic, arrays, name, was_left)
        if others is not None:
            joints = torch.where(sources[target["source"]][:, None, None], joints, others)
    return joints


# ------------------------------------------------------------------------------------------------------ views
def draw_theta(batch, generator, box_scale, rotation, zoom, shift):
    """theta (B,2,3): turned by +- rotation degrees, `zoom` (low, high) times the usual window, moved by up to
    a share `shift` of half its side. box_scale: side of the usual window over the box."""
    usual = box_scale / CONTEXT
    scale = (usual * zoom[0], usual * zoom[1])
    return random_theta(batch, generator, np.deg2rad(rotation), scale, usual * shift)


def draw_color(batch, generator, strength):
    """Factors (B,6) of colour. Strength 1: gains .4, brightness .2, contrast .3, saturation .3 (ours)."""
    return random_color(batch, generator, 0.4 * strength, 0.2 * strength, 0.3 * strength, 0.3 * strength)


def make_views(canvas, theta, size, finer, color, spoiled=None):
    """Canvases (B,3,H,W) u8 -> views (B,3,size,size) as the encoder sees them. finer: as warp's. spoiled: of
    draw_spoiled."""
    views = apply_color(warp(canvas, theta, size, finer), color)
    if spoiled:
        views = apply_strong_color(apply_cover(views, spoiled["cover"]), **spoiled["looks"])
    return normalise(views)


def draw_spoiled(draw_rows, strength, size):
    """What makes views worse, as photographs are (ours): tinted light, grey, blur, and a piece of the picture
    in front of the hand in a third of the views. draw_rows: (stream, draw) -> tensor of this process."""
    draw_light, draw_factors, draw_sigma = strong_color(strength, size)
    sigma = draw_rows(BLUR, draw_sigma)
    looks = {"light": draw_rows(LIGHT, draw_light), "color": draw_rows(FACTORS, draw_factors),
             "sigma": sigma, "blurred": rows_to_blur(sigma)}
    return {"cover": draw_rows(COVER, partial(random_cover, share=strength / 3)), "looks": looks}


def make_target(labels, theta, hands_mean):
    """The labels of a batch in its views theta (B,2,3): a dict of tensors, as HandDataset's.

    joints2d by the inverse of theta; joints and vertices turned with the content. Added: rotmats (B,16,3,3),
    turned; upright (B,778,3), the vertices from the wrist in the hand's own frame. hands_mean: of the hand.
    """
    turn = theta_rotation(theta)  # (B, 3, 3)
    pose = labels["pose"].unflatten(1, (16, 3))
    fingers = pose[:, 1:] + hands_mean * labels["pose_mean"][:, None, None]
    rotmats = rotmat_from_axis_angle(torch.cat([pose[:, :1], fingers], dim=1))  # (B, 16, 3, 3)
    from_wrist = labels["vertices"] - labels["joints"][:, :1]
    return labels | {
        "rotmats": torch.cat([turn[:, None] @ rotmats[:, :1], rotmats[:, 1:]], dim=1),
        "upright": from_wrist @ rotmats[:, 0],  # R^T v
        "joints": labels["joints"] @ turn.transpose(1, 2),  # R v
        "vertices": labels["vertices"] @ turn.transpose(1, 2),
        "joints2d": apply_theta(invert_theta(theta), labels["joints2d"]),
    }


# ------------------------------------------------------------------------------------------------------- data
def open_labelled(paths, flag):
    """The indices, refused where they hold no labels."""
    indices = [HandIndex(path) for path in paths]
    for index in indices:
        if not {"joints", "joints2d"} & set(index.columns):
            advice = "fit_hands.py makes them" if "keypoints" in index.columns else "pre-training needs none"
            raise ValueError(f"{flag} {index.path}: no labels in this index: {advice}")
    return indices


def joint_definition(index):
    return index.meta.get("joints", "freihand")


def check_definition(index, arrays):
    """ValueError where an index says of its joints what labelled_joints does not know."""
    try:
        labelled_joints(torch.zeros(1, 778, 3), torch.zeros(1, 21, 3), arrays, joint_definition(index))
    except (ValueError, AttributeError, RuntimeError) as error:
        what = joint_definition(index)
        raise ValueError(f"{index.path / 'index.json'}: joints {what!r} cannot be made: {error}") from None


def label_rows(indices, fraction, seed):
    """Rows of a seeded share of the poses: all images of a pose or none.

    A smaller share is a part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--label-fraction {fraction} must lie in (0, 1]")
    starts = np.cumsum([0] + [index.meta["labels"] for index in indices])
    poses = [index.pose_ids() + start for index, start in zip(indices, starts[:-1], strict=True)]
    order = np.random.default_rng([seed, FRACTION]).permutation(starts[-1])
    chosen = order[:max(1, round(fraction * starts[-1]))]
    return np.flatnonzero(np.isin(np.concatenate(poses), chosen))


def training_mean(dataset, hands_mean, box_scale, most=4000):
    """Mean rotations (16,3,3) and camera scale of the rows trained on, from which the head starts.

    The chordal mean of the global orientations, the hand's mean pose for the fingers, and the median scale in
    an upright view. Reads the columns of `most` rows, no image.
    """
    spaced = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    chosen = dataset.rows[np.unique(spaced)]
    orientations = []
    scales = []
    for index, start in zip(dataset.indices, dataset.starts[:-1], strict=True):
        rows = chosen[(chosen >= start) & (chosen < start + len(index))] - start
        if len(rows) and "pose" in index.columns:
            orientations.append(_orientations(index, rows))
        if len(rows) and {"joints", "joints2d"} <= set(index.columns):
            scales.append(_camera_scales(index, rows, box_scale))
    rotmats = rotmat_from_axis_angle(torch.cat([torch.zeros(1, 3), hands_mean.cpu()]))
    if sum(map(len, orientations)):
        rotmats[0] = nearest_rotation(torch.cat(orientations).mean(0))
    scales = np.concatenate([*scales, []])
    return rotmats, float(np.median(scales)) if len(scales) else 9.0


def _orientations(index, rows):
    """Global orientations (R,3,3) of the hands that have one; left hands mirrored, as HandDataset does."""
    pose = index.columns["pose"][index.pose_ids()[rows]]  # (R, 48)
    is_left = np.array([index.side(row) for row in rows]) == 1
    pose = np.where(is_left[:, None], mirror("pose", pose), pose)[:, :3]
    rotmats = rotmat_from_axis_angle(torch.from_numpy(pose[np.isfinite(pose).all(1)]))
    return rotmats[rotmats.isfinite().all(2).all(1)]


def _camera_scales(index, rows, box_scale):
    """Camera scales (R,) of upright views: the spread of the 2-D joints over that of the 3-D ones."""
    labels = index.pose_ids()[rows]
    in_image, in_space = index.columns["joints2d"][labels], index.columns["joints"][labels][..., :2]
    known = np.isfinite(in_image + in_space).all(2)  # (R, 21)
    kept = known.sum(1) > 1
    sides = square(index.columns["box"][rows[kept]], box_scale)[2]
    in_image, in_space = (_spread(points[kept], known[kept]) for points in (in_image, in_space))
    return in_image / np.maximum(in_space, 1e-4) * 2 / sides


def _spread(points, known):
    """Mean distance (R,) of the points (R,21,2) that are known (R,21) from their middle."""
    points = np.where(known[..., None], points, np.nan)
    return np.nanmean(np.linalg.norm(points - np.nanmean(points, 1, keepdims=True), axis=-1), 1)


# ------------------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(net, loader, runtime, box_scale, size, arrays, definition):
    """PA-MPJPE and PA-MPVPE in mm over the hands of all processes, in upright views; None without labels.

    Third, the number of hands left out because their image could not be read. Hands whose labels are not all
    there are left out as well.
    """
    sums = {name: torch.zeros(2, device=runtime.device) for name in ("joints", "vertices")}  # error, hands
    unread = torch.zeros(1, device=runtime.device)
    for batch in loader:
        is_read = batch["failed"] < 0
        unread += (~is_read).sum()
        with runtime.autocast():
            views = upright_views(batch["canvas"].to(runtime.device), box_scale / CONTEXT, size)
            estimate = net(views)[-1]
        was_left = batch["mirrored"].to(runtime.device) > 0
        joints = labelled_joints(estimate["vertices"], estimate["joints"], arrays, definition, was_left)
        predicted = {"joints": joints, "vertices": estimate["vertices"]}
        is_whole = {"joints": batch["known_joints"].all(1), "vertices": batch["has_vertices"].bool()}
        for name, points in predicted.items():
            chosen = (is_whole[name] & is_read).numpy()
            if chosen.any():
                points = points.float().cpu().numpy()[chosen]
                true = batch[name].numpy()[chosen]
                errors = np.linalg.norm(procrustes(points, true, reflect=True) - true, axis=-1).mean(1)
                sums[name] += torch.tensor([float(errors.sum()), len(errors)], device=runtime.device)
    scores = []
    for name in ("joints", "vertices"):
        total, hands = runtime.mean(sums[name])
        scores.append(float(1000 * total / hands) if hands else None)
    return *scores, round(float(runtime.mean(unread)) * runtime.world)


def label_picture(views, joints2d):
    """Views (B,3,S,S) with their joints2d (B,21,2) in view coordinates."""
    size = views.shape[-1]
    points = to_pixels(joints2d, size)
    marked = [draw_joints(*hand) for hand in zip(to_rgb(views), points, strict=True)]
    return grid(marked, 8, cell=144)


def estimate_picture(views, joints2d, estimate, faces):
    """Views (B,3,S,S) with the true joints2d (B,21,2), each beside the estimated mesh laid over it."""
    size = views.shape[-1]
    points = weak_perspective(estimate["vertices"], estimate["camera"])
    points = torch.cat([(points + 1) * size / 2, estimate["vertices"][..., 2:]], dim=2).cpu().numpy()
    true_points = to_pixels(joints2d, size)
    tiles = []
    for image, mesh, joints in zip(to_rgb(views), points, true_points, strict=True):
        tiles += [draw_joints(image, joints), overlay(image, mesh, faces)]
    return grid(tiles, 8, ["true joints", "estimate"] * len(views), cell=144)


def load_head(head, path, hand, size, box_scale):
    """Loads the averaged head where `path`, of --init, is the last.pt of a run of this script; True if so.

    Says so where that run had views of another size or another box_scale. ValueError: it was trained with
    another hand model than that of the fingerprint `hand`, or has another shape."""
    before = read_weights(path) if path else None
    if not isinstance(before, dict) or before.get("kind") != "mesh":
        return False
    advice = "give the encoder.pt beside it, for a fresh head"
    if before.get("format", 1) != FORMATS["mesh"]:
        raise ValueError(f"--init {path} is a mesh run of another version: {advice}")
    if before.get("hand") != hand:
        raise ValueError(f"--init {path} was trained with another hand model: pass its file with --mano, "
                         f"or {advice}")
    try:
        config = OLD_HEAD | before["head"]
        then = before["encoder"]["config"]["image_size"], before["box_scale"]
        other = [name for name, value in head.config.items() if name != "dropout" and config[name] != value]
        if not other:
            head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in before["ema"].items()
                                  if name.startswith("head.")})
    except Exception as error:  # a damaged file can fail in any way
        reason = type(error).__name__
        raise ValueError(f"--init {path}: its head cannot be read ({reason}): {advice}") from None
    if other:
        had = ", ".join(f"{name} {config[name]}" for name in other)
        known = [f"--{flag.replace('_', '-')}" for flag, name in HEAD_FLAGS.items() if name in other]
        flags = " and ".join(known)
        flags = f"set {flags} so, or " if flags else ""
        raise ValueError(f"--init {path} has a head of {had}: {flags}{advice}")
    if then != (size, box_scale):
        print(f"note: {path} was trained with --image-size {then[0]} --box-scale {then[1]:g}, not {size} and "
              f"{box_scale:g}: other views cost it accuracy", file=sys.stderr)
    return True


# ------------------------------------------------------------------------------------------------------ flags
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="labelled hands to train on")
    cli.add_argument("--val", required=True, metavar="INDEX",
                     help="labelled hands for the validation lines of the log")
    cli.add_argument("--mano", metavar="FILE",
                     help="MANO_RIGHT.pkl or .npz, from mano.is.tue.mpg.de (default: the synthetic hand)")
    group = cli.add_argument_group("network")
    add_init_flags(group, "an encoder.pt, or ViT or ResNet weights of others (docs/mesh.md lists them); or "
                          "the last.pt of a run of this script, whose head is taken too")
    group.add_argument("--arch", choices=sorted(ARCHS),
                       help="architecture of the encoder (default: that of --init, else vit_small)")
    group.add_argument("--image-size", type=int,
                       help=f"side of the views in pixels, a multiple of the patch: 16, DINOv2's 14 ({LIKE} "
                            "224)")
    group.add_argument("--drop-path", type=float, default=0.1,
                       help="stochastic depth of a ViT (default .1, iBOT's for vit_small; .2 for vit_base)")
    group.add_argument("--dropout", type=float, default=0.1,
                       help="dropout of the head's regressors (default .1; PyMAF: .5, from scratch)")
    group.add_argument("--head-width", type=int,
                       help=f"channels of the head's maps ({LIKE} 256, PyMAF; 64 is enough at toy sizes)")
    group.add_argument("--head-hidden", type=int,
                       help=f"width of the head's regressors ({LIKE} 1024, PyMAF; 256 for small networks)")
    group.add_argument("--iterations", type=int, choices=[1, 2, 3],
                       help=f"estimates of the head, each corrects the last one ({LIKE} 3, PyMAF)")
    group.add_argument("--joint-maps", action="store_true", default=None,
                       help="the head also finds the joints in its maps, to which finer maps of a ResNet are "
                            "added, and sees how far its estimate lies from them (ours)")
    group = cli.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, default=5e-4,
                       help="rate of AdamW at batch 256, linear in the batch; 2e-4 to 4e-3 (default 5e-4). "
                            "An encoder of --init, without its head, is slower: a block of the ViT has .75 "
                            "of the next one's rate, a ResNet a tenth")
    group.add_argument("--image-weight", type=float, default=1.0,
                       help="factor on the two losses in the image, camera and joints2d; more makes overlays "
                            "fit better (default 1)")
    group.add_argument("--ema", type=float, default=0.999,
                       help="momentum of the averaged weights, lower in the first steps (default .999)")
    group.add_argument("--label-fraction", type=float, default=1.0,
                       help="seeded share of the labelled poses to train on (default 1)")
    group = cli.add_argument_group("views: the usual window is --box-scale x the box")
    group.add_argument("--box-scale", type=float,
                       help=f"side of the usual window over the longer side of the box ({LIKE} 1.3; "
                            "PyMAF-X: 1.2)")
    group.add_argument("--rotation", type=float, default=90,
                       help="degrees either way (default 90: hands occur in all orientations; PyMAF: 30)")
    group.add_argument("--zoom", type=float, nargs=2, default=(0.8, 1.25), metavar=("LOW", "HIGH"),
                       help="factor on the usual window's side, below 1 is nearer (default .8 1.25)")
    group.add_argument("--shift", type=float, default=0.1,
                       help="share of half the usual window's side, in x and in y (default .1)")
    group.add_argument("--color", type=float, default=1.0,
                       help="strength of the random colours: gains, brightness, contrast, saturation; 0 "
                            "none, 2 the most (default 1)")
    group.add_argument("--spoil", type=float, default=0.0,
                       help="how much views are made worse, as photographs are: tinted light, grey, blur, a "
                            "piece of the picture in front of the hand; 0 to 2 (default 0; 1 for real ones)")
    add_training_flags(cli, batch_size=64, epochs=100)
    cli.add_argument("--eval-every", type=int, default=500,
                     help="steps between validations (default 500); the last step always validates")
    return cli


def fill_in(args, runtime):
    """Flags that were not given become what they were in the run that goes on, or else in the mesh run that
    --init names, else FRESH."""
    for name, value in runtime.from_main(lambda: FRESH | known_flags(args)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def known_flags(args):
    config = Path(args.out) / "config.json"
    if (args.resume or is_restart()) and config.is_file():
        before = read_json(config)  # --init may be gone
        return {name: before[name] for name in FRESH if name in before} if isinstance(before, dict) else {}
    return flags_of_mesh(args.init) if args.init and Path(args.init).is_file() else {}


def flags_of_mesh(path):
    """What FRESH names, in the mesh run whose last.pt `path` is; {} for other files."""
    before = read_weights(path)
    if not isinstance(before, dict) or before.get("kind") != "mesh":
        return {}
    try:
        head = OLD_HEAD | before["head"]
        known = {flag: head[name] for flag, name in HEAD_FLAGS.items()}
        return known | {"image_size": before["encoder"]["config"]["image_size"],
                        "box_scale": before["box_scale"]}
    except (KeyError, TypeError):
        return {}  # load_head says that the file is damaged


def check_flags(args):
    """ValueError that names the first flag out of its range, before anything is written."""
    check_ranges(args, {"image_size": (16, 4096), "drop_path": (0, 0.99), "dropout": (0, 0.99),
                        "lr": (0, 1e3), "image_weight": (0, 1e3), "ema": (0, 1), "box_scale": (0.5, CONTEXT),
                        "rotation": (0, 180), "zoom": (0.1, 3), "shift": (0, 1), "color": (0, 2),
                        "spoil": (0, 2)})
    if args.head_hidden < 16:
        raise ValueError(f"--head-hidden {args.head_hidden}: must be 16 or more")
    if args.zoom[0] > args.zoom[1]:
        raise ValueError("--zoom: the lower number comes first")
    if args.head_width < 32 or args.head_width % 32:
        raise ValueError(f"--head-width {args.head_width}: must be a multiple of 32")


def lr_scale(name, encoder, decay):
    """Rate of the parameter `name` over the head's: decay^(blocks behind it) in a ViT, RESNET_RATE in a
    ResNet; 1 for all where decay is 1."""
    if decay == 1 or not name.startswith("encoder."):
        return 1.0
    if is_resnet(encoder.arch):
        return RESNET_RATE
    return decay ** (encoder.layers - encoder.layer_of(name.removeprefix("encoder.")))


# ------------------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = flags().parse_args(argv)
    runtime = setup(args)
    fill_in(args, runtime)
    check_flags(args)
    device = runtime.device
    size = args.image_size
    hand_arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    hand = Mano(hand_arrays)
    indices = open_labelled(args.data, "--data")
    val_index, = open_labelled([args.val], "--val")
    for index in [*indices, val_index]:
        check_definition(index, hand_arrays)
    rows = label_rows(indices, args.label_fraction, args.seed)
    canvas = canvas_size(size, args.box_scale)
    dataset = HandDataset(indices, canvas, CONTEXT, LABELS, rows)
    steps = total_steps(args, len(rows))
    check_mix(rows, dataset.starts, args.mix)

    torch.manual_seed(args.seed)
    inputs = {"data": index_fingerprint([index.columns for index in indices], "joints2d"),
              "val": index_fingerprint([val_index.columns], "joints2d"),
              "mano": hand_fingerprint(hand_arrays)}
    state = check_run(args, runtime, "mesh", inputs)
    encoder = choose_encoder(args.arch, args.init, size, "vit_small", args.drop_path,
                             state["encoder"] if state else None, args.heads, args.pixels)
    if args.joint_maps and is_resnet(encoder.arch) and size % 32:
        raise ValueError(f"--image-size {size}: with --joint-maps a ResNet needs a multiple of 32")
    head = MeshHead(hand, encoder.dim, encoder.dim, strides=is_resnet(encoder.arch),
                    iterations=args.iterations, width=args.head_width, hidden=args.head_hidden,
                    dropout=args.dropout, joint_maps=args.joint_maps,
                    laterals=encoder.widths[2::-1] if args.joint_maps and is_resnet(encoder.arch) else ())
    # A pre-trained encoder before a fresh head learns more slowly than it. One that brings its head does not.
    if state:
        slower = any(group["lr_scale"] < 1 for group in state.get("optimizer", {}).get("param_groups", ()))
    else:
        has_head = load_head(head, args.init, inputs["mano"], size, args.box_scale)
        if not has_head:
            head.set_mean(*training_mean(dataset, hand.hands_mean, args.box_scale))
        slower = bool(args.init) and not has_head
    model = HandMesh(encoder, head).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    scale = partial(lr_scale, encoder=encoder, decay=LAYER_DECAY if slower else 1.0)
    optimizer = adamw(param_groups(model.named_parameters(), WEIGHT_DECAY, scale), device)
    scaler = runtime.scaler()
    start = restore(state, model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    state = state and {"step": start}  # the rest would stay in memory
    net = runtime.wrap(model)
    parameters = list(model.parameters())

    order = make_sampler(rows, dataset.starts, args.mix, args.batch_size, args.seed, start, steps,
                         runtime.rank, runtime.world)
    cache = cache_canvases(dataset, args.cache, device, runtime.workers and cores(), runtime.rank,
                           runtime.world, runtime.local_rank)
    loader = make_loader(dataset, order, workers=runtime.workers, pin=device.type == "cuda")
    unread = UnreadImages(dataset)
    val_rows = runtime.local_rows(torch.arange(len(val_index)))
    val_dataset = HandDataset([val_index], canvas, CONTEXT, LABELS, val_rows, substitute=False)
    val_loader = make_loader(val_dataset, batch_size=64, workers=runtime.workers, pin=device.type == "cuda")
    shown_rows = np.linspace(0, len(val_index) - 1, 8).astype(int)
    shown_dataset = HandDataset([val_index], canvas, CONTEXT, LABELS, shown_rows)
    shown = next(iter(make_loader(shown_dataset, batch_size=8)))
    shown_views = upright_views(shown["canvas"].to(device), args.box_scale / CONTEXT, size)
    shown_joints2d = shown["joints2d"] * CONTEXT / args.box_scale  # canvas -> view
    names = [joint_definition(index) for index in indices]
    definitions = {name: torch.tensor([each == name for each in names], device=device) for name in names}
    lr_base = args.lr * args.batch_size / 256
    parts = batch_parts(args.batch_size // runtime.world, args.accumulate)
    weights = WEIGHTS | {name: args.image_weight * WEIGHTS[name] for name in ("camera", "joints2d")}
    weights["joint_maps"] = JOINT_MAPS
    finer = choose_finer(args.box_scale / CONTEXT * args.zoom[1], canvas, size)
    theta_of = partial(draw_theta, box_scale=args.box_scale, rotation=args.rotation, zoom=args.zoom,
                       shift=args.shift)
    color_of = partial(draw_color, strength=args.color)

    def draw(step):
        """What is random in a step, of this process's hands."""
        def rows(stream, draw_one):
            return runtime.draw(draw_one, args.batch_size, args.seed, step, stream)

        drawn = {"theta": rows(THETA, theta_of), "color": rows(COLOR, color_of)}
        return drawn | ({"spoiled": draw_spoiled(rows, args.spoil, size)} if args.spoil else {})

    out = start_run(args, runtime, state, inputs)
    announce(runtime, out, model, len(rows), start, steps, args.batch_size, cache)
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every)

    def export(step):
        """The averaged encoder after `step` updates."""
        save_checkpoint(out / "encoder.pt", "encoder", step=step, arch=encoder.arch, config=encoder.config,
                        state_dict=ema.encoder.state_dict())

    if state and runtime.is_main:
        export(start)  # a kill may have come between last.pt and it
    saves = Saves(runtime, args.save_every, args.save_minutes, steps)

    for step, batch, drawn in saves.watch(feed(unread.watch(loader), draw, start, device, cache)):
        theta = drawn["theta"]  # (B, 2, 3)
        canvases = batch.pop("canvas")  # (B, 3, C, C) u8
        views = make_views(canvases, theta, size, finer, drawn["color"], drawn.get("spoiled"))  # (B, 3, S, S)
        target = make_target(batch, theta, hand.hands_mean)
        if step == 0 and runtime.is_main:
            save_image(out / "samples" / "views.png", label_picture(views[:16], target["joints2d"][:16]))

        torch.manual_seed(generator(args.seed, step, DROPOUT, runtime.rank).initial_seed())
        values = {}
        for part, is_last in parts:
            true = {name: value[part] for name, value in target.items()}
            with runtime.sync_gradients(net, is_last):
                with runtime.autocast():
                    estimates = net(views[part])  # T dicts; the last is the answer, all learn
                joints = [defined_joints(estimate, true, hand_arrays, definitions) for estimate in estimates]
                losses = mesh_losses(estimates, joints, true)
                loss = sum(weights[name] * value for name, value in losses.items())
                scaler.scale(loss / args.accumulate).backward()
            for name, value in (losses | {"loss": loss}).items():
                values[name] = values.get(name, 0) + value.detach() / args.accumulate

        lr = cosine(step, steps, lr_base, final=1e-6, warmup=int(WARMUP * steps))
        set_lr(optimizer, lr)
        norm = update(optimizer, scaler, parameters, CLIP)
        ema_update(ema, model, min(args.ema, (1 + step) / (10 + step)))
        log(step + 1, values | {"lr": lr, "gradient_norm": norm})

        if is_due(step, args.eval_every, steps):
            runtime.share_buffers(ema)
            pa_joints, pa_vertices, val_unread = validate(ema, val_loader, runtime, args.box_scale, size,
                                                          hand_arrays, joint_definition(val_index))
            log.write({"step": step + 1, "val_pa_mpjpe_mm": pa_joints, "val_pa_mpvpe_mm": pa_vertices})
            if runtime.is_main:
                estimate = ema(shown_views)[-1]
                picture = estimate_picture(shown_views, shown_joints2d, estimate, hand_arrays["f"])
                save_image(out / "samples" / f"step_{step + 1:07d}.png", picture)
        if saves.due(step):
            save_checkpoint(out / "last.pt", "mesh", step=step + 1, hand=hand_fingerprint(hand_arrays),
                            encoder={"arch": encoder.arch, "config": encoder.config}, head=head.config,
                            box_scale=args.box_scale, model=model.state_dict(), ema=ema.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            export(step + 1)
            save_curves(out / "samples", log.curves, CHARTS)
    log.close()
    unread.rows = runtime.union(unread.rows)
    if runtime.is_main and start < steps:
        scores = {"PA-MPVPE": pa_vertices, "PA-MPJPE": pa_joints}
        score = ", ".join(f"{name} {value:.2f} mm" for name, value in scores.items() if value)
        print(f"{out / 'last.pt'}: step {steps}, validation {score}")
        if val_unread:
            print(f"{val_unread} validation images could not be read and were left out of these numbers")
        if unread.rows:
            print(unread)
    finish()


if __name__ == "__main__":
    run(main)
