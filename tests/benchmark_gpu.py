"""The section `gpu` of benchmark.py: what needs a GPU, within four minutes, on hands that it draws itself.

Runs the real commands; their share of the chip counts the encoder's passes alone, without heads and losses.
"""

import collections
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmark import (OPTIONS, ROOT, SCRATCH, START, TABLE, TorchvisionViews, alone, attempt, command,
                       comparator, draw_hands, layer, log_rates, matrix_rate, operations, our_views,
                       pretraining, pretraining_step, race, small)
from benchmark_data import big_index, detected_poses

GPU_SECONDS = 230  # of the whole section
RUNS = {  # script, architecture, side, batch, passes of the encoder that a hand costs, flags
    "HandMIM, vit_small": ("pretrain_mim.py", "vit_small", 224, 256, 8, []),
    "HandMIM, vit_base": ("pretrain_mim.py", "vit_base", 224, 256, 8, []),
    "SiMHand, resnet50": ("pretrain_contrastive.py", "resnet50", 128, 1024, 6,
                          ["--labelled", "--pairs", "PAIRS"]),
    "mesh, vit_small": ("finetune_mesh.py", "vit_small", 224, 256, 3, ["--val", "DATA"]),
}


def gpu_device():
    """With --device cpu the CPU: a test of this file's code."""
    return torch.device("cuda" if torch.cuda.is_available() and OPTIONS.device == "auto" else "cpu")


