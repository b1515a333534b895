"""HandMIM: masked, pose-aware pre-training of a plain ViT on unlabelled hands (after arXiv 2307.16061, of which only the
abstract is a source: teacher and student, a pseudo keypoint alignment module for pose-aware class tokens, self-distillation of
patch tokens, pixel reconstruction; every formula below is iBOT's, MAE's or ours, as its docstring says).

Reads indices (data.py); writes RUN/config.json, log.jsonl, last.pt, encoder.pt, samples/*.png. One step:

    canvas -> two views u, v (theta, colour)      teacher: EMA of the student, sees both views whole
           -> masks, for the student only         student: sees them masked
    class token -> K pseudo keypoints -> undone by theta -> agree with the teacher's of the OTHER view     pose loss
    class token -> which way edges run in the whole view; every patch token -> in its patch               (sketches)
    masked patch tokens -> prototypes -> agree with the teacher's of the SAME view and place              patch loss
    masked patch tokens -> their pixels                                                                   pixel loss
"""

import copy
import math
from argparse import BooleanOptionalAction

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import HandDataset, HandIndex, check_mix, make_loader, make_sampler
from draw import curve, draw_edges, draw_points, grid, save_image
from model import ARCHS, DistanceHead, KeypointHead, PrototypeHead, choose_encoder
from runtime import (
    Log,
    adamw,
    add_training_flags,
    check_ranges,
    cosine,
    ema_update,
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
    apply_strong_color,
    apply_theta,
    invert_theta,
    normalise,
    random_theta,
    strong_color,
    to_rgb,
    warp,
)

CELLS, DIRECTIONS = 8, 8                                           # of a sketch, a side
CONTEXT = 2.0                                                      # canvas: room for rotation and shift around the box
STUDENT_TEMPERATURE, CENTER_MOMENTUM, CONTRAST_TEMPERATURE, SPREAD = 0.1, 0.9, 0.2, 0.4              # iBOT, iBOT, ours


# ------------------------------------------------------------------------------------------------------------- network
class HandMIM(nn.Module):
    """Encoder, mask token and the heads that the losses ask for; the teacher is a copy of it."""

    def __init__(self, encoder, args):
        super().__init__()
        pose, numbers = args.pose_loss == "keypoints", 2 * args.keypoints
        points = pose and args.align + args.hinge + args.contrast + args.distribution > 0
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.dim))
        self.classify, self.distil_patches = args.pose_loss == "class" or (pose and args.class_weight > 0), args.patch_loss > 0
        self.tokens = PrototypeHead(encoder.dim, args.prototypes, args.head_width) if self.classify or self.distil_patches else None
        self.keypoints = KeypointHead(encoder.dim, args.keypoints) if points else None
        self.poses = None
        if pose and args.distribution:
            self.poses = (DistanceHead(numbers, args.pose_prototypes) if args.logits == "distance" else
                          PrototypeHead(numbers * (2 if args.shape_input else 1), args.pose_prototypes, 1024))
        self.shape_input = args.shape_input
        self.pixels = nn.Linear(encoder.dim, 3 * encoder.patch ** 2) if args.pixel_loss else None
        self.sketch = nn.Linear(encoder.dim, DIRECTIONS * CELLS ** 2) if pose and args.sketch else None
        self.patch_sketch = nn.Linear(encoder.dim, DIRECTIONS * 4) if pose and args.sketch else None

    def forward(self, views, theta, where, mask=None):
        """views (2B,3,S,S), their theta (2B,2,3), where (M,) the flat positions of the masked patches; mask (2B,N) hides
        them (student), None shows them (teacher). The heads run on class tokens and masked patches alone, but for patch_sketch."""
        tokens = self.encoder(views, mask, self.mask_token).float()
        out = {"tokens": tokens}
        cls, patches = tokens[:, 0], tokens[:, 1:].flatten(0, 1)[where]                      # (2B, D), (M, D)
        with torch.autocast("cuda" if views.is_cuda else "cpu", enabled=False):
            if self.classify:
                out["class"] = self.tokens(cls)                    # (2B, P)
            if self.distil_patches:
                out["patch"] = self.tokens(patches)                # (M, P)
            if self.keypoints is not None:
                out["view_keypoints"] = self.keypoints(cls)        # (2B, K, 2) in the view
                out["keypoints"] = apply_theta(theta, out["view_keypoints"])                 # undone: on the canvas
            if self.poses is not None:
                points = out["keypoints"]
                if self.shape_input:                               # and what is left without place and size
                    shape = points - points.mean(1, keepdim=True)
                    points = torch.cat([points, shape / shape.norm(dim=(1, 2), keepdim=True).clamp(min=1e-4)], 1)
                out["pose"] = self.poses(points.flatten(1))        # (2B, P)
            if self.pixels is not None and mask is not None:
                out["pixels"] = self.pixels(patches)               # (M, 3 p p)
            if self.sketch is not None and mask is not None:
                out["sketch"] = self.sketch(cls)                   # (2B, 512)
                out["patch_sketch"] = self.patch_sketch(tokens[:, 1:])                       # (2B, N, 32): of all patches
        return out


