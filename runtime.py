"""What every training script shares and nobody needs to read: flags, device and processes, precision,
schedules, checkpoints, the log.

Nothing here knows about hands. One process needs no process group; `torchrun` sets RANK, WORLD_SIZE and
LOCAL_RANK. Randomness is a function of (seed, step), so a checkpoint holds no generator and resuming is
exact.

Example::

    import torch
    from runtime import adamw, cosine, param_groups, set_lr

    model = torch.nn.Linear(3, 1)
    optimizer = adamw(param_groups(model.named_parameters(), weight_decay=0.05), torch.device("cpu"))
    for step in range(10):
        set_lr(optimizer, cosine(step, total=10, base=1e-3, warmup=2))
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# Flags that may differ when a run is continued. The first change where and how fast it runs. Of paths, what
# lies there is compared (inputs of check_run). The last change what is computed from then on, as the log says.
FREE_ON_RESUME = {"resume", "out", "workers", "cache", "device", "compile", "log_every", "save_every",
                  "save_minutes", "eval_every"}
PATHS = {"data", "val", "pairs", "mano", "init"}
CHANGE_ON_RESUME = {"lr", "precision", "accumulate", "steps", "epochs"}
MANY_SKIPPED = 20  # steps in a row without a finite gradient that end a run
BLOCK = 128  # rows of a batch that are drawn together, from one generator
# What this version writes, by kind of file ("run": config.json). A file without a number was written before
# there were any and counts as 1.
FORMATS = {"encoder": 1, "mesh": 1, "mim": 2, "contrastive": 2, "run": 3}


def run(main: Callable):
    """Calls main(); a mistake of the user (ValueError, OSError) or a diverged run becomes one line and exit
    status 2.

    With DEBUG=1 in the environment the traceback is shown instead. Processes of torchrun leave at once: a
    thread of gloo that still frees tensors would abort them while Python takes itself down.
    """
    status = _status(main)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _status(main):
    """The exit status of main(), whose mistakes are printed."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DEBUG"):
            raise
        text = str(error).strip()
        if isinstance(error, OSError) and error.strerror and not error.filename:
            text = f"a file could not be written or read: {error.strerror}"
        if "Original Traceback" in text:  # raised in a process of the loader
            text = text.splitlines()[-1].partition(": ")[2]
        for bar in list(getattr(tqdm, "_instances", ())):  # the line begins where a bar would stand
            bar.close()
        rank = int(os.environ.get("RANK", 0))  # a wrong flag is wrong in all processes, a full disk in one
        process = f" (process {rank})" if rank else ""
        print(f"error{process}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code or 0
    return 0


# ------------------------------------------------------------------------------------------------------ flags
def parser(description: str) -> argparse.ArgumentParser:
    """ArgumentParser whose help keeps the docstring's lines."""
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device_flags(cli, workers=True):
    group = cli.add_argument_group("machine")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
                       help="device to compute on. auto: cuda where there is one, else cpu. mps (untested) "
                            "needs PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment")
    group.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                       help="number type of the encoder; the hand model and the losses are always fp32. "
                            "auto: bf16 on a GPU that has it, else fp32")
    if workers:
        group.add_argument("--workers", type=int, default=-1,
                           help="processes that decode images. -1: the free cores with a GPU, else 1")


def add_training_flags(cli, batch_size, epochs):
    """The flags of every training command; the defaults that depend on the stage are arguments."""
    add_device_flags(cli)
    group = cli.add_argument_group("run")
    group.add_argument("--out", required=True, metavar="RUN",
                       help="folder for config.json, log.jsonl, last.pt, encoder.pt and samples/")
    group.add_argument("--resume", nargs="?", const="yes", choices=["yes", "auto"], metavar="auto",
                       help="continue RUN exactly where last.pt stands. Rate, precision, steps and what only "
                            "changes speed may differ. auto: start where there is nothing yet")
    group.add_argument("--mix", nargs="+", type=float, metavar="SHARE",
                       help="shares of a batch, one for each --data; hands are then drawn with replacement "
                       "(default: every hand once an epoch)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=epochs,
                        help=f"passes over the data (default {epochs:g})")
    length.add_argument("--steps", type=int, help="optimiser updates, instead of --epochs")
    group.add_argument("--batch-size", type=int, default=batch_size,
                       help=f"hands an update, over all processes (default {batch_size})")
    group.add_argument("--accumulate", type=int, default=1,
                       help="parts of each update, one after the other, to save memory")
    group.add_argument("--seed", type=int, default=0,
                       help="seed: every draw is a function of (seed, step, sample)")
    group.add_argument("--cache", choices=["none", "file", "memory", "device"], default="none",
                       help="decode each image once and keep its canvas: in a file beside the index that "
                            "runs share, in memory, or on the device (default none: decode in every epoch)")
    group.add_argument("--log-every", type=int, default=10,
                       help="steps between lines of log.jsonl (default 10)")
    group.add_argument("--save-every", type=int, default=500,
                       help="steps between checkpoints (default 500); the last step always saves, and so do "
                            "SIGTERM and SIGUSR1, which end the run")
    group.add_argument("--save-minutes", type=float, default=15,
                       help="most minutes between checkpoints (default 15)")


