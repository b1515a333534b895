"""Canvases that are kept: each image of a run is decoded and cut once, instead of in every epoch.

In a file beside the index, which later runs find; in memory, which the processes of one machine share; or on
the device, so that an epoch costs neither decoding nor a copy. The bits are the same as without.

A dataset here is one like data.HandDataset. It has `indices`, `starts`, `rows`, `canvas` (a side in pixels),
`context` and read_canvas(row), and serves what its attribute `cache` holds.

Example::

    import os
    import numpy as np
    from cache import CanvasFile

    two = CanvasFile(os.open("canvases.bin", os.O_RDWR | os.O_CREAT), count=2, size=8)
    os.truncate("canvases.bin", CanvasFile.head_bytes(2) + 2 * 3 * 8 * 8)
    two.write(1, np.full((3, 8, 8), 7, np.uint8), np.float32([-1, -1, 1, 1]))
    canvas = np.empty((3, 8, 8), np.uint8)
    two.read(1, canvas)
    assert (canvas == 7).all()

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
import weakref
from functools import partial
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

CANVAS_FORMAT = 1  # of how canvases are cut and of the files that keep them


def cache_canvases(dataset, kind: str, device="cpu", workers=0, rank=0, world=1, local_rank=0):
    """Cuts the canvases of dataset.rows once, in parallel; from then on the dataset serves them.

    kind: "none"; "file", one file an index, beside its columns, which later runs with the same rows find;
    "memory", which the processes of one machine share; "device", a copy on the device of every process, for
    CanvasCache.canvases. workers: processes that decode, for each of `world`. The processes call this
    together, and those of one machine share the work.

    Items are the same bits as without a cache. Returns the CanvasCache, or None for "none". ValueError says
    before any decoding that the canvases do not fit, and what to do.
    """
    if kind == "none":
        return None
    rows = np.unique(dataset.rows)
    parts = np.split(rows, np.searchsorted(rows, dataset.starts[1:-1]))  # the rows of each index
    used = [which for which, part in enumerate(parts) if len(part)]
    local = [parts[which] - dataset.starts[which] for which in used]
    indices = [dataset.indices[which] for which in used]
    plans = [_CanvasPlan(kind, *part, dataset) for part in zip(indices, local, strict=True)]
    _agree(_problem_of_room(kind, plans, torch.device(device), local_rank == 0), world)

    leader = rank - local_rank  # of this machine: it opens the files that the others then fill with it
    problem = None
    try:
        if local_rank == 0:
            problem = _first_problem(plan.begin for plan in plans)
        machines = _agree(problem, world, (leader, [plan.shared for plan in plans]))
        for plan, shared in zip(plans, machines[leader][1], strict=True):
            plan.shared = shared
        mates = [other for other, (its_leader, _) in enumerate(machines) if its_leader == leader]
        made = [plan for plan in plans if not plan.is_ready]
        files = [plan.open() for plan in plans]
        share = mates.index(rank), len(mates)
        with tqdm(total=sum(plan.count for plan in made), desc="canvases", unit="hand",
                  disable=rank > 0 or not made, mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
            problem = _first_problem(
                partial(_make_canvases, dataset, file, parts[which], workers, share, bar)
                for plan, file, which in zip(plans, files, used, strict=True) if not plan.is_ready)
        _agree(problem, world)
        if local_rank == 0:
            problem = _first_problem(plan.keep for plan in made)
        _agree(problem, world)
    finally:
        for plan in plans:
            plan.clean()
    cache = CanvasCache(kind, rows, files, dataset.canvas)
    if kind == "device":
        cache.move(device)
    dataset.cache = cache
    return cache


def _agree(problem, world, value=None):
    """The values of all processes; ValueError in all of them where one has a problem, a text or None."""
    answers = [(problem, value)]
    if world > 1:
        answers = [None] * world
        torch.distributed.all_gather_object(answers, (problem, value))
    for problem, _ in answers:
        if problem:
            raise ValueError(problem)
    return [value for _, value in answers]


def _first_problem(actions):
    """Calls the actions; the text of the first that raises ValueError or OSError, else None."""
    try:
        for action in actions:
            action()
    except (ValueError, OSError) as error:
        return str(error)
    return None


class _CanvasPlan:
    """The canvases of some rows (M,) of an index on their way into a file.

    shared: what the processes of a machine open, made by `begin` in the first of them; is it ready.
    """

    def __init__(self, kind, index, rows, dataset):
        self.kind = kind
        self.folder = index.path
        self.count = len(rows)
        self.size = dataset.canvas
        self.shared = None
        self.part = None  # what `clean` removes
        self.file = None
        self.bytes = CanvasFile.head_bytes(self.count) + self.count * 3 * self.size**2
        if kind == "file":
            name = f"canvases_{self.size}_{_canvas_fingerprint(index, rows, dataset)}.bin"
            self.path = index.path / name
            if self.path.is_file() and self.path.stat().st_size == self.bytes:
                self.shared = str(self.path), True

    @property
    def is_ready(self):
        return self.shared is not None and self.shared[1]

    def begin(self):
        """Opens a new file of this size, where there is none yet; ValueError says why it cannot."""
        if self.is_ready:
            return
        try:
            if self.kind == "file":
                self._remove_stale()
                part = self.path.with_name(f"{self.path.name}.{platform.node()}.{os.getpid()}.part")
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                self.part = part
                path = str(part)
            elif hasattr(os, "memfd_create"):  # unlike /dev/shm, which containers keep at 64 MB
                descriptor = os.memfd_create("canvases")
                path = f"/proc/{os.getpid()}/fd/{descriptor}"
            else:
                descriptor, path = tempfile.mkstemp()
                self.part = Path(path)
            self.file = CanvasFile(descriptor, self.count, self.size)
            os.ftruncate(descriptor, self.bytes)
        except OSError as error:
            other = "memory" if self.kind == "file" else "file"
            raise ValueError(f"--cache {self.kind}: the canvases of {self.folder} cannot be kept there "
                             f"({error.strerror}): use --cache {other}") from None
        self.shared = path, False

    def _remove_stale(self):
        """Removes files, maybe of many GB, that were begun here and not written to for a day."""
        for part in self.folder.glob("canvases_*.bin.*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                if time.time() - part.stat().st_mtime > 86400:
                    part.unlink()

    def open(self):
        """The CanvasFile; in the process that began it the one that it opened."""
        path, is_ready = self.shared
        return self.file or CanvasFile(os.open(path, os.O_RDONLY if is_ready else os.O_RDWR), self.count,
                                       self.size)

    def keep(self):
        """Gives the finished file its name, under which other runs find it."""
        if self.kind == "file":
            os.replace(self.part, self.path)
            self.part = None

    def clean(self):
        if self.part is not None:
            self.part.unlink(missing_ok=True)


def _canvas_fingerprint(index, rows, dataset):
    """A text that differs where a canvas may differ: by the images' names, boxes, sides, the context; and for
    other rows."""
    digest = hashlib.sha256(f"{CANVAS_FORMAT} {dataset.canvas} {dataset.context}".encode())
    digest.update(np.ascontiguousarray(rows))
    for name in ("image", "box", "side"):
        if name in index.columns:
            digest.update(np.ascontiguousarray(index.columns[name][rows]))
    return digest.hexdigest()[:16]


class CanvasFile:
    """M canvases in one open file, which lies on disk or in memory alone.

    The file: `valid` (M,4) f4; M bytes, 1 where the image could be read; from the next multiple of 4,096 on
    the canvases (M,3,S,S) u8.
    """

    def __init__(self, descriptor, count, size):
        self.descriptor = descriptor
        self.count = count
        self.size = size
        self.head = self.head_bytes(count)
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self):  # a process of the loader gets a descriptor of its own: nothing is copied
        return _open_again, (reduction.DupFd(self.descriptor), self.count, self.size)

    @staticmethod
    def head_bytes(count):
        return -(-17 * count // 4096) * 4096

    def facts(self):
        """valid (M,4), readable (M,)."""
        head = np.empty(17 * self.count, np.uint8)
        self._read(head, 0)
        split = 16 * self.count
        return head[:split].view(np.float32).reshape(-1, 4), head[split:] == 1

    def read(self, place, canvas):
        """Fills a contiguous canvas (3,S,S), or several (n,3,S,S) from a place on."""
        self._read(canvas, self.head + place * 3 * self.size**2)

    def _read(self, array, offset):
        # not mapped: an error of the disk is an exception here, and one call asks for a whole canvas
        view = memoryview(array).cast("B")
        while len(view):
            count = os.preadv(self.descriptor, [view], offset)
            if count == 0:
                raise ValueError("the file of canvases was cut off while it was in use: delete it")
            view = view[count:]
            offset += count

    def write(self, place, canvas, valid):
        """A readable image's canvas (3,S,S), and valid (4,)."""
        self._write(np.ascontiguousarray(canvas), self.head + place * canvas.nbytes)
        self._write(valid, 16 * place)
        self._write(np.uint8([1]), 16 * self.count + place)

    def _write(self, array, offset):
        view = memoryview(array).cast("B")
        while len(view):
            count = os.pwrite(self.descriptor, view, offset)
            view = view[count:]
            offset += count


