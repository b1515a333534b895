"""Speed and memory, beside what people would use instead: one table, each row printed at once.

    python tests/benchmark.py [SECTION ...] [--out FILE]     all sections without one; FILE: the rows as JSON
    torchrun --nproc_per_node=1 tests/benchmark.py gpu       what needs a GPU, within four minutes; or plain
    python tests/benchmark.py --device cpu --tiny            a test of this file: its figures mean nothing

Rivals run in one process and in turn, so that a busy machine slows both alike. A cell is the median, and in
brackets the quartiles. A ratio above 1 says that ours is better. Comparators: requirements-bench.txt.
Sections on data, and those for a GPU, are in benchmark_data.py and benchmark_gpu.py.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
START = time.monotonic()
CPU = torch.device("cpu")
TINY = "--tiny" in sys.argv
OPTIONS = argparse.Namespace(device="auto")
SCRATCH = Path(os.environ.get("BENCHMARK_SCRATCH") or f"{tempfile.gettempdir()}/benchmark_{os.getpid()}")
MISSING = {}  # package -> why a comparator is not there


# -------------------------------------------------------------------------------------------- table and tools
class Table:
    """The rows. `add` prints one and, with --out, writes all of them."""

    def __init__(self):
        self.rows = []
        self.section = ""
        self.out = None

    def head(self):
        model = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
        self.machine = f"{os.cpu_count()} cores ({model and model[1]}), torch {torch.__version__}"
        print(f"{self.machine}\n\n| section | what | ours | theirs | ratio | MB: ours, theirs | note |\n"
              "| --- | --- | --- | --- | --- | --- | --- |", flush=True)

    def add(self, what, ours=None, theirs=None, rival="", unit="s", memory=(), note=""):
        """ours, theirs: quartiles (3,) or a number, in `unit`; None where `rival` is not installed."""
        ours, theirs = (x if x is None else np.broadcast_to(x, 3).tolist() for x in (ours, theirs))
        ratio = None
        if ours and theirs:
            ratio = theirs[1] / ours[1] if unit == "s" else ours[1] / theirs[1]
        other = _cell(theirs, unit) if theirs else MISSING.get(rival.partition(".")[0], "")
        self.rows.append({"section": self.section, "what": what, "unit": unit, "ours": ours, "theirs": theirs,
                          "rival": rival, "ratio": ratio, "memory_mb": list(memory), "note": note})
        cells = [self.section, what, _cell(ours, unit) if ours else "", f"{rival}: {other}" if rival else "",
                 f"{ratio:.2f}" if ratio else "", ", ".join(f"{each:,.0f}" for each in memory), note]
        print("|", " | ".join(cells), "|", flush=True)
        if self.out:
            self.out.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1))

    def race(self, what, ours, theirs=None, rival="", repeats=20, warm_up=3, growth=None, note="", **others):
        """Adds a row of two functions, called in turn; theirs is None where `rival` is not installed.

        Returns {"ours": quartiles in seconds, "theirs": ...}."""
        times = race({"ours": ours, "theirs": theirs}, repeats, warm_up)
        notes = filter(None, [note, growth and growth.note(times["ours"][1])])
        self.add(what, times["ours"], times.get("theirs"), rival, note="; ".join(notes), **others)
        return times


TABLE = Table()


def _cell(quartiles, unit):
    factor, unit = (1e3, "ms") if unit == "s" and quartiles[1] < 1 else (1, unit)
    digits = max(0, 2 - int(math.log10(max(factor * quartiles[1], 1e-9))))
    low, middle, high = (f"{factor * value:,.{digits}f}" for value in quartiles)
    return f"{middle} {unit}" + (f" [{low} {high}]" if low != high else "")


def _text(path):
    return Path(path).read_text() if Path(path).exists() else ""


def small(full, tiny):
    return tiny if TINY else full


def race(runners, repeats=20, warm_up=3):
    """{name: function or None} -> {name: quartiles in seconds}; every round runs each once, but for None."""
    seconds = {name: [] for name, runner in runners.items() if runner}
    for turn in range(small(warm_up + repeats, 1)):
        for name in seconds:
            start = time.perf_counter()
            runners[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= small(warm_up, 0):
                seconds[name].append(time.perf_counter() - start)
    return {name: np.quantile(times, [0.25, 0.5, 0.75]) for name, times in seconds.items()}


class Growth:
    """Of times at growing sizes: a note, at the last one, of the power with which the time grows."""

    def __init__(self, name, sizes):
        self.name = name
        self.sizes = sizes
        self.medians = []

    def note(self, median):
        self.medians.append(median)
        if len(self.medians) < len(self.sizes) or len(self.sizes) == 1:
            return ""
        power = math.log(median / self.medians[0]) / math.log(self.sizes[-1] / self.sizes[0])
        return f"grows with {self.name}^{power:.2f}"


def comparator(name):
    """A module to compare with, or None where it is not installed."""
    while True:
        try:
            return importlib.import_module(name)
        except Exception as error:  # whatever another project's import may raise
            # Beside another build of torch, torchvision has no compiled operators. Its transforms need none.
            operator = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if not operator:
                MISSING[name.partition(".")[0]] = f"not installed ({type(error).__name__})"
                return None
            torch.library.define(operator[1], "(Tensor a) -> Tensor")


def alone(function, *args):
    """The dict that a function of this program returns in a process of its own, and `mb`, its peak memory.

    With --tiny in this process, but for one function."""
    if TINY and function.__name__ != "mine_once":
        return function(*args) | {"mb": 0}
    call = json.dumps([function.__module__, function.__name__, args], default=str)
    words = [sys.executable, __file__, "--alone", call, *(["--tiny"] if TINY else [])]
    done = subprocess.run(words, capture_output=True, text=True,
                          env=os.environ | {"BENCHMARK_SCRATCH": str(SCRATCH)})
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def resident():
    """Largest resident memory of this process in MB. getrusage would count the parent's memory too."""
    found = re.search(r"VmHWM:\s+(\d+)", _text("/proc/self/status"))
    return int(found[1]) // 1024 if found else 0