def total_steps(args, hands: int) -> int:
    """Optimiser updates of a run over this many hands; ValueError where the flags contradict each other."""
    least = {"batch_size": 1, "accumulate": 1, "log_every": 1, "save_every": 1, "save_minutes": 0,
             "eval_every": 1, "seed": 0}
    for name, low in least.items():
        if getattr(args, name, low) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}")
    steps = args.steps if args.steps is not None else math.ceil(args.epochs * hands / args.batch_size)
    if steps < 1:
        raise ValueError("--steps or --epochs asks for no step at all")
    return steps


def check_ranges(args, ranges: dict):
    """ranges: name -> (low, high). ValueError that names the first flag with a value outside."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not all(low <= x <= high for x in values if x is not None):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in {low} .. {high}")


# ---------------------------------------------------------------------------------------------------- machine
@dataclass
class Runtime:
    """Where this process computes: its device, number type, and rank among `world` processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    local_rank: int
    workers: int

    @property
    def is_main(self):
        """True in the process that prints and writes."""
        return self.rank == 0

    @property
    def cores(self):
        """Cores of the machine for this process."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def autocast(self):
        """Context in which the encoder runs at the chosen precision."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self):
        """The loss scaler, which only fp16 needs."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def wrap(self, model):
        """The model that the loop calls; with several processes their gradients are averaged."""
        if self.world == 1:
            return model
        # Buffers are constants, or BatchNorm's running means, of which process 0's are saved.
        devices = [self.local_rank] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, devices, broadcast_buffers=False,
                                                         gradient_as_bucket_view=True)

    def share_buffers(self, model):
        """Gives all processes the buffers of process 0: BatchNorm's running means differ otherwise."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sync_gradients(self, model, now):
        """Context of a forward and backward pass; the processes exchange gradients only where `now`."""
        return contextlib.nullcontext() if self.world == 1 or now else model.no_sync()

    def local_rows(self, array, dim=0):
        """This process's consecutive rows of something that was drawn for the whole batch."""
        first, end = (rank * array.shape[dim] // self.world for rank in (self.rank, self.rank + 1))
        return array.narrow(dim, first, end - first)

    def draw(self, draw, batch, *key, dim=0):
        """This process's rows, along `dim`, of what draw(rows, generator) makes for a batch.

        The same for any number of processes. Each BLOCK of the batch's rows has a generator of its own, a
        function of key and block; a process draws the blocks that it has rows of."""
        first, end = (rank * batch // self.world for rank in (self.rank, self.rank + 1))
        blocks = range(first // BLOCK, (end - 1) // BLOCK + 1)
        drawn = torch.cat([draw(BLOCK, generator(*key, block)) for block in blocks], dim)
        return drawn.narrow(dim, first - blocks[0] * BLOCK, end - first)

    def gather(self, value):
        """Tensors (2,B,...) of all processes joined along dimension 1, with their gradients.

        A loss over the whole batch is then the same in every process. Its gradients are summed on the way
        back, and the model's are averaged afterwards."""
        return value if self.world == 1 else _Gather.apply(value, self.rank, self.world)

    def union(self, values: set) -> set:
        """The union of the processes' sets."""
        everywhere = [values]
        if self.world > 1:
            everywhere = [None] * self.world
            dist.all_gather_object(everywhere, values)
        return set().union(*everywhere)

    def mean(self, value):
        """The mean of a tensor over the processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value


class _Gather(torch.autograd.Function):
    """all_gather along dimension 1; the backward pass sums the processes' gradients."""

    @staticmethod
    def forward(ctx, value, rank, world):
        ctx.rows = slice(rank * value.shape[1], (rank + 1) * value.shape[1])
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[:, ctx.rows], None, None


def setup(args, alone: bool = False) -> Runtime:
    """The Runtime that the flags and torchrun's environment ask for; ValueError where the machine does not
    have it. alone: the command has no work for a second process."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if alone and world > 1:
        raise ValueError(f"torchrun started {world} processes, but this command needs one: use python")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[name]:
        raise ValueError(f"--device {name}: this machine has none; use --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"--nproc_per_node asks for more processes than this machine's {gpus} GPUs")
    if name == "mps" and args.precision not in ("auto", "fp32"):
        raise ValueError(f"--precision {args.precision}: on mps only fp32 is supported")
    if "accumulate" in args and args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of processes x --accumulate = "
                         f"{world * args.accumulate}")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        # Convolutions of a fp32 encoder stay exact too; torch's matrix products are by default.
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
        torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
    bf16 = name == "cuda" and torch.cuda.is_bf16_supported()
    precision = args.precision if args.precision != "auto" else "bf16" if bf16 else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if world > 1 and not dist.is_initialized():
        # one may wait for another's last video
        patience = timedelta(minutes=30) if name == "cuda" else timedelta(days=7)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=patience)
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    runtime = Runtime(device, dtype, rank, world, local_rank, getattr(args, "workers", -1))
    if runtime.workers < 0:
        runtime.workers = min(16, max(1, runtime.cores - 1)) if name == "cuda" else 1
    return runtime


def barrier():
    """Waits for the other processes, where there are any."""
    if dist.is_initialized():
        dist.barrier()


def finish():
    """Ends the process group, so that no process outlives the run."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the integers in key: (seed, step, stream, ...)."""
    text = ",".join(str(int(number)) for number in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def feed(loader: Iterable, draw: Callable, start: int, device: torch.device, cache=None) -> Iterator[tuple]:
    """Yields (step, batch, drawn) from step `start` on, both on the device, without ever waiting for it.

    batch: a dict of tensors from the loader. drawn: draw(step), a dict of CPU tensors or lists of them. A
    thread makes the next step's while this one is computed; on a GPU they are pinned and copied
    asynchronously. cache: a CanvasCache, or None; where it lies on the device, the canvases come from there.
    """
    batches = iter(loader)

    def make(step):
        batch = next(batches, None)
        return None if batch is None else (_pinned(batch, device), _pinned(draw(step), device))

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, start)
        for step in itertools.count(start):
            made = coming.result()
            if made is None:
                return
            coming = thread.submit(make, step + 1)
            batch, drawn = (_each(each, lambda tensor: tensor.to(device, non_blocking=True)) for each in made)
            if cache is not None and cache.is_on_device:
                batch["canvas"] = cache.canvases(batch["row"])
            yield step, batch, drawn


def _each(item, change):
    """change(tensor) for every tensor of a dict or list."""
    if isinstance(item, dict):
        return {name: _each(value, change) for name, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_each(value, change) for value in item]
    return change(item)


def _pinned(item, device):
    if device.type != "cuda" or not torch.cuda.is_available():
        return item
    torch.cuda.set_device(device)  # of this thread
    return _each(item, lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())


# -------------------------------------------------------------------------------------- schedules and updates
def cosine(step: int, total: int, base: float, final: float = 0.0, warmup: int = 0) -> float:
    """Linear from 0 to base over `warmup` steps, then half a cosine to final at `total`: a pure function of
    the step."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer, lr: float, weight_decay: float | None = None):
    """Sets this step's rate in every group, times the group's lr_scale, and this step's decay in the groups
    that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


def param_groups(named_parameters, weight_decay: float,
                 lr_scale: Callable[[str], float] = lambda name: 1.0) -> list:
    """AdamW's groups: no weight decay on 1-D tensors (biases, norms); lr_scale(name) multiplies the rate."""
    groups = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, lr_scale(name)), []).append(parameter)
    return [{"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale,
             "decays": decays} for (decays, scale), parameters in groups.items()]


def adamw(groups: list, device: torch.device):
    """AdamW in one kernel where this torch has it for the device (CPU: since 2.4): a seventh of a small
    step."""
    fused = device.type == "cuda" or (device.type == "cpu" and torch.__version__ >= (2, 4))
    return torch.optim.AdamW(groups, fused=fused)


def batch_parts(size: int, accumulate: int) -> Iterator[tuple]:
    """Yields (rows, last) for each of the parts that a batch of `size` is split into; rows is a slice."""
    length = size // accumulate
    for i in range(accumulate):
        yield slice(i * length, (i + 1) * length), i + 1 == accumulate


def update(optimizer, scaler, parameters, clip: float = math.inf, adapt: Callable | None = None):
    """One optimiser update after the backward passes; returns the gradient's norm before clipping.

    adapt() changes the clipped gradients in place, as LARS does. Where the norm is not finite, nothing
    changes; the log counts such steps. The device decides that, the loop does not wait for it.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if adapt:
        adapt()
    is_fused = optimizer.defaults.get("fused")
    if is_fused and not scaler.is_enabled():
        optimizer.found_inf = (~norm.isfinite()).float()  # the fused kernel then leaves the weights alone
    if is_fused or scaler.is_enabled() or norm.isfinite():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def ema_update(average, model, decay: float):
    """Parameters: average <- decay average + (1 - decay) model. Buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    buffers = list(average.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(model.buffers()))


def is_due(step: int, every: int, steps: int) -> bool:
    """True after step `step` (0 based) where something happens `every` steps and at the last one."""
    return (step + 1) % every == 0 or step + 1 == steps


# -------------------------------------------------------------------------------------------------------- run
def check_run(args, runtime: Runtime, kind: str, inputs: dict) -> dict | None:
    """The checkpoint that RUN goes on from, on the CPU; None where it starts. kind: as in FORMATS.

    inputs: {name of a flag: fingerprint of what is read}; the path does not matter. A new run refuses a
    folder that is not empty. A continued one refuses other inputs, and flags that would make it another run.
    Process 0 reads, because other machines may not have the folder. Writes nothing."""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    resume = args.resume or ("auto" if is_restart else None)
    answer = [None, None]  # checkpoint, problem
    if runtime.is_main:
        try:
            answer[0] = _checkpoint_to_continue(Path(args.out), kind, _flags(args), inputs, resume)
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    if runtime.world > 1:
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def _flags(args):
    """The flags of a run as config.json has them."""
    flags = {name: value for name, value in vars(args).items() if name != "resume"}
    return json.loads(json.dumps(flags, default=str))


def _checkpoint_to_continue(out, kind, flags, inputs, resume):
    config = out / "config.json"
    is_taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if not resume or (resume == "auto" and not is_taken):
        if is_taken:
            raise ValueError(f"--out {out} is not empty: choose another folder, or continue that run with "
                             "--resume")
        return None
    if not config.is_file():
        raise ValueError(f"--resume: there is no run in {out} (no config.json); check --out, or leave "
                         "--resume out")
    before = read_json(config)
    if not isinstance(before, dict):
        raise ValueError(f"{config}: not the configuration of a run; choose another --out")
    if before.get("format", 1) != FORMATS["run"]:
        raise ValueError(f"{config}: a run of another version (format {before.get('format', 1)}, needed "
                         f"{FORMATS['run']}), whose flags or draws have changed since: start a new --out")
    for name, value in flags.items():
        if name not in FREE_ON_RESUME | PATHS | CHANGE_ON_RESUME and before.get(name, value) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}, but {config} says {before[name]}: resume with the same "
                             "flags")
    for name, fingerprint in inputs.items():
        if before.get("inputs", {}).get(name, fingerprint) != fingerprint:
            raise ValueError(f"--{name} holds something else than when {out} was started: give the same "
                             f"--{name}, or start a new --out")
    return _last_checkpoint(out, kind)


