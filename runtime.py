"""Plumbing that every training script shares: flags, device and processes, precision, schedules, checkpoints, the log.

Nothing here knows about hands. One process needs no process group; `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK.
Randomness is a function of (seed, step), so a checkpoint holds no generator and resuming is exact.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# Flags that may differ when a run is continued: they change where and how fast it runs, not what it computes.
FREE_ON_RESUME = {"resume", "out", "workers", "device", "log_every", "save_every"}


def run(main):
    """Calls main(); a mistake of the user (ValueError, OSError) or a diverged run becomes one line and exit status 2.
    With DEBUG=1 in the environment the traceback is shown instead."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DEBUG"):
            raise
        text = str(error).strip()
        text = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text      # from a loader's process
        for bar in list(getattr(tqdm, "_instances", ())):          # the line begins where a bar would stand
            bar.close()
        rank = int(os.environ.get("RANK", 0))                      # a mistake in the flags is every process's, a full disk one's
        print(f"error{f' (process {rank})' if rank else ''}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------- flags
def add_device_flags(cli, workers=True):
    group = cli.add_argument_group("machine")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
                       help="auto takes cuda, then cpu; mps on request: torch lacks the sampling's backward there, so set "
                            "PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment (untested)")
    group.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                       help="of the encoder; hand model and losses are always fp32. auto: bf16 on a GPU that has it, else fp32")
    if workers:
        group.add_argument("--workers", type=int, default=-1,
                           help="processes that decode images; -1 takes the free cores on a GPU machine and 1 on a CPU")


def add_training_flags(cli, batch_size, epochs):
    """The flags of every training command; defaults that depend on the stage are arguments."""
    add_device_flags(cli)
    group = cli.add_argument_group("run")
    group.add_argument("--out", required=True, help="folder RUN for config.json, log.jsonl, last.pt, encoder.pt and samples/")
    group.add_argument("--resume", action="store_true", help="continue RUN exactly where last.pt stands, with the same flags")
    group.add_argument("--mix", nargs="+", type=float, metavar="SHARE",
                       help="of a batch, one for each --data, drawn with replacement (default: every hand once an epoch)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=epochs, help=f"passes over the data (default {epochs:g})")
    length.add_argument("--steps", type=int, help="optimiser updates, instead of --epochs")
    group.add_argument("--batch-size", type=int, default=batch_size,
                       help=f"images an update, over all processes (default {batch_size})")
    group.add_argument("--accumulate", type=int, default=1, help="split each update into this many parts to save memory")
    group.add_argument("--seed", type=int, default=0, help="every draw is a function of (seed, step, sample)")
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl (default 10)")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default 500); the end always saves")


