"""HandMIM: masked, pose-aware pre-training of a plain ViT on unlabelled hands (after arXiv 2307.16061).

Of the paper only the abstract is a source: teacher and student, a pseudo keypoint alignment module for
pose-aware class tokens, self-distillation of patch tokens, pixel reconstruction. These are the default, with
equal weights. Every formula below is iBOT's, MAE's or ours, as its docstring says.

Reads indices (data.py); writes RUN/config.json, log.jsonl, last.pt, encoder.pt, samples/*.png, and with
--probe encoder_best.pt. One step:

    canvas -> two views u, v (theta, colour)     teacher: EMA of the student, sees both views whole
           -> masks, for the student only        student: sees both views masked

    the pose loss
    class token          -> K pseudo keypoints -> undone by theta  = the teacher's of the OTHER view  align
                            (with --pairs view v shows a similar hand of another video: ours)
    patch self-distillation
    masked patch tokens  -> prototypes                             = the teacher's of the SAME patch  patch
    pixels, at two levels
    masked patch tokens  -> their pixels                                                              pixel
    class token          -> the whole view, 16 x 16 grey                                              picture
    only with --hog, which is ours and not the paper's
    class token          -> HOG of the whole view                                                     hog
    every patch token    -> HOG of its patch                                                       patch_hog
    only with --contrast, ours too
    class token          -> its undone keypoints find the teacher's among those of all hands       contrast
"""

import copy
import hashlib
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cache import cache_canvases
from data import (CONTEXT, HandDataset, HandIndex, PairSampler, UnreadImages, canvas_size, check_mix,
                  has_points, index_fingerprint, make_loader, make_sampler, pair_rows, pose_labels,
                  read_pairs)
from draw import draw_hog, draw_points, grid, save_curves, save_image
from masking import (HOG_CELLS, HOG_DIRECTIONS, PICTURE, block_mask, from_patches, hog_targets,
                     least_block, mask_sampler, normalise_patches, random_mask, small_picture, to_patches)
from metrics import procrustes
from model import ARCHS, KeypointHead, PrototypeHead, choose_encoder, is_resnet
from probing import LIVE_CHARTS, PROBE_WINDOW, LiveProbe
from runtime import (
    adamw, add_init_flags, add_training_flags, batch_parts, check_ranges, cores, cosine, ema_update, feed,
    finish, param_groups, parser, run, set_lr, setup, total_steps, update,
)
from saving import Log, Saves, announce, check_run, is_due, restore, save_checkpoint, start_run
from views import (apply_strong_color, apply_theta, choose_finer, invert_theta, normalise, random_theta,
                   rows_to_blur, strong_color, to_pixels, to_rgb, two_views, upright_views, warp)

WINDOW = 1.5  # side of the usual view over the longer side of the box (ours)
STUDENT_TEMPERATURE = 0.1  # bytedance/ibot main_ibot.py
CENTER_MOMENTUM = 0.9  # bytedance/ibot
CONTRAST_TEMPERATURE = 0.2  # ours
SPREAD = 0.4  # of the teacher's keypoints, where the hand's box is 1 wide: align_loss (ours)
CLIP = 3.0  # largest norm of the gradient; iBOT's number, which it applies to each tensor
FROZEN = 1250  # steps in which the prototypes stand still, at most a 50th of the run (iBOT: its first epoch)
THETA, LIGHT, COLOR, BLUR, MASKS = 0, 1, 2, 3, 5  # random streams: of (seed, step, stream); 4 is unused


# ---------------------------------------------------------------------------------------------------- network
class HandMIM(nn.Module):
    """Encoder, mask token and the heads that the losses ask for. The teacher is a copy of it.

    distil: the tokens whose logits over the prototypes are compared, "class", "patch" or both. keypoints: how
    many, 0 for none. pixels, hog: whether there are heads for them."""

    def __init__(self, encoder, prototypes=8192, distil=("patch",), keypoints=21, pixels=True, hog=False):
        super().__init__()
        dim = encoder.dim
        width = 2048 if dim >= 384 else 512  # iBOT's 2048; a quarter below ViT-S (ours)
        self.distil = distil
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.prototype_head = PrototypeHead(dim, prototypes, width) if distil else None
        self.keypoint_head = KeypointHead(dim, keypoints) if keypoints else None
        self.pixel_head = nn.Linear(dim, 3 * encoder.patch ** 2) if pixels else None
        self.picture_head = nn.Linear(dim, PICTURE ** 2) if pixels else None
        self.hog_head = nn.Linear(dim, HOG_DIRECTIONS * HOG_CELLS ** 2) if hog else None
        self.patch_hog_head = nn.Linear(dim, HOG_DIRECTIONS * 4) if hog else None

    def forward(self, views, mask, masked, hide):
        """views (2,B,3,S,S); mask (2,B,N), the patches that are asked about; masked (M,), their places in the
        flat mask; hide: True for the student, which does not see them, False for the teacher.

        Returns a dict, all fp32: tokens (2B,1+N,D); class (2,B,P) and patch (M,P) logits; keypoints
        (2,B,K,2), coordinates of the VIEW; and from the student pixels (M,3pp), picture (2,B,256), hog
        (2,B,512), patch_hog (2,B,N,32)."""
        two_views = views.shape[:2]
        hidden = mask.flatten(0, 1) if hide else None  # (2B, N)
        tokens = self.encoder(views.flatten(0, 1), hidden, self.mask_token).float()
        outputs = {"tokens": tokens}
        class_tokens = tokens[:, 0]  # (2B, D)
        masked_patches = tokens[:, 1:].flatten(0, 1)[masked]  # (M, D)
        if "class" in self.distil:
            outputs["class"] = self.prototype_head(class_tokens).float().unflatten(0, two_views)
        if "patch" in self.distil:
            outputs["patch"] = self.prototype_head(masked_patches).float()
        if self.keypoint_head is not None:
            with torch.autocast(views.device.type, enabled=False):  # coordinates need all digits
                outputs["keypoints"] = self.keypoint_head(class_tokens).unflatten(0, two_views)
        if self.pixel_head is not None and hide:
            outputs["pixels"] = self.pixel_head(masked_patches).float()
            outputs["picture"] = self.picture_head(class_tokens).float().unflatten(0, two_views)
        if self.hog_head is not None and hide:
            outputs["hog"] = self.hog_head(class_tokens).float().unflatten(0, two_views)
            outputs["patch_hog"] = self.patch_hog_head(tokens[:, 1:]).float().unflatten(0, two_views)
        return outputs