# -------------------------------------------------------------------------------------------------------------- losses
def pretraining_losses(student, teacher, centers, target, args, runtime):
    """Named losses of a batch. student, teacher: HandMIM's outputs. target: make_target's dict and `temperature`."""
    def distilled(name, other_view=False):
        logits = teacher[name].roll(len(teacher[name]) // 2, 0) if other_view else teacher[name]
        return distill(logits, centers[name], student[name], target["temperature"])
    terms = {}
    if "class" in student:
        terms["class"] = distilled("class", other_view=True).mean()
    if args.patch_loss:                                            # same view, same place
        terms["patch"] = (distilled("patch") * target["patch_weight"]).sum()
    if args.pixel_loss:
        error = ((student["pixels"] - target["pixels"]) ** 2).mean(1)                        # (M,)
        terms["pixel"] = (error * target["pixel_weight"]).sum()
    for name in ("sketch", "patch_sketch"):
        if name in student:
            terms[name] = F.mse_loss(student[name], target[name])
    if "pose" in student:
        terms["distribution"] = distilled("pose", other_view=True).mean()
    if "keypoints" in student:
        ours, theirs = (runtime.gather(out["keypoints"].unflatten(0, (2, -1))) for out in (student, teacher))     # (2, B, K, 2)
        theirs = theirs.flip(0)                                    # the other view's
        if args.align:
            terms["align"] = align_loss(ours, theirs, args.align_norm)
        if args.hinge:
            terms["hinge"] = hinge_loss(ours)
        if args.contrast:
            terms["contrast"] = contrast_loss(ours, theirs)
    return terms


def total_loss(terms, args):
    """lambda_pose L_pose + lambda_patch L_patch + lambda_pix L_pix."""
    pose = {name: args.pose_weight * getattr(args, name) for name in ("sketch", "distribution", "align", "hinge", "contrast")}
    weights = pose | {"patch_sketch": pose["sketch"], "patch": args.patch_loss, "pixel": args.pixel_loss,
                      "class": args.pose_weight * (args.class_weight if args.pose_loss == "keypoints" else 1)}
    return sum(weights[name] * term for name, term in terms.items())


def distill(teacher, center, student, temperature):
    """H(P_t, P_s) of logits (R,P), by rows: the teacher centred and sharpened (DINO, iBOT)."""
    return -(sharpened(teacher, center, temperature) * (student / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)


def sharpened(teacher, center, temperature):
    return ((teacher - center) / temperature).softmax(-1)


def align_loss(ours, theirs, norm):
    """Undone points (2,B,K,2) of the student against the teacher's of the other view (ours). norm: squared distance to the
    teacher's points brought to a fixed spread, so that the set cannot shrink from one teacher to the next; else smooth L1."""
    if not norm:
        return F.smooth_l1_loss(ours, theirs, beta=0.1)
    in_image, _ = spreads(theirs)
    middle = theirs.mean(2, keepdim=True)
    target = middle + (theirs - middle) * (SPREAD / in_image.clamp(min=1e-3))
    return ((ours - target) ** 2).sum(-1).mean() / SPREAD ** 2


def spreads(points):
    """Root mean square distance of points (2,B,K,2) to their image's mean, and of each point to its mean over the batch."""
    points = points.flatten(0, 1)
    return (points.var(dim, unbiased=False).sum(-1).mean().sqrt() for dim in (1, 0))


def hinge_loss(points, least=0.25):
    """Holds the standard deviations of the points (2,B,K,2) over the batch and in an image above `least` (ours)."""
    points = points.flatten(0, 1)
    return sum(F.relu(least - (points.var(dim, unbiased=False) + 1e-4).sqrt()).mean() for dim in (0, 1))


def contrast_loss(ours, theirs):
    """Each hand's undone points (2,B,K,2) find the teacher's of its other view among those of all hands (ours: InfoNCE on
    what differs from the mean point set)."""
    a, b = (F.normalize((points - points.mean((0, 1))).flatten(2), dim=-1) for points in (ours, theirs))      # (2, B, 2K)
    logits = a @ b.transpose(1, 2) / CONTRAST_TEMPERATURE          # (2, B, B)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(a.shape[1], device=a.device).repeat(2))


@torch.no_grad()
def move_center(center, total, count, runtime):
    """c <- .9 c + .1 mean of the teacher's logits, from their sum (1,P) and number over the update's parts, and all processes; stays
    where there were none. As iBOT's, but of the masked patches alone, the only ones that have logits here (ours)."""
    total, count = runtime.mean(total), runtime.mean(torch.tensor(float(count), device=center.device))
    return torch.where(count > 0, CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * total / count.clamp(min=1e-6), center)


# --------------------------------------------------------------------------------------------------------------- masks
def block_mask(batch, grid, ratio, generator):
    """(B,N) bool, True = hidden: rectangles of random size and shape until ratio x N patches are hidden, never more
    (bytedance/ibot loader.py). grid: patches a side, or (rows, columns). ratio: a number or (B,), one for each image."""
    H, W = (grid, grid) if isinstance(grid, int) else grid
    wanted = torch.as_tensor(ratio, dtype=torch.float32).expand(batch) * H * W
    least, aspect = least_block(H, W), math.log(0.3)
    mask, tries = torch.zeros(batch, H, W, dtype=torch.bool), torch.zeros(batch)
    while True:
        open_ = ((wanted - mask.sum((1, 2)) >= 1) & (tries < 10)).nonzero().squeeze(1)
        if not len(open_):
            return mask.flatten(1)
        area, shape, top, left = torch.rand(4, batch, generator=generator)[:, open_]
        room = wanted[open_] - mask[open_].sum((1, 2))
        area, shape = least + area * (room - least), torch.exp(aspect - 2 * aspect * shape)
        height, width = (area.clamp(min=0) * shape).sqrt().round(), (area.clamp(min=0) / shape).sqrt().round()
        top, left = (top * (H - height + 1)).floor(), (left * (W - width + 1)).floor()
        rows = (torch.arange(H) >= top[:, None]) & (torch.arange(H) < (top + height)[:, None])
        columns = (torch.arange(W) >= left[:, None]) & (torch.arange(W) < (left + width)[:, None])
        block = rows[:, :, None] & columns[:, None]                # (R, H, W)
        added = (block & ~mask[open_]).sum((1, 2))
        fits = (height < H) & (width < W) & (added > 0) & (added <= room)
        mask[open_] |= block & fits[:, None, None]
        tries[open_] = torch.where(fits, 0, tries[open_] + 1)


def least_block(H, W):
    """Patches of the smallest rectangle that block_mask starts with."""
    return max(1, min(H, W) // 3) ** 2


def random_mask(batch, grid, ratio, generator):
    """(B,N) bool, True = hidden: floor(ratio x N) patches of each image, anywhere. grid and ratio as block_mask's."""
    N = grid * grid if isinstance(grid, int) else grid[0] * grid[1]
    wanted = (torch.as_tensor(ratio, dtype=torch.float32).expand(batch) * N + 1e-4).floor()
    order = torch.rand(batch, N, generator=generator).argsort(1).argsort(1)
    return order < wanted[:, None]


def draw_masks(args, runtime, step, grid):
    """This process's share of the step's masks, (2B,N): a share of the views hides a ratio U(low, high), the others nothing."""
    make = block_mask if args.mask == "block" else random_mask

    def draw(batch, generator):
        ratio, chosen = torch.rand(2, batch, generator=generator)
        ratio = args.mask_ratio[0] + ratio * (args.mask_ratio[1] - args.mask_ratio[0])
        return make(batch, grid, torch.where(chosen < args.mask_share, ratio, 0.0), generator)
    return for_both_views(args, runtime, step, 5, draw)


# --------------------------------------------------------------------------------------------------------------- views
def for_both_views(args, runtime, step, purpose, draw):
    """draw(batch, generator) for views u and v of the whole batch, as a function of (seed, step): this process's (2B,...)."""
    return torch.cat([runtime.share(draw(args.batch_size, generator(args.seed, step, purpose, view))) for view in (0, 1)])


def draw_views(args, runtime, step):
    """theta (2B,2,3), and light, colour factors and blur of the step's views, which stay on the CPU."""
    zoom = 1.5 / CONTEXT

    def theta(batch, g):
        drawn = random_theta(batch, g, np.deg2rad(args.rotation), (zoom * args.zoom[0], zoom * args.zoom[1]), zoom * args.shift)
        room = (drawn[:, :, 0].norm(dim=1) - 1 / CONTEXT).clamp(min=0)[:, None]              # keeps the box in an upright view
        drawn[:, :, 2] = drawn[:, :, 2].clamp(-room, room)
        return drawn

    draws = (theta, *strong_color(args.color, args.image_size))
    theta, light, factors, sigma = (for_both_views(args, runtime, step, purpose, draw) for purpose, draw in enumerate(draws))
    return theta.to(runtime.device), light, factors, sigma


def make_views(canvas, theta, light, factors, sigma, size):
    """Canvases (B,3,H,W) u8 -> views (2B,3,size,size) as the encoder sees them, u of all hands, then v."""
    return normalise(apply_strong_color(warp(canvas.repeat(2, 1, 1, 1), theta, size), light, factors, sigma))


def to_patches(images, patch):
    """Images (B,3,S,S) -> (B,N,3 patch patch)."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def normalise_patches(patches):
    """Each patch minus its mean, over its deviation; and both (MAE; its 1e-6 would blow up the noise of flat patches)."""
    mean = patches.mean(-1, keepdim=True)
    deviation = (((patches - mean) ** 2).sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-2).sqrt()
    return (patches - mean) / deviation, mean, deviation


def inside(theta, valid, grid):
    """(2B,N) True where at least half of a patch shows real pixels of the canvas, not padding."""
    line = (torch.arange(4 * grid, device=theta.device) * 2 + 1) / (4 * grid) - 1
    points = apply_theta(theta, torch.cartesian_prod(line, line).flip(1).expand(len(theta), -1, 2))           # (2B, 16 N, 2)
    low, high = valid.repeat(2, 1)[:, None, :2], valid.repeat(2, 1)[:, None, 2:]
    real = ((points >= low) & (points <= high)).all(-1).float().unflatten(1, (1, 4 * grid, 4 * grid))
    return F.avg_pool2d(real, 4).flatten(1) >= 0.5


def make_target(views, mask, seen, count, patch, sketch=True):
    """What the student is asked for at the masked patches: `where` they are, their `pixels`, and the weights of means.

    patch_weight: mean over an image's masked patches, then over all views, those without a mask counting as 0 (iBOT).
    pixel_weight: mean over the `count` masked patches of the batch that show the photograph and not its padding."""
    where = mask.flatten().nonzero().squeeze(1)                    # (M,)
    share = (1 / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)).expand_as(mask)
    pixels = normalise_patches(to_patches(views, patch).flatten(0, 1)[where])[0]
    target = {"where": where, "pixels": pixels, "patch_weight": share.flatten()[where], "pixel_weight": seen.flatten()[where] / count}
    return target | (dict(zip(("sketch", "patch_sketch"), sketches(views, patch), strict=True)) if sketch else {})


def edges(views, cells):
    """Views (B,3,S,S) -> (B,8,cells,cells): how strongly edges run in each of 8 directions (of 180 degrees) in each cell, over what runs
    in the 3 x 3 cells around; about unit variance. HOG (Dalal and Triggs 2005), which MaskFeat (arXiv 2112.09133) asks of masked
    patches. Ours: asked of the class token for the whole view and of every patch token for its patch. Edges say where fingers run;
    skin, background and light, which grey levels say, are left out."""
    images = F.pad(views, (1, 1, 1, 1), mode="replicate")
    across, down = images[:, :, 1:-1, 2:] - images[:, :, 1:-1, :-2], images[:, :, 2:, 1:-1] - images[:, :, :-2, 1:-1]
    strength, steepest = (across ** 2 + down ** 2).max(1, keepdim=True)                      # over the colours
    direction = torch.atan2(down.gather(1, steepest), across.gather(1, steepest)) / torch.pi * DIRECTIONS    # (B, 1, S, S)
    bins = torch.arange(DIRECTIONS, device=views.device)[:, None, None]
    away = ((direction - bins + DIRECTIONS / 2) % DIRECTIONS - DIRECTIONS / 2).abs()         # (B, 8, S, S), between two bins
    bins = strength.sqrt() * (1 - away).clamp(min=0)
    bins = F.adaptive_avg_pool2d(bins, cells)
    around = F.avg_pool2d((bins ** 2).sum(1, keepdim=True), 3, 1, 1, count_include_pad=False).sqrt()
    return bins / (around + 0.1) / 0.16


def sketches(views, patch):
    """(B,3,S,S) -> (B,512), the edges of the view at 64 pixels, in 8 x 8 cells; and (B,N,32), those in the quarters of each patch."""
    size, cells = views.shape[-1], 2 * views.shape[-1] // patch
    quarters = edges(views, cells)
    same = size <= 64 and cells == CELLS                           # of 64 pixels in patches of 16 the two are one
    whole = quarters if same else edges(F.adaptive_avg_pool2d(views, min(64, size)), CELLS)
    return whole.flatten(1), F.unfold(quarters, 2, stride=2).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- diagnostics
@torch.no_grad()
def diagnose(student, teacher, centers, temperature, runtime):
    """Numbers that show a collapse coming (README, "What the log says")."""
    found = {}
    for name, center in centers.items():
        target = sharpened(teacher[name], center, temperature)     # (R, P)
        count = runtime.mean(torch.tensor(float(len(target)), device=center.device)).clamp(min=1e-6)
        found[f"{name}_teacher_entropy"] = runtime.mean(entropy(target).sum()) / count
        found[f"{name}_entropy_of_mean"] = entropy(runtime.mean(target.sum(0)) / count)
        found[f"{name}_center_norm"] = center.norm()
    if "keypoints" in teacher:
        ours, theirs = (runtime.gather(out["keypoints"].unflatten(0, (2, -1))) for out in (student, teacher))
        in_image, in_batch = spreads(theirs)
        spread = torch.hypot(in_image, in_batch).clamp(min=1e-6)
        found |= {"keypoint_spread": in_image, "keypoint_batch_spread": in_batch,
                  "equivariance_error": (theirs[0] - theirs[1]).norm(dim=-1).mean() / spread,
                  "student_error": (ours - theirs.flip(0)).norm(dim=-1).mean() / spread}
    return found


def entropy(p):
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def gradient_sizes(terms, tokens, parts, runtime):
    """Norm of each loss's gradient, before its weight, at the final LayerNorm's output over the whole batch, judged by one of its
    `parts`: which loss owns the encoder."""
    sizes = {name: torch.autograd.grad(term, tokens, retain_graph=True)[0].square().sum() for name, term in terms.items()}
    return {f"{name}_gradient": (runtime.mean(size) / runtime.world / parts).sqrt() for name, size in sizes.items()}


def collapsed(values, prototypes):
    """What looks collapsed in a logged step: {name: what to do}. prototypes: {name: D}."""
    found = {}
    losses = {name: values[loss] for name, loss in (("class", "class"), ("patch", "patch"), ("pose", "distribution")) if name in prototypes}
    if "patch" in losses:
        losses["patch"] /= max(values["masked_views"], 1e-9)       # views without a mask count as 0 in its mean
    for name, loss in losses.items():
        if abs(loss - math.log(prototypes[name])) < 0.02:
            found[name] = (f"the {name} loss is glued to ln {prototypes[name]} = {math.log(prototypes[name]):.3f}: the student says the "
                           "same of every input; lower --temperature (.02 .04), lower --ema, or raise --lr")
    if values.get("keypoint_spread", 1) < 0.05 or values.get("keypoint_batch_spread", 1) < 0.02:
        found["keypoints"] = "the pseudo keypoints coincide or never move: use --align-norm, raise --hinge, or lower --lr"
    return found


# ------------------------------------------------------------------------------------------------------------ pictures
@torch.no_grad()
def picture(student, teacher, views, theta, mask, patch, hands=8):
    """From HandMIM's outputs for views (2B,3,S,S), a row for each hand: for either view the view with the teacher's pseudo keypoints (dots)
    and those it finds in the other view, brought here (rings; a keypoint has one colour); the masked input; where pixels are learned, their
    reconstruction, visible patches pasted; and where sketches are, the view's and what the class token makes of the masked input."""
    B, size, N = len(mask) // 2, views.shape[-1], mask.shape[1]
    where = mask.flatten().nonzero().squeeze(1)
    patches = to_patches(views, patch).flatten(0, 1)               # (2B N, 3pp)
    hidden, filled = patches.clone(), patches.clone()
    hidden[where] = 0
    _, mean, deviation = normalise_patches(patches[where])
    if "pixels" in student:
        filled[where] = student["pixels"] * deviation + mean
    shown = [views, *(F.fold(p.unflatten(0, (-1, N)).transpose(1, 2), size, patch, stride=patch) for p in (hidden, filled))]
    shown = [to_rgb(images) for images in (shown if "pixels" in student else shown[:2])]
    if "view_keypoints" in teacher:
        others = apply_theta(invert_theta(theta), teacher["keypoints"].roll(B, 0))           # the other view's, seen from this one
        pixels = [((at + 1) * size / 2 - 0.5).cpu().numpy() for at in (teacher["view_keypoints"], others)]
        shown[0] = [draw_points(image, *both) for image, *both in zip(shown[0], *pixels, strict=True)]
    names = ["view", "masked", "reconstruction"][:len(shown)]
    if "sketch" in student:
        for name, cells in (("edges", sketches(views, patch)[0]), ("edges read", student["sketch"])):
            cells = cells.float().unflatten(1, (DIRECTIONS, CELLS, CELLS)).cpu().numpy()
            shown, names = [*shown, [draw_edges(each, size) for each in cells]], [*names, name]
    hands = range(min(B, hands))
    tiles = [images[row] for hand in hands for row in (hand, hand + B) for images in shown]
    return grid(tiles, 2 * len(shown), [f"{name} {view}" for _ in hands for view in "uv" for name in names], cell=128)


CURVES = {"loss": ("class", "patch", "pixel", "sketch", "patch_sketch", "distribution", "align", "hinge", "contrast", "loss"),
          "collapse": ("class_teacher_entropy", "class_entropy_of_mean", "patch_teacher_entropy", "patch_entropy_of_mean",
                       "pose_teacher_entropy", "pose_entropy_of_mean"),
          "keypoints": ("keypoint_spread", "keypoint_batch_spread", "equivariance_error", "student_error")}


def draw_curves(out):
    """samples/loss.png, collapse.png and keypoints.png from the log."""
    rows = read_log(out / "log.jsonl")
    for picture_name, names in CURVES.items():
        points = {name: [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])] for name in names}
        series = {name: tuple(zip(*pairs, strict=True)) for name, pairs in points.items() if pairs}
        if series:
            save_image(out / "samples" / f"{picture_name}.png", curve(series, title=picture_name, x_label="step"))


# ---------------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="hands; labels are not read")
    group = cli.add_argument_group("network")
    group.add_argument("--init", help="encoder to start from: an encoder.pt, or ViT weights of timm, MAE, DINO or iBOT (default: fresh)")
    group.add_argument("--arch", choices=sorted(ARCHS), help="a ViT; vit_tiny on a CPU, vit_small on one GPU (default), vit_base on eight")
    group.add_argument("--image-size", type=int, default=224, help="side of the views, a multiple of 16 (default 224; 64 on a CPU)")
    group.add_argument("--drop-path", type=float, default=0.0,
                       help="stochastic depth of the student (default 0, which is the same for any number of processes; iBOT .1)")
    group.add_argument("--prototypes", type=int, default=8192, help="of class and patches (iBOT 8192); 512 to 2048 below 50,000 hands")
    group.add_argument("--head-width", type=int, default=2048, help="of the MLP before the prototypes (iBOT 2048; 512 on a CPU)")
    group = cli.add_argument_group("losses: a weight of 0 switches one off")
    group.add_argument("--pose-loss", choices=["none", "class", "keypoints"], default="keypoints",
                       help="none; iBOT's distillation of the class token; pseudo keypoints aligned across the views (default)")
    group.add_argument("--pose-weight", type=float, default=1.0, help="of all pose losses together (default 1)")
    group.add_argument("--patch-loss", type=float, default=0.1, metavar="W", help="self-distillation of masked patches (default .1)")
    group.add_argument("--pixel-loss", type=float, default=0.3, metavar="W", help="pixels of masked patches (default .3)")
    group = cli.add_argument_group("pose-aware tokens (all ours; with --pose-loss keypoints)")
    group.add_argument("--sketch", type=float, metavar="W",
                       help="read off which way edges run: in the whole view (class token), in each patch (patch tokens) (default 3)")
    group.add_argument("--keypoints", type=int, default=21, help="how many; 16 to 64 are reasonable (default 21)")
    group.add_argument("--align", type=float, metavar="W", help="distance to the teacher's undone points (default .2)")
    group.add_argument("--align-norm", action=BooleanOptionalAction, default=True,
                       help="bring the teacher's points to a fixed spread first; else smooth L1 to them as they are (default: bring)")
    group.add_argument("--hinge", type=float, default=0.0, metavar="W", help="keeps the points apart; .25 with --no-align-norm")
    group.add_argument("--contrast", type=float, default=0.0, metavar="W",
                       help="tell the hand from the batch's others by its undone points (default 0)")
    group.add_argument("--distribution", type=float, default=0.0, metavar="W",
                       help="centred and sharpened cross-entropy on the undone points")
    group.add_argument("--logits", choices=["mlp", "distance"], default="distance",
                       help="what --distribution reads from the points (default distance)")
    group.add_argument("--shape-input", action="store_true", help="--logits mlp also sees the points without place and size")
    group.add_argument("--pose-prototypes", type=int, default=4096, help="of --distribution, 1024 to 4096 (default)")
    group.add_argument("--class-weight", type=float, default=0.0, metavar="W", help="iBOT's class loss beside the keypoints (default 0)")
    group = cli.add_argument_group("masks")
    group.add_argument("--mask", choices=["block", "random"], default="block", help="rectangles (default, iBOT) or single patches")
    group.add_argument("--mask-ratio", type=float, nargs=2, default=(0.1, 0.5), metavar=("LOW", "HIGH"),
                       help="share of a masked view's patches (default .1 .5, iBOT)")
    group.add_argument("--mask-share", type=float, default=0.5, help="share of the views that are masked (default .5, iBOT)")
    group = cli.add_argument_group("views: each is drawn alone")
    group.add_argument("--rotation", type=float, default=45, help="degrees either way (default 45, PeCLR)")
    group.add_argument("--zoom", type=float, nargs=2, default=(0.75, 1.1), metavar=("LOW", "HIGH"),
                       help="side of a view over 1.5 x the box (default .75 1.1)")
    group.add_argument("--shift", type=float, default=0.12,
                       help="of its centre, in units of .75 x the box, less where an upright view would lose the box (default .12)")
    group.add_argument("--color", type=float, default=1.0,
                       help="strength of gains, jitter, tinted light, grey and blur; 0 none, 1 default, 2 the most")
    group = cli.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, default=5e-4,
                       help="AdamW rate at batch 256; the log shows it times batch / 256 (default 5e-4, iBOT; up to 4e-3)")
    group.add_argument("--weight-decay", type=float, nargs=2, default=(0.04, 0.4), metavar=("FIRST", "LAST"),
                       help="cosine (default .04 .4, DINO)")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises (default .05)")
    group.add_argument("--ema", type=float, default=0.996,
                       help="the teacher's momentum at the start, cosine to 1 (default .996, iBOT); .98 for some hundred steps")
    group.add_argument("--temperature", type=float, nargs=2, default=(0.04, 0.07), metavar=("FIRST", "LAST"),
                       help="of the teacher (default .04 .07, iBOT); rises over 15 %% of the steps (ours); lower if a loss stays at ln D")
    group.add_argument("--clip", type=float, default=3.0, help="largest norm of the gradient (default 3; iBOT 3 for each tensor)")
    group.add_argument("--compile", action="store_true", help="torch.compile of the encoder: slower to start, faster after")
    add_training_flags(cli, batch_size=256, epochs=100)
    return cli