def _last_checkpoint(out, kind):
    """The state in last.pt, or where that is damaged or missing in last.prev.pt; None where there is neither.
    """
    problem = None
    for path in (out / "last.pt", out / "last.prev.pt"):
        try:
            state = load_checkpoint(path, kind)
        except FileNotFoundError:
            continue
        except ValueError as error:
            problem = problem or error
            continue
        if path.name != "last.pt":
            print(f"{problem or 'last.pt is missing'}: going on from {path}, step {state['step']}",
                  file=sys.stderr)
        return state
    if problem:
        raise problem
    print(f"{out} was stopped before its first checkpoint: starting at step 0", file=sys.stderr)
    return None


def start_run(args, runtime: Runtime, state: dict | None, inputs: dict) -> Path:
    """Makes RUN with its config.json; returns its path. state, inputs: of check_run.

    What a continued run changes is a line of its log."""
    out = Path(args.out)
    if runtime.is_main:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        flags = _flags(args)
        config = out / "config.json"
        before = read_json(config) if state else flags
        changed = {name: [before.get(name), flags[name]] for name in sorted(CHANGE_ON_RESUME & set(flags))
                   if before.get(name) != flags[name]}
        if changed:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": state["step"], "changed": changed}) + "\n")
        facts = {"format": FORMATS["run"], "command": " ".join(sys.argv), "torch": torch.__version__,
                 "numpy": np.__version__, "python": platform.python_version(), "revision": _git_revision(),
                 "world_size": runtime.world, "machine": str(runtime.device), "inputs": inputs}
        write_atomically(config, lambda path: path.write_text(json.dumps(flags | facts, indent=1)))
    return out


