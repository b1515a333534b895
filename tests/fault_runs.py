"""Runs of the commands on tiny hands that are killed, or whose disk is full, and then go on: kills, torchrun,
disk, memory of faults.py.

A command runs in a fork of this process, which has imported everything: that takes a tenth of the time that
Python and torch take to start. A case is a function of (seed, section, number) but for the clock."""

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # every optimiser does: a second and a half for each fork otherwise
from fixtures import ENV, ROOT
from PIL import Image

from data import HandIndex, read_image
from model import build_encoder
from runtime import run
from saving import read_log, save_checkpoint

STEPS = 12
TINY = ["--data", "{base}/train", "--init", "{base}/encoder.pt", "--image-size", "32", "--batch-size", "4"]
OPTIONS = {"pretrain_mim.py": ["--prototypes", "64"],
           "pretrain_contrastive.py": ["--pairs", "{base}/pairs.npz", "--labelled"],
           "finetune_mesh.py": ["--val", "{base}/val", "--head-width", "32", "--iterations", "1"]}
STAGES = list(OPTIONS)
MAINS = {f"{name}.py": importlib.import_module(name).main  # all, because a fork has what is imported now
         for name in (*(stage.removesuffix(".py") for stage in STAGES), "make_synthetic", "prepare_data",
                      "mine_pairs", "probe", "evaluate", "predict")}
LIMIT = 300  # seconds for a command that nobody interrupts


