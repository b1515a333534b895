"""What commands leave on disk, whole or not at all: a run's folder, its checkpoints and log; other files.

A run's folder RUN holds config.json, log.jsonl, last.pt (all that a continued run needs), encoder.pt and
samples/. Nothing here knows about hands. `runtime` is what runtime.setup returns.

Example::

    import torch
    from saving import load_checkpoint, save_checkpoint

    save_checkpoint("last.pt", "mesh", step=7, model={"weight": torch.ones(2)})
    assert load_checkpoint("last.pt", "mesh")["step"] == 7     # runs no code from the file

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import contextlib
import errno
import functools
import glob
import json
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# Flags that may differ when a run is continued. The first change where and how fast it runs. Of paths, what
# lies there is compared (inputs of check_run). The last change what is computed from then on, as logged.
FREE_ON_RESUME = {"resume", "out", "workers", "cache", "device", "compile", "log_every", "save_every",
                  "save_minutes", "eval_every", "init"}
PATHS = {"data", "val", "pairs", "probe", "mano"}
CHANGE_ON_RESUME = {"lr", "precision", "accumulate", "steps", "epochs"}
WRITERS = {"encoder": "a pre-training", "mesh": "finetune_mesh.py", "mim": "pretrain_mim.py",
           "contrastive": "pretrain_contrastive.py"}  # kind of file -> who writes it
# What this version writes, by kind of file ("run": config.json). A file without a number was written before
# there were any and counts as 1.
FORMATS = {"encoder": 1, "mesh": 1, "mim": 3, "contrastive": 2, "run": 3}
MOST_POINTS = 4000  # of a curve
MANY_SKIPPED = 20  # steps in a row without a finite gradient that end a run


# -------------------------------------------------------------------------------------------------------- run
def check_run(args, runtime, kind: str, inputs: dict) -> dict | None:
    """The checkpoint that RUN goes on from, on the CPU; None where it starts. kind: as in FORMATS.

    inputs: {name of a flag: fingerprint of what is read}; the path does not matter. A new run refuses a
    folder that is not empty. A continued one refuses other inputs, and flags that would make it another run.
    Process 0 reads, because other machines may not have the folder. Writes nothing."""
    resume = args.resume or ("auto" if is_restart() else None)
    out = Path(args.out)
    return runtime.from_main(lambda: _checkpoint_to_continue(out, kind, _flags(args), inputs, resume))


def is_restart():
    """True in a process that torchrun --max-restarts started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _flags(args):
    """The flags of a run as config.json has them."""
    flags = {name: value for name, value in vars(args).items() if name != "resume"}
    return json.loads(json.dumps(flags, default=str))


def _checkpoint_to_continue(out, kind, flags, inputs, resume):
    config = out / "config.json"
    begun = {"config.json.part"}  # all that a kill can leave before there is a config.json
    is_taken = out.exists() and (not out.is_dir() or any(path.name not in begun for path in out.iterdir()))
    if not resume or (resume == "auto" and not is_taken):
        if is_taken:
            raise ValueError(f"--out {out} is not empty: choose another folder, or continue that run with "
                             "--resume")
        check_writable(out)
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
        then = before.get(name, value)
        is_path = name in PATHS  # may be written otherwise, and lie elsewhere: `inputs` has what it holds
        differs = (then is None) != (value is None) if is_path else then != value
        if differs and name not in FREE_ON_RESUME | CHANGE_ON_RESUME:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}, but {config} says {then}: resume with the same flags")
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
        if "step" not in state:
            raise ValueError(f"{path} holds weights alone, no run that could go on: give it as --init")
        if path.name != "last.pt":
            print(f"{problem or 'last.pt is missing'}: going on from {path}, step {state['step']}",
                  file=sys.stderr)
        return state
    if problem:
        raise problem
    print(f"{out} was stopped before its first checkpoint: starting at step 0", file=sys.stderr)
    return None


def start_run(args, runtime, state: dict | None, inputs: dict) -> Path:
    """Makes RUN with its config.json; returns its path. state, inputs: of check_run.

    What a continued run changes is a line of its log."""
    out = Path(args.out)
    if runtime.is_main:
        out.mkdir(parents=True, exist_ok=True)
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
        (out / "samples").mkdir(exist_ok=True)
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


def announce(runtime, out, model, hands: int, start: int, steps: int, batch_size: int, cache=None):
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


def check_writable(out: Path | str):
    """OSError where nothing can be written into the folder `out`, which may be new. To ask before hours of
    work; it leaves nothing there."""
    folder = Path(out)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{out}: cannot be written ({error.strerror})") from None


