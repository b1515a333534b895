"""Supervised mesh training: an encoder (fresh, or pre-trained by any script here or elsewhere) and the PyMAF head regress
MANO from one view of a hand.

Reads indices (data.py); writes RUN/config.json, log.jsonl, last.pt, encoder.pt, samples/*.png. One step: canvas -> random
view (theta) and colour -> encoder -> T estimates of rotations, shape and camera -> losses on all of them. Left hands come
mirrored; the labels turn with the view. The averaged weights (EMA) are the ones validated, saved for use and exported.
"""

import copy

import numpy as np
import torch

from data import HandDataset, HandIndex, check_mix, make_loader, make_sampler, mirror, square
from draw import curve, draw_joints, grid, overlay, save_image
from mano import Mano, hand_fingerprint, labelled_joints, read_mano, rotmat_from_axis_angle, weak_perspective
from metrics import procrustes
from model import ARCHS, HandMesh, MeshHead, choose_encoder
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
from synthetic_hand import synthetic_mano
from views import (
    apply_color,
    apply_theta,
    centre_theta,
    invert_theta,
    normalise,
    random_color,
    random_theta,
    theta_rotation,
    to_rgb,
    warp,
)

CONTEXT = 2.0                                                      # canvas: room for rotation and shift around the box
LABELS = ("joints2d", "visible", "joints", "vertices", "pose", "betas")
WEIGHTS = {                # rotations: HongwenZhang/PyMAF-X core/trainer.py, hand_only. The others are ours: L1 on points,
    "rotations": 60.0,     # because the metric is a distance; betas and camera held by their own labels, because as long as
    "betas": 1.0,          # the orientation is unknown, a small hand far away is what fits the points best; and above all
    "camera": 2.0,         # the mesh in the hand's own frame, which teaches the fingers before the orientation is known
    "joints2d": 3.0,
    "joints": 30.0,
    "vertices": 30.0,
    "articulation": 500.0,
}


# --------------------------------------------------------------------------------------------------------------- losses
def mesh_losses(outputs, target, arrays, definitions=("freihand",)):
    """Named losses, each the mean over the iterations, and of the samples over what is labelled.

    outputs: MeshHead's list. target: make_target's dict. arrays: the hand's. definitions: of the joints, of each source."""
    terms = dict.fromkeys(WEIGHTS, 0.0)
    known = target["known_joints"] * target["has_joints"][:, None]                           # (B, 21)
    root, has_mesh = target["joints"][:, :1], target["has_vertices"] * target["has_joints"]
    for output in outputs:
        joints = defined_joints(output, target, arrays, definitions)                         # (B, 21, 3) m
        seen = target["visible"][..., None]                                                  # confidence of what is known
        # The camera learns from the true joints; the pose then moves under a fixed camera, so it cannot shrink it.
        labelled = target["has_joints"][:, None] > 0
        fixed = torch.where(labelled, output["camera"].detach(), output["camera"])
        by_camera = weak_perspective(target["joints"] - root, output["camera"]) - target["joints2d"]       # (B, 21, 2)
        by_both = weak_perspective(joints, fixed) - target["joints2d"]
        rotation = (output["rotmats"] - target["rotmats"]) ** 2
        upright = (output["vertices"] - joints[:, :1]) @ output["rotmats"][:, 0]         # R^T v: in the hand's own frame
        step = {"rotations": masked_mean(rotation, target["has_pose"]),
                "articulation": masked_mean((upright - target["upright"]).abs(), target["has_pose"] * has_mesh),
                "betas": masked_mean((output["betas"] - target["betas"]) ** 2, target["has_betas"]),
                "camera": masked_mean(by_camera.abs() * seen, target["has_joints2d"][:, None] * target["known_joints2d"] * known),
                "joints2d": masked_mean(by_both.abs() * seen, target["has_joints2d"][:, None] * target["known_joints2d"]),
                "joints": masked_mean((joints - joints[:, :1] - target["joints"] + root).abs(), known),
                "vertices": masked_mean((output["vertices"] - joints[:, :1] - target["vertices"] + root).abs(), has_mesh)}
        terms = {name: terms[name] + step[name] / len(outputs) for name in terms}
    return terms


def masked_mean(values, has):
    """Mean over the entries of values (B,...) or (B,P,...) where has (B,) or (B,P) is 1; 0 where there are none."""
    return (values.flatten(has.ndim).mean(has.ndim) * has).sum() / has.sum().clamp(min=1)