# ------------------------------------------------------------------------------------------ forked commands
def start(folder, command, before=lambda: None, terminal="utf-8"):
    """A command of this repository in a forked process, in `folder` -> its process id and a pipe with what it
    says on standard error. before(): called in it first. terminal: the letters that it can print."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout = open(1, "w", encoding=terminal, closefd=False)  # noqa: SIM115 (for the process)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace",  # noqa: SIM115
                              closefd=False)
            status = _status(command, before)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    return pid, reader


def _status(command, before):
    torch.set_num_threads(1)
    before()
    try:
        run(lambda: MAINS[command[0]](list(map(str, command[1:]))))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def finish(pid, reader, limit=LIMIT):
    """Waits for a forked command -> its status (-9 killed, None after `limit` seconds), what it said, and the
    most memory that it held, MB."""
    end = time.monotonic() + limit
    found, status, usage = os.wait4(pid, os.WNOHANG)
    while not found and time.monotonic() < end:
        time.sleep(0.005)
        found, status, usage = os.wait4(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # it, or what it left behind
    if not found:
        _, _, usage = os.wait4(pid, 0)
    os.set_blocking(reader, False)
    with open(reader, "rb") as file:
        said = (file.read() or b"").decode(errors="replace")
    return os.waitstatus_to_exitcode(status) if found else None, said, usage.ru_maxrss / 1024


def call(folder, command, before=lambda: None, limit=LIMIT, memory=None, terminal="utf-8"):
    """start and finish. memory: MB that it may ask for in addition to what it has."""
    def bounded():
        if memory:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + (memory << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before()

    return finish(*start(folder, command, bounded, terminal), limit)


def watch_events(number, action):
    """action() before the number-th time that this process opens, renames or removes a file of its case.

    action None: their count is left in the file `events`."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        changes = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event in changes and str(arguments[0]).lstrip("./").startswith("out"):
            count += 1
            if action is None:
                Path("events").write_text(str(count))
            elif count == number:
                action()

    sys.addaudithook(hook)


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------------- what is there
def content(folder):
    """{name: value} of what a command left in its folder `out` and must leave again, whatever happened."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name == "events" or "samples" in name or path.name == "last.prev.pt":
            continue
        if path.name == "config.json":
            continue  # the time and the command differ
        found[name] = _value(path)
    return found


def _value(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".jsonl":
        return [{name: row[name] for name in row if name != "images_per_second"} for row in read_log(path)]
    return path.read_bytes()


def differences(a, b, name=""):
    """Names of what is not the same, to the bit, in nested dicts and lists."""
    if isinstance(a, (dict, list)) and type(a) is type(b):
        a, b = (dict(enumerate(each)) if isinstance(each, list) else each for each in (a, b))
        return [text for key in a.keys() | b.keys()
                for text in differences(a.get(key), b.get(key), f"{name}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and a.tobytes() == b.tobytes() else [name]
    return [] if type(a) is type(b) and a == b else [name]


def broken(folder):
    """Files below a folder that a reader would take for whole ones, and are not."""
    wrong = []
    for path in sorted(Path(folder).rglob("*")):
        is_column = path.suffix == ".npy" and (path.parent / "index.json").exists()
        if not (path.suffix in (".pt", ".npz", ".json") or is_column):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npy":
                np.load(path)
            else:
                _value(path)
        except Exception as error:
            wrong.append(f"{path}: {error}")
    return wrong


def leftovers(folder):
    """Temporary files and folders."""
    return [str(path) for path in Path(folder).rglob("*")
            if path.name.endswith(".part") or path.name.startswith(".")]


# --------------------------------------------------------------------------------------------------- commands
def make_base(base):
    """Hands, pairs, and frames with detections, that all runs share."""
    if (base / "done").exists():
        return
    for name, hands, seed in (("train", 24, 0), ("val", 8, 1)):
        _succeed(base, "make_synthetic.py", "--out", name, "--hands", hands, "--videos", hands // 4, "--size",
                 64, "--seed", seed, "--workers", 1)
    _succeed(base, "mine_pairs.py", "--data", "train", "--out", "pairs.npz", "--labelled", "--workers", 1)
    torch.manual_seed(0)
    encoder = build_encoder("vit", 32, dim=32, depth=2, heads=1)
    save_checkpoint(base / "encoder.pt", "encoder", step=0, arch="vit", config=encoder.config,
                    state_dict=encoder.state_dict())
    index = HandIndex(base / "train")
    names = []
    for row in range(len(index)):
        names.append(f"film{row // 6}/{row:06d}.png")
        (base / "frames" / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        read_image(index.image_path(row))[0].save(base / "frames" / names[-1])
    np.savez(base / "seen.npz", image=np.array(names), side=np.array(["right"] * len(index)),
             keypoints=np.array(index.columns["joints2d"], np.float64), score=np.full(len(index), 0.9))
    (base / "done").touch()


def _succeed(folder, *command):
    folder.mkdir(parents=True, exist_ok=True)
    status, said, _ = call(folder, command)
    if status != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} in {folder}: {said}")


def stage(script, base, *more, steps=STEPS):
    """The command of a training stage in the folder of a case."""
    options = [option.format(base=base) for option in [*TINY, *OPTIONS[script]]]
    return [script, *options, "--steps", steps, "--save-every", 3, "--log-every", 1, "--out", "out",
            "--resume", "auto", *more]


def once(folder, run):
    """What run(folder) returns, which is called once, in whichever lane comes first."""
    facts = folder / "facts.json"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        while not facts.exists():
            time.sleep(0.05)
    else:
        try:
            found = run(folder)
        except Exception:
            found = f"without any accident: {traceback.format_exc()}"
        (folder / "facts.part").write_text(json.dumps(found))
        os.replace(folder / "facts.part", facts)
    found = json.loads(facts.read_text())
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def reference(folder, run):
    """What run(folder), which nothing interrupts, leaves in `out`, and what it returns."""
    found = once(folder, run)
    return content(folder / "out"), found


def uninterrupted(command, folder):
    """Runs a command -> its seconds, and how often it changed a file."""
    begin = time.monotonic()
    status, said, _ = call(folder, command, lambda: watch_events(None, None))
    if status != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} in {folder}: {said}")
    return time.monotonic() - begin, int((folder / "events").read_text())


# ------------------------------------------------------------------------------------------------------ cases
def kill(number, rng, folder, work):
    """Kills a command once or twice, by the clock or at a change of a file, and gives it again: 100 times the
    three stages, then other commands. Returns what is wrong, or an empty text."""
    base = work / "base"
    prepare = ["--every", 1, "--detections", base / "seen.npz", "--out", "out"]
    commands = [["mine_pairs.py", "--data", base / "train", "--labelled", "--out", "out/pairs.npz"],
                ["prepare_data.py", "folder", base / "frames", "--out", "out"],
                ["prepare_data.py", "video", base / "frames", *prepare],
                ["prepare_data.py", "video", base / "frames", *prepare, "--pack"],
                ["prepare_data.py", "pack", base / "train", "--out", "out"]]
    if number < 100:
        name = f"{number % 3}{number // 3 % 2}"
        command = stage(STAGES[number % 3], base, "--workers", number // 3 % 2)
    else:
        name = f"command{number % 5}"
        command = commands[number % 5]
    wanted, (seconds, events) = reference(work / "reference" / name, partial(uninterrupted, command))
    for _ in range(rng.integers(1, 3)):
        event, delay = rng.integers(1, events + 1), rng.uniform(0, seconds)
        if rng.random() < 0.5:
            status, said, _ = call(folder, command, partial(watch_events, event, kill_myself))
        else:
            pid, reader = start(folder, command)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            status, said, _ = finish(pid, reader)
        if status not in (-9, 0, 2):
            return f"before the kill: status {status}: {said[-2000:]}"
        if broken(folder):
            return f"half-written after the kill: {broken(folder)}"
    status, said, _ = call(folder, command)
    return _judge(folder, status, said, wanted, may_refuse=command[0] not in STAGES)


def _judge(folder, status, said, wanted, may_refuse=False):
    """What is wrong after the last run of a case. may_refuse: it may say that its work is done already."""
    if status != 0 and not (may_refuse and status == 2 and not differences(content(folder / "out"), wanted)):
        return f"afterwards: status {status}: {said[-2000:]}"
    wrong = differences(content(folder / "out"), wanted)
    if wrong:
        return f"not the same: {', '.join(wrong[:5])} ({len(wrong)} in all)"
    return f"left behind: {leftovers(folder)}" if leftovers(folder) else ""


def disk(number, rng, folder, work):
    """From some change of a file on no file may grow beyond some bytes, as on a full disk; later it may."""
    command = stage(STAGES[number % 3], work / "base", "--workers", 0)
    wanted, (_, events) = reference(work / "reference" / f"{number % 3}0", partial(uninterrupted, command))
    event = rng.integers(1, events)
    size = int(rng.choice([0, rng.integers(1 << 22)]))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    status, said, _ = call(folder, command, lambda: watch_events(event, fill))
    if status == 0 and size:  # nothing larger was written afterwards
        shutil.rmtree(folder / "out")
        return disk(number, rng, folder, work)
    problem = one_line(status, said)
    if problem or not ("out" in said or "TMPDIR" in said):
        return f"full disk at event {event}, {size} bytes: {problem or said}"
    if broken(folder) or leftovers(folder):
        return f"half-written on a full disk: {broken(folder) + leftovers(folder)}"
    status, said, _ = call(folder, command)
    return _judge(folder, status, said, wanted)


def one_line(status, said):
    """What is wrong with how a command ended that should have refused: status 2 and one line."""
    lines = [line.strip(" \x1b[A") for line in said.replace("\r", "\n").splitlines()]
    errors = [line for line in lines if line.startswith("error")]
    if status != 2 or "Traceback" in said or len(errors) != 1:
        return f"status {status}, {len(errors)} lines of errors: {said[-2000:]}"
    return ""


def two_processes(folder, command, kill_after=None, rng=None):
    """Two processes under torchrun, one of which is killed so many seconds after the run has begun. Returns
    the status, standard error, the seconds since the run began, and whether one was killed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--max-restarts=3", "--monitor-interval=0.2"]
    with open(folder / "said", "w+") as said:
        job = subprocess.Popen([*start, ROOT / command[0], *map(str, command[1:])], cwd=folder,
                               env=ENV | {"TMPDIR": str(folder)}, stdout=subprocess.DEVNULL, stderr=said)
        while job.poll() is None and not (folder / "out" / "config.json").exists():
            time.sleep(0.02)
        begin = time.monotonic()
        killed = False
        if kill_after is not None:
            time.sleep(kill_after)
            workers = children(job.pid)
            if len(workers) == 2:
                os.kill(int(rng.choice(workers)), signal.SIGKILL)
                killed = True
        try:
            status = job.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = None
            for worker in children(job.pid):
                os.kill(worker, signal.SIGKILL)
            job.kill()
        said.seek(0)
        return status, said.read(), time.monotonic() - begin, killed


