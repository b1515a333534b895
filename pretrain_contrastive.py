"""SimCLR, PeCLR and SiMHand: contrastive pre-training of a ViT or ResNet-50 on unlabelled hands.

arXiv 2002.05709, 2106.05953 and 2502.15251. What the papers leave open follows the public code of PeCLR and
SiMHand or is ours; the docstrings say which.

Reads indices (data.py) and, for simhand, the pairs of mine_pairs.py. Writes RUN/config.json, log.jsonl,
last.pt, encoder.pt and samples/*.png. One step:

    simclr   two views of a hand                    the latents agree
    peclr    two views of a hand, rotated           64 points in the latents agree, once undone by theta
    simhand  a hand and a similar one, rotated      the same, weighted by the distance of their joints

What belongs to the two views has a leading axis: views (2,B,3,S,S), theta (2,B,2,3), latents (2,B,128). So
`.flip(0)` is the other view, and `a, b = h` are the pairs.
"""

import hashlib
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cache import cache_canvases
from data import (CONTEXT, HandDataset, HandIndex, PairSampler, UnreadImages, canvas_size, check_mix,
                  has_points, index_fingerprint, make_loader, make_sampler, pair_rows, pose_labels,
                  read_pairs)
from draw import curve, draw_joints, draw_points, grid, histogram, save_curves, save_image
from metrics import procrustes
from model import ARCHS, ProjectionHead, choose_encoder
from probing import LIVE_CHARTS, PROBE_WINDOW, LiveProbe
from runtime import (
    adamw, add_init_flags, add_training_flags, batch_parts, check_ranges, cores, cosine, feed, finish,
    param_groups, parser, run, set_lr, setup, total_steps, update,
)
from saving import Log, Saves, announce, check_run, is_due, restore, save_checkpoint, start_run
from views import (apply_hsv, apply_strong_color, apply_theta, choose_finer, invert_theta, normalise,
                   random_hsv, rows_to_blur, strong_color, to_pixels, to_rgb, two_views, upright_views, warp)

CROP = 1.3  # the public code's crop: its side over the longer side of the box
PIXELS = 112  # half the side of that crop in pixels, before it is resized
OUTPUT = 128  # side of the public code's view, after the crop is resized
SIMCLR_ZOOM = (1.25, 1.25)  # the public code's fixed margin around the keypoints
THETA, LIGHT, COLOR, BLUR, HSV = 0, 1, 2, 3, 4  # random streams: of (seed, step, stream)
CHUNK = 256  # rows of the similarity matrix that exist at a time
CHARTS = {"loss": ("loss",), "agreement": ("positive_similarity", "negative_similarity", "alignment"),
          **LIVE_CHARTS}


# ---------------------------------------------------------------------------------------------------- network
class Contrastive(nn.Module):
    """Encoder and projection head: 128 numbers, of which peclr and simhand make 64 points.

    gather: a function that joins the summaries (2,B,D) of all processes along dimension 1, or None. The
    head's BatchNorm needs the statistics of the whole batch, so each process then has the latents of all.
    """

    def __init__(self, encoder, gather=None):
        super().__init__()
        self.encoder = encoder
        self.gather = gather
        self.head = ProjectionHead(encoder.dim)

    def forward(self, views):
        """Views (2,B,3,S,S) -> latents (2,B,128), of all processes with `gather`; the head in fp32."""
        summary = self.encoder.features(views.flatten(0, 1))[0].float()  # (2B, D)
        summary = summary.unflatten(0, (2, -1))  # (2, B, D)
        if self.gather:
            summary = self.gather(summary)
        with torch.autocast(views.device.type, enabled=False):
            return self.head(summary.flatten(0, 1)).unflatten(0, (2, -1))