# ----------------------------------------------------------------------------------------------------- losses
def align_loss(student, teacher):
    """Undone keypoints (2,B,K,2) of the student against the teacher's of the other view; canvas coordinates
    (ours).

    The squared distance to the teacher's points after these are brought to a fixed spread. Otherwise the
    points could shrink together, from one teacher to the next."""
    spread, _ = spreads(teacher)
    middle = teacher.mean(2, keepdim=True)
    target = middle + (teacher - middle) * (SPREAD / spread.clamp(min=1e-3))
    return ((student - target) ** 2).sum(-1).mean() / SPREAD ** 2


def spreads(points):
    """Spread of points (2,B,K,2) within an image, and of each point over the batch: root mean square
    distances."""
    points = points.flatten(0, 1)
    in_image = points.var(1, unbiased=False).sum(-1).mean().sqrt()
    in_batch = points.var(0, unbiased=False).sum(-1).mean().sqrt()
    return in_image, in_batch


def contrast_loss(student, teacher):
    """Each hand's undone keypoints (2,B,K,2) find the teacher's of the other view among those of all hands of
    the batch.

    Ours: InfoNCE on what differs from the mean point set.
    """
    a, b = (F.normalize((points - points.mean((0, 1))).flatten(2), dim=-1) for points in (student, teacher))
    logits = a @ b.transpose(1, 2) / CONTRAST_TEMPERATURE  # (2, B, B)
    own_hand = torch.arange(a.shape[1], device=a.device).repeat(2)
    return F.cross_entropy(logits.flatten(0, 1), own_hand)


def distill(student, teacher, center, temperature):
    """Cross-entropy H(P_teacher, P_student) (...) of logits (...,P), the teacher's centred and sharpened
    (DINO, iBOT)."""
    target = sharpen(teacher, center, temperature)
    return -(target * (student / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)


def sharpen(teacher, center, temperature):
    """The teacher's distribution over the prototypes."""
    return ((teacher - center) / temperature).softmax(-1)


class Centers(dict):
    """Centres (1,P) of the teacher's logits, by name. Once an update c <- .9 c + .1 mean of its logits.

    As iBOT's, but that of the patches is of the masked ones alone, which are the only ones with logits here
    (ours). A centre stays where an update had no logits.
    """

    def __init__(self, names, prototypes, device):
        super().__init__({name: torch.zeros(1, prototypes, device=device) for name in names})
        self.load_state_dict(self)

    @torch.no_grad()
    def collect(self, outputs):
        """Adds the teacher's logits (...,P) of a part of the batch."""
        for name in self:
            logits = outputs[name].flatten(0, -2)
            self.sums[name] = self.sums[name] + logits.sum(0, keepdim=True)
            self.rows[name] += len(logits)

    @torch.no_grad()
    def move(self, mean):
        """mean: over the processes, of a tensor. Logits that are not finite move nothing."""
        if not self:
            return
        totals = [F.pad(self.sums[name], (0, 1), value=self.rows[name]) for name in self]  # (1, P + 1) each
        for name, total in zip(self, mean(torch.stack(totals)), strict=True):
            logits, rows = total[:, :-1], total[:, -1:]
            moved = CENTER_MOMENTUM * self[name] + (1 - CENTER_MOMENTUM) * logits / rows.clamp(min=1e-6)
            self[name] = torch.where((rows > 0) & moved.isfinite().all(), moved, self[name])
        self.sums, self.rows = dict.fromkeys(self, 0), dict.fromkeys(self, 0)

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state):
        self.update({name: center.to(self[name].device) for name, center in state.items()})
        self.sums, self.rows = dict.fromkeys(self, 0), dict.fromkeys(self, 0)


