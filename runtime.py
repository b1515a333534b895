"""What every training script shares and nobody needs to read: flags, device and processes, precision, draws,
the feed, schedules, updates.

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
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

BLOCK = 128  # rows of a batch that are drawn together, from one generator


def run(main: Callable):
    """Calls main(); a mistake of the user (ValueError, OSError), a diverged run, full memory of a GPU or the
    loss of a process that decodes becomes one line and exit status 2; the loss of another process of the run
    one line and status 1.

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
    if hasattr(sys.stdout, "reconfigure"):  # a test's StringIO has none
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot print
    try:
        main()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("DEBUG"):
            raise
        text = str(error).strip()
        is_alone = isinstance(error, RuntimeError) and _is_of_processes(error)
        if is_alone:
            text = "another process of this run has ended; --resume goes on from the last save"
        elif isinstance(error, torch.OutOfMemoryError):
            text = ("the GPU's memory is full: a smaller --batch-size needs less, and in a training "
                    "--accumulate 2 and --cache file")
        elif isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
            text = f"--workers: a process that decodes images has died ({text.splitlines()[0]})"
        elif isinstance(error, BrokenExecutor):
            text = "a process of --workers has died: is the memory full? Fewer need less"
        elif isinstance(error, RuntimeError):  # a mistake of ours
            raise
        if isinstance(error, OSError) and error.strerror and not error.filename:
            text = f"a file could not be written or read: {error.strerror}"
            if "temporary directory" in error.strerror:
                text = f"{error.strerror}: is the disk full? TMPDIR=FOLDER names another place"
        if "Original Traceback" in text:  # raised in a process of the loader
            text = text.splitlines()[-1].partition(": ")[2]
        for bar in list(getattr(tqdm, "_instances", ())):  # the line begins where a bar would stand
            bar.close()
        rank = int(os.environ.get("RANK", 0))  # a wrong flag is wrong in all processes, a full disk in one
        process = f" (process {rank})" if rank else ""
        print(f"error{process}: {' '.join(text.split())}", file=sys.stderr)
        return 1 if is_alone else 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code or 0
    return 0


def _is_of_processes(error):
    """True for what torch.distributed raises where another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


# ------------------------------------------------------------------------------------------------------ flags
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all flags."""

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists the flags\n")


def parser(description: str) -> Parser:
    """A Parser whose help keeps the docstring's lines."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device_flags(cli, workers=True):
    group = cli.add_argument_group("machine")
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
                       help="device to compute on. auto: cuda where there is one, else cpu. mps (untested) "
                            "needs PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment")
    group.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                       help="number type of the encoder; the hand model and the losses are always fp32. "
                            "auto: bf16 on a GPU that has it, else fp32. bf16 is faster on a CPU, too, "
                            "whose /proc/cpuinfo says avx512_bf16")
    if workers:
        group.add_argument("--workers", type=int, default=-1,
                           help="processes that decode images. -1: the free cores with a GPU, else 1")


def add_init_flags(group, starts):
    """--init, which names what a training `starts` from, --heads and --pixels."""
    group.add_argument("--init", metavar="FILE", help=f"what to start from: {starts} (default: fresh)")
    add_weights_flags(group, "--init")


def add_weights_flags(group, file):
    """--heads and --pixels: what the weights of others in `file` do not say themselves."""
    group.add_argument("--heads", type=int, metavar="N",
                       help=f"attention heads of the ViT in {file}, where weights of others do not say it "
                            "(default: as usual for the width, with a note)")
    group.add_argument("--pixels", choices=["imagenet", "half"],
                       help=f"what a ViT of others in {file} was trained on: ImageNet's mean and deviation, "
                            "or .5 and .5 (default: half for timm's names with augreg, else imagenet)")


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

    def from_main(self, read: Callable):
        """What read() returns in process 0, in all processes: other machines may not have its files. Its
        ValueError or OSError is a ValueError in all of them."""
        answer = [None, None]  # value, problem
        if self.is_main:
            try:
                answer[0] = read()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(answer)
        if answer[1]:
            raise ValueError(answer[1])
        return answer[0]

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


def cores() -> int:
    """Cores that this process may use, of those that are lent to it and its fellows on the machine."""
    lent = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, lent // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
    bf16 = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = args.precision if args.precision != "auto" else "bf16" if bf16 else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if world > 1 and not dist.is_initialized():
        # one may wait for another's last video
        patience = timedelta(minutes=30) if name == "cuda" else timedelta(days=7)
        # torchrun keeps one store for all its restarts, where addresses of dead processes would be read
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=patience)
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    runtime = Runtime(device, dtype, rank, world, local_rank, getattr(args, "workers", -1))
    if runtime.workers < 0:
        runtime.workers = min(16, max(1, cores() - 1)) if name == "cuda" else 1
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


def batch_parts(size: int, accumulate: int) -> list[tuple]:
    """(rows, is_last) of each of the parts that a batch of `size` is split into; rows is a slice."""
    length = size // accumulate
    return [(slice(i * length, (i + 1) * length), i + 1 == accumulate) for i in range(accumulate)]


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