def defined_joints(output, batch, arrays, definitions):
    """Joints (B,21,3) of a prediction as the labels of each sample's source define them."""
    left, found = batch["mirrored"] > 0, None
    for name in dict.fromkeys(definitions):
        joints = labelled_joints(output["vertices"], output["joints"], arrays, name, left)
        own = torch.tensor([other == name for other in definitions], device=left.device)[batch["source"]]
        found = joints if found is None else torch.where(own[:, None, None], joints, found)
    return found


def definition_of(index):
    return index.meta.get("joints", "freihand")


# ---------------------------------------------------------------------------------------------------------------- views
def make_views(canvas, theta, size, color=None):
    """Canvases (B,3,H,W) u8 -> views (B,3,size,size) as the encoder sees them."""
    views = warp(canvas, theta, size)
    return normalise(views if color is None else apply_color(views, color))


def make_target(batch, theta, hands_mean):
    """The labels of a batch in its views: 2-D joints by the inverse of theta, 3-D turned with the content."""
    turn = theta_rotation(theta)                                   # (B, 3, 3)
    pose = batch["pose"].unflatten(1, (16, 3))
    pose = torch.cat([pose[:, :1], pose[:, 1:] + hands_mean * batch["pose_mean"][:, None, None]], dim=1)
    rotmats = rotmat_from_axis_angle(pose)                         # (B, 16, 3, 3)
    rotmats = torch.cat([turn[:, None] @ rotmats[:, :1], rotmats[:, 1:]], dim=1)
    upright = (batch["vertices"] - batch["joints"][:, :1]) @ rotmat_from_axis_angle(pose[:, 0])      # (B, 778, 3)
    turned = {name: batch[name] @ turn.transpose(1, 2) for name in ("joints", "vertices")}
    return batch | turned | {"rotmats": rotmats, "upright": upright, "joints2d": apply_theta(invert_theta(theta), batch["joints2d"])}


def draw_views(args, runtime, step):
    """This process's share of the step's random views and colours, functions of (seed, step)."""
    zoom = args.box_scale / CONTEXT
    theta = random_theta(args.batch_size, generator(args.seed, step, 0), np.deg2rad(args.rotation),
                         (zoom / (1 + args.zoom), zoom * (1 + args.zoom)), zoom * args.shift)
    color = random_color(args.batch_size, generator(args.seed, step, 1), gain=args.color)
    return runtime.share(theta).to(runtime.device), runtime.share(color).to(runtime.device)


# ----------------------------------------------------------------------------------------------------------------- data
def label_rows(indices, fraction, seed):
    """Rows of a seeded share of the poses; all images of a pose go together, and a smaller share is part of a larger one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"--label-fraction {fraction} must lie in (0, 1]")
    starts = np.cumsum([0] + [index.meta["labels"] for index in indices])
    poses = np.concatenate([index.pose_ids() + start for index, start in zip(indices, starts[:-1], strict=True)])
    chosen = np.random.default_rng([seed, 77]).permutation(starts[-1])[:max(1, round(fraction * starts[-1]))]
    return np.flatnonzero(np.isin(poses, chosen))


def training_mean(dataset, hand, box_scale, count=4000):
    """Mean rotations (16,3,3) and camera scale of the rows trained on: the chordal mean of the global orientations, the
    hand's mean pose for the fingers, the median scale in an upright view. Columns only, no image is opened."""
    turns, scales = [], []
    chosen = dataset.rows[np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))]
    for index, start in zip(dataset.indices, dataset.starts[:-1], strict=True):
        rows = chosen[(chosen >= start) & (chosen < start + len(index))] - start
        if not len(rows):
            continue
        labels = index.pose_ids()[rows]
        if "pose" in index.columns:
            pose, left = index.columns["pose"][labels], np.array([index.side(row) for row in rows])[:, None] == 1
            pose = np.where(left, mirror("pose", pose), pose)[:, :3]
            turns.append(rotmat_from_axis_angle(torch.from_numpy(pose[np.isfinite(pose).all(1)])))
        if "joints" in index.columns and "joints2d" in index.columns:
            side = [square(index.columns["box"][row], box_scale)[2] for row in rows]
            spread = [np.linalg.norm(x[..., :2] - np.nanmean(x[..., :2], 1, keepdims=True), axis=-1)
                      for x in (index.columns["joints2d"][labels], index.columns["joints"][labels])]
            scales.append(np.nanmean(spread[0], 1) / np.maximum(np.nanmean(spread[1], 1), 1e-4) * 2 / np.array(side))
    rotmats = rotmat_from_axis_angle(torch.cat([torch.zeros(1, 3), hand.hands_mean.cpu()]))
    if sum(map(len, turns)):
        u, _, v = torch.linalg.svd(torch.cat(turns).mean(0))
        rotmats[0] = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ v).sign())])) @ v
    return rotmats, float(np.nanmedian(np.concatenate(scales))) if scales else 9.0