def _open_again(descriptor, count, size):
    return CanvasFile(descriptor.detach(), count, size)


def _make_canvases(dataset, file, rows, workers, share, bar):
    """Writes the canvases of rows (M,) of the dataset. share: this process's number, and of how many."""
    number, shares = share
    runs = [range(first, min(first + 32, len(rows))) for first in range(0, len(rows), 32)][number::shares]
    maker = torch.utils.data.DataLoader(_CanvasMaker(dataset, file, rows), batch_size=None, sampler=runs,
                                        num_workers=min(workers, len(runs)), collate_fn=int,
                                        generator=torch.Generator())  # the run's own draws stay as they are
    for count in maker:
        bar.update(min(count * shares, bar.total - bar.n))  # the others are as far as this one


class _CanvasMaker(torch.utils.data.Dataset):
    """Item `places` writes these canvases to a file; its value is their number."""

    def __init__(self, dataset, file, rows):
        self.dataset = dataset
        self.file = file
        self.rows = rows

    def __getitem__(self, places):
        for place in places:
            try:
                canvas, valid = self.dataset.read_canvas(int(self.rows[place]))
            except (ValueError, OSError):
                continue  # its place in the file stays zero: not readable, and black
            try:
                self.file.write(place, canvas, valid)
            except OSError as error:
                raise ValueError(f"the canvases cannot be written ({error.strerror}): make room, or choose "
                                 "another --cache") from None
        return len(places)