def gpu():
    """Everything that needs a GPU, on hands that it draws itself."""
    if not torch.cuda.is_available() and OPTIONS.device != "cpu":
        return TABLE.add("everything", note="not measured: no GPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return TABLE.add("everything", note="not measured: start it with --nproc_per_node=1")
    begin = START if OPTIONS.sections == ["gpu"] else time.monotonic()

    def left():
        return GPU_SECONDS - (time.monotonic() - begin)

    cached = "device" if gpu_device().type == "cuda" else "memory"
    runs = small(list(RUNS), list(RUNS)[2:])
    parts = [("chip", 5, gpu_chip), ("hands", 20, gpu_hands)]  # name, least seconds, function
    parts += [(name, 12, lambda name=name: gpu_training(name, cached, left())) for name in runs]
    parts += [("step", 10, gpu_step), ("synchronisations", 20, gpu_syncs),
              ("layer", 5, lambda: layer([small(1024, 2)], gpu_device()))]
    parts += [(name, 12, lambda name=name: gpu_training(name, "none", left())) for name in small(runs, ())]
    parts += [("loader", 15, gpu_loader), ("mining", 30, gpu_mining)]
    for name, least, part in parts:
        if left() < least:
            TABLE.add(name, note=f"not measured: the section's {GPU_SECONDS} s are over")
        else:
            attempt(name, part)


def gpu_rate():
    """Quartiles of the rate of large bf16 products, FLOP/s."""
    return matrix_rate(gpu_device(), torch.bfloat16, small(8192, 256))


def gpu_chip():
    """Name of the GPU, its matrix rate, and copies from the host's pinned memory."""
    is_cuda = gpu_device().type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else "no GPU"
    TABLE.add(f"{name}: product of large bf16 matrices", gpu_rate() / 1e12, unit="TFLOP/s")
    host = torch.empty(small(2**28, 2**20), dtype=torch.uint8, pin_memory=is_cuda)
    there = torch.empty_like(host, device=gpu_device())
    seconds = race({"ours": lambda: there.copy_(host, non_blocking=True)}, 10, 2)["ours"]
    TABLE.add("copies from pinned memory", len(host) / seconds[::-1] / 1e9, unit="GB/s")


def gpu_hands():
    """Draws the section's hands with all cores, and mines their pairs."""
    folder, rate = draw_hands(2048, 224)
    TABLE.add("make_synthetic.py, 224 px, all cores", rate, unit="images/s")
    alone(command, "mine_pairs.py", "--data", folder, "--out", SCRATCH / "gpu_pairs.npz", "--labelled")


def encoder_flops(arch, size):
    """Of one image's forward pass."""
    from model import build_encoder

    with torch.device("meta"):
        encoder, image = build_encoder(arch, size), torch.empty(1, 3, size, size)
    return operations(lambda: encoder(image))


def gpu_training(name, cache, left):
    """Hands a second of the real command, by some lines of its log but the first two; then it is stopped."""
    script, arch, size, batch, passes, flags = RUNS[name]
    arch, size, batch = small((arch, size, batch), ("vit_micro", 32, 4))
    data = draw_hands(2048, 224)[0]
    words = {"PAIRS": SCRATCH / "gpu_pairs.npz", "DATA": data}
    flags = ["--data", data, "--arch", arch, "--image-size", size, "--batch-size", batch, "--cache", cache,
             "--device", gpu_device().type, "--log-every", small(5, 1), "--steps", small(10_000, 4),
             *(words.get(flag, flag) for flag in flags)]
    out = Path(tempfile.mkdtemp(dir=SCRATCH))
    end = time.monotonic() + min(22, left - 2)
    with open(out / "said", "w+") as said:
        words = [sys.executable, ROOT / script, "--out", out / "run", *flags]
        process = subprocess.Popen(list(map(str, words)), stdout=said, stderr=said, start_new_session=True)
        while process.poll() is None and time.monotonic() < end and len(log_rates(out / "run")) < 8:
            time.sleep(0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rates = log_rates(out / "run")[2:]
        said.seek(0)
        if not rates:
            raise RuntimeError(f"no line of the log in time; it said: {said.read().strip()[-200:]}")
    rates = np.quantile(rates, [0.25, 0.5, 0.75])
    share = rates[1] * passes * encoder_flops(arch, size) / gpu_rate()[1]
    TABLE.add(f"{name} at {size} px, batch {batch}, --cache {cache}", rates, unit="hands/s",
              note=f"{share:.1%} of the matrix rate, at {passes} passes of the encoder a hand")


def gpu_step():
    """HandMIM's step against the iBOT form; under torchrun also as several processes would run it."""
    where = gpu_device()
    shape = small(("vit_small", 224, 64), ("vit_micro", 32, 2))
    pretraining([shape], where)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
        wrap = torch.nn.parallel.DistributedDataParallel
        TABLE.race(f"HandMIM's step in DistributedDataParallel, {torch.distributed.get_backend()}",
                   pretraining_step(*shape, False, where, wrap), pretraining_step(*shape, False, where),
                   "the bare step", 7, 1)
        torch.distributed.destroy_process_group()


def gpu_syncs():
    """Where the steps wait for the GPU, as torch.cuda's debug mode warns."""
    data = draw_hands(2048, 224)[0]
    common = ["--data", data, "--arch", "vit_micro", "--image-size", 32, "--batch-size", small(64, 4),
              "--steps", small(16, 6), "--log-every", 100, "--workers", 0,
              "--device", gpu_device().type]
    more = {"pretrain_mim.py": [], "finetune_mesh.py": ["--val", data],
            "pretrain_contrastive.py": ["--labelled", "--pairs", SCRATCH / "gpu_pairs.npz"]}
    runs = [[script, "--out", SCRATCH / f"syncs_{script}", *common, *flags] for script, flags in more.items()]
    for script, counts, places in alone(count_syncs, json.dumps(runs, default=str))["runs"]:
        TABLE.add(f"{script}: synchronisations a step",
                  note=f"{min(counts)} to {max(counts)} " + ", ".join(places))


def count_syncs(runs):
    """Of each [script, flags ...]: the warnings in each step but the first three and the last, and where most
    are."""
    counted = []
    for script, *argv in json.loads(runs):
        module = importlib.import_module(Path(script).stem)
        found = []
        ends = []

        class Counting(module.Log):
            def __call__(self, step, values, found=found, ends=ends):
                super().__call__(step, values)
                ends.append(len(found))

        def note(message, category, filename, lineno, file=None, line=None, found=found):
            if "synchroniz" in str(message):
                found.append(f"{Path(filename).name}:{lineno}")

        with warnings.catch_warnings(), patch.object(module, "Log", Counting):
            warnings.simplefilter("always")
            warnings.showwarning = note
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
            command(script, *argv)
        places = collections.Counter(found[ends[2]:ends[-2]])
        counted.append((script, np.diff(ends[2:-1]).tolist(),
                        [f"{place} ({times})" for place, times in places.most_common(5)]))
    return {"runs": counted}


def gpu_loader():
    """From JPEG to two strong views on the GPU, with all cores: ours there, torchvision's in the loader."""
    from data import HandDataset, HandIndex, canvas_size, make_loader

    size = small(224, 32)
    index = HandIndex(draw_hands(2048, 224)[0])
    there = comparator("torchvision.transforms.v2")
    pin = gpu_device().type == "cuda"
    workers = small(max(1, os.cpu_count() - 1), 0)

    def ours():
        dataset = HandDataset([index], canvas_size(size))
        for batch in make_loader(dataset, batch_size=256, workers=workers, pin=pin):
            our_views(batch["canvas"].to(gpu_device(), non_blocking=True), size)

    def theirs():
        dataset = TorchvisionViews(index, size)
        for batch in torch.utils.data.DataLoader(dataset, 256, num_workers=workers, pin_memory=pin):
            batch.to(gpu_device(), non_blocking=True)

    times = race({"ours": ours, "theirs": there and theirs}, 1, 0)
    rates = {name: len(index) / seconds[1] for name, seconds in times.items()}
    TABLE.add(f"two strong views of {size} px from files, all cores", rates["ours"], rates.get("theirs"),
              "torchvision", "hands/s", note="with the start of the loader")


def gpu_mining():
    """mine_pairs.py on the GPU against itself on the CPU."""
    count = small(500_000, 400)
    path = big_index(count)
    np.save(path / "keypoints.npy", detected_poses(count, count // 100)[0])
    there = gpu_device().type
    found = {name: alone(command, "mine_pairs.py", "--data", path, "--out", SCRATCH / name / "pairs.npz",
                         "--device", name) for name in dict.fromkeys((there, "cpu"))}
    TABLE.add(f"mine_pairs.py, {count:,} hands, --device {there}", found[there]["seconds"],
              found["cpu"]["seconds"], "its --device cpu", note="with reading and the report")