def check_flags(args):
    """ValueError that names the first flag out of its range or at odds with another, before anything is written."""
    for name, default in (("sketch", 3.0), ("align", 0.2)):
        if getattr(args, name) is None:
            setattr(args, name, default if args.pose_loss == "keypoints" else 0.0)
    weights = ("pose_weight", "patch_loss", "pixel_loss", "sketch", "align", "hinge", "contrast", "distribution", "class_weight")
    ranges = dict.fromkeys(weights, (0, 1e4)) | {
              "image_size": (16, 4096), "drop_path": (0, 0.99), "prototypes": (2, 1e6), "head_width": (1, 1e5), "keypoints": (2, 1024),
              "pose_prototypes": (2, 1e6), "mask_ratio": (0, 1), "mask_share": (0, 1),
              "rotation": (0, 180), "zoom": (0.1, CONTEXT / 1.5), "shift": (0, 1), "color": (0, 2), "lr": (0, 1e3), "weight_decay": (0, 10),
              "warmup": (0, 1), "ema": (0, 1), "temperature": (1e-3, 10), "clip": (1e-6, 1e6)}
    check_ranges(args, ranges)
    for name in ("mask_ratio", "zoom"):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            raise ValueError(f"--{name.replace('_', '-')}: the lower number comes first")
    if args.arch == "resnet50":
        raise ValueError("--arch resnet50: masks need a ViT")
    if args.shape_input and (args.logits != "mlp" or not args.distribution):
        raise ValueError("--shape-input needs --distribution and --logits mlp")
    for name in ("sketch", "align", "distribution", "hinge", "contrast", "class_weight"):
        if getattr(args, name) and args.pose_loss != "keypoints":
            raise ValueError(f"--{name.replace('_', '-')} needs --pose-loss keypoints")
    if args.contrast and args.batch_size // args.accumulate < 2:
        raise ValueError("--contrast tells the hands of a part of the batch apart: lower --accumulate or raise --batch-size")
    parts = args.sketch + args.align + args.contrast + args.distribution + args.class_weight
    pose = args.pose_loss == "class" or (args.pose_loss == "keypoints" and parts > 0)
    if args.pose_loss == "keypoints" and not pose:
        raise ValueError("--sketch, --align, --contrast, --distribution and --class-weight are all 0: say --pose-loss none")
    pose = pose and args.pose_weight > 0
    if not (args.patch_loss or args.pixel_loss or pose):
        raise ValueError("--pose-loss, --patch-loss and --pixel-loss are all off: nothing to learn")
    if not pose and (args.mask_share == 0 or args.mask_ratio[1] == 0):
        raise ValueError("--mask-share or --mask-ratio hides nothing: --patch-loss and --pixel-loss need masks")