def patch_weights(mask, masked):
    """Weights (M,) of the masked patches, which are at `masked` in the flat mask (2,B,N): the mean over an
    image's masked patches, then over all views.

    Views without a mask count as 0 in it (iBOT).
    """
    mask = mask.flatten(0, 1)
    weights = 1 / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return weights.expand_as(mask).flatten()[masked]


def pixel_loss(predicted, patches, weights):
    """Squared error of masked patches (M,3pp), normalised each (MAE), weighted by weights (M,)."""
    error = ((predicted - normalise_patches(patches)[0]) ** 2).mean(1)
    return (error * weights).sum()


def picture_loss(predicted, pictures):
    """Squared error of small pictures (2,B,256), normalised each as a patch is (ours)."""
    return F.mse_loss(predicted, normalise_patches(pictures)[0])


# ------------------------------------------------------------------------------------------------------ views
def theta_sampler(rotation, zoom, shift):
    """A draw (batch, generator) -> theta (B,2,3): turned by +- rotation degrees, `zoom` (low, high) times the
    usual window, moved by a share `shift` of half of it, less where an upright view would lose the box."""
    usual = WINDOW / CONTEXT

    def draw(batch, generator):
        scale = (usual * zoom[0], usual * zoom[1])
        theta = random_theta(batch, generator, np.deg2rad(rotation), scale, usual * shift)
        room = (theta[:, :, 0].norm(dim=1) - 1 / CONTEXT).clamp(min=0)[:, None]
        theta[:, :, 2] = theta[:, :, 2].clamp(-room, room)
        return theta

    return draw


def teacher_temperature(step, steps, first, last):
    """Rises linearly from first to last over 15 % of the steps (ours; iBOT: 30 epochs)."""
    return min(1.0, step / max(1, 0.15 * steps)) * (last - first) + first


def make_views(canvas, theta, size, finer, looks):
    """Canvases (2,B,3,H,W) u8, or (B,3,H,W) for both views, seen through theta (2,B,2,3) -> views
    (2,B,3,size,size) as the encoder sees them. finer: as warp's. looks: the factors of colour, as
    apply_strong_color's."""
    canvas = canvas.expand(2, *canvas.shape[-4:]).flatten(0, 1)
    views = warp(canvas, theta.flatten(0, 1), size, finer).unflatten(0, (2, -1))
    return normalise(apply_strong_color(views, **looks))


def in_photograph(theta, valid, grid):
    """(2,B,N) True where at least half of a patch shows the photograph and not its padding.

    theta (2,B,2,3); valid (2,B,4): the photograph's rectangle on the canvas. Looks at 4 x 4 points of each
    patch."""
    line = (torch.arange(4 * grid, device=theta.device) * 2 + 1) / (4 * grid) - 1
    points = apply_theta(theta, torch.cartesian_prod(line, line).flip(1))  # (2, B, 16 N, 2)
    low, high = valid[..., None, :2], valid[..., None, 2:]
    real = ((points >= low) & (points <= high)).all(-1).float().unflatten(2, (4 * grid, 4 * grid))
    return F.avg_pool2d(real, 4).flatten(2) >= 0.5


# ------------------------------------------------------------------------------------------------ diagnostics
@torch.no_grad()
def diagnose_prototypes(taught, centers, temperature, mean):
    """Numbers that show a collapse of the teacher coming (docs/handmim.md). mean: over the processes."""
    found = {}
    for name, center in centers.items():
        target = sharpen(taught[name].flatten(0, -2), center, temperature)  # (R, P)
        rows = mean(torch.tensor(float(len(target)), device=center.device)).clamp(min=1e-6)
        found[f"{name}_teacher_entropy"] = mean(_entropy(target).sum()) / rows
        found[f"{name}_entropy_of_mean"] = _entropy(mean(target.sum(0)) / rows)
        found[f"{name}_center_norm"] = center.norm()
    return found


@torch.no_grad()
def diagnose_keypoints(student, teacher):
    """Spread and agreement of undone keypoints (2,B,K,2), errors over the teacher's spread."""
    in_image, in_batch = spreads(teacher)
    spread = torch.hypot(in_image, in_batch).clamp(min=1e-6)
    return {"keypoint_spread": in_image, "keypoint_batch_spread": in_batch,
            "equivariance_error": (teacher[0] - teacher[1]).norm(dim=-1).mean() / spread,
            "student_error": (student - teacher.flip(0)).norm(dim=-1).mean() / spread}


def _entropy(p):
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def gradient_norms(losses, tokens, parts, world, mean):
    """Norm of each loss's gradient, before its weight, at the encoder's output: which loss owns the encoder.

    Of the whole batch, judged by one of its `parts` in each of `world` processes; mean: over the processes.
    """
    norms = {}
    for name, loss in losses.items():
        gradient, = torch.autograd.grad(loss, tokens, retain_graph=True)
        norms[f"{name}_gradient"] = (mean(gradient.square().sum()) / world / parts).sqrt()
    return norms