def total_steps(args, count):
    """Optimiser updates of a run over `count` hands; ValueError where the flags contradict each other."""
    for name, least in (("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("save_every", 1), ("eval_every", 1), ("seed", 0)):
        if getattr(args, name, least) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    steps = args.steps if args.steps is not None else math.ceil(args.epochs * count / args.batch_size)
    if steps < 1:
        raise ValueError("--steps or --epochs asks for no step at all")
    return steps


def check_ranges(args, ranges):
    """ranges: name -> (low, high). ValueError that names the first flag with a value outside, before anything is written."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not all(low <= x <= high for x in (value if isinstance(value, (tuple, list)) else (value,))):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in {low} .. {high}")


# -------------------------------------------------------------------------------------------------------------- machine
@dataclass
class Runtime:
    """Where this process computes: device, number type, its rank among `world` processes."""
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    local_rank: int
    workers: int

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Context in which the encoder runs at the chosen precision."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self):
        """Loss scaling, needed by fp16 alone."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def wrap(self, model):
        """The model that the loop calls: averages gradients over the processes where there are several."""
        if self.world == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, [self.local_rank] if self.device.type == "cuda" else None)

    def exchange(self, model, last):
        """Context of one part of an accumulated batch: the processes exchange gradients with the last part alone."""
        return contextlib.nullcontext() if self.world == 1 or last else model.no_sync()

    def share(self, array):
        """This process's consecutive part of something drawn for the whole batch."""
        return array[self.rank * len(array) // self.world:(self.rank + 1) * len(array) // self.world]

    def gather(self, value):
        """The processes' tensors (...,B,...) joined along dimension 1, gradients included, so that a loss over the whole batch is
        the same on every process: its gradients are summed on the way back, and averaged again with those of the model."""
        return value if self.world == 1 else Gather.apply(value, self.rank, self.world)

    def union(self, values):
        """The set of what is in any process's set."""
        everywhere = [values]
        if self.world > 1:
            everywhere = [None] * self.world
            dist.all_gather_object(everywhere, values)
        return set().union(*everywhere)

    def mean(self, value):
        """Mean of a tensor over the processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value


class Gather(torch.autograd.Function):
    """all_gather along dimension 1 whose backward sums the processes' gradients."""

    @staticmethod
    def forward(ctx, value, rank, world):
        ctx.share = slice(rank * value.shape[1], (rank + 1) * value.shape[1])
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[:, ctx.share], None, None


def setup(args):
    """Runtime from the flags and torchrun's environment. ValueError where the flags ask for what is not there."""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    mps = torch.backends.mps.is_available()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise ValueError(f"--device {name}: this machine has none; use --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node asks for more processes than this machine's {torch.cuda.device_count()} GPUs")
    if name == "mps" and args.precision not in ("auto", "fp32"):
        raise ValueError(f"--precision {args.precision}: on mps only fp32 is supported")
    batch, accumulate = getattr(args, "batch_size", world), getattr(args, "accumulate", 1)
    if "accumulate" in args and batch % (world * accumulate):
        raise ValueError(f"--batch-size {batch} must be a multiple of processes x --accumulate = {world * accumulate}")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"    # products outside the encoder stay exact: views, losses
    bf16 = name == "cuda" and torch.cuda.is_bf16_supported()
    precision = args.precision if args.precision != "auto" else "bf16" if bf16 else "fp32"
    if world > 1 and not dist.is_initialized():
        patience = timedelta(minutes=30) if name == "cuda" else timedelta(days=7)            # a process may wait for another's last video
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=patience)
    free = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1) if name == "cuda" else 1
    return Runtime(torch.device(name, local_rank) if name == "cuda" else torch.device(name),
                   {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision],
                   rank, world, local_rank, args.workers if getattr(args, "workers", -1) >= 0 else min(free, 16))


def barrier():
    """Waits for the other processes, where there are any."""
    if dist.is_initialized():
        dist.barrier()


def finish():
    """Ends the process group, so that no process outlives the run."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def generator(*key):
    """CPU torch generator that is a function of the integers in key: (seed, step, purpose)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)


# ------------------------------------------------------------------------------------------------------------ schedules
def cosine(step, total, base, final=0.0, warmup=0):
    """Linear from 0 to base over `warmup` steps, then half a cosine to final at `total`. A pure function of the step."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer, lr, weight_decay=None):
    """Sets this step's rate in every group, times the group's lr_scale, and this step's decay where a group has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


def param_groups(named_parameters, weight_decay, lr_scale=lambda name: 1.0):
    """AdamW groups: no weight decay on 1-D tensors (biases, norms); lr_scale(name) multiplies the rate."""
    groups = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            key = (parameter.ndim > 1, lr_scale(name))
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale, "decays": decays}
            for (decays, scale), params in groups.items()]


def adamw(groups, device):
    """AdamW in one kernel where this torch has it for the device (for a CPU since 2.4): a seventh of a small step."""
    return torch.optim.AdamW(groups, fused=device.type == "cuda" or (device.type == "cpu" and torch.__version__ >= (2, 4)))