class Saves:
    """After which steps a run saves: every `every` steps, after `minutes` without one, and at the last.

    SIGTERM and SIGUSR1, with which a cluster takes a machine back, save after the present step and end the
    run with exit status 143."""

    def __init__(self, runtime, every, minutes, steps):
        self.is_main = runtime.is_main
        self.every = every
        self.minutes = minutes
        self.steps = steps
        self.last = time.monotonic()
        self.is_asked = False  # by a signal

    def due(self, step):
        """True in process 0 where `step` (0 based) is followed by a save."""
        late = time.monotonic() - self.last > 60 * self.minutes
        if not (self.is_main and (self.is_asked or late or is_due(step, self.every, self.steps))):
            return False
        self.last = time.monotonic()
        return True

    def watch(self, batches):
        """Yields the batches. Where a signal came, the loop ends with SystemExit once it has saved.

        Only process 0 stops: it needs the others to finish its step. torchrun then ends them."""
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            for each in batches:
                yield each
                if self.is_asked and self.is_main:
                    print("stopped by a signal after a save: --resume goes on", file=sys.stderr)
                    raise SystemExit(143)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number, frame):
        self.is_asked = True


def announce(runtime: Runtime, out, model, hands: int, start: int, steps: int, batch_size: int, cache=None):
    """One line at the start of a run: parameters, hands, steps, epochs, device, precision, cache, where it
    writes; or that it is finished."""
    if not runtime.is_main:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes = f" x {runtime.world}" if runtime.world > 1 else ""
    print(f"{parameters / 1e6:.1f} M parameters; {hands:,} hands, {steps:,} steps of {batch_size} = "
          f"{steps * batch_size / hands:.3g} epochs; {runtime.device}{processes}, "
          f"{str(runtime.dtype).removeprefix('torch.')}; {f'{cache}; ' if cache else ''}writes {out}",
          flush=True)
    if start >= steps:
        print(f"{out} is finished: step {start} of {steps}. --resume with more --steps or --epochs goes on")


