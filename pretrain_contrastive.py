"""SimCLR, PeCLR and SiMHand: contrastive pre-training of a ViT or ResNet-50 on unlabelled hands (arXiv 2002.05709, 2106.05953,
2502.15251; what the papers leave open follows the public code of PeCLR and SiMHand or is ours, as docstrings say).

Reads indices (data.py) and, for simhand, the pairs of mine_pairs.py; writes RUN/config.json, log.jsonl, last.pt, encoder.pt,
samples/*.png. One step:

    simclr   two views of a hand                     z agrees
    peclr    two views of a hand, rotated            64 points in z, undone by theta, agree
    simhand  a hand and a similar one, rotated       64 points in z, undone by theta, agree, weighted by how alike the joints are
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import HandDataset, HandIndex, PairSampler, check_mix, index_fingerprint, make_loader, make_sampler
from draw import curve, draw_joints, draw_points, grid, histogram, save_image
from model import ARCHS, ProjectionHead, choose_encoder
from runtime import (
    Log,
    adamw,
    add_training_flags,
    check_ranges,
    cosine,
    finish,
    generator,
    param_groups,
    parser,
    read_log,
    run,
    save_checkpoint,
    set_lr,
    setup,
    start_run,
    total_steps,
    update,
)
from views import (
    apply_hsv,
    apply_strong_color,
    apply_theta,
    invert_theta,
    normalise,
    random_hsv,
    strong_color,
    to_rgb,
    warp,
)

CONTEXT = 2.0                                                      # canvas: room for rotation and shift around the box
CROP, PIXELS, OUTPUT = 1.3, 112, 128                               # the public code's: crop over box, half its side, view's side
CHUNK = 256                                                        # rows of the similarity matrix that exist at a time


# ------------------------------------------------------------------------------------------------------------- network
class Contrastive(nn.Module):
    """Encoder and projection head: 128 numbers, of which peclr and simhand make 64 points. gather: a function that joins what the
    processes have; the head then sees the whole batch, whose statistics it needs, on each of them."""

    def __init__(self, encoder, gather=None):
        super().__init__()
        self.encoder, self.gather = encoder, gather
        self.head = ProjectionHead(encoder.dim)

    def forward(self, views):
        """views (2B,3,S,S), a of all pairs, then b -> latent (2B,128), of all processes with `gather`; the head in fp32."""
        summary = self.encoder.features(views)[0].float()
        if self.gather:
            summary = self.gather(summary)
        with torch.autocast("cuda" if views.is_cuda else "cpu", enabled=False):
            return self.head(summary)


def embed(latent, theta, middle, args):
    """Latents (2B,128) of the views -> unit vectors (2B,128) that agree where the hands do.

    simclr: normalised. Else 64 points in coordinates of the view, undone. exact: A Z + t - middle, the points around the middle of the
    hand (ours: the middle itself, which t holds, lies elsewhere in each box and would tell hands apart for a network that sees
    nothing); official: the public arithmetic; none: as they are."""
    if args.method == "simclr" or args.undo == "none":
        return F.normalize(latent, dim=1)
    points = latent.unflatten(1, (-1, 2))                          # (2B, 64, 2)
    points = apply_theta(theta, points) - middle[:, None] if args.undo == "exact" else undo_official(points, theta, middle)
    return F.normalize(points.flatten(1), dim=1)


def undo_official(points, theta, middle):
    """Points (B,64,2) undone as dahiyaaneesh/peclr src/models/unsupervised/hybrid2_model.py and ut-vision/SiMHand do: shift in pixels
    before the crop is resized, over the side after it, times the points' own range; rotation about their mean; the scale is left
    to normalisation. middle (B,2): centre of the joints on the canvas, which the view's window moves away from."""
    points = points / points.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)
    turn = theta[:, :, :2] / theta[:, :, 0].norm(dim=1)[:, None, None]                       # R(phi)
    moved = (turn.transpose(1, 2) @ (theta[:, :, 2] - middle)[:, :, None])[:, :, 0] * PIXELS * CONTEXT / CROP
    extent = (points.amax(1) - points.amin(1)).detach()
    points = points + (moved / OUTPUT * extent)[:, None]
    centre = points.mean(1, keepdim=True).detach()
    return (points - centre) @ turn.transpose(1, 2) + centre


