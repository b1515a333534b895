"""Timings: python tests/benchmark.py SECTION [SECTION ...]   (all sections without one); medians [quartiles].

Two threads, rivals in one process and in turn, so that a busy machine slows both alike.
"""
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]


def race(runners, repeats=20, warm_up=3):
    """{name: function} -> {name: (quartile, median, quartile)} in ms; every round runs each once."""
    seconds = {name: [] for name in runners}
    for turn in range(warm_up + repeats):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * np.quantile(times, [0.25, 0.5, 0.75]) for name, times in seconds.items()}


def layer():
    """`Mano` (21 joints) against smplx.lbs (16), both with a backward pass to rotations and betas."""
    from fixtures import PARENTS, random_mano
    from smplx.lbs import lbs

    from mano import FREIHAND_TO_MANO, Mano, rotmat_from_axis_angle

    arrays = random_mano()
    hand = Mano(arrays)
    a = {key: torch.tensor(value, dtype=torch.float32) for key, value in arrays.items() if key != "f"}
    posedirs, parents = a["posedirs"].reshape(-1, 135).T.contiguous(), torch.tensor(PARENTS)

    def smplx_hand(rotmats, betas):
        return lbs(betas, rotmats, a["v_template"], a["shapedirs"], posedirs, a["J_regressor"], parents,
                   a["weights"],
                   pose2rot=False)

    print(f"layer, forward + backward, ms  {'smplx.lbs':>26}{'ours':>26}   times faster (target)")
    for batch, target in ((1, 1.3), (64, 2.0), (1024, 3.0)):
        generator = torch.Generator().manual_seed(batch)
        rotmats = rotmat_from_axis_angle(torch.randn(batch, 16, 3, generator=generator)).requires_grad_()
        betas = torch.randn(batch, 10, generator=generator).requires_grad_()
        gradients = torch.randn(batch, 778, 3, generator=generator), torch.randn(batch, 21, 3,
                                                                                 generator=generator)

        def step(model, rotmats=rotmats, betas=betas, gradients=gradients):
            vertices, joints = model(rotmats, betas)
            torch.autograd.grad((vertices, joints), (rotmats, betas),
                                (gradients[0], gradients[1][:, :joints.shape[1]]))

        result = race({"smplx": lambda step=step: step(smplx_hand), "ours": lambda step=step: step(hand)})
        columns = "".join(f"{f'{m:.3f} [{low:.3f} {high:.3f}]':>26}" for low, m, high in result.values())
        print(f"  batch {batch:<23d}{columns}   {result['smplx'][1] / result['ours'][1]:.2f} ({target})")

    # The last batch again, joints 0 to 15 of the chain in the file's order, gradients of the same sum.
    chain = list(FREIHAND_TO_MANO[:16])
    found = []
    for model, order in ((smplx_hand, list(range(16))), (hand, chain)):
        vertices, joints = model(rotmats, betas)
        loss = (vertices * gradients[0]).sum() + (joints[:, order] * gradients[1][:, :16]).sum()
        found.append((vertices, joints[:, order], *torch.autograd.grad(loss, (rotmats, betas))))
    vertices, joints, *slopes = ((ours - theirs).detach() for theirs, ours in zip(*found, strict=True))
    relative = max(float(slope.norm() / theirs.norm()) for slope,
                   theirs in zip(slopes, found[0][2:], strict=True))
    print(f"  largest difference, 1,024 hands: vertices {vertices.abs().max():.1e} m, "
          f"joints {joints.abs().max():.1e} m, "
          f"gradients {relative:.1e} relative")


def scores():
    """The whole evaluations of FreiHAND and of HO-3D v2: random hands of 21 joints and 778 vertices."""
    from metrics import evaluate_hands

    rng = np.random.default_rng(0)
    for protocol, count, limit in (("freihand", 3960, 15), ("ho3d", 11524, 40)):
        print(f"metrics.evaluate_hands, {protocol}, {count:,} hands, s (target {limit})")
        gt = rng.normal(0, 0.03, (count, 799, 3)) + [0, 0, 0.7]
        for name, noise in (("5 mm off", 0.005), ("50 mm off", 0.05)):
            pred = gt + rng.normal(0, noise, gt.shape)
            arrays = [x for points in (pred, gt) for x in (points[:, :21], points[:, 21:])]
            low, m, high = race({"ours": lambda arrays=arrays, of=protocol: evaluate_hands(*arrays, of)}, 3,
                                0)["ours"] / 1e3
            print(f"  {name:10}  {m:.2f} [{low:.2f} {high:.2f}]")