class CollapseAlarm:
    """Warns once of each thing that has looked collapsed for ten logged steps in a row, from step `start` on.

    prototypes: how many.
    """

    def __init__(self, prototypes, start):
        self.prototypes = prototypes
        self.start = start
        self.steps = {}  # name -> logged steps in a row
        self.warned = []

    def check(self, step, values):
        """The warnings that are due after a logged step with these values."""
        if step <= self.start:
            return []
        found = self.collapsed({name: float(value) for name, value in values.items()})
        self.steps = {name: self.steps.get(name, 0) + 1 for name in found}
        due = [name for name in found if self.steps[name] >= 10 and name not in self.warned]
        self.warned += due
        return [found[name] for name in due]

    def collapsed(self, values):
        """What looks collapsed in a logged step: {name: what to do}."""
        found = {}
        uniform = math.log(self.prototypes)
        for name in ("class", "patch"):
            if name in values:
                # Views without a mask count as 0 in the patch loss' mean.
                loss = values[name] / max(values["masked_views"], 1e-9) if name == "patch" else values[name]
                if abs(loss - uniform) < 0.02:
                    found[name] = (f"the {name} loss is glued to ln {self.prototypes} = {uniform:.3f}: the "
                                   "student gives the same answer for every input; lower --temperature "
                                   "(.02 .04), lower --ema, or raise --lr")
        if values.get("keypoint_spread", 1) < 0.05 or values.get("keypoint_batch_spread", 1) < 0.02:
            found["keypoints"] = "the pseudo keypoints coincide or never move: lower --lr or raise --align"
        return found

    def state_dict(self):
        return {"steps": self.steps, "warned": self.warned}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.warned = state["warned"]


# --------------------------------------------------------------------------------------------------- pictures
@torch.no_grad()
def draw_step(student, teacher, views, theta, mask, masked, patch, hands=8):
    """A row for each of the first hands, from HandMIM's outputs for views (2,B,3,S,S). For either view:

    the view with the teacher's keypoints (dots) and those that it finds in the other view, brought here
    (rings; a keypoint has one colour); the masked input; the reconstruction with the visible patches pasted;
    the small picture that the class token reads from the masked input; the HOG of the view, and what the
    class token makes of the masked input. Patches and picture get their true mean and deviation, which no
    loss asks for."""
    is_shown = masked // mask.shape[2] % mask.shape[1] < hands  # (M,)
    views, theta, mask = views[:, :hands], theta[:, :hands], mask[:, :hands]
    size = views.shape[-1]
    patches = to_patches(views, patch)  # (2, B, N, 3pp)
    hidden = patches.clone()
    hidden[mask] = 0
    columns = {"view": to_rgb(views.flatten(0, 1)), "masked": to_rgb(from_patches(hidden, size, patch))}
    if "keypoints" in teacher:
        here = teacher["keypoints"][:, :hands]
        undone = apply_theta(theta, here)
        others = apply_theta(invert_theta(theta), undone.flip(0))
        dots, rings = (to_pixels(points.flatten(0, 1), size) for points in (here, others))
        columns["view"] = list(map(draw_points, columns["view"], dots, rings))
    if "pixels" in student:
        _, mean, deviation = normalise_patches(patches[mask])
        filled = patches.clone()
        filled[mask] = student["pixels"][is_shown] * deviation + mean
        columns["reconstruction"] = to_rgb(from_patches(filled, size, patch))
        _, mean, deviation = normalise_patches(small_picture(views))
        small = (student["picture"][:, :hands] * deviation + mean).reshape(-1, 1, PICTURE, PICTURE)
        columns["picture read"] = to_rgb(F.interpolate(small, size).expand(-1, 3, -1, -1))
    if "hog" in student:
        for name, cells in (("HOG", hog_targets(views, patch)[0]), ("HOG read", student["hog"][:, :hands])):
            cells = cells.float().reshape(-1, HOG_DIRECTIONS, HOG_CELLS, HOG_CELLS).cpu().numpy()
            columns[name] = [draw_hog(each, size) for each in cells]
    B = views.shape[1]
    rows = [view * B + hand for hand in range(B) for view in (0, 1)]
    tiles = [images[row] for row in rows for images in columns.values()]
    names = [f"{name} {'uv'[row // B]}" for row in rows for name in columns]
    return grid(tiles, 2 * len(columns), names, cell=128)


CHARTS = {"loss": ("class", "patch", "pixel", "picture", "hog", "patch_hog", "align", "contrast", "loss"),
            "collapse": ("class_teacher_entropy", "class_entropy_of_mean", "patch_teacher_entropy",
                         "patch_entropy_of_mean"),
            "keypoints": ("keypoint_spread", "keypoint_batch_spread", "equivariance_error",
                          "student_error")} | LIVE_CHARTS