def open_labelled(paths, flag):
    """The indices, refused where they hold no labels."""
    indices = [HandIndex(path) for path in paths]
    for index in indices:
        if not {"joints", "joints2d"} & set(index.columns):
            raise ValueError(f"{flag} {index.path}: no labels in this index (images alone are for pre-training)")
    return indices


# ----------------------------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(net, loader, runtime, args, arrays, definition):
    """PA-MPJPE and PA-MPVPE in mm over the validation hands of all processes, upright views of box x --box-scale, and the
    number of hands left out because their image could not be read or their labels are not all there."""
    net.eval()
    unread = 0
    sums = torch.zeros(4, device=runtime.device)
    for batch in loader:
        unread += int((batch["failed"] >= 0).sum())
        theta = centre_theta(len(batch["row"]), args.box_scale / CONTEXT).to(runtime.device)
        views = make_views(batch["canvas"].to(runtime.device), theta, args.image_size)
        with runtime.autocast():
            output = net(views)[-1]
        joints = labelled_joints(output["vertices"], output["joints"], arrays, definition, batch["mirrored"].to(runtime.device) > 0)
        for k, (name, predicted) in enumerate((("joints", joints), ("vertices", output["vertices"]))):
            whole = batch["known_joints"].all(1) if name == "joints" else batch["has_vertices"].bool()
            has = (whole & (batch["failed"] < 0)).numpy()
            if has.any():
                pred, true = predicted.float().cpu().numpy()[has], batch[name].numpy()[has]
                errors = np.linalg.norm(procrustes(pred, true, reflect=True) - true, axis=-1)
                sums[2 * k] += errors.mean(1).sum()
                sums[2 * k + 1] += len(errors)
    sums = runtime.mean(sums)
    unread = runtime.mean(torch.tensor(float(unread), device=runtime.device)) * runtime.world
    return *(float(1000 * sums[k] / sums[k + 1]) if sums[k + 1] else None for k in (0, 2)), int(unread)


@torch.no_grad()
def picture(net, batch, runtime, args, faces):
    """Views beside the mesh laid over them and the true joints: what the network sees and makes."""
    net.eval()
    size, tiles = args.image_size, []
    theta = centre_theta(len(batch["row"]), args.box_scale / CONTEXT).to(runtime.device)
    views = make_views(batch["canvas"].to(runtime.device), theta, size)
    output = net(views)[-1]
    seen = to_rgb(views)
    points = torch.cat([weak_perspective(output["vertices"], output["camera"]), output["vertices"][..., 2:]], dim=2).cpu().numpy()
    joints2d = batch["joints2d"] * (CONTEXT / args.box_scale)
    for image, mesh, joints in zip(seen, points, joints2d.numpy(), strict=True):
        mesh[:, :2] = (mesh[:, :2] + 1) * size / 2
        tiles += [draw_joints(image, (joints + 1) * size / 2 - 0.5), overlay(image, mesh, faces)]
    return grid(tiles, 8, ["true joints", "estimate"] * len(seen), cell=144)