def preparing(labels=32_560):
    """prepare_data.py freihand on labels of the full size and 4 x as many links to one image: seconds and
    peak memory."""
    from PIL import Image

    print(f"prepare_data.py freihand, {4 * labels:,} images of {labels:,} labels (targets 180 s, 4096 MB)")
    rng, command = np.random.default_rng(0), [sys.executable, str(ROOT.parent / "prepare_data.py"),
                                              "freihand"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("rgb", "mask"):
            (folder / "hands" / "training" / name).mkdir(parents=True)
        Image.new("RGB", (224, 224)).save(folder / "one.jpg")
        for k in range(4 * labels):
            (folder / "hands" / "training" / "rgb" / f"{k:08d}.jpg").symlink_to(folder / "one.jpg")
        vertices = rng.normal(0, 0.03, (50, 778, 3)) + [0, 0, 0.7]
        entries = {"K": [[[480.0, 0, 112], [0, 480, 112], [0, 0, 1]]] * 50, "xyz": vertices[:, :21].tolist(),
                   "verts": vertices.tolist(),
                   "mano": rng.normal(0, 1, (50, 1, 61)).tolist(), "scale": [0.03] * 50}
        for name, values in entries.items():
            with open(folder / "hands" / f"training_{name}.json", "w") as file:
                texts = list(map(json.dumps, values))
                for k in range(labels):
                    file.write(("[" if k == 0 else ", ") + texts[k % 50])
                file.write("]")
        start = time.perf_counter()
        subprocess.run([*command, str(folder / "hands"), "--out", str(folder / "index")], check=True,
                       capture_output=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        print(f"  {time.perf_counter() - start:.0f} s, {peak} MB")


def opening():
    """Opening an index of two million hands: columns are mapped, not read."""
    from data import HandIndex, write_index

    print("HandIndex, 2,000,000 hands, ms (target 1000)")
    with tempfile.TemporaryDirectory() as folder:
        count = 2_000_000
        columns = {"image": np.full(count, b"frames/00000000.jpg"),
                   "box": np.tile(np.float32([0, 0, 9, 9]), (count, 1)),
                   "keypoints": np.zeros((count, 21, 2), np.float32)}
        write_index(Path(folder) / "big", columns, {"name": "big"})
        low, m, high = race({"ours": lambda: HandIndex(Path(folder) / "big").image_path(count - 1)})["ours"]
        print(f"  {m:.2f} [{low:.2f} {high:.2f}]")


def pretraining_step(arch, image_size, batch, public):
    """One HandMIM step (forward, losses, backward, update) with iBOT's losses and the pixels, as a function.

    public: in the public iBOT form, attention written out and heads on all tokens, whose errors the mask
    multiplies. """
    import copy
    import math
    from unittest.mock import patch

    import pretrain_mim as mim
    from masking import block_mask, to_patches
    from model import build_encoder
    from runtime import adamw, ema_update, generator, param_groups

    def written_out(q, k, v):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    torch.manual_seed(0)
    student = mim.HandMIM(build_encoder(arch, image_size), distil=("class", "patch"), keypoints=0).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = adamw(param_groups(student.named_parameters(), 0.04), torch.device("cpu"))
    centers = {name: torch.zeros(1, 8192) for name in ("class", "patch")}
    g = generator(0)
    views = torch.randn(2, batch, 3, image_size, image_size, generator=g)
    # iBOT: half of the views, .1 to .5 of the patches
    ratio = torch.where(torch.arange(2 * batch) % 2 == 0, 0.3, 0.0)
    mask = block_mask(2 * batch, image_size // 16, ratio, g).unflatten(0, (2, batch))
    asked = torch.ones_like(mask) if public else mask
    patch_weight = torch.zeros(mask.shape).masked_scatter_(mask, mim.patch_weights(mask))[asked]
    pixel_weight = (mask / mask.sum())[asked]

    def on_all_tokens(net, hide):
        tokens = net.encoder(views.flatten(0, 1), mask.flatten(0, 1) if hide else None, net.mask_token)
        patches = tokens[:, 1:].flatten(0, 1)
        return {"class": net.prototype_head(tokens[:, 0]).unflatten(0, (2, batch)),
                "patch": net.prototype_head(patches), "pixels": net.pixel_head(patches)}

    def step():
        forward = on_all_tokens if public else lambda net, hide: net(views, mask, hide)
        with torch.no_grad():
            taught = forward(teacher, False)
        learned = forward(student, True)
        loss = mim.distill(learned["class"], taught["class"].flip(0), centers["class"], 0.05).mean()
        errors = mim.distill(learned["patch"], taught["patch"], centers["patch"], 0.05)
        loss = loss + (errors * patch_weight).sum()
        loss = loss + mim.pixel_loss(learned["pixels"], to_patches(views, 16)[asked], pixel_weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(teacher, student, 0.996)
        return float(loss.detach())

    def in_public_form():
        with patch("torch.nn.functional.scaled_dot_product_attention", written_out):
            return step()

    return in_public_form if public else step


PRETRAINING = (("vit_tiny", 64, 64), ("vit_small", 224, 4))


def pretraining():
    """The step of pretrain_mim.py against the same step in the public iBOT form; the same losses of the first
    steps, and peak memory of a process that does nothing else."""
    print(f"pre-training step, s{'public form':>31}{'ours':>24}   times faster (target 1.5)   "
          "peak MB: public     ours")
    for arch, size, batch in PRETRAINING:
        steps = {name: pretraining_step(arch, size, batch, name == "public") for name in ("public", "ours")}
        first = {name: step() for name, step in steps.items()}
        assert abs(first["public"] - first["ours"]) < 1e-4 * first["ours"], first
        result = {name: times / 1e3 for name, times in race(steps, 7, 1).items()}
        columns = "".join(f"{f'{m:.2f} [{low:.2f} {high:.2f}]':>24}" for low, m, high in result.values())
        peaks = [subprocess.run([sys.executable, __file__, "--peak", arch, str(size), str(batch), name],
                                capture_output=True, text=True,
                                check=True).stdout.strip() for name in steps]
        faster = result["public"][1] / result["ours"][1]
        name = f"{arch}, {size} px, {batch} hands"
        print(f"  {name:25}{columns}   {faster:<25.2f} {peaks[0]:>16} {peaks[1]:>8}")


def peak(arch, size, batch, name):
    """Prints the largest resident memory of three steps, in MB."""
    step = pretraining_step(arch, int(size), int(batch), name == "public")
    for _ in range(3):
        step()
    print(resident())


def resident():
    """Largest resident memory of this process in MB."""
    status = Path("/proc/self/status")  # Linux: getrusage would count the parent's memory too
    return re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)[:-3] if status.exists() else "?"


def detected_poses(count, videos, seed=0):
    """(count,21,2) keypoints and (count,) videos: hands whose pose and view change smoothly from key pose to
    key pose, as make_synthetic.py draws them, seen from anywhere by a camera and a detector with its
    noise."""
    from scipy.spatial.transform import Rotation

    from mano import MANO_TO_FREIHAND
    from synthetic_hand import synthetic_mano

    hand, rng, frames, made = synthetic_mano(), np.random.default_rng(seed), count // videos, []
    rest, parent = hand["J"], hand["kintree_table"][0].astype(int)
    tips, last = hand["v_template"][[744, 320, 443, 555, 672]], [15, 3, 6, 12, 9]
    at = np.arange(frames) / 5
    key, share = at.astype(int), (at % 1)[None, :, None]
    share = share * share * (3 - 2 * share)
    for start in range(0, videos, 500):
        many, keys = min(500, videos - start), frames // 5 + 2
        pose = hand["hands_coeffs"][rng.integers(len(hand["hands_coeffs"]), size=(many, keys))]
        pose = pose + 0.2 * rng.standard_normal(pose.shape)
        pose[..., 8:] *= 0.25
        turn = 0.3 * rng.standard_normal((many, keys, 3))
        pose, turn = (x[:, key] * (1 - share) + x[:, key + 1] * share for x in (pose, turn))
        view = np.repeat(rng.standard_normal((many, 4)), frames, 0)
        angles = (pose @ hand["hands_components"] + hand["hands_mean"]).reshape(-1, 3)
        local = Rotation.from_rotvec(angles).as_matrix().reshape(-1, 15, 3, 3)
        world = np.empty((len(local), 16, 3, 3))
        world[:, 0] = (Rotation.from_rotvec(turn.reshape(-1, 3)) * Rotation.from_quat(view)).as_matrix()
        joints = np.zeros((len(local), 21, 3))
        for k in range(1, 16):
            world[:, k] = world[:, parent[k]] @ local[:, k - 1]
            joints[:, k] = joints[:, parent[k]] + world[:, parent[k]] @ (rest[k] - rest[parent[k]])
        for k, bone in enumerate(last):
            joints[:, 16 + k] = joints[:, bone] + world[:, bone] @ (tips[k] - rest[bone])
        image = joints[:, MANO_TO_FREIHAND, :2] / (joints[:, MANO_TO_FREIHAND, 2:] + 0.5)
        extent = np.ptp(image, axis=1).max(1)[:, None, None]
        noise = 0.016 * extent * rng.uniform(0.6, 1.6, (len(image), 1, 1)) * rng.standard_normal(image.shape)
        made.append((image + noise).astype(np.float32))
    return np.concatenate(made), np.repeat(np.arange(videos), frames)


def mining(*counts):
    """mine_pairs.mine on detected poses, 100 frames a video, K = 10; each size in a process of its own, for
    its peak memory."""
    print("mining, 10 neighbours       hands   seconds   peak MB   exponent   median distance: nearest, "
          "random")
    before = None
    for count in counts or (125_000, 500_000, 2_000_000):
        done = subprocess.run([sys.executable, __file__, "--mine", str(count)], capture_output=True,
                              text=True, check=True).stdout.split()
        seconds, memory = float(done[0]), done[1]
        exponent = f"{np.log(seconds / before[1]) / np.log(count / before[0]):.2f}" if before else ""
        print(f"{count:>33,}{seconds:>10.1f}{memory:>10}{exponent:>11}   {done[2]}, {done[3]}", flush=True)
        before = count, seconds


def mine_once(count):
    """Prints seconds, peak memory in MB and median distances of mining `count` detected poses."""
    from mine_pairs import mine, normalise_pose

    keypoints, videos = detected_poses(int(count), int(count) // 100)
    start = time.perf_counter()
    found = mine(keypoints, videos, 10)
    seconds = time.perf_counter() - start
    some = np.random.default_rng(0).integers(len(keypoints), size=(2, 10000))
    x, y = ((normalise_pose(keypoints[rows]) - found["mean"]) @ found["components"].T for rows in some)
    nearest = np.median(found["dist"][:, 0])
    print(f"{seconds} {resident()} {nearest:.3f} {np.median(np.linalg.norm(x - y, axis=1)):.3f}")


def contrast(pairs=8192):
    """The weighted loss of 8,192 pairs of 64 latent points, forward and backward, with and without chunks;
    each in a process of its own."""
    print(f"NT-Xent, {pairs:,} weighted pairs    seconds   peak MB   loss         gradient's norm")
    for name in ("in chunks", "whole"):
        print(f"  {name:28}" + subprocess.run([sys.executable, __file__, "--contrast", str(pairs), name],
                                              capture_output=True, text=True,
                                              check=True).stdout.rstrip(), flush=True)


def contrast_once(pairs, name):
    """Prints seconds, peak memory in MB, loss and gradient of one such loss."""
    import pretrain_contrastive as pc

    g, pc.CHUNK = torch.Generator().manual_seed(0), pc.CHUNK if name == "in chunks" else 2 * int(pairs)
    latent = torch.randn(2, int(pairs), 128, generator=g, requires_grad=True)
    joints = torch.rand(2, int(pairs), 21, 2, generator=g)
    start = time.perf_counter()
    loss = pc.nt_xent(*torch.nn.functional.normalize(latent, dim=2), 0.5, *pc.pair_weights_by_rows(*joints))
    loss.backward()
    seconds = time.perf_counter() - start
    print(f"{seconds:>8.1f}{resident():>10}   {loss.item():.8f}   {latent.grad.norm().item():.8f}")


SECTIONS = {"layer": layer, "metrics": scores, "index": opening, "prepare": preparing,
            "pretraining": pretraining,
            "mining": mining, "contrast": contrast}

if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1:2] == ["--peak"]:
        sys.exit(peak(*sys.argv[2:]))
    if sys.argv[1:2] == ["--contrast"]:
        sys.exit(contrast_once(*sys.argv[2:]))
    if sys.argv[1:2] == ["--mine"]:
        sys.exit(mine_once(sys.argv[2]))
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