# ---------------------------------------------------------------------------------------------------------------- loss
def nt_xent(a, b, temperature, positive_weights=None, negative_weights=None):
    """NT-Xent of unit vectors a, b (N,D): each of the 2N rows finds its partner among all others; scalar.

    positive_weights (N,) and negative_weights (2N,2N), or a function rows -> (R,2N), multiply the similarity inside the exponent
    (SiMHand, section 3.3): -mean_i log( exp(w+_i s_ip / T) / sum_{j != i} exp(w-_ij s_ij / T) ). CHUNK rows exist at a time and
    are made again on the way back, so that memory grows with 2N, not its square."""
    h, N = torch.cat([a, b]), len(a)
    positive = (a * b).sum(1) / temperature                        # (N,)
    if positive_weights is not None:
        positive = positive * positive_weights

    def spread(h, rows):
        logits = h[rows] @ h.T / temperature                       # (R, 2N)
        if negative_weights is not None:
            logits = logits * (negative_weights(rows) if callable(negative_weights) else negative_weights[rows])
        return logits.scatter(1, rows[:, None], -torch.inf).logsumexp(1).sum()
    parts = torch.arange(2 * N, device=h.device).split(CHUNK)
    total = sum(checkpoint(spread, h, rows, use_reentrant=False) if len(parts) > 1 else spread(h, rows) for rows in parts)
    return (total - 2 * positive.sum()) / (2 * N)


def distances(joints_a, joints_b):
    """(R,21,2), (M,21,2) -> (R,M): mean over the joints of their distance; by differences, products would lose the near ones."""
    a, b = (joints.transpose(0, 1).contiguous() for joints in (joints_a, joints_b))
    return torch.cat([torch.cdist(some, b, compute_mode="donot_use_mm_for_euclid_dist").mean(0) for some in a.split(64, 1)])


def pair_weights(joints_a, joints_b):
    """Weights of SiMHand from the joints (N,21,2) of the pairs' views: positive (N,), negative (2N,2N), in [0,1]: 1 for the closest,
    0 for the farthest, linear (ut-vision/SiMHand src/models/utils.py). All equally far: 1 (ours; the public code divides by 0)."""
    positive, negative = weights(joints_a, joints_b)
    return positive, torch.cat([negative(rows) for rows in torch.arange(2 * len(joints_a), device=joints_a.device).split(CHUNK)])


@torch.no_grad()
def weights(joints_a, joints_b):
    """pair_weights with the negative ones as a function of rows, so that they need not exist at once."""
    joints = torch.cat([joints_a, joints_b])
    apart = (joints_a - joints_b).norm(dim=2).mean(1)              # (N,)
    farthest = max(distances(joints[rows], joints).max() for rows in torch.arange(len(joints), device=joints.device).split(CHUNK))

    def linear(d, nearest, farthest):
        return (farthest - d) / (farthest - nearest) if farthest - nearest >= 1e-6 else torch.ones_like(d)
    return linear(apart, apart.min(), apart.max()), lambda rows: linear(distances(joints[rows], joints), 0, farthest)