def update(optimizer, scaler, parameters, clip, adapt=None):
    """One optimiser update after the backward passes; returns the gradient's norm before clipping. adapt(): changes the clipped
    gradients in place, as LARS does.
    A gradient that is not finite ends the run (fp16 halves its loss scale and skips the update instead)."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not scaler.is_enabled() and not torch.isfinite(norm):
        raise FloatingPointError("the gradient is not finite: lower --lr or use --precision fp32; --resume continues from the last save")
    if adapt:
        adapt()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def ema_update(average, model, decay):
    """average <- decay average + (1 - decay) model, parameters; buffers are copied."""
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(other)


# ------------------------------------------------------------------------------------------------------------------ run
def start_run(args, runtime):
    """Prepares RUN; returns its path and the checkpoint to continue from, or None.

    A fresh run refuses a folder that is not empty; --resume refuses flags that differ from config.json."""
    out = Path(args.out)
    flags = json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "resume"}, default=str))
    verdict = [check_run(out, flags, args.resume) if runtime.is_main else None]
    if runtime.world > 1:
        dist.broadcast_object_list(verdict)                        # nobody writes before process 0 has judged
    if verdict[0]:
        raise ValueError(verdict[0])
    checkpoint = out / "last.pt"
    state = load_checkpoint(checkpoint, "any") if args.resume and checkpoint.is_file() else None
    if args.resume and state is None and runtime.is_main:
        print(f"{out} was stopped before its first checkpoint: starting at step 0", file=sys.stderr)
    if runtime.is_main:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        facts = {"command": " ".join(sys.argv), "torch": torch.__version__, "numpy": np.__version__,
                 "python": platform.python_version(), "revision": git_revision(), "world_size": runtime.world,
                 "machine": str(runtime.device)}
        write_atomically(out / "config.json", lambda path: path.write_text(json.dumps(flags | facts, indent=1)))
    return out, state


def check_run(out, flags, resume):
    """What is wrong where the folder `out` holds something else than a run of the same flags to be continued, else None."""
    config = out / "config.json"
    if resume and not config.is_file():
        return f"--resume: there is no run in {out} (no config.json); check --out, or start it without --resume"
    if resume:
        before = read_json(config)
        if not isinstance(before, dict):
            return f"{config}: not the configuration of a run; choose another --out"
        for name, value in flags.items():
            if name not in FREE_ON_RESUME and before.get(name, value) != value:
                return f"--{name.replace('_', '-')} is {value}, but {config} says {before[name]}: resume with the same flags"
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"--out {out} is not empty: choose another folder, or continue that run with --resume"
    return None


def read_json(path):
    """The JSON in a file; ValueError or OSError that names it."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, where a JSON file is needed") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None


def git_revision():
    try:
        folder = Path(__file__).resolve().parent
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True,
                              timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def write_atomically(path, write):
    """write(temporary path), then rename: a reader sees the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save_arrays(path, **arrays):
    """A .npz of plain arrays, whole or not at all."""
    def write(part):
        with open(part, "wb") as file:                             # a name would get .npz appended
            np.savez(file, **arrays)
    write_atomically(Path(path), write)


def save_checkpoint(path, **state):
    """Tensors and plain values only, so that it loads with weights_only=True; must hold `kind` and `step`."""
    write_atomically(Path(path), lambda part: torch.save(state, part))


def load_checkpoint(path, kind):
    """The dict that save_checkpoint wrote, on the CPU. kind: "mesh", "mim", "contrastive", "encoder" or "any".
    Runs no code from the file. ValueError or OSError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:                                     # a damaged file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no checkpoint of plain tensors and values ({reason[:120]})") from None
    found = state.get("kind") if isinstance(state, dict) else None
    if found is None or (kind != "any" and found != kind):
        raise ValueError(f"{path}: a checkpoint of kind {found or 'unknown'!r}, needed {kind!r}")
    return state


class Log:
    """log.jsonl and the progress bar, which shows the loss and the values named in `show`. Lines after `step` are dropped
    first: a killed run may have logged past last.pt."""

    def __init__(self, path, step, total, images, runtime, every, show=()):
        self.path, self.images, self.every, self.runtime, self.show = Path(path), images, every, runtime, show
        self.last_step, self.last_time = step, time.perf_counter()
        if runtime.is_main:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(self.path, lambda part: part.write_text("".join(line + "\n" for line in kept)))
        self.bar = tqdm(total=total, initial=step, disable=not runtime.is_main, unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 15)

    def __call__(self, step, values):
        """After update number `step` (1 based): a line every `every` steps. values: name -> number or tensor, the mean over
        the processes is logged; `loss` is shown on the bar."""
        self.bar.update(step - self.bar.n)
        if step % self.every and step != self.bar.total:
            return
        numbers = self.runtime.mean(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.runtime.device)
                                                 for v in values.values()])).tolist()
        now = time.perf_counter()
        row = {"step": step} | dict(zip(values, numbers, strict=True))
        row["images_per_second"] = (step - self.last_step) * self.images / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        shown = {name: f"{row[name]:.3g}" for name in self.show if name in row}
        self.bar.set_postfix(loss=f"{row['loss']:.4g}", **shown, lr=f"{row['lr']:.1e}", img_s=f"{row['images_per_second']:.0f}")
        self.write(row)

    def write(self, row):
        if self.runtime.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def warn(self, step, text):
        """One line above the bar and in the log."""
        self.write({"step": step, "warning": text})
        if self.runtime.is_main:
            tqdm.write(f"warning, step {step}: {text}", file=sys.stderr)

    def close(self):
        self.bar.close()


def read_log(path):
    """The lines of log.jsonl as dicts."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def parser(description):
    """ArgumentParser whose help keeps the docstring's lines."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