# ------------------------------------------------------------------------------------------------------- main
def open_probe(path, size, runtime):
    """The LiveProbe of hands in an index, which sees them as probe.py does."""
    index = HandIndex(path)
    hands = HandDataset([index], canvas_size(size), CONTEXT, pose_labels(index), substitute=False)
    see = partial(upright_views, scale=PROBE_WINDOW / CONTEXT, size=size)
    return LiveProbe(hands, has_points(index, *hands.labels), see, procrustes, runtime, cores())


def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="hands; labels are not read")
    cli.add_argument("--probe", metavar="INDEX",
                     help="hands with joints or detected keypoints: at every save, up to 3,000 of them show "
                          "what the encoder knows of poses (samples/probe.png); encoder_best.pt is the best "
                          "so far")
    group = cli.add_argument_group("network")
    add_init_flags(group, "an encoder.pt, or ViT weights of timm, MAE, DINO, iBOT and others (docs/mesh.md)")
    group.add_argument("--arch", choices=sorted(arch for arch in ARCHS if not is_resnet(arch)),
                       help="a ViT: vit_tiny on a CPU, vit_small on one GPU (default), vit_base on eight")
    group.add_argument("--image-size", type=int, default=224,
                       help="side of the views in pixels, a multiple of 16 (default 224; 64 on a CPU)")
    group.add_argument("--prototypes", type=int, default=8192,
                       help="number of prototypes (default 8192, iBOT; 512 to 2048 below 50,000 hands)")
    group = cli.add_argument_group("losses: a weight of 0 switches one off")
    group.add_argument("--pose-loss", choices=["none", "class", "keypoints"], default="keypoints",
                       help="loss of the class token: none; iBOT's distillation; pseudo keypoints, aligned "
                            "across the views (default)")
    group.add_argument("--align", type=float, metavar="W",
                       help="weight of the distance to the teacher's keypoints (default 1)")
    group.add_argument("--patch-loss", type=float, default=1.0, metavar="W",
                       help="weight of the self-distillation of masked patches (default 1)")
    group.add_argument("--pixel-loss", type=float, default=1.0, metavar="W",
                       help="weight of the pixels: of masked patches from their tokens, and of a small grey "
                            "picture of the view from the class token (default 1)")
    group.add_argument("--hog", type=float, default=0.0, metavar="W",
                       help="weight of HOG: of the whole view from the class token, of each patch from its "
                            "token (ours, not the paper's; default 0; 3 teaches most in some minutes, with "
                            "--align .2 --patch-loss .1 --pixel-loss .3)")
    group.add_argument("--contrast", type=float, default=0.0, metavar="W",
                       help="weight of InfoNCE on the keypoints of the batch's hands (ours; default 0; 1 "
                            "with --pairs teaches more than HandMIM alone, but over many passes)")
    group.add_argument("--keypoints", type=int, default=21,
                       help="number of pseudo keypoints, 16 to 64 are reasonable (default 21)")
    group = cli.add_argument_group("similar hands")
    group.add_argument("--pairs", metavar="FILE",
                       help="pairs.npz of mine_pairs.py for the same --data: view v then shows a similar "
                            "hand of another video, view u the hand itself (ours; default: two views of a "
                            "hand)")
    group.add_argument("--pair-share", type=float,
                       help="share of the hands, drawn anew in each step, whose view v shows a similar one "
                            "(default .5); hands without a neighbour are always their own")
    group.add_argument("--neighbour", type=int,
                       help="which mined neighbour it is, the last where a hand has fewer: 1 the nearest "
                            "(default), 0 any at random")
    group = cli.add_argument_group("masks")
    group.add_argument("--mask", choices=["block", "random"], default="block",
                       help="shape of the masks: rectangles (default, iBOT) or single patches")
    group.add_argument("--mask-ratio", type=float, nargs=2, default=(0.1, 0.5), metavar=("LOW", "HIGH"),
                       help="share of a masked view's patches (default .1 .5, iBOT)")
    group.add_argument("--mask-share", type=float, default=0.5,
                       help="share of the views that are masked (default .5, iBOT)")
    group = cli.add_argument_group("views: each is drawn alone; the usual window is 1.5 x the box")
    group.add_argument("--rotation", type=float, default=45, help="degrees either way (default 45, PeCLR)")
    group.add_argument("--zoom", type=float, nargs=2, default=(0.75, 1.1), metavar=("LOW", "HIGH"),
                       help="factor on the usual window's side, below 1 is nearer (default .75 1.1)")
    group.add_argument("--shift", type=float, default=0.12,
                       help="share of half the usual window's side, less where an upright view would lose "
                            "the box (default .12)")
    group.add_argument("--color", type=float, default=1.0,
                       help="strength of the random colours: gains, jitter, tinted light, grey, blur; 0 "
                            "none, 2 the most (default 1)")
    group = cli.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, default=5e-4,
                       help="rate of AdamW at batch 256, linear in the batch (default 5e-4, iBOT)")
    group.add_argument("--weight-decay", type=float, nargs=2, default=(0.04, 0.4), metavar=("FIRST", "LAST"),
                       help="weight decay, half a cosine from FIRST to LAST (default .04 .4, DINO)")
    group.add_argument("--warmup", type=float, default=0.05,
                       help="share of the steps in which the rate rises (default .05)")
    group.add_argument("--ema", type=float, default=0.996,
                       help="momentum of the teacher at the start, half a cosine to 1 (default .996, iBOT; "
                            ".98 for some hundred steps)")
    group.add_argument("--temperature", type=float, nargs=2, default=(0.04, 0.07), metavar=("FIRST", "LAST"),
                       help="temperature of the teacher, rises over 15 %% of the steps (default .04 .07, "
                            "iBOT); lower it if a loss stays at ln of --prototypes")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile of the encoder: slower to start, faster afterwards")
    add_training_flags(cli, batch_size=256, epochs=100)
    return cli