def command(script, *argv):
    """Runs a script of ours; seconds, without the start of Python."""
    main = importlib.import_module(Path(script).stem).main
    said = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([str(each) for each in argv])
        except SystemExit:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1]) from None
    return {"seconds": time.perf_counter() - start}


def draw_hands(hands, size, seed=0):
    """Folder of an index of drawn hands, and how many images were drawn in a second. Drawn once."""
    return _draw_hands(*small((hands, size), (16, 64)), seed)


@functools.cache
def _draw_hands(hands, size, seed):
    out = SCRATCH / f"drawn_{hands}_{size}_{seed}"
    words = [ROOT / "make_synthetic.py", "--out", out, "--hands", hands, "--size", size, "--seed", seed,
             "--videos", hands // 4, "--workers", os.cpu_count()]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return out, float(re.search(r"([\d.]+) images/s", done.stdout)[1])


def log_rates(run):
    """images_per_second of the complete lines of a run's log."""
    lines = _text(run / "log.jsonl").split("\n")[:-1]
    return [row["images_per_second"] for row in map(json.loads, lines) if "images_per_second" in row]


# -------------------------------------------------------------------------------------------- parts of a step
def layer(batches=None, where=CPU):
    """`Mano` (21 joints) against smplx.lbs (16), both with a backward pass to rotations and betas."""
    from fixtures import PARENTS, random_mano

    from mano import Mano, rotmat_from_axis_angle

    arrays = random_mano()
    hand = Mano(arrays).to(where)
    a = {name: torch.tensor(value, dtype=torch.float32, device=where) for name, value in arrays.items()}
    posedirs = a["posedirs"].reshape(-1, 135).T.contiguous()
    parents = torch.tensor(PARENTS, device=where)
    smplx = comparator("smplx.lbs")

    def smplx_hand(rotmats, betas):
        return smplx.lbs(betas, rotmats, a["v_template"], a["shapedirs"], posedirs, a["J_regressor"], parents,
                         a["weights"], pose2rot=False)

    def step(model):
        vertices, joints = model(rotmats, betas)
        torch.autograd.grad((vertices, joints), (rotmats, betas), (slopes[0], slopes[1][:, :joints.shape[1]]))

    batches = batches or small((1, 64, 1024), (2,))
    growth = Growth("batch", batches)
    for batch in batches:
        g = torch.Generator().manual_seed(batch)
        rotmats = rotmat_from_axis_angle(torch.randn(batch, 16, 3, generator=g)).to(where).requires_grad_()
        betas = torch.randn(batch, 10, generator=g).to(where).requires_grad_()
        slopes = [torch.randn(batch, points, 3, generator=g).to(where) for points in (778, 21)]
        TABLE.race(f"MANO layer, forward + backward, {batch:,} hands", lambda: step(hand),
                   smplx and (lambda: step(smplx_hand)), "smplx.lbs", growth=growth)
    if smplx:
        with torch.no_grad():
            apart = (hand(rotmats, betas)[0] - smplx_hand(rotmats, betas)[0]).abs().max().item()
        TABLE.add(f"its largest difference, {batch:,} hands", note=f"vertices {apart:.1e} m")


def forward_backward(net, images):
    net(images).square().mean().backward()


def vit():
    """Our ViT against timm's of the same name and weights, forward and backward."""
    from model import ViT

    timm = comparator("timm")
    cases = ("vit_tiny", 64, (16, 64)), ("vit_tiny", 224, (2, 8)), ("vit_small", 224, (4,))
    for arch, size, batches in small(cases, (("vit_tiny", 32, (2,)),)):
        ours = ViT(arch, size)
        theirs = timm and timm.create_model(f"{arch}_patch16_224", img_size=size, num_classes=0)
        growth = Growth("batch", batches)
        for batch in batches:
            images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            note = ""
            if timm:
                theirs.load_state_dict(ours.state_dict())
                with torch.no_grad():
                    apart = (ours(images) - theirs.forward_features(images)).abs().max().item()
                note = f"tokens differ by {apart:.0e}"
            TABLE.race(f"{arch} at {size} px, forward + backward, {batch} images",
                       functools.partial(forward_backward, ours, images),
                       timm and functools.partial(forward_backward, theirs.forward_features, images),
                       "timm", 9, 2, growth, note)


class TorchvisionViews(torch.utils.data.Dataset):
    """Two strong views of each hand of an index by torchvision's transforms, one image after the other."""

    def __init__(self, index, size):
        from views import MEAN, STD

        v2 = comparator("torchvision.transforms.v2")
        blur = v2.GaussianBlur(2 * math.ceil(9 * size / 224) + 1, (0.1 * size / 224, 3 * size / 224))
        self.index = index
        self.transform = v2.Compose([
            v2.PILToTensor(), v2.RandomRotation(45, v2.InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(size, scale=(0.32, 0.68), ratio=(1, 1), antialias=True),
            v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomGrayscale(0.2), v2.RandomApply([blur], 0.3),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.index)

    def __getitem__(self, row):
        from data import CONTEXT, square

        x, y, side = map(float, square(self.index.columns["box"][row], CONTEXT))
        window = [round(v) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2)]
        with Image.open(self.index.image_path(row)) as image:
            crop = image.convert("RGB").crop(window)
        return torch.stack([self.transform(crop), self.transform(crop)])


def our_views(canvas, size):
    """Canvases (B,3,C,C) -> two strong views (2,B,3,size,size) as pretrain_mim.py makes them."""
    import pretrain_mim as mim
    from runtime import generator
    from views import choose_finer, rows_to_blur, strong_color, two_views

    draws = mim.theta_sampler(45, (0.75, 1.1), 0.12), *strong_color(1.0, size)
    theta, light, color, sigma = (two_views(draw)(len(canvas), generator(stream))
                                  for stream, draw in enumerate(draws))
    looks = {"light": light, "color": color, "sigma": sigma, "blurred": rows_to_blur(sigma)}
    looks = {name: value.to(canvas.device) for name, value in looks.items()}
    finer = choose_finer(0.75 * 1.1, canvas.shape[-1], size)
    return mim.make_views(canvas, theta.to(canvas.device), size, finer, looks)


def views():
    """From JPEG to two strong views: ours by the batch, torchvision's by the image, one thread each."""
    from data import HandDataset, HandIndex, canvas_size, make_loader

    index = HandIndex(draw_hands(64, 224)[0])
    torchvision = comparator("torchvision.transforms.v2")
    sizes = small((64, 128, 224), (32,))
    growth = Growth("side", sizes)
    torch.set_num_threads(1)
    for size in sizes:
        loader = make_loader(HandDataset([index], canvas_size(size)), batch_size=32)
        dataset = torchvision and TorchvisionViews(index, size)
        TABLE.race(f"decoding and two strong views of {size} px, {len(index)} hands, one thread",
                   lambda loader=loader, size=size: [our_views(batch["canvas"], size) for batch in loader],
                   torchvision and (lambda dataset=dataset: [dataset[row] for row in range(len(dataset))]),
                   "torchvision", 5, 1, growth)
    torch.set_num_threads(2)


def draws(world=64):
    """What is random in a step of HandMIM, in one of 64 processes."""
    import pretrain_mim as mim
    from masking import block_mask, mask_sampler
    from runtime import Runtime
    from views import strong_color, two_views

    samplers = (mim.theta_sampler(45, (0.75, 1.1), 0.12), *strong_color(1.0, 224),
                mask_sampler(block_mask, 14, (0.1, 0.5), 0.5))
    batch = small(8192, 256)
    steps = itertools.count()

    def draw(rank, world):
        runtime = Runtime(CPU, torch.float32, rank, world, rank, 0)
        step = next(steps)
        return [runtime.draw(two_views(each), batch, 0, step, stream, dim=1)
                for stream, each in enumerate(samplers)]

    TABLE.race(f"draws of a step, batch {batch:,}, one of {world} processes", lambda: draw(1, world),
               lambda: draw(0, 1), "the whole batch", 5, 1)


def pretraining_step(arch, size, batch, public, where=CPU, wrap=lambda net: net):
    """One HandMIM step (forward, losses, backward, update) with iBOT's losses and the pixels, as a function.

    public: in the public iBOT form, attention written out and heads on all tokens, whose errors the mask
    multiplies."""
    import pretrain_mim as mim
    from masking import block_mask, to_patches
    from model import build_encoder
    from runtime import adamw, ema_update, generator, param_groups

    def written_out(q, k, v):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    torch.manual_seed(0)
    student = mim.HandMIM(build_encoder(arch, size), distil=("class", "patch"), keypoints=0).train().to(where)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    net = wrap(student)
    optimizer = adamw(param_groups(student.named_parameters(), 0.04), where)
    center = torch.zeros(1, 8192, device=where)
    g = generator(0)
    views = torch.randn(2, batch, 3, size, size, generator=g).to(where)
    # iBOT: half of the views, .1 to .5 of the patches
    ratio = torch.where(torch.arange(2 * batch) % 2 == 0, 0.3, 0.0)
    mask = block_mask(2 * batch, size // 16, ratio, g).unflatten(0, (2, batch)).to(where)  # (2, B, N)
    masked = mask.flatten().nonzero().squeeze(1)  # (M,)
    asked = torch.arange(mask.numel(), device=where) if public else masked
    pixel_weight = (mask / mask.sum()).flatten()[asked]
    patch_weight = torch.zeros(mask.numel(), device=where)
    patch_weight[masked] = mim.patch_weights(mask, masked)
    patch_weight = patch_weight[asked]

    def step():
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            with torch.no_grad():
                taught = teacher(views, mask, asked, hide=False)
            learned = net(views, mask, asked, hide=True)
        loss = mim.distill(learned["class"], taught["class"].flip(0), center, 0.05).mean()
        loss = loss + (mim.distill(learned["patch"], taught["patch"], center, 0.05) * patch_weight).sum()
        patches = to_patches(views, 16).flatten(0, 2)[asked]
        loss = loss + mim.pixel_loss(learned["pixels"], patches, pixel_weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(teacher, student, 0.996)
        return float(loss.detach())

    def in_public_form():
        with patch("torch.nn.functional.scaled_dot_product_attention", written_out):
            return step()

    return in_public_form if public else step


@functools.cache
def matrix_rate(where, dtype, side):
    """Quartiles of the rate of large products, FLOP/s: what no step can exceed."""
    a, b = torch.randn(2, side, side, device=where, dtype=dtype)
    return 2 * side**3 / race({"ours": lambda: a @ b}, 20, 5)["ours"][::-1]


def operations(function):
    """Floating-point operations of a call's products, attention and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def pretraining(shapes=None, where=CPU):
    """The step of pretrain_mim.py against the same step in the public iBOT form, with the same losses."""
    shapes = shapes or small((("vit_tiny", 64, 64), ("vit_small", 224, 4)), (("vit_micro", 32, 2),))
    for shape in shapes:
        steps = {"ours": pretraining_step(*shape, False, where),
                 "theirs": pretraining_step(*shape, True, where)}
        first = {name: step() for name, step in steps.items()}
        assert abs(first["theirs"] - first["ours"]) < (1e-4 if where == CPU else 1e-2) * first["ours"], first
        memory = [alone(pretraining_peak, *shape, name, where.type)["peak"] for name in steps]
        times = TABLE.race("HandMIM's step, {} at {} px, {} hands".format(*shape), steps["ours"],
                           steps["theirs"], "public iBOT form", 7, 1, note="the first losses are the same",
                           memory=memory)
        if where == CPU:
            least = operations(steps["ours"]) / matrix_rate(where, torch.float32, small(2048, 64))[1]
            TABLE.add("its products, at the rate of large ones", least,
                      note=f"a floor: {least / times['ours'][1]:.0%} of the step; the ratio can be "
                           f"{times['theirs'][1] / least:.2f} at most")


def pretraining_peak(arch, size, batch, name, where):
    """Peak memory in MB, of the GPU where there is one, of some steps."""
    step = pretraining_step(arch, size, int(batch), name == "theirs", torch.device(where))
    for _ in range(small(3, 1)):
        step()
    return {"peak": resident() if where == "cpu" else torch.cuda.max_memory_allocated() / 2**20}


def contrast():
    """The weighted loss of many pairs of 64 latent points, forward and backward: in chunks, or at once."""
    pairs = small(8192, 64)
    ours, theirs = (alone(contrast_once, pairs, name) for name in ("chunks", "whole"))
    TABLE.add(f"NT-Xent, {pairs:,} weighted pairs, forward + backward", ours["seconds"], theirs["seconds"],
              "the whole matrix", memory=(ours["mb"], theirs["mb"]),
              note=f"losses differ by {abs(ours['loss'] - theirs['loss']):.0e}")


def contrast_once(pairs, name):
    import pretrain_contrastive as pc

    g = torch.Generator().manual_seed(0)
    latent = torch.randn(2, pairs, 128, generator=g, requires_grad=True)
    joints = torch.rand(2, pairs, 21, 2, generator=g)
    with patch.object(pc, "CHUNK", pc.CHUNK if name == "chunks" else 2 * pairs):
        start = time.perf_counter()
        a, b = torch.nn.functional.normalize(latent, dim=2)
        loss = pc.nt_xent(a, b, 0.5, *pc.pair_weights_by_rows(*joints))
        loss.backward()
    return {"seconds": time.perf_counter() - start, "loss": loss.item()}


# ---------------------------------------------------------------------------------------------------- metrics
def metrics():
    """The whole evaluations of FreiHAND and of HO-3D v2: random hands of 21 joints and 778 vertices."""
    from metrics import evaluate_hands

    rng = np.random.default_rng(0)
    for protocol, count in (("freihand", small(3960, 8)), ("ho3d", small(11524, 8))):
        gt = rng.normal(0, 0.03, (count, 799, 3)) + [0, 0, 0.7]
        for noise in (0.005, 0.05):
            pred = gt + rng.normal(0, noise, gt.shape)
            arrays = [x for points in (pred, gt) for x in (points[:, :21], points[:, 21:])]
            TABLE.race(f"evaluation, {protocol}, {count:,} hands, {1e3 * noise:.0f} mm off",
                       functools.partial(evaluate_hands, *arrays, protocol), repeats=3, warm_up=0)


# ------------------------------------------------------------------------------------------------------- main
SECTIONS = {name: module for module, names in (
    ("benchmark", ("layer", "vit", "views", "draws", "pretraining", "contrast", "metrics")),
    ("benchmark_data", ("index", "start", "sampling", "prepare", "pack", "synthetic", "saving", "epoch",
                        "mining")),
    ("benchmark_gpu", ("gpu",))) for name in names}


def attempt(name, function):
    """A row that fails says why, and the others go on; DEBUG=1 in the environment shows the traceback."""
    try:
        function()
    except Exception as error:
        if os.environ.get("DEBUG"):
            raise
        TABLE.add(name, note=f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    cli.add_argument("--out", type=Path, metavar="FILE", help="file for all rows as JSON")
    cli.add_argument("--device", choices=["auto", "cpu"], default="auto",
                     help="cpu: the section gpu on the CPU too, as a test of its code")
    cli.add_argument("--tiny", action="store_true", help="tiny sizes and one repeat, as a test of this file")
    cli.add_argument("--alone", help=argparse.SUPPRESS)  # a call, from alone()
    cli.parse_args(namespace=OPTIONS)
    torch.set_num_threads(2)
    if OPTIONS.alone:
        module, name, args = json.loads(OPTIONS.alone)
        found = getattr(importlib.import_module(module), name)(*args)
        print(json.dumps(found | {"mb": resident()}))
        return
    unknown = set(OPTIONS.sections) - set(SECTIONS)
    if unknown:
        cli.error(f"no such section: {', '.join(sorted(unknown))}")
    SCRATCH.mkdir()
    TABLE.out = OPTIONS.out
    if TABLE.out:
        TABLE.out.parent.mkdir(parents=True, exist_ok=True)
    TABLE.head()
    try:
        for name in OPTIONS.sections or SECTIONS:
            TABLE.section = name
            attempt(name, getattr(importlib.import_module(SECTIONS[name]), name))
    finally:
        shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    import benchmark  # by its name, as the files of other sections import it: one table

    benchmark.main()