def embed(latent, theta, middle, undo):
    """Latents (2,B,128) of the views -> unit vectors h (2,B,128) that agree where the hands do.

    undo "none": the latent itself, normalised (SimCLR). Otherwise it is 64 points in coordinates of the view,
    whose theta (2,B,2,3) is undone. middle (2,B,2): of the hand's joints on the canvas.

    "exact" (ours): A Z + t - middle, the points around the middle of the hand. The middle lies elsewhere in
    each box. If it stayed, a network that sees nothing could recognise a hand by it.
    "official": the arithmetic of the public code (undo_official)."""
    if undo == "none":
        return F.normalize(latent, dim=-1)
    points = latent.unflatten(-1, (-1, 2))  # (2, B, 64, 2), in the view
    if undo == "exact":
        points = apply_theta(theta, points) - middle[..., None, :]
    else:
        points = undo_official(points, theta, middle)
    return F.normalize(points.flatten(-2), dim=-1)


def undo_official(points, theta, middle):
    """Points (...,64,2) of views theta (...,2,3), undone as the public code does it.

    dahiyaaneesh/peclr src/models/unsupervised/hybrid2_model.py and ut-vision/SiMHand. They take the shift in
    pixels before the crop is resized, over the side after it, times the extent of the points. They rotate
    about the points' mean and leave the scale to the normalisation. middle (...,2): of the joints on the
    canvas, from which the view's window moved away."""
    length = points.flatten(-2).norm(dim=-1)[..., None, None]
    points = points / length.clamp(min=1e-12)
    scale = theta[..., 0].norm(dim=-1)[..., None, None]
    turn = theta[..., :2] / scale  # R(phi), (..., 2, 2)
    moved = (theta[..., 2] - middle)[..., None]  # on the canvas, (..., 2, 1)
    moved = (turn.transpose(-1, -2) @ moved)[..., 0] * PIXELS * CONTEXT / CROP  # in pixels of the crop
    extent = (points.amax(-2) - points.amin(-2)).detach()
    points = points + (moved / OUTPUT * extent)[..., None, :]
    centre = points.mean(-2, keepdim=True).detach()
    return (points - centre) @ turn.transpose(-1, -2) + centre


# ------------------------------------------------------------------------------------------------------- loss
def nt_xent(a, b, temperature, positive_weights=None, negative_weights=None):
    """NT-Xent of unit vectors a, b (N,D); scalar. Each of the 2N finds its partner among all others:

        -mean_i log( exp(w+_i s_ip / T) / sum_{j != i} exp(w-_ij s_ij / T) )

    s are cosines, p is the partner of i. SiMHand, section 3.3: the weights multiply the similarity inside the
    exponent. positive_weights: (N,). negative_weights: (2N,2N), or a function rows (R,) -> (R,2N). None: 1.

    CHUNK rows of the similarity matrix exist at a time. The backward pass makes them again, so that memory
    grows with 2N and not with its square."""
    h = torch.cat([a, b])  # (2N, D)
    N = len(a)
    positive = (a * b).sum(1) / temperature  # (N,)
    if positive_weights is not None:
        positive = positive * positive_weights

    def log_denominators(h, rows):
        logits = h[rows] @ h.T / temperature  # (R, 2N)
        if callable(negative_weights):
            logits = logits * negative_weights(rows)
        elif negative_weights is not None:
            logits = logits * negative_weights[rows]
        others = logits.scatter(1, rows[:, None], -torch.inf)  # without itself
        return others.logsumexp(1).sum()

    chunks = torch.arange(2 * N, device=h.device).split(CHUNK)
    if len(chunks) == 1:
        denominators = log_denominators(h, chunks[0])
    else:
        denominators = sum(checkpoint(log_denominators, h, rows, use_reentrant=False) for rows in chunks)
    return (denominators - 2 * positive.sum()) / (2 * N)


def pair_weights(joints_a, joints_b):
    """SiMHand's weights from the joints (N,21,2) of the pairs' views: positive (N,), negative (2N,2N).

    Linear in the distance (ut-vision/SiMHand src/models/utils.py). Positive: 1 for the closest pair, 0 for
    the farthest, 1 for all where all are equally far apart (ours: the public code divides by 0). Negative: 1
    at distance 0, 0 for the farthest two views."""
    positive, negative_rows = pair_weights_by_rows(joints_a, joints_b)
    rows = torch.arange(2 * len(joints_a), device=joints_a.device)
    return positive, torch.cat([negative_rows(some) for some in rows.split(CHUNK)])