def _two_alone(command, folder):
    status, said, seconds, _ = two_processes(folder, command)
    if status != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} under torchrun: {said[-2000:]}")
    return seconds


def children(pid):
    """The processes that a process has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rsplit(")", 1)
        except OSError:
            continue
        state, parent = fields.split()[:2]
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def torchrun(number, rng, folder, work):
    """A worker is killed; torchrun starts both again, and they go on."""
    command = stage(STAGES[number % 3], work / "base", "--workers", 0, steps=2 * STEPS)
    wanted, seconds = reference(work / "reference" / f"two{number % 3}", partial(_two_alone, command))
    for _ in range(5):
        status, said, _, killed = two_processes(folder, command, rng.uniform(0, seconds), rng)
        if killed and "Traceback" in said:
            return f"a process without another one says more than a line: {said[-3000:]}"
        if killed:
            return _judge(folder, status, said, wanted)
        shutil.rmtree(folder / "out")  # it had ended
    return "the run ended before every kill"


# ----------------------------------------------------------------------------------------------------- memory
def memory(number, rng, folder, work):
    """How the three stages grow; what a photograph costs. Prints both; returns what is wrong, or an empty
    text."""
    if number < len(STAGES):
        return _growth(STAGES[number], folder, work)
    return _photograph(*[((4000, 3000), 700), ((8000, 6000), 1200)][number - len(STAGES)], folder, work)


def _growth(script, folder, work, longest=20_000, seconds=1000):
    """MB per 1,000 steps that a stage grows by: a line through the memory at every hundredth step of the
    second half."""
    command = stage(script, work / "base", "--workers", 0, "--batch-size", 2, "--log-every", 100,
                    "--save-every", 10**6, steps=10**6)
    pid, reader = start(folder, command)
    samples = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end and max(samples, default=0) < longest:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.2)
        log = folder / "out" / "log.jsonl"
        for row in read_log(log)[-1:] if log.exists() else []:
            status = Path(f"/proc/{pid}/status").read_text().split()
            samples.setdefault(row["step"], int(status[status.index("VmRSS:") + 1]) / 1024)
    os.kill(pid, signal.SIGKILL)
    _, said, _ = finish(pid, reader)
    steps = np.array(sorted(samples))
    steps = steps[steps > steps.max(initial=0) / 2]  # the first validations of a mesh run take some MB
    if len(steps) < 3:
        return f"{script}: too few steps in {seconds:.0f} s: {said[-2000:]}"
    slope = np.polyfit(steps / 1000, [samples[step] for step in steps], 1)[0]
    print(f"memory: {script}: {slope:+.3f} MB per 1,000 steps, over {steps[-1]:,} steps", flush=True)
    return f"{script} grows by {slope:.3f} MB per 1,000 steps" if slope > 0.5 else ""


def _photograph(size, most, folder, work):
    """predict.py in a process of its own, with one hand on a photograph of that many pixels: its MB and
    seconds."""
    mesh = stage("finetune_mesh.py", work / "base", "--workers", 0)
    reference(work / "reference" / "20", partial(uninterrupted, mesh))
    Image.effect_noise(size, 60).convert("RGB").save(folder / "photo.jpg")
    (folder / "boxes.csv").write_text("image,x0,y0,x1,y1\nphoto.jpg,900,900,1900,1900\n")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import predict
predict.main(sys.argv[2:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""
    begin = time.monotonic()
    checkpoint = work / "reference" / "20" / "out" / "last.pt"
    done = subprocess.run([sys.executable, "-c", code, ROOT, "photo.jpg", "--boxes", "boxes.csv",
                           "--checkpoint", checkpoint, "--out", "out"],
                          cwd=folder, env=ENV, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        return done.stderr[-2000:]
    used = int(done.stdout.split()[-1]) / 1024
    megapixels = size[0] * size[1] / 1e6
    print(f"memory: predict.py, one hand on {megapixels:.0f} MP: {used:.0f} MB, {seconds:.1f} s", flush=True)
    return f"{used:.0f} MB for {megapixels:.0f} MP" if used > most else ""