def check_flags(args):
    """Fills in what another flag decides; ValueError that names the first flag out of its range or at odds
    with another."""
    on_keypoints = args.pose_loss == "keypoints"
    if args.align is None:
        args.align = 1.0 if on_keypoints else 0.0
    if not args.pairs and (args.pair_share, args.neighbour) != (None, None):
        raise ValueError("--pair-share and --neighbour do nothing without --pairs: leave them out")
    args.pair_share = 0.5 if args.pair_share is None else args.pair_share
    args.neighbour = 1 if args.neighbour is None else args.neighbour
    weights = ("patch_loss", "pixel_loss", "hog", "align", "contrast")
    check_ranges(args, dict.fromkeys(weights, (0, 1e4)) | {
        "image_size": (16, 4096), "prototypes": (2, 1e6), "keypoints": (2, 1024),
        "mask_ratio": (0, 1), "mask_share": (0, 1), "pair_share": (1e-3, 1), "neighbour": (0, 1000),
        "rotation": (0, 180), "zoom": (0.1, CONTEXT / WINDOW), "shift": (0, 1), "color": (0, 2),
        "lr": (0, 1e3), "weight_decay": (0, 10), "warmup": (0, 1), "ema": (0, 1), "temperature": (1e-3, 10)})
    for name in ("mask_ratio", "zoom"):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            raise ValueError(f"--{name.replace('_', '-')}: the lower number comes first")
    for name in ("align", "contrast"):
        if getattr(args, name) and not on_keypoints:
            raise ValueError(f"--{name} needs --pose-loss keypoints")
    if args.pairs and not (args.align or args.contrast or args.pose_loss == "class"):
        raise ValueError("--pairs: no loss compares the two views; raise --align or leave it out")
    if args.contrast and args.batch_size // args.accumulate < 2:
        raise ValueError("--contrast compares the hands of a part of the batch: lower --accumulate or raise "
                         "--batch-size")
    if on_keypoints and not (args.align or args.contrast or args.hog):
        raise ValueError("--align, --contrast and --hog are all 0: use --pose-loss none")
    pose = args.hog or args.pose_loss != "none"
    if not (args.patch_loss or args.pixel_loss or pose):
        raise ValueError("--pose-loss, --patch-loss and --pixel-loss are all off: nothing to learn")
    if args.patch_loss and not pose and (args.mask_share == 0 or args.mask_ratio[1] == 0):
        raise ValueError("--mask-share or --mask-ratio is 0: --patch-loss needs masks; raise it or set "
                         "--patch-loss 0")


def loss_weights(args):
    """{name of a loss: its weight}, of the losses that are on."""
    weights = {"align": args.align, "contrast": args.contrast, "class": float(args.pose_loss == "class"),
               "patch": args.patch_loss, "pixel": args.pixel_loss, "picture": args.pixel_loss,
               "hog": args.hog, "patch_hog": args.hog}
    return {name: weight for name, weight in weights.items() if weight}


def check_masks(args, side):
    """ValueError where masks of these flags cannot hide a patch of a view of side x side patches."""
    least = least_block(side, side) if args.mask == "block" else 1
    if args.mask_share and args.mask == "block" and side == 1:
        raise ValueError(f"--image-size {args.image_size} is one patch: raise it, or use --mask random or "
                         "--mask-share 0")
    if args.mask_share and args.mask_ratio[1] * side * side < least:
        raise ValueError(f"--mask-ratio {args.mask_ratio[1]}: less than the smallest {args.mask} mask, "
                         f"{least} of {side * side} patches; raise it or --image-size, or use --mask random")