# ----------------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--data", nargs="+", required=True, metavar="INDEX", help="labelled training hands")
    cli.add_argument("--val", required=True, metavar="INDEX", help="labelled hands for the validation lines of the log")
    cli.add_argument("--mano",
                     help="MANO_RIGHT.pkl or .npz (licensed: mano.is.tue.mpg.de); default: the synthetic hand")
    group = cli.add_argument_group("network")
    group.add_argument("--init",
                       help="encoder to start from: RUN/encoder.pt, or ViT or ResNet-50 weights of timm, MAE, DINO, iBOT, PeCLR, SiMHand")
    group.add_argument("--arch", choices=sorted(ARCHS), help="encoder where --init does not say (default vit_small)")
    group.add_argument("--image-size", type=int, default=224, help="side of the views, a multiple of 16 (default 224)")
    group.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of a ViT: .1 for small, .2 for base (iBOT)")
    group.add_argument("--dropout", type=float, default=0.1, help="in the head's regressors (PyMAF: .5, from scratch)")
    group.add_argument("--head-width", type=int, default=256, help="channels of the head's maps (PyMAF: 256; 64 is enough for toy sizes)")
    group.add_argument("--iterations", type=int, default=3, choices=[1, 2, 3], help="feedback iterations of the head (PyMAF: 3)")
    group = cli.add_argument_group("optimisation (ours, from the practice of MAE, iBOT and ViTPose)")
    group.add_argument("--lr", type=float, default=5e-4,
                       help="AdamW rate of the head at batch 256, scaled linearly with the batch; 2e-4 to 4e-3")
    group.add_argument("--layer-decay", type=float,
                       help="rate of a block relative to the next one; default .75 with --init, 1 from scratch; of a "
                            "pre-trained ResNet the whole trunk takes a tenth of the rate")
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises")
    group.add_argument("--ema", type=float, default=0.999, help="momentum of the averaged weights, lower in the first steps")
    group.add_argument("--label-fraction", type=float, default=1.0, help="seeded share of the labelled poses to train on")
    group = cli.add_argument_group("views")
    group.add_argument("--box-scale", type=float, default=1.3,
                       help="side of an upright view over the longer side of the box (PyMAF-X: 1.2)")
    group.add_argument("--rotation", type=float, default=90, help="degrees either way: hands occur in all orientations (PyMAF: 30)")
    group.add_argument("--zoom", type=float, default=0.25, help="views are up to this share larger or smaller")
    group.add_argument("--shift", type=float, default=0.1, help="views move by up to this share of half their side")
    group.add_argument("--color", type=float, default=0.4, help="each channel is multiplied by 1 -+ this")
    group.add_argument("--eval-every", type=int, default=500, help="steps between validations and pictures; the end always has one")
    add_training_flags(cli, batch_size=64, epochs=100)
    return cli


def check_flags(args):
    """ValueError that names the first flag out of its range, before anything is written."""
    ranges = {"image_size": (16, 4096), "drop_path": (0, 0.99), "dropout": (0, 0.99), "lr": (0, 1e3), "ema": (0, 1), "warmup": (0, 1),
              "weight_decay": (0, 10), "box_scale": (0.5, CONTEXT), "rotation": (0, 180), "zoom": (0, 4), "shift": (0, 1), "color": (0, 1)}
    check_ranges(args, ranges)
    if args.head_width < 32 or args.head_width % 32:
        raise ValueError(f"--head-width {args.head_width}: must be a multiple of 32")


def build(args, hand):
    """HandMesh from the flags: a fresh or pre-trained encoder under a fresh head."""
    encoder = choose_encoder(args, "vit_small", args.drop_path)
    return HandMesh(encoder, MeshHead(hand, encoder.dim, encoder.dim, strides=encoder.arch == "resnet50", iterations=args.iterations,
                                      width=args.head_width, dropout=args.dropout))


def lr_scales(encoder, decay):
    """Parameter name -> rate relative to the head's: layer-wise decay in a ViT, one tenth for a pre-trained ResNet."""
    def scale(name):
        if not name.startswith("encoder.") or decay == 1:
            return 1.0
        return decay ** (encoder.layers - encoder.layer_of(name.removeprefix("encoder."))) if encoder.arch != "resnet50" else 0.1
    return scale