class CanvasCache:
    """What cache_canvases made: canvases of the rows (M,), ascending. str(): what it takes, for a run's first
    line."""

    def __init__(self, kind, rows, files, size):
        self.kind = kind
        self.rows = rows
        self.files = files
        self.size = size
        self.firsts = np.cumsum([0] + [file.count for file in files])
        facts = [file.facts() for file in files]
        self.valid, self.is_readable = (np.concatenate(values) for values in zip(*facts, strict=True))
        self.is_on_device = False

    def __str__(self):
        place = {"file": "on disk", "memory": "in memory", "device": "on the device"}[self.kind]
        unread = int((~self.is_readable).sum())
        text = f"cache: {_size_text(3 * self.size**2 * len(self.rows))} {place}"
        if unread and self.kind == "file":  # nobody looks at them again
            return f"{text}, of which {unread} images could not be read: delete it once they are mended"
        return text

    def __getstate__(self):  # a process of the loader has no use for the device's copy
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}

    def places(self, rows):
        """Where rows (n,) lie; KeyError for one that was not drawn from when the cache was made."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        if (self.rows[places] != rows).any():
            raise KeyError("rows that the cache was not made for")
        return places

    def readable(self, rows):
        """(n,) False where an image could not be read."""
        return self.is_readable[self.places(rows)]

    def read(self, rows):
        """valid (n,4), and canvas (n,3,S,S) unless the device has the canvases."""
        places = self.places(rows)
        found = {"valid": self.valid[places]}
        if not self.is_on_device:
            found["canvas"] = np.empty((len(places), 3, self.size, self.size), np.uint8)
            sources = np.searchsorted(self.firsts, places, side="right") - 1
            own = (places - self.firsts[sources]).tolist()
            for canvas, source, place in zip(found["canvas"], sources.tolist(), own, strict=True):
                self.files[source].read(place, canvas)
        return found

    def move(self, device):
        """Copies the canvases to the device and lets go of the memory that they were in."""
        whole = torch.empty(len(self.rows), 3, self.size, self.size, dtype=torch.uint8, device=device)
        for file, first in zip(self.files, self.firsts, strict=False):
            for place in range(0, file.count, 256):
                some = np.empty((min(256, file.count - place), *whole.shape[1:]), np.uint8)
                file.read(place, some)
                whole[first + place:first + place + len(some)] = torch.from_numpy(some)
        self.whole = whole
        self.rows_there = torch.from_numpy(self.rows).to(device)
        self.files = []
        self.is_on_device = True

    def canvases(self, rows):
        """(B,3,S,S) u8 on the device, for a batch's `row` (B,); kind "device" alone. Does not wait for it."""
        return self.whole[torch.searchsorted(self.rows_there, rows.to(self.rows_there.device))]


def _problem_of_room(kind, plans, device, is_first):
    """Why the canvases do not fit, in one line, or None. is_first: this process asks for its machine."""
    text = "--cache {}: {} of canvases, but {} {} free: use {}"
    needed = sum(plan.bytes for plan in plans)
    if kind == "file" and is_first:
        of_disk = {}
        for plan in plans:
            if not plan.is_ready:
                of_disk.setdefault(os.stat(plan.folder).st_dev, []).append(plan)
        for some in of_disk.values():
            needed = sum(plan.bytes for plan in some)
            free = shutil.disk_usage(some[0].folder).free
            if needed > free:
                return text.format(kind, _size_text(needed), f"the disk of {some[0].folder} has",
                                   _size_text(free), "--cache memory or none")
    if kind == "device" and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            return text.format(kind, _size_text(needed), "the device has", _size_text(free), "--cache memory")
    if kind in ("memory", "device") and is_first:
        free = _free_memory()
        if free is not None and needed > free:
            return text.format(kind, _size_text(needed), "this machine has", f"{_size_text(free)} of memory",
                               "--cache file")
    return None


def _free_memory():
    """Bytes of memory that this machine, or the container, has left; None where it does not say."""
    try:
        facts = Path("/proc/meminfo").read_text().split()
        free = 1024 * int(facts[facts.index("MemAvailable:") + 1])
    except (OSError, ValueError):
        return None
    try:  # of a container; pages of files that were read count as used, but give way
        group = Path("/sys/fs/cgroup")
        facts = (group / "memory.stat").read_text().split()
        given_back = int(facts[facts.index("inactive_file") + 1])
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()) + given_back)
    except (OSError, ValueError):
        return free


def _size_text(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