def main(argv=None):
    args = flags().parse_args(argv)
    check_flags(args)
    runtime = setup(args)
    indices = [HandIndex(path) for path in args.data]
    canvas = args.image_size * 8 // 7                              # 256 for 224
    dataset = HandDataset(indices, canvas, CONTEXT)
    steps = total_steps(args, len(dataset))
    torch.manual_seed(args.seed)
    encoder = choose_encoder(args, "vit_small", args.drop_path)
    if encoder.arch == "resnet50":
        raise ValueError(f"--init {args.init} holds {encoder.arch}: masks need a ViT")
    side, patch = args.image_size // encoder.patch, encoder.patch
    least = least_block(side, side) if args.mask == "block" else 1
    if args.mask_share and args.mask == "block" and side == 1:
        raise ValueError(f"--image-size {args.image_size} is one patch: raise it, or use --mask random or --mask-share 0")
    if args.mask_share and args.mask_ratio[1] * side * side < least:
        raise ValueError(f"--mask-ratio {args.mask_ratio[1]}: less than the smallest {args.mask} mask, {least} of {side * side} patches; "
                         "raise it or --image-size, or use --mask random")
    check_mix(dataset.rows, dataset.starts, args.mix)
    out, state = start_run(args, runtime)

    student = HandMIM(encoder, args).to(runtime.device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    centers = {name: torch.zeros(1, len(head.prototypes), device=runtime.device) for name, head in
               (("class", student.tokens if student.classify else None), ("patch", student.tokens if args.patch_loss else None),
                ("pose", student.poses)) if head is not None}
    optimizer = adamw(param_groups(student.named_parameters(), args.weight_decay[0]), runtime.device)
    scaler, start, stuck, warned = runtime.scaler(), 0, {}, []     # for how many logged steps what has looked collapsed; what was said
    if state:
        for part, name in ((student, "student"), (teacher, "teacher"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[name])
        centers = {name: center.to(runtime.device) for name, center in state["centers"].items()}
        start, stuck, warned = state["step"], state["stuck"], state["warned"]
    if args.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    net, parameters, failed = runtime.wrap(student), list(student.parameters()), set()
    last_layers = [head.prototypes for head in (student.tokens, student.poses) if head is not None]
    order = make_sampler(dataset.rows, dataset.starts, args.mix, args.batch_size, args.seed, start, steps, runtime.rank, runtime.world)
    loader = make_loader(dataset, order, workers=runtime.workers, pin=runtime.device.type == "cuda")
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every, show=("keypoint_spread", "patch_teacher_entropy"))
    lr_base, frozen = args.lr * args.batch_size / 256, min(1250, int(0.02 * steps))

    for step, batch in enumerate(loader, start):
        failed |= set(batch["failed"][batch["failed"] >= 0].tolist())
        theta, *color = draw_views(args, runtime, step)            # (2B, 2, 3)
        mask = draw_masks(args, runtime, step, side)               # (2B, N)
        views = make_views(batch["canvas"].to(runtime.device, non_blocking=True), theta, *color, args.image_size)
        seen = inside(theta, batch["valid"].to(runtime.device), side)
        mask = mask.to(runtime.device)
        count = runtime.mean((seen & mask).sum().float()).clamp(min=1) / args.accumulate
        temperature = min(1.0, step / max(1, 0.15 * steps)) * (args.temperature[1] - args.temperature[0]) + args.temperature[0]
        torch.manual_seed(generator(args.seed, step, 6 + runtime.rank).initial_seed())         # stochastic depth
        last, logged = step + 1 == steps, (step + 1) % args.log_every == 0 or step + 1 == steps
        values = {"masked_views": mask.any(1).float().mean(), "masked_patches": mask.float().mean()}
        sums, counts = dict.fromkeys(centers, 0), dict.fromkeys(centers, 0)
        B = len(batch["row"])
        for part in torch.arange(B).chunk(args.accumulate):
            rows = torch.cat([part, part + B])
            target = make_target(views[rows], mask[rows], seen[rows], count, patch, student.sketch is not None)
            target["temperature"] = temperature
            inputs = views[rows], theta[rows], target["where"]
            with runtime.exchange(net, last=part[-1] == B - 1):
                with runtime.autocast():
                    with torch.no_grad():
                        whole = teacher(*inputs)
                    masked = net(*inputs, mask[rows])
                terms = pretraining_losses(masked, whole, centers, target, args, runtime)
                loss = total_loss(terms, args)
                if logged and part[-1] == B - 1:                   # accumulated parts: of the last one
                    values |= diagnose(masked, whole, centers, temperature, runtime)
                    values |= gradient_sizes(terms, masked["tokens"], args.accumulate, runtime)
                scaler.scale(loss / args.accumulate).backward()
            for name in centers:
                sums[name], counts[name] = sums[name] + whole[name].sum(0, keepdim=True), counts[name] + len(whole[name])
            for name, value in (terms | {"loss": loss}).items():
                values[name] = values.get(name, 0) + value.detach() / args.accumulate
        if not torch.isfinite(values["loss"]):
            raise FloatingPointError("the loss is not finite: lower --lr or use --precision fp32; --resume continues from the last save")
        if step < frozen:
            for layer in last_layers:
                layer.grad = None
        lr, momentum = cosine(step, steps, lr_base, final=1e-6, warmup=int(args.warmup * steps)), cosine(step, steps, args.ema, final=1.0)
        set_lr(optimizer, lr, cosine(step, steps, *args.weight_decay))
        norm = update(optimizer, scaler, parameters, args.clip)
        ema_update(teacher, student, momentum)
        centers = {name: move_center(center, sums[name], counts[name], runtime) for name, center in centers.items()}
        log(step + 1, values | {"lr": lr, "gradient_norm": norm})
        if logged and step > 0.1 * steps:
            problems = collapsed({name: float(value) for name, value in values.items()},
                                 {name: center.shape[1] for name, center in centers.items()})
            stuck = {name: stuck.get(name, 0) + 1 for name in problems}
            for name in problems:
                if stuck[name] >= 10 and name not in warned:       # ten logged steps in a row
                    warned.append(name)
                    log.warn(step + 1, problems[name])
        if runtime.is_main and (step == 0 or last or (step + 1) % args.save_every == 0):
            save_image(out / "samples" / f"step_{step + 1:07d}.png", picture(masked, whole, views[rows], theta[rows], mask[rows], patch))
        if runtime.is_main and (last or (step + 1) % args.save_every == 0):
            draw_curves(out)
            save_checkpoint(out / "encoder.pt", kind="encoder", step=step + 1, arch=encoder.arch, config=encoder.config,
                            state_dict=teacher.encoder.state_dict())
            save_checkpoint(out / "last.pt", kind="mim", step=step + 1, student=student.state_dict(), teacher=teacher.state_dict(),
                            centers=centers, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), stuck=stuck, warned=warned)
    log.close()
    failed = runtime.union(failed)
    if runtime.is_main and start < steps:
        print(f"{out / 'encoder.pt'}: step {steps}, the teacher's encoder; look at {out / 'samples'}")
        if failed:
            print(dataset.unread(failed))
    finish()


if __name__ == "__main__":
    run(main)