def _git_revision():
    try:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True,
                              text=True, timeout=10)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


# ------------------------------------------------------------------------------------------------------ files
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


def write_atomically(path: Path, write: Callable[[Path], object], previous: Path | None = None):
    """write(temporary path), then rename: a reader sees the old file or the whole new one, after a loss of
    power too. previous: where the old file goes. OSError where it cannot be written; the old file stays."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        _to_disk(part)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        part.unlink(missing_ok=True)
        is_full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "is the disk full?" if is_full else str(error)
        raise OSError(f"{path} could not be written ({reason}); what was there before stays") from None
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(part, path)
    if os.name == "posix":
        _to_disk(path.parent)


def _to_disk(path):
    """Waits until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """A temporary folder beside `out`. Its files move into `out` where the block ends well; else they go."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        out.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_arrays(path: Path | str, **arrays):
    """A .npz of plain arrays, whole or not at all."""

    def write(part):
        with open(part, "wb") as file:  # np.savez would append .npz to a name
            np.savez(file, **arrays)

    write_atomically(Path(path), write)


def save_checkpoint(path: Path | str, kind: str, **state):
    """Tensors and plain values, so that the file loads with weights_only=True. kind: as in FORMATS; state:
    step, ...

    The last.pt before becomes last.prev.pt. FloatingPointError where a tensor holds NaN or infinity, OSError
    where there is no room: the file of the save before stays."""
    path = Path(path)
    for name in _not_finite(state):
        raise FloatingPointError(f"{path}: not saved, because {name} is not finite; the last save stays: "
                                 "--resume with a lower --lr or --precision fp32 goes on from there")
    state = {"kind": kind, "format": FORMATS[kind]} | state
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    write_atomically(path, lambda part: torch.save(state, part), previous)


def _not_finite(state, name="") -> Iterator[str]:
    """The names of the tensors in nested dicts and lists that hold NaN or infinity."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, torch.Tensor) and state.is_floating_point() and not state.isfinite().all():
        yield name