@torch.no_grad()
def pair_weights_by_rows(joints_a, joints_b):
    """pair_weights, but the negative ones as a function rows (R,) -> (R,2N), so that they never exist at
    once."""
    joints = torch.cat([joints_a, joints_b])  # (2N, 21, 2)
    pair_distance = (joints_a - joints_b).norm(dim=2).mean(1)  # (N,)
    farthest = torch.stack([_joint_distance(some, joints).max() for some in joints.split(CHUNK)]).max()

    def negative_rows(rows):
        return _closeness(_joint_distance(joints[rows], joints), 0, farthest)

    return _closeness(pair_distance, pair_distance.min(), pair_distance.max()), negative_rows


def _joint_distance(joints_a, joints_b):
    """(R,21,2), (M,21,2) -> (R,M): the distance of two joints, mean over the joints.

    Element by element: matrix products would lose the small distances, and cdist without them is slow on a
    GPU."""
    total = 0
    for a, b in zip(joints_a.unbind(1), joints_b.unbind(1), strict=True):  # (R, 2), (M, 2)
        across, down = (a[:, None] - b).unbind(-1)  # (R, M)
        total = total + torch.hypot(across, down)
    return total / joints_a.shape[1]


def _closeness(distance, nearest, farthest):
    """1 at the nearest, 0 at the farthest distance, linear between; 1 where the two are equal."""
    extent = farthest - nearest
    return torch.where(extent < 1e-6, 1.0, (farthest - distance) / extent.clamp(min=1e-6))


def lars(parameters, lr, weight_decay, eta=0.02):
    """Scales the gradient of each tensor in place, as LARS does, before Adam.

    ut-vision/SiMHand src/models/base_model.py: a LARS wrapper whose rate is at most 1. No weight decay on 1-D
    tensors."""
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        some = [each for each in parameters if each.grad is not None and (each.ndim > 1) == is_matrix]
        values = [each.detach() for each in some]
        gradients = [each.grad for each in some]
        size = torch.stack(torch._foreach_norm(values))  # (P,), one for each tensor
        slope = torch.stack(torch._foreach_norm(gradients))
        rate = (eta * size / (slope + decay * size + 1e-8) / lr).clamp(max=1)
        moves = (size > 0) & (slope > 0)
        if decay:
            torch._foreach_add_(gradients, torch._foreach_mul(values, (decay * moves).unbind()))
        torch._foreach_mul_(gradients, torch.where(moves, rate, 1.0).unbind())


# ------------------------------------------------------------------------------------------------------ views
def hand_circle(joints, is_known):
    """Circles around hands on the canvas, from joints (2,B,21,2): middle (2,B,2), radius (2,B).

    The middle is the joints' mean, the radius the largest distance to it. A hand whose joints are not known,
    is_known (2,B), has the middle of its box and half the side of the public code's crop (ours: drawn hands
    have a median radius of 1.33 x half their box, and half the box alone cuts off fingers)."""
    middle = torch.where(is_known[..., None], joints.mean(2), 0.0)
    radius = (joints - middle[..., None, :]).norm(dim=-1).amax(-1)
    return middle, torch.where(is_known, radius, CROP / CONTEXT).clamp(0.1, 2)


def hand_theta(unit, middle, radius, rotation, zoom, shift, both_ways=True):
    """theta (2,B,2,3) of windows around hands, from numbers unit (2,B,4) in 0 .. 1.

    middle (2,B,2), radius (2,B): of hand_circle. rotation: degrees either way. zoom = (low, high): half the
    window's side over the radius. shift: the largest one, as a share of half the side of the public code's
    crop, along the sides of the turned window. The public shifts go to the right and down only; ours go
    `both_ways`."""
    phi = (2 * unit[..., 0] - 1) * math.radians(rotation)
    cos, sin = phi.cos(), phi.sin()
    turn = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))  # R(phi), (2, B, 2, 2)
    scale = radius * (zoom[0] + unit[..., 1] * (zoom[1] - zoom[0]))  # (2, B)
    moved = 2 * unit[..., 2:] - 1 if both_ways else unit[..., 2:]
    moved = turn @ (moved * shift * CROP / CONTEXT)[..., None]  # (2, B, 2, 1)
    return torch.cat([scale[..., None, None] * turn, middle[..., None] + moved], -1)