def main(argv=None):
    args = flags().parse_args(argv)
    check_flags(args)
    runtime = setup(args)
    device = runtime.device
    size = args.image_size
    indices = [HandIndex(path) for path in args.data]
    dataset = HandDataset(indices, canvas_size(size))
    neighbours = read_pairs(args.pairs, indices, "keypoints", "joints2d") if args.pairs else None  # (N, K)
    steps = total_steps(args, len(dataset))
    torch.manual_seed(args.seed)
    inputs = {"data": index_fingerprint([index.columns for index in indices], "")}
    if args.pairs:
        inputs["pairs"] = hashlib.sha256(neighbours).hexdigest()[:16]
    probe = open_probe(args.probe, size, runtime) if args.probe else None
    if probe:
        inputs["probe"] = index_fingerprint([probe.hands.indices[0].columns], probe.hands.labels[-1])
    state = check_run(args, runtime, "mim", inputs)
    encoder = choose_encoder(args.arch, args.init, size, saved=state["encoder"] if state else None,
                             heads=args.heads, pixels=args.pixels)
    if is_resnet(encoder.arch):
        raise ValueError(f"--init {args.init} holds {encoder.arch}: masks need a ViT")
    patch = encoder.patch
    side = size // patch
    check_masks(args, side)
    check_mix(dataset.rows, dataset.starts, args.mix)

    weights = loss_weights(args)
    distil = tuple(name for name in ("class", "patch") if name in weights)
    keypoints = args.keypoints if "align" in weights or "contrast" in weights else 0
    student = HandMIM(encoder, args.prototypes, distil, keypoints, "pixel" in weights, "hog" in weights)
    student.to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    centers = Centers(distil, args.prototypes, device)
    optimizer = adamw(param_groups(student.named_parameters(), args.weight_decay[0]), device)
    scaler = runtime.scaler()
    alarm = CollapseAlarm(args.prototypes, start=0.1 * steps)
    start = restore(state, student=student, teacher=teacher, centers=centers, optimizer=optimizer,
                    scaler=scaler, alarm=alarm)
    state = state and {"step": start}  # the rest would stay in memory
    if args.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    net = runtime.wrap(student)
    parameters = list(student.parameters())
    order = make_sampler(dataset.rows, dataset.starts, args.mix, args.batch_size, args.seed, start, steps,
                         runtime.rank, runtime.world)
    cache = cache_canvases(dataset, args.cache, device, runtime.workers and cores(), runtime.rank,
                           runtime.world, runtime.local_rank)
    sampler = PairSampler(order, dataset.rows, neighbours, args.neighbour, args.seed, args.pair_share)
    loader = make_loader(dataset, sampler, workers=runtime.workers, pin=device.type == "cuda")
    unread = UnreadImages(dataset)
    lr_base = args.lr * args.batch_size / 256
    frozen = min(FROZEN, int(0.02 * steps))
    finer = choose_finer(WINDOW / CONTEXT * args.zoom[1], canvas_size(size), size)
    draw_theta = theta_sampler(args.rotation, args.zoom, args.shift)
    draw_light, draw_color, draw_sigma = strong_color(args.color, size)
    draw_mask = mask_sampler(block_mask if args.mask == "block" else random_mask, side, args.mask_ratio,
                             args.mask_share)
    B = args.batch_size // runtime.world  # hands of this process
    parts = batch_parts(B, args.accumulate)

    def draw(step):
        """What is random in a step, of this process's hands, for views u and v: (2, B, ...)."""
        def rows(stream, draw_one):
            return runtime.draw(two_views(draw_one), args.batch_size, args.seed, step, stream, dim=1)

        sigma = rows(BLUR, draw_sigma)
        looks = {"light": rows(LIGHT, draw_light), "color": rows(COLOR, draw_color), "sigma": sigma,
                 "blurred": rows_to_blur(sigma)}
        mask = rows(MASKS, draw_mask)  # (2, B, N)
        masked = [mask[:, part].flatten().nonzero().squeeze(1) for part, _ in parts]  # (M,) of each part
        return {"theta": rows(THETA, draw_theta), "looks": looks, "mask": mask, "masked": masked}

    if runtime.is_main and args.pairs:
        print(f"{(neighbours[:, 0] >= 0).sum()} of {len(dataset)} hands have a neighbour")
    out = start_run(args, runtime, state, inputs)
    announce(runtime, out, student, len(dataset), start, steps, args.batch_size, cache)
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every,
              show=("keypoint_spread", "patch_teacher_entropy", "probe_ridge_mm", "probe_ridge_percent"))

    def export(step):
        """The teacher's encoder after `step` updates, also as the best if the log says so."""
        is_best = probe and log.lowest.get(probe.score) == step
        for name in ("encoder.pt", "encoder_best.pt") if is_best else ("encoder.pt",):
            save_checkpoint(out / name, "encoder", step=step, arch=encoder.arch, config=encoder.config,
                            state_dict=teacher.encoder.state_dict())

    if state and runtime.is_main:  # a kill may have come between last.pt and these
        if probe and log.last.get(probe.score) != start:
            log.write({"step": start} | probe(teacher.encoder))
        export(start)
    saves = Saves(runtime, args.save_every, args.save_minutes, steps)

    for step, batch, drawn in saves.watch(feed(unread.watch(loader), draw, start, device, cache)):
        theta, mask = drawn["theta"], drawn["mask"]  # (2, B, 2, 3), (2, B, N)
        shown = pair_rows(batch["failed"], B)  # (2, B): the hand in view u; in view v itself or a similar one
        views = make_views(batch["canvas"][shown], theta, size, finer, drawn["looks"])  # (2, B, 3, S, S)
        real = in_photograph(theta, batch["valid"][shown], side)  # (2, B, N)
        real_masked = runtime.mean((real & mask).sum().float()).clamp(min=1) / args.accumulate
        temperature = teacher_temperature(step, steps, *args.temperature)
        values = {"masked_views": mask.any(2).float().mean(), "masked_patches": mask.float().mean()}

        for (part, is_last), masked in zip(parts, drawn["masked"], strict=True):
            some_views, some_theta, some_mask = views[:, part], theta[:, part], mask[:, part]
            with runtime.sync_gradients(net, is_last):
                with runtime.autocast():
                    with torch.no_grad():
                        taught = teacher(some_views, some_mask, masked, hide=False)
                    learned = net(some_views, some_mask, masked, hide=True)
                losses = {}
                if keypoints:  # the pose loss: class token, undone onto the canvas; the OTHER view
                    # A canvas lies around its hand's box, and mining keeps the turn in the image. So similar
                    # hands lie upon each other as their canvases lie: joints .05 of the box apart (random
                    # hands: .30; laid by wrist and size: .046).
                    both = torch.cat([learned["keypoints"], taught["keypoints"]], dim=2)  # (2, B, 2K, 2)
                    points, targets = runtime.gather(apply_theta(some_theta, both)).chunk(2, dim=2)
                    targets = targets.flip(0)
                    if "align" in weights:
                        losses["align"] = align_loss(points, targets)
                    if "contrast" in weights:
                        losses["contrast"] = contrast_loss(points, targets)
                if "class" in weights:  # class token, iBOT's way: the OTHER view of the hand
                    errors = distill(learned["class"], taught["class"].flip(0), centers["class"], temperature)
                    losses["class"] = errors.mean()
                if "patch" in weights:  # masked patches: the SAME view, the same patch
                    errors = distill(learned["patch"], taught["patch"], centers["patch"], temperature)  # (M,)
                    losses["patch"] = (errors * patch_weights(some_mask, masked)).sum()
                if "pixel" in weights:  # masked patches, but for the padding around the photograph
                    patches = to_patches(some_views, patch).flatten(0, 2)[masked]  # (M, 3pp)
                    share = real[:, part].flatten()[masked] / real_masked  # (M,)
                    losses["pixel"] = pixel_loss(learned["pixels"], patches, share)
                if "picture" in weights:  # class token: the whole view, also what is masked
                    losses["picture"] = picture_loss(learned["picture"], small_picture(some_views))
                if "hog" in weights:
                    whole, of_patches = hog_targets(some_views, patch)
                    losses["hog"] = F.mse_loss(learned["hog"], whole)
                    losses["patch_hog"] = F.mse_loss(learned["patch_hog"], of_patches)
                loss = sum(weights[name] * term for name, term in losses.items())
                logged = is_last and is_due(step, args.log_every, steps)  # of the last part
                if logged:
                    values |= diagnose_prototypes(taught, centers, temperature, runtime.mean)
                    values |= diagnose_keypoints(points, targets.flip(0)) if keypoints else {}
                    values |= gradient_norms(losses, learned["tokens"], args.accumulate, runtime.world,
                                             runtime.mean)
                scaler.scale(loss / args.accumulate).backward()
            centers.collect(taught)
            for name, term in (losses | {"loss": loss}).items():
                values[name] = values.get(name, 0) + term.detach() / args.accumulate

        if step < frozen and distil:
            student.prototype_head.prototypes.grad = None
        lr = cosine(step, steps, lr_base, final=1e-6, warmup=int(args.warmup * steps))
        set_lr(optimizer, lr, cosine(step, steps, *args.weight_decay))
        norm = update(optimizer, scaler, parameters, CLIP)
        ema_update(teacher, student, cosine(step, steps, args.ema, final=1.0))
        centers.move(runtime.mean)

        log(step + 1, values | {"lr": lr, "gradient_norm": norm})
        for text in alarm.check(step, values) if logged else ():
            log.warn(step + 1, text)
        is_saved = saves.due(step)
        if is_saved:  # first of all: where a machine is taken back, seconds are left
            save_checkpoint(out / "last.pt", "mim", step=step + 1, student=student.state_dict(),
                            encoder={"arch": encoder.arch, "config": encoder.config},
                            teacher=teacher.state_dict(), centers=centers.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            alarm=alarm.state_dict())
            if probe:
                log.write({"step": step + 1} | probe(teacher.encoder))
            export(step + 1)
            save_curves(out / "samples", log.curves, CHARTS)
        if is_saved or (runtime.is_main and step == 0):
            tiles = draw_step(learned, taught, some_views, some_theta, some_mask, masked, patch)
            save_image(out / "samples" / f"step_{step + 1:07d}.png", tiles)
    log.close()
    unread.rows = runtime.union(unread.rows)
    if runtime.is_main and start < steps:
        print(f"{out / 'encoder.pt'}: step {steps}, the teacher's encoder; look at {out / 'samples'}")
        if unread.rows:
            print(unread)
    finish()


if __name__ == "__main__":
    run(main)