def load_checkpoint(path: Path | str, kind: str) -> dict:
    """The dict that save_checkpoint wrote, on the CPU. kind: as in FORMATS.

    Runs no code from the file. ValueError or OSError that names it: damaged, of another kind, of another
    format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no checkpoint of plain tensors and values ({reason[:120]})") from None
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        raise ValueError(f"{path}: a checkpoint of kind {found or 'unknown'!r}, needed {kind!r}")
    number = state.get("format", 1)
    if number != FORMATS[found]:
        raise ValueError(f"{path}: format {number} of {found!r}, this version reads {FORMATS[found]}; "
                         "train again, or use the revision in the run's config.json")
    return state


def restore(state: dict | None, **parts) -> int:
    """Loads the named parts (modules, optimiser, scaler) from a checkpoint; returns the step to go on with, 0
    without one."""
    if state is None:
        return 0
    for name, part in parts.items():
        if name != "scaler" or state[name]:  # it is empty unless the run had --precision fp16
            part.load_state_dict(state[name])
    return state["step"]


# -------------------------------------------------------------------------------------------------------- log
class Log:
    """log.jsonl and the progress bar, which shows the loss and the values named in `show`.

    step: where the run goes on. total: its steps. images: per step. every: steps between lines. Lines after
    `step` are dropped first, because a killed run may have logged past last.pt."""

    def __init__(self, path, step, total, images, runtime, every, show=()):
        self.path = Path(path)
        self.images = images
        self.every = every
        self.runtime = runtime
        self.show = show
        self.skipped = torch.zeros((), device=runtime.device)  # steps since the last line
        self.in_row = torch.zeros((), device=runtime.device)  # the last steps, all of which were skipped
        self.last_step = step
        self.last_time = time.perf_counter()
        if runtime.is_main:
            rows = [row for row in read_log(self.path) if row["step"] <= step] if self.path.exists() else []
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.path, lambda part: part.write_text(text))
        self.bar = tqdm(total=total, initial=step, disable=not runtime.is_main, unit="step",
                        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15)

    def __call__(self, step, values):
        """After update number `step` (1 based): a line every `every` steps.

        values: name -> number or tensor; the mean over the processes is logged. `loss` is shown on the bar.
        Where `gradient_norm` is not finite, `update` has skipped the step. That is counted on the device; a
        line says how often, and FloatingPointError ends the run after MANY_SKIPPED in a row."""
        self.bar.update(step - self.bar.n)
        is_skipped = ~values["gradient_norm"].isfinite()
        self.skipped += is_skipped
        self.in_row = torch.where(is_skipped, self.in_row + 1, 0)
        if not is_due(step - 1, self.every, self.bar.total):
            return
        device = self.runtime.device
        numbers = [*values.values(), self.skipped, self.in_row]
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in numbers])
        *found, skipped, in_row = self.runtime.mean(numbers).tolist()
        found = [number if math.isfinite(number) else None for number in found]  # JSON has no NaN
        now = time.perf_counter()
        row = {"step": step} | dict(zip(values, found, strict=True))
        row["images_per_second"] = (step - self.last_step) * self.images / max(now - self.last_time, 1e-9)
        self.last_step = step
        self.last_time = now
        shown = {name: _short(row[name], ".3g") for name in self.show if name in row}
        self.bar.set_postfix(loss=_short(row["loss"], ".4g"), **shown, lr=f"{row['lr']:.1e}",
                             img_s=f"{row['images_per_second']:.0f}")
        self.write(row)
        if in_row >= MANY_SKIPPED:
            raise FloatingPointError(f"step {step}: the gradient was not finite in {in_row:.0f} steps in a "
                                     "row: --resume with a lower --lr or --precision fp32 goes on from the "
                                     "last save")
        if skipped:
            self.warn(step, f"{skipped:.0f} steps without a finite gradient were skipped")
        self.skipped.zero_()

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


def _short(number, form):
    return "none" if number is None else format(number, form)


def text_table(columns: list[str], rows: list[tuple]) -> str:
    """Lines of a table: rows are (name, texts), names to the left, columns to the right."""
    lines = [["", *columns], *([name, *texts] for name, texts in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        texts.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(texts)


def read_log(path) -> list[dict]:
    """The lines of log.jsonl as dicts; damaged lines are left out."""
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