def make_views(canvas, theta, size, finer, looks):
    """Canvases (2,B,3,H,W) u8 seen through theta (2,B,2,3) -> normalised views (2,B,3,size,size).

    finer: as warp's. looks: the factors (2,B,...) of colour, {"hsv": ...} or apply_strong_color's."""
    views = warp(canvas.flatten(0, 1), theta.flatten(0, 1), size, finer)  # (2B, 3, S, S)
    if "hsv" in looks:
        views = apply_hsv(views, looks["hsv"].flatten(0, 1))
    else:
        views = apply_strong_color(views, **looks)
    return normalise(views).unflatten(0, (2, -1))


# ----------------------------------------------------------------------------------- diagnostics and pictures
@torch.no_grad()
def agreement(h):
    """How pairs and others of h (2,N,D) agree: a dict of scalars for the log.

    Pairs should agree (alignment) and the others spread (uniformity, Wang and Isola 2020)."""
    a, b = h
    pair_cosine, other_cosine = _cosines(h)
    found = {"alignment": (a - b).square().sum(1).mean(), "positive_similarity": pair_cosine.mean()}
    if len(other_cosine):
        square = 2 - 2 * other_cosine  # squared distance of unit vectors
        found |= {"uniformity": (-2 * square).exp().mean().clamp(min=1e-30).log(),
                  "negative_similarity": other_cosine.mean(),
                  "negative_similarity_std": other_cosine.std(unbiased=False)}
    return found


def _cosines(h):
    """Of h (2,N,D): cosines of the pairs (N,), and those of the first CHUNK rows with all that are neither
    the same nor their partner (K,)."""
    N = h.shape[1]
    everything = h.flatten(0, 1)  # (2N, D)
    similarity = everything[:CHUNK] @ everything.T  # (R, 2N)
    rows = torch.arange(len(similarity), device=h.device)
    is_other = torch.ones_like(similarity, dtype=torch.bool)
    is_other[rows, rows] = False
    is_other[rows, (rows + N) % (2 * N)] = False
    return (h[0] * h[1]).sum(1), similarity[is_other]


@torch.no_grad()
def weight_ranges(positive, negative_rows):
    """Smallest, mean and largest weight of pair_weights_by_rows, for the log."""
    first = torch.arange(min(CHUNK, 2 * len(positive)), device=positive.device)
    found = {}
    for name, weights in (("positive", positive), ("negative", negative_rows(first))):
        found[f"{name}_weight_min"] = weights.min()
        found[f"{name}_weight_mean"] = weights.mean()
        found[f"{name}_weight_max"] = weights.max()
    return found