def lars(parameters, lr, weight_decay, eta=0.02):
    """Scales each tensor's gradient as LARS does, before Adam (ut-vision/SiMHand src/models/base_model.py: a LARS wrapper, clipped)."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        decay = weight_decay if parameter.ndim > 1 else 0.0
        size, slope = parameter.detach().norm(), parameter.grad.norm()
        rate = (eta * size / (slope + decay * size + 1e-8) / lr).clamp(max=1)
        moves = (size > 0) & (slope > 0)
        parameter.grad.add_(parameter.detach() * (decay * moves)).mul_(torch.where(moves, rate, 1.0))


# --------------------------------------------------------------------------------------------------------------- views
def draw_views(args, runtime, step, joints, known):
    """theta (2B,2,3), what make_views does to the colours, and the joints' middle (2B,2) on the canvas of this process's views a, then b.

    joints (2B,21,2) canvas coordinates, known (2B,) where there are any: windows are drawn around their mean c, by r = their
    largest distance to it; a hand without them takes the middle of its box and half the side of the public code's crop, 1.3 x the
    box (ours: drawn hands have a median r of 1.33 x half their box, and half the box alone cuts off fingers). Ranges: the public
    code's, for simclr no rotation, a fixed margin and a shift; shifts go both ways, unless --undo official asks for the public
    ones (ours)."""
    middle = torch.where(known[:, None], joints.mean(1), 0.0)
    radius = torch.where(known, (joints - middle[:, None]).norm(dim=2).amax(1), CROP / CONTEXT).clamp(0.1, 2)
    drawn = []
    color_draws = strong_color(args.color, args.image_size) if args.color else (random_hsv,)
    for view in (0, 1):
        g = generator(args.seed, step, 2, view)
        drawn.append([torch.rand(args.batch_size, 4, generator=g), *(draw(args.batch_size, g) for draw in color_draws)])
    unit, *color = (torch.cat([runtime.share(half) for half in halves]) for halves in zip(*drawn, strict=True))
    unit = unit.to(joints.device)
    turning = args.method != "simclr"
    phi = (2 * unit[:, 0] - 1) * math.radians(args.rotation) * turning
    scale = radius * (args.zoom[0] + unit[:, 1] * (args.zoom[1] - args.zoom[0]) if turning else 1.25)
    shift = unit[:, 2:] if turning and args.undo == "official" else 2 * unit[:, 2:] - 1
    turn = torch.stack([phi.cos(), -phi.sin(), phi.sin(), phi.cos()], 1).unflatten(1, (2, 2))                 # (2B, 2, 2)
    shift = (turn @ (shift * args.shift / PIXELS * CROP / CONTEXT)[:, :, None])[:, :, 0]
    return torch.cat([scale[:, None, None] * turn, (middle + shift)[:, :, None]], 2), color, middle


def instead_of_failed(failed):
    """Rows (2B,) to take in place of 0 .. 2B: where an image could not be read, the pair's other one, twice."""
    rows, other = torch.arange(len(failed)), torch.arange(len(failed)).roll(len(failed) // 2)
    return torch.where(failed >= 0, other, rows)


def make_views(canvas, theta, color, args):
    """Canvases (2B,3,H,W) u8 -> views (2B,3,S,S) as the encoder sees them."""
    views = warp(canvas, theta, args.image_size)
    return normalise(apply_strong_color(views, *color) if args.color else apply_hsv(views, color[0].to(views.device)))


# --------------------------------------------------------------------------------------------------------- diagnostics
@torch.no_grad()
def diagnose(h, w):
    """Numbers that show whether pairs agree (alignment) and the rest spreads (uniformity, Wang and Isola 2020), and the weights."""
    a, b = h.chunk(2)
    similar = h[:CHUNK] @ h.T                                      # (R, 2N)
    other = torch.ones_like(similar, dtype=torch.bool)
    rows = torch.arange(len(similar), device=h.device)
    other[rows, rows] = other[rows, (rows + len(a)) % len(h)] = False
    found = {"alignment": (a - b).square().sum(1).mean(), "positive_similarity": (a * b).sum(1).mean()}
    if other.any():
        negatives = similar[other]
        found |= {"uniformity": (-2 * (2 - 2 * negatives)).exp().mean().clamp(min=1e-30).log(),
                  "negative_similarity": negatives.mean(), "negative_similarity_std": negatives.std(unbiased=False)}
    if w is not None:
        positive, negative = w[0], w[1](torch.arange(min(CHUNK, len(h)), device=h.device))
        found |= {f"{name}_weight_{how}": value for name, x in (("positive", positive), ("negative", negative))
                  for how, value in (("min", x.min()), ("mean", x.mean()), ("max", x.max()))}
    return found


# ------------------------------------------------------------------------------------------------------------ pictures
@torch.no_grad()
def picture(views, theta, middle, joints, latent, args, hands=12):
    """Pairs as the network sees them, with the joints they were weighed by and every fourth latent point: a view's own as dots, the other's
    as rings, undone by theta about the middle of its hand and brought to this one; what agrees lies on one spot."""
    N, size = len(views) // 2, views.shape[-1]
    tiles = []
    points = latent.unflatten(1, (-1, 2))[:, ::4] if args.method != "simclr" else None
    undone = apply_theta(theta, points) - middle[:, None] if points is not None else None
    for row in range(min(N, hands)):
        for at, other in ((row, row + N), (row + N, row)):
            image = to_rgb(views[at:at + 1])[0]
            image = draw_joints(image, ((joints[at] + 1) * size / 2 - 0.5).cpu().numpy())
            if points is not None:
                theirs = apply_theta(invert_theta(theta[at:at + 1]), (undone[other] + middle[at])[None])[0]
                image = draw_points(image, *(((p + 1) * size / 2 - 0.5).cpu().numpy() for p in (points[at], theirs)))
            tiles.append(image)
    return grid(tiles, 6, ["a", "b"] * (len(tiles) // 2), cell=160)


def draw_curves(out, h):
    """samples/loss.png and agreement.png from the log, and similarity.png: histograms of pairs and of others, of the last batch."""
    rows = [row for row in read_log(out / "log.jsonl") if "loss" in row]
    for name, keys in (("loss", ("loss",)), ("agreement", ("positive_similarity", "negative_similarity", "alignment"))):
        series = {key: ([row["step"] for row in rows if key in row], [row[key] for row in rows if key in row]) for key in keys}
        save_image(out / "samples" / f"{name}.png", curve(series, title=name, x_label="step"))
    a, b = h.chunk(2)
    bins = np.linspace(-1, 1, 61)
    similar = a[:CHUNK] @ b.T                                      # (R, N)
    kinds = {"pairs": (a * b).sum(1), "others": similar[~torch.eye(*similar.shape, dtype=torch.bool, device=h.device)]}
    series = {name: histogram(value.cpu().numpy(), bins) for name, value in kinds.items()}
    save_image(out / "samples" / "similarity.png", curve(series, title="share of the pairs", x_label="cosine"))


# ---------------------------------------------------------------------------------------------------------------- main
def read_pairs(path, indices, points):
    """idx (N,K) of mine_pairs.py for these indices and points; ValueError where the file is none or belongs to others."""
    try:
        with np.load(path, allow_pickle=False) as file:
            idx, made_for = file["idx"], str(file["fingerprint"])
    except FileNotFoundError:
        raise FileNotFoundError(f"--pairs {path}: no such file; make it with mine_pairs.py") from None
    except Exception as error:                                     # zipfile and numpy raise a dozen types
        raise ValueError(f"--pairs {path}: no pairs of mine_pairs.py ({type(error).__name__}: {error})") from None
    count = sum(len(index) for index in indices)
    if made_for != index_fingerprint([index.columns for index in indices], points):
        raise ValueError(f"--pairs {path}: mined from other indices, in another order, or from other points than {points}; mine these "
                         "with mine_pairs.py")
    if idx.ndim != 2 or idx.shape[0] != count or not idx.shape[1] or idx.dtype.kind != "i" or idx.max() >= count or idx.min() < -1 or (
            (idx[:, :-1] < 0) & (idx[:, 1:] >= 0)).any() or not (idx[:, 0] >= 0).any():
        raise ValueError(f"--pairs {path}: damaged, or no hand has a neighbour")
    return idx


def has_points(index, name):
    """(N,) whether all 21 points of a hand are there."""
    if name not in index.columns:
        return np.zeros(len(index), bool)
    rows = index.pose_ids()
    scored = name == "keypoints" and "keypoints_score" in index.columns
    return (np.asarray(index.columns["keypoints_score"])[rows] > 0).all(1) if scored else np.ones(len(index), bool)


def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="hands; views are cut around their keypoints")
    cli.add_argument("--method", choices=["simclr", "peclr", "simhand"], default="simhand", help="see above (default simhand)")
    cli.add_argument("--pairs", help="simhand: pairs.npz that mine_pairs.py made of the same --data; simclr and peclr then draw the same "
                                     "hands, those that have a neighbour, as a fair comparison needs (default: all)")
    cli.add_argument("--labelled", action="store_true", help="views and weights from the labels joints2d instead of keypoints")
    group = cli.add_argument_group("network")
    group.add_argument("--init", help="encoder to start from: an encoder.pt, or weights of ImageNet, MAE, DINO, PeCLR, SiMHand "
                                      "(default: fresh; the papers start from ImageNet)")
    group.add_argument("--arch", choices=sorted(ARCHS), help="resnet50 (default, the papers'), or a ViT; vit_micro on a CPU")
    group.add_argument("--image-size", type=int, default=128, help="side of the views (default 128; 64 on a CPU)")
    group = cli.add_argument_group("loss")
    group.add_argument("--weights", choices=["none", "positive", "negative", "both"],
                       help="which similarities the joints' distances weigh (default: both for simhand, the paper's, else none; none is "
                            "better in short runs)")
    group.add_argument("--undo", choices=["exact", "official", "none"], default="exact",
                       help="how views are undone on the latent points: by theta (default, ours), as the public code, or not")
    group.add_argument("--temperature", type=float, default=0.5,
                       help="of NT-Xent, .05 to 1 (default .5, the public code's; short runs: .05, simhand .2)")
    group.add_argument("--neighbour", type=int, default=1,
                       help="which mined neighbour is a hand's positive: 1 the nearest (default, the paper's), 0 any at random")
    group.add_argument("--gather", action="store_true",
                       help="one loss over the pairs of all processes; default one in each, as the public code")
    group = cli.add_argument_group("views (simclr: no rotation, zoom 1.25)")
    group.add_argument("--rotation", type=float, default=45, help="degrees either way (default 45, PeCLR)")
    group.add_argument("--zoom", type=float, nargs=2, default=(0.9, 1.5), metavar=("LOW", "HIGH"),
                       help="half side of a view over the hand's largest radius (default .9 1.5, PeCLR)")
    group.add_argument("--shift", type=float, default=15, help="in pixels of a crop of 224 (default 15, PeCLR)")
    group.add_argument("--color", type=float, default=0,
                       help="strength, to 2, of gains, jitter, tinted light, grey and blur (1: pretrain_mim.py's); 0, the default: not "
                            "none, but PeCLR's factors of HSV in their place")
    group = cli.add_argument_group("optimisation")
    group.add_argument("--optimizer", choices=["lars_adam", "adamw"], default="lars_adam",
                       help="Adam behind LARS (default, the public code's) or AdamW, for a ViT")
    group.add_argument("--lr", type=float, default=1e-4, help="times the root of the pairs per loss (default 1e-4, PeCLR)")
    group.add_argument("--weight-decay", type=float, default=1e-6, help="not on 1-D tensors (default 1e-6, PeCLR; with adamw try .04)")
    group.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises (default .1, PeCLR)")
    group.add_argument("--clip", type=float, default=1e6, help="largest norm of the gradient (default: none)")
    group.add_argument("--compile", action="store_true", help="torch.compile of the encoder: slower to start, faster after")
    add_training_flags(cli, batch_size=1024, epochs=100)
    return cli


def check_flags(args):
    """ValueError that names the first flag out of its range or at odds with another, before anything is written."""
    check_ranges(args, {"image_size": (16, 4096), "temperature": (1e-3, 100), "neighbour": (0, 1000), "rotation": (0, 180),
                        "zoom": (0.1, 3), "shift": (0, 100), "color": (0, 2), "lr": (0, 1e3), "weight_decay": (0, 10), "warmup": (0, 1),
                        "clip": (1e-6, 1e9)})
    if args.zoom[0] > args.zoom[1]:
        raise ValueError("--zoom: the lower number comes first")
    if args.method == "simhand" and not args.pairs:
        raise ValueError("--method simhand needs --pairs: make them with mine_pairs.py")
    if args.method == "peclr" and args.rotation == 0:
        raise ValueError("--rotation 0: --method peclr is SimCLR without it; use --method simclr")
    if args.batch_size < 2:
        raise ValueError("--batch-size must be at least 2: a pair is told from others")
    if args.batch_size // args.accumulate < 2:
        raise ValueError("--accumulate: fewer than two pairs in a part; each part is a loss of its own")
    args.weights = args.weights or ("both" if args.method == "simhand" else "none")


def main(argv=None):
    args = flags().parse_args(argv)
    check_flags(args)
    runtime = setup(args)
    if args.batch_size // (runtime.world * args.accumulate) < 2 and not args.gather:
        raise ValueError("--batch-size: fewer than two pairs for each process and part; raise it, or use --gather")
    indices = [HandIndex(path) for path in args.data]
    points = "joints2d" if args.labelled else "keypoints"
    lacking = [index for index in indices if points not in index.columns]
    if lacking and (args.weights != "none" or args.labelled):
        raise ValueError(f"{lacking[0].path} has no column {points}: --weights needs it; use --weights none"
                         + ("" if args.labelled else ", or --labelled where there are labels"))
    dataset = HandDataset(indices, args.image_size * 2, CONTEXT, (points,))
    known = np.concatenate([has_points(index, points) for index in indices])                 # (N,)
    idx = read_pairs(args.pairs, indices, points) if args.pairs else None
    anchors = np.flatnonzero(idx[:, 0] >= 0) if args.pairs else np.flatnonzero(known | (args.weights == "none"))
    if len(anchors) == 0:
        raise ValueError(f"--data: no hand has all its {points}, which --weights needs; use --weights none")
    steps = total_steps(args, len(anchors))
    torch.manual_seed(args.seed)
    encoder = choose_encoder(args, "resnet50")
    check_mix(anchors, dataset.starts, args.mix)
    out, state = start_run(args, runtime)

    def gather(x):                                                 # (2B,...), a's and b's -> those of all processes
        return runtime.gather(x.unflatten(0, (2, -1))).flatten(0, 1) if args.gather else x

    def own(x):                                                    # and back
        return runtime.share(x.unflatten(0, (2, -1)).transpose(0, 1)).transpose(0, 1).flatten(0, 1) if args.gather else x
    model = Contrastive(encoder, gather if args.gather else None).to(runtime.device).train()
    decay = 0.0 if args.optimizer == "lars_adam" else args.weight_decay                      # LARS decays by itself
    optimizer = adamw(param_groups(model.named_parameters(), decay), runtime.device)
    scaler, start = runtime.scaler(), 0
    if state:
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[name])
        start = state["step"]
    if args.compile:
        model.encoder.compile()
    net, parameters, failed = runtime.wrap(model), list(model.parameters()), set()
    order = make_sampler(anchors, dataset.starts, args.mix, args.batch_size, args.seed, start, steps, runtime.rank, runtime.world)
    sampler = PairSampler(order, anchors, idx if args.method == "simhand" else None, args.neighbour, args.seed)
    loader = make_loader(dataset, sampler, workers=runtime.workers, pin=runtime.device.type == "cuda")
    if runtime.is_main:
        print(f"{len(anchors)} of {len(known)} hands " + ("have a neighbour" if args.pairs else "are drawn from"))
        if args.batch_size > len(anchors):
            print(f"warning: --batch-size {args.batch_size} draws hands more than once, each a negative of itself")
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every, show=("positive_similarity",))
    losses = args.accumulate * (1 if args.gather else runtime.world)                         # in an update, each over its own pairs
    lr_base, B = args.lr * math.sqrt(args.batch_size / losses), args.batch_size // runtime.world

    for step, batch in enumerate(loader, start):
        failed |= set(batch["failed"][batch["failed"] >= 0].tolist())
        canvas, joints = (batch[name].to(runtime.device, non_blocking=True) for name in ("canvas", points))
        rows = torch.arange(B).repeat(2) if args.method != "simhand" else instead_of_failed(batch["failed"])
        canvas, joints, seen = canvas[rows], joints[rows], torch.from_numpy(known[batch["row"]])[rows].to(runtime.device)
        theta, color, middle = draw_views(args, runtime, step, joints, seen)
        views = make_views(canvas, theta, color, args)
        joints = apply_theta(invert_theta(theta), joints)          # in the view
        last, logged = step + 1 == steps, (step + 1) % args.log_every == 0 or step + 1 == steps
        values = {"loss": 0.0}
        for part in torch.arange(B).chunk(args.accumulate):
            rows = torch.cat([part, part + B])
            with runtime.exchange(net, last=part[-1] == B - 1):
                with runtime.autocast():
                    latent = net(views[rows])                      # (2B, 128), with --gather those of all processes
                h = embed(latent, gather(theta[rows]), gather(middle[rows]), args)
                a, b = h.chunk(2)
                w = weights(*gather(joints[rows]).chunk(2)) if args.weights != "none" else None
                loss = nt_xent(a, b, args.temperature, w[0] if args.weights in ("positive", "both") else None,
                               w[1] if args.weights in ("negative", "both") else None)
                scaler.scale(loss / args.accumulate).backward()
            values["loss"] += loss.detach() / args.accumulate
        if not torch.isfinite(values["loss"]):
            raise FloatingPointError("the loss is not finite: lower --lr or use --precision fp32; --resume continues from the last save")
        if logged:                                                 # accumulated parts: of the last one
            values |= diagnose(h.detach(), w)
        lr = cosine(step, steps, lr_base, final=1e-3 * lr_base, warmup=int(args.warmup * steps))
        adapt = partial(lars, parameters, lr, args.weight_decay) if args.optimizer == "lars_adam" else None
        set_lr(optimizer, lr)
        norm = update(optimizer, scaler, parameters, args.clip, adapt)
        log(step + 1, values | {"lr": lr, "gradient_norm": norm})
        if logged and step > 0.2 * steps and abs(float(values["loss"]) - math.log(len(h) - 1)) < 0.01 and args.weights == "none":
            log.warn(step + 1, f"the loss is glued to ln {len(h) - 1}: all hands look the same; lower --lr or --temperature")
        if runtime.is_main and (step == 0 or last or (step + 1) % args.save_every == 0):
            marked = torch.where(seen[rows, None, None], joints[rows], torch.nan)            # not what the detector missed
            shown = picture(views[rows], theta[rows], middle[rows], marked, own(latent), args)
            save_image(out / "samples" / f"step_{step + 1:07d}.png", shown)
        if runtime.is_main and (last or (step + 1) % args.save_every == 0):
            draw_curves(out, h.detach())
            save_checkpoint(out / "encoder.pt", kind="encoder", step=step + 1, arch=encoder.arch, config=encoder.config,
                            state_dict=encoder.state_dict())
            save_checkpoint(out / "last.pt", kind="contrastive", step=step + 1, model=model.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict())
    log.close()
    failed = runtime.union(failed)
    if runtime.is_main and start < steps:
        print(f"{out / 'encoder.pt'}: step {steps}; look at {out / 'samples'}")
        if failed:
            print(dataset.unread(failed))
    finish()


if __name__ == "__main__":
    run(main)