def main(argv=None):
    args = flags().parse_args(argv)
    check_flags(args)
    runtime = setup(args)
    hand_arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    hand = Mano(hand_arrays)
    indices, val_index = open_labelled(args.data, "--data"), open_labelled([args.val], "--val")[0]
    rows = label_rows(indices, args.label_fraction, args.seed)
    steps = total_steps(args, len(rows))
    torch.manual_seed(args.seed)
    model = build(args, hand)
    canvas = args.image_size * 8 // 7                              # 256 for 224: views of box x 1.3 are never finer
    dataset = HandDataset(indices, canvas, CONTEXT, LABELS, rows)
    model.head.set_mean(*training_mean(dataset, hand, args.box_scale))
    check_mix(rows, dataset.starts, args.mix)
    out, state = start_run(args, runtime)

    model.to(runtime.device).train()
    ema = copy.deepcopy(model)
    decay = args.layer_decay if args.layer_decay is not None else 0.75 if args.init else 1.0
    groups = param_groups(model.named_parameters(), args.weight_decay, lr_scales(model.encoder, decay))
    optimizer = adamw(groups, runtime.device)
    scaler, start = runtime.scaler(), 0
    if state:
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[name])
        start = state["step"]
    net = runtime.wrap(model)

    order = make_sampler(rows, dataset.starts, args.mix, args.batch_size, args.seed, start, steps, runtime.rank, runtime.world)
    loader = make_loader(dataset, order, workers=runtime.workers, pin=runtime.device.type == "cuda")
    definitions = [definition_of(index) for index in indices]
    val_rows = runtime.share(np.arange(len(val_index)))
    val_loader = make_loader(HandDataset([val_index], canvas, CONTEXT, LABELS, val_rows, substitute=False), batch_size=64,
                             workers=runtime.workers)
    shown = next(iter(make_loader(HandDataset([val_index], canvas, CONTEXT, LABELS, np.linspace(0, len(val_index) - 1, 8).astype(int)),
                                  batch_size=8)))
    log = Log(out / "log.jsonl", start, steps, args.batch_size, runtime, args.log_every)
    parameters, failed, lr_base = list(model.parameters()), set(), args.lr * args.batch_size / 256

    for step, batch in enumerate(loader, start):
        failed |= set(batch["failed"][batch["failed"] >= 0].tolist())
        model.train()
        batch = {name: value.to(runtime.device, non_blocking=True) for name, value in batch.items()}
        theta, color = draw_views(args, runtime, step)
        torch.manual_seed(generator(args.seed, step, 2 + runtime.rank).initial_seed())         # dropout, stochastic depth
        views, target = make_views(batch["canvas"], theta, args.image_size, color), make_target(batch, theta, hand.hands_mean)
        if step == 0 and runtime.is_main:
            marked = [draw_joints(image, (joints + 1) * args.image_size / 2 - 0.5)
                      for image, joints in zip(to_rgb(views[:16]), target["joints2d"][:16].cpu().numpy(), strict=True)]
            save_image(out / "samples" / "views.png", grid(marked, 8, cell=144))
        lr = cosine(step, steps, lr_base, final=1e-6, warmup=int(args.warmup * steps))
        set_lr(optimizer, lr)
        totals = {}
        for part in torch.arange(len(views)).chunk(args.accumulate):
            with runtime.exchange(net, last=part[-1] == len(views) - 1):
                with runtime.autocast():
                    outputs = net(views[part])
                terms = mesh_losses(outputs, {name: value[part] for name, value in target.items()}, hand_arrays, definitions)
                loss = sum(WEIGHTS[name] * term for name, term in terms.items())
                scaler.scale(loss / args.accumulate).backward()
            for name, term in (terms | {"loss": loss}).items():
                totals[name] = totals.get(name, 0) + term.detach() / args.accumulate
        norm = update(optimizer, scaler, parameters, clip=1.0)
        ema_update(ema, model, min(args.ema, (1 + step) / (10 + step)))
        log(step + 1, totals | {"lr": lr, "gradient_norm": norm})

        done = step + 1 == steps
        if done or (step + 1) % args.eval_every == 0:
            pa_joints, pa_vertices, unread = validate(ema, val_loader, runtime, args, hand_arrays, definition_of(val_index))
            log.write({"step": step + 1, "val_pa_mpjpe_mm": pa_joints, "val_pa_mpvpe_mm": pa_vertices})
            if runtime.is_main:
                save_image(out / "samples" / f"step_{step + 1:07d}.png", picture(ema, shown, runtime, args, hand_arrays["f"]))
        if runtime.is_main and (done or (step + 1) % args.save_every == 0):
            save_checkpoint(out / "last.pt", kind="mesh", step=step + 1, hand=hand_fingerprint(hand_arrays), box_scale=args.box_scale,
                            encoder={"arch": model.encoder.arch, "config": model.encoder.config}, head=model.head.config,
                            model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            save_checkpoint(out / "encoder.pt", kind="encoder", step=step + 1, arch=model.encoder.arch, config=model.encoder.config,
                            state_dict=ema.encoder.state_dict())
    log.close()
    failed = runtime.union(failed)
    if runtime.is_main and start < steps:
        rows = read_log(out / "log.jsonl")
        for names in (["loss"], ["val_pa_mpvpe_mm", "val_pa_mpjpe_mm"]):
            points = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names}
            series = {name: tuple(zip(*pairs, strict=True)) for name, pairs in points.items() if pairs}
            save_image(out / "samples" / f"{names[0]}.png", curve(series, title=names[0], x_label="step"))
        score = ", ".join(f"{name} {value:.2f} mm" for name, value in (("PA-MPVPE", pa_vertices), ("PA-MPJPE", pa_joints)) if value)
        print(f"{out / 'last.pt'}: step {steps}, validation {score}")
        if unread:
            print(f"{unread} validation images could not be read and were left out of these numbers")
        if failed:
            print(dataset.unread(failed))
    finish()


if __name__ == "__main__":
    run(main)