@torch.no_grad()
def draw_views(views, theta, middle, joints, latent=None, hands=12):
    """Pairs as the network sees them, side by side, with their joints (2,B,21,2) in the view (NaN: not
    drawn).

    latent (2,B,128): also every fourth latent point. The view's own are dots. Rings are those of the other
    view: undone by its theta about the middle of its hand, and brought to this view. What agrees lies on one
    spot."""
    if latent is not None:
        points = latent.unflatten(-1, (-1, 2))[:, :, ::4]  # (2, B, 16, 2)
        undone = apply_theta(theta, points) - middle[..., None, :]
        rings = apply_theta(invert_theta(theta), undone.flip(0) + middle[..., None, :])
    size = views.shape[-1]
    tiles = []
    for pair in range(min(hands, views.shape[1])):
        for view in (0, 1):
            at = (view, pair)
            tile = draw_joints(to_rgb(views[at][None])[0], to_pixels(joints[at], size))
            if latent is not None:
                tile = draw_points(tile, to_pixels(points[at], size), to_pixels(rings[at], size))
            tiles.append(tile)
    return grid(tiles, 6, ["a", "b"] * (len(tiles) // 2), cell=160)


def draw_similarity(h):
    """Histograms of the cosines of h (2,N,D): the pairs, and the others."""
    bins = np.linspace(-1, 1, 61)
    cosines = zip(("pairs", "others"), _cosines(h), strict=True)
    series = {name: histogram(values.cpu().numpy(), bins) for name, values in cosines}
    return curve(series, title="share of the pairs", x_label="cosine")


# ------------------------------------------------------------------------------------------------------ flags
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX",
                     help="indices of hands; views are cut around their keypoints")
    cli.add_argument("--method", choices=["simclr", "peclr", "simhand"], default="simhand",
                     help="method, see above (default simhand)")
    cli.add_argument("--pairs", metavar="FILE",
                     help="pairs.npz of mine_pairs.py for the same --data. simhand needs it. With it, simclr "
                          "and peclr draw the same hands, for a fair comparison (default: all hands)")
    cli.add_argument("--labelled", action="store_true",
                     help="use the labels joints2d for views and weights, not the keypoints")
    cli.add_argument("--probe", metavar="INDEX",
                     help="hands with joints or detected keypoints: at every save, 3,000 of them show what "
                          "the encoder knows of poses (samples/probe.png); encoder_best.pt is the best so "
                          "far")
    group = cli.add_argument_group("network")
    add_init_flags(group, "an encoder.pt, or weights of ImageNet, MAE, DINO, PeCLR, SiMHand and others "
                          "(docs/mesh.md); the papers start from ImageNet")
    group.add_argument("--arch", choices=sorted(ARCHS),
                       help="architecture: resnet50 (default, the papers'), or a ViT; vit_micro on a CPU")
    group.add_argument("--image-size", type=int, default=128,
                       help="side of the views in pixels, a multiple of 16 (default 128; 64 on a CPU)")
    group = cli.add_argument_group("loss")
    group.add_argument("--weights", choices=["none", "positive", "negative", "both"],
                       help="similarities that the joints' distances weigh (default: both for simhand, as in "
                            "the paper, else none; none is better in short runs)")
    group.add_argument("--undo", choices=["exact", "official", "none"], default="exact",
                       help="way to undo theta on the latent points, not for simclr: exact (default, ours), "
                            "official (the public code's arithmetic), or none")
    group.add_argument("--temperature", type=float, default=0.5,
                       help="temperature of NT-Xent (default .5, the public code's; in short runs .05, or .2 "
                            "for simhand)")
    group.add_argument("--neighbour", type=int, default=1,
                       help="which mined neighbour is a hand's positive, only for simhand: 1 the nearest "
                            "(default, the paper's), 0 any at random")
    group.add_argument("--gather", action="store_true",
                       help="one loss over the pairs of all processes (default: one in each, as published)")
    group = cli.add_argument_group("views")
    group.add_argument("--rotation", type=float, default=45.0,
                       help="degrees either way, not for simclr (default 45, PeCLR)")
    group.add_argument("--zoom", type=float, nargs=2, default=[0.9, 1.5], metavar=("LOW", "HIGH"),
                       help="factor on the usual window's side, here the square around the keypoints' circle "
                            "(default .9 1.5, PeCLR; simclr: 1.25)")
    group.add_argument("--shift", type=float, default=15 / PIXELS,
                       help="share of half the usual window's side, here 1.3 x the box (default .134, PeCLR: "
                            "15 pixels of a crop of 224)")
    group.add_argument("--color", type=float,
                       help="strength of the random colours of pretrain_mim.py, 0 to 2 (default: instead of "
                            "these PeCLR's factors of hue, saturation and value)")
    group = cli.add_argument_group("optimisation")
    group.add_argument("--optimizer", choices=["lars_adam", "adamw"], default="lars_adam",
                       help="Adam behind LARS (default, the public code's), or AdamW, for a ViT")
    group.add_argument("--lr", type=float, default=1e-4,
                       help="rate, times the root of the pairs in a loss, as the log shows it (default 1e-4, "
                            "PeCLR)")
    group.add_argument("--weight-decay", type=float, default=1e-6,
                       help="weight decay, not on 1-D tensors (default 1e-6, PeCLR; with adamw try .04)")
    group.add_argument("--warmup", type=float, default=0.1,
                       help="share of the steps in which the rate rises (default .1, PeCLR)")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile of the encoder: slower to start, faster after")
    add_training_flags(cli, batch_size=1024, epochs=100)
    return cli


def read_flags(argv=None):
    """The flags of a run, with the values that its method fixes.

    ValueError names the first flag that is out of range, contradicts another, or is ignored by the method."""
    cli = flags()
    args = cli.parse_args(argv)
    check_ranges(args, {"image_size": (16, 4096), "temperature": (1e-3, 100), "neighbour": (0, 1000),
                        "rotation": (0, 180), "zoom": (0.1, 3), "shift": (0, 1), "color": (0, 2),
                        "lr": (0, 1e3), "weight_decay": (0, 10), "warmup": (0, 1)})
    ignored = {"simclr": ("rotation", "zoom", "undo", "neighbour"), "peclr": ("neighbour",), "simhand": ()}
    for name in ignored[args.method]:
        if getattr(args, name) != cli.get_default(name):
            raise ValueError(f"--{name}: --method {args.method} does not use it; leave it out")
    if args.zoom[0] > args.zoom[1]:
        raise ValueError("--zoom: the lower number comes first")
    if args.method == "simhand" and not args.pairs:
        raise ValueError("--method simhand needs --pairs: make them with mine_pairs.py")
    if args.method == "peclr" and args.rotation == 0:
        raise ValueError("--rotation 0: --method peclr is SimCLR without it; use --method simclr")
    if args.batch_size < 2:
        raise ValueError("--batch-size must be at least 2: a pair is compared with other pairs")
    if args.batch_size // args.accumulate < 2:
        raise ValueError("--accumulate: fewer than two pairs in a part; each part is a loss of its own")
    if args.method == "simclr":
        args.rotation = 0.0
        args.zoom = list(SIMCLR_ZOOM)
        args.undo = "none"
    args.weights = args.weights or ("both" if args.method == "simhand" else "none")
    return args


# ------------------------------------------------------------------------------------------------------- main
def read_hands(args, column):
    """The indices of --data, which hands have all their points in `column` (hands,), the pairs (hands,K) or
    None, and the rows (M,) of the hands to draw from. ValueError where the flags need more than there is."""
    indices = [HandIndex(path) for path in args.data]
    lacking = [index for index in indices if column not in index.columns]
    if lacking and (args.weights != "none" or args.labelled):
        mend = "" if args.labelled else ", or --labelled where there are labels"
        raise ValueError(f"{lacking[0].path} has no column {column}, which --weights needs; "
                         f"use --weights none{mend}")
    is_known = np.concatenate([has_points(index, column) for index in indices])
    idx = read_pairs(args.pairs, indices, column) if args.pairs else None
    is_drawn = idx[:, 0] >= 0 if args.pairs else is_known | (args.weights == "none")
    anchors = np.flatnonzero(is_drawn)
    if len(anchors) == 0:
        raise ValueError(f"--data: no hand has all its {column}, which --weights needs; use --weights none")
    return indices, torch.from_numpy(is_known), idx, anchors


def open_probe(path, size, runtime):
    """The LiveProbe of hands in an index, which sees them as probe.py does."""
    index = HandIndex(path)
    hands = HandDataset([index], canvas_size(size), CONTEXT, pose_labels(index), substitute=False)
    see = partial(upright_views, scale=PROBE_WINDOW / CONTEXT, size=size)
    return LiveProbe(hands, has_points(index, *hands.labels), see, procrustes, runtime, cores())


def main(argv=None):
    args = read_flags(argv)
    runtime = setup(args)
    if args.batch_size // (runtime.world * args.accumulate) < 2 and not args.gather:
        raise ValueError("--batch-size: fewer than two pairs for a process and part; raise it, "
                         "or use --gather")
    column = "joints2d" if args.labelled else "keypoints"
    indices, is_known, idx, anchors = read_hands(args, column)
    # twice as fine as the views: the smallest windows are about half a canvas wide
    dataset = HandDataset(indices, 2 * args.image_size, CONTEXT, (column,))
    steps = total_steps(args, len(anchors))
    check_mix(anchors, dataset.starts, args.mix)
    torch.manual_seed(args.seed)
    inputs = {"data": index_fingerprint([index.columns for index in indices], column)}
    if args.pairs:
        inputs["pairs"] = hashlib.sha256(idx).hexdigest()[:16]
    probe = open_probe(args.probe, args.image_size, runtime) if args.probe else None
    if probe:
        inputs["probe"] = index_fingerprint([probe.hands.indices[0].columns], probe.hands.labels[-1])
    state = check_run(args, runtime, "contrastive", inputs)
    encoder = choose_encoder(args.arch, args.init, args.image_size, "resnet50",
                             saved=state["encoder"] if state else None, heads=args.heads,
                             pixels=args.pixels)

    gather = runtime.gather if args.gather else nn.Identity()  # (2,B,...) of one process or of all
    model = Contrastive(encoder, runtime.gather if args.gather else None).to(runtime.device).train()
    decay = args.weight_decay if args.optimizer == "adamw" else 0.0  # lars adds its own
    optimizer = adamw(param_groups(model.named_parameters(), decay), runtime.device)
    scaler = runtime.scaler()
    start = restore(state, model=model, optimizer=optimizer, scaler=scaler)
    state = state and {"step": start}  # the rest would stay in memory
    if args.compile:
        model.encoder.compile()
    net = runtime.wrap(model)
    parameters = list(model.parameters())
    order = make_sampler(anchors, dataset.starts, args.mix, args.batch_size, args.seed, start, steps,
                         runtime.rank, runtime.world)
    neighbours = idx if args.method == "simhand" else None
    sampler = PairSampler(order, anchors, neighbours, args.neighbour, args.seed)
    cache = cache_canvases(dataset, args.cache, runtime.device, runtime.workers and cores(),
                           runtime.rank, runtime.world, runtime.local_rank)
    loader = make_loader(dataset, sampler, workers=runtime.workers, pin=runtime.device.type == "cuda")
    unread = UnreadImages(dataset)
    if runtime.is_main:
        what = "have a neighbour" if args.pairs else "are drawn from"
        print(f"{len(anchors)} of {len(is_known)} hands {what}")
        if args.batch_size > len(anchors):
            print(f"warning: --batch-size {args.batch_size} draws hands twice, each a negative of itself")
    out = start_run(args, runtime, state, inputs)
    announce(runtime, out, model, len(anchors), start, steps, args.batch_size, cache)
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every,
              show=("positive_similarity", "probe_ridge_mm", "probe_ridge_percent"))
    B = args.batch_size // runtime.world  # pairs of this process
    parts = batch_parts(B, args.accumulate)
    is_known = is_known.to(runtime.device)
    # The widest usual window. Around a hand that fills more than that, views are a little coarser.
    finer = choose_finer(CROP / CONTEXT * args.zoom[1], dataset.canvas, args.image_size)
    if args.color is None:
        looks = {"hsv": (HSV, random_hsv)}
    else:
        draw_light, draw_color, draw_sigma = strong_color(args.color, args.image_size)
        looks = {"light": (LIGHT, draw_light), "color": (COLOR, draw_color), "sigma": (BLUR, draw_sigma)}

    def draw(step):
        """What is random in a step, of this process's pairs, for views a and b: (2, B, ...)."""
        def rows(stream, draw_one):
            return runtime.draw(two_views(draw_one), args.batch_size, args.seed, step, stream, dim=1)

        drawn = {name: rows(*each) for name, each in looks.items()}
        if "sigma" in drawn:
            drawn["blurred"] = rows_to_blur(drawn["sigma"])
        return {"unit": rows(THETA, lambda count, g: torch.rand(count, 4, generator=g)), "looks": drawn}

    losses_per_update = args.accumulate * (1 if args.gather else runtime.world)  # each over its own pairs
    peak_lr = args.lr * math.sqrt(args.batch_size / losses_per_update)

    def export(step):
        """The encoder after `step` updates, also as the best if the log says so."""
        is_best = probe and log.lowest.get(probe.score) == step
        for name in ("encoder.pt", "encoder_best.pt") if is_best else ("encoder.pt",):
            save_checkpoint(out / name, kind="encoder", step=step, arch=encoder.arch,
                            config=encoder.config, state_dict=encoder.state_dict())

    def save(step, h):
        """last.pt, the probe, encoder.pt and charts of the log after `step` updates."""
        # last.pt first of all: where a machine is taken back, seconds are left.
        save_checkpoint(out / "last.pt", kind="contrastive", step=step, model=model.state_dict(),
                        encoder={"arch": encoder.arch, "config": encoder.config},
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if probe:
            log.write({"step": step} | probe(encoder))
        export(step)
        save_curves(out / "samples", log.curves, CHARTS)
        save_image(out / "samples" / "similarity.png", draw_similarity(h))

    if state and runtime.is_main:  # a kill may have come between last.pt and these
        if probe and log.last.get(probe.score) != start:
            log.write({"step": start} | probe(encoder))
        export(start)
    saves = Saves(runtime, args.save_every, args.save_minutes, steps)

    for step, batch, drawn in saves.watch(feed(unread.watch(loader), draw, start, runtime.device, cache)):
        rows = pair_rows(batch["failed"], B)  # (2, B)
        canvas = batch["canvas"][rows]  # (2, B, 3, H, W)
        joints = batch[column][rows]  # (2, B, 21, 2), on the canvas
        has_joints = is_known[batch["row"]][rows]  # (2, B)
        middle, radius = hand_circle(joints, has_joints)
        theta = hand_theta(drawn["unit"], middle, radius, args.rotation, args.zoom, args.shift,
                           both_ways=args.undo != "official")  # (2, B, 2, 3)
        views = make_views(canvas, theta, args.image_size, finer, drawn["looks"])  # (2, B, 3, S, S)
        joints = apply_theta(invert_theta(theta), joints)  # (2, B, 21, 2), in the view

        mean_loss = 0.0
        for part, is_last in parts:
            positive = negative = None  # the weights
            with runtime.sync_gradients(net, is_last):
                with runtime.autocast():
                    latent = net(views[:, part])  # (2, B, 128), with --gather of all processes
                h = embed(latent, gather(theta[:, part]), gather(middle[:, part]), args.undo)
                if args.weights != "none":
                    positive, negative = pair_weights_by_rows(*gather(joints[:, part]))
                a, b = h
                loss = nt_xent(a, b, args.temperature,
                               positive if args.weights in ("positive", "both") else None,
                               negative if args.weights in ("negative", "both") else None)
                scaler.scale(loss / args.accumulate).backward()
            mean_loss += loss.detach() / args.accumulate

        lr = cosine(step, steps, peak_lr, final=1e-3 * peak_lr, warmup=int(args.warmup * steps))
        set_lr(optimizer, lr)
        adapt = partial(lars, parameters, lr, args.weight_decay) if args.optimizer == "lars_adam" else None
        norm = update(optimizer, scaler, parameters, adapt=adapt)

        values = {"loss": mean_loss}
        if is_due(step, args.log_every, steps):  # of the last part
            values |= agreement(h.detach())
            if positive is not None:
                values |= weight_ranges(positive, negative)
            elif step > 0.2 * steps and abs(float(mean_loss) - math.log(2 * len(a) - 1)) < 0.01:
                log.warn(step + 1, f"the loss stays at ln {2 * len(a) - 1}: all hands look the same to the "
                         "network; lower --lr or --temperature")
        log(step + 1, values | {"lr": lr, "gradient_norm": norm})
        is_saved = saves.due(step)
        if is_saved or (runtime.is_main and step == 0):
            points = runtime.local_rows(latent, dim=1) if args.gather else latent
            joints = torch.where(has_joints[..., None, None], joints, torch.nan)  # not what was missed
            picture = draw_views(views[:, part], theta[:, part], middle[:, part], joints[:, part],
                                 points if args.method != "simclr" else None)
            save_image(out / "samples" / f"step_{step + 1:07d}.png", picture)
        if is_saved:
            save(step + 1, h.detach())
    log.close()
    unread.rows = runtime.union(unread.rows)
    if runtime.is_main and start < steps:
        print(f"{out / 'encoder.pt'}: step {steps}; look at {out / 'samples'}")
        if unread.rows:
            print(unread)
    finish()


if __name__ == "__main__":
    run(main)