def refuse_files(out: Path | str):
    """ValueError where `out`, of --out, is a file or a folder with anything in it. What a killed command
    began there goes."""
    out = Path(out)
    if out.is_dir():
        _remove_stale(out, "results")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: there are files already; choose another folder or delete it")


@contextlib.contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """A temporary folder in `out`, or beside it where `out` is new. Its files move into `out` where the block
    ends well; else they go."""
    out = Path(out)
    is_new = not out.exists()
    parent, name = (out.parent, out.name) if is_new else (out, "results")
    _remove_stale(parent, name)
    # Containers may share a host's name, and a command may be process 1 in each.
    folder = parent / f".{name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}.part"
    folder.mkdir(parents=True)
    try:
        yield folder
        if is_new:
            os.replace(folder, out)  # at once: a kill leaves all or nothing
            return
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "index.json"):  # it makes an index
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache  # once: predict.py comes here with every hand
def _remove_stale(parent, name):
    """Removes the staged folders of commands that were killed: those whose process runs no more."""
    begin = f".{name}.{platform.node()}."
    for folder in parent.glob(f"{glob.escape(begin)}*.part") if os.name == "posix" else ():
        number = folder.name.removeprefix(begin).partition(".")[0]
        try:
            os.kill(int(number), 0)  # asks only
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OverflowError, PermissionError):  # no folder of ours, or another's that runs
            continue


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
        raise ValueError(f"{path}: no checkpoint of plain tensors and values ({_reason(error)})") from None
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        raise ValueError(f"{path}: a checkpoint of kind {found or 'unknown'!r}, needed {kind!r}: the last.pt "
                         f"of {WRITERS[kind]}")
    step = state.get("step", 0)  # released weights have none
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path}: damaged (step {step!r})")
    number = state.get("format", 1)
    if number != FORMATS[found]:
        raise ValueError(f"{path}: format {number} of {found!r}, this version reads {FORMATS[found]}; "
                         "train again, or use the revision in the run's config.json")
    return state


def _reason(error):
    """The first line of an error's text, or its kind."""
    if "Weights only load failed" in str(error):  # torch goes on with advice to load it unsafely
        return "torch.save did not write it"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def restore(state: dict | None, **parts) -> int:
    """Loads the named parts (modules, optimiser, scaler) from a checkpoint; returns the step to go on with, 0
    without one."""
    if state is None:
        return 0
    for name, part in parts.items():
        try:
            if name != "scaler" or state[name]:  # it is empty unless the run had --precision fp16
                part.load_state_dict(state[name])
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"--resume: the checkpoint's {name!r} does not fit ({_reason(error)}); is "
                             "last.pt damaged?") from None
    return state["step"]


# -------------------------------------------------------------------------------------------------------- log
def is_due(step: int, every: int, steps: int) -> bool:
    """True after step `step` (0 based) where something happens `every` steps and at the last one."""
    return (step + 1) % every == 0 or step + 1 == steps


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
        self.curves = {}  # name -> [(step, value)], for charts
        self.least = {}  # name -> its lowest value
        self.lowest = {}  # name -> the first step with it
        self.last = {}  # name -> the last step with any
        self.shown = {}  # what the bar shows of `show`, as last written
        if runtime.is_main:
            rows = [row for row in read_log(self.path) if row["step"] <= step] if self.path.exists() else []
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.path, lambda part: part.write_text(text))
            for row in rows:
                self._note(row)
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
        self.write(row)
        self.bar.set_postfix(loss=_short(row["loss"], ".4g"), **self.shown, lr=f"{row['lr']:.1e}",
                             img_s=f"{row['images_per_second']:.0f}")
        if in_row >= MANY_SKIPPED:
            raise FloatingPointError(f"step {step}: the gradient was not finite in {in_row:.0f} steps in a "
                                     "row: --resume with a lower --lr or --precision fp32 goes on from the "
                                     "last save")
        if skipped:
            self.warn(step, f"{skipped:.0f} steps without a finite gradient were skipped")
        self.skipped.zero_()

    def write(self, row):
        if self.runtime.is_main:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} could not be written ({error.strerror})") from None
            self._note(row)

    def _note(self, row):
        """Adds a line's numbers to the curves. Of a long one every second point goes, so that charts stay
        cheap."""
        self.shown |= {name: _short(row[name], ".3g") for name in self.show if name in row}
        for name, value in row.items():
            if isinstance(value, (int, float)):
                points = self.curves.setdefault(name, [])
                points.append((row["step"], value))
                self.last[name] = row["step"]
                if value < self.least.get(name, math.inf):
                    self.least[name] = value
                    self.lowest[name] = row["step"]
                if len(points) > MOST_POINTS:
                    del points[1::2]

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
