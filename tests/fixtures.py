"""What several test files share: calls of the commands, a crude random hand with MANO's structure, and a
writer of the official pickle's format."""

import contextlib
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

PARENTS = [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]


def call(*command, check=True, processes=1, **options):
    """A command of this repository as a user types it -> returncode, stdout, stderr.

    One process runs here, through the same `run(main)` as on the command line, because starting Python and
    torch takes longer than most of the commands. Several processes run under torchrun. options: of
    subprocess.run, which is then used. """
    command = list(map(str, command))
    if processes == 1 and not options:
        done = _call_here(*command)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        start = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / command[0])]
        options = {"env": ENV, "capture_output": True, "text": True} | options
        done = subprocess.run([*start, *command[1:]], **options)
        if "Address already in use" in done.stderr:  # another torchrun took the free port first
            done = subprocess.run([*start, *command[1:]], **options)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def _call_here(script, *argv):
    from runtime import run

    module = importlib.import_module(Path(script).stem)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(lambda: module.main(list(argv)))
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess([script, *argv], code, out.getvalue(), err.getvalue())


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def random_mano(seed=0):
    """Arrays with the keys, shapes and axes of MANO's right file: blobs of vertices on 16 joints, the rest
    random."""
    rng = np.random.default_rng(seed)
    joints = np.zeros((16, 3))
    joints[0] = 0.09, 0.006, 0.006
    for finger, across in enumerate((0.025, 0.0, -0.045, -0.022, 0.05)):  # MANO's order of fingers
        for k in range(3):
            joints[1 + 3 * finger + k] = 0.01 - 0.03 * k + 0.04 * (finger == 4), 0.002 * k, across
    v_template = joints[np.arange(778) % 16] + rng.normal(scale=0.006, size=(778, 3))
    near = np.exp(-((v_template[:, None] - joints) ** 2).sum(2) / 2e-4) + 1e-4 * rng.random((778, 16))
    shapedirs = rng.normal(scale=5e-4, size=(778, 3, 10))
    shapedirs[..., 0] += 0.06 * (v_template - v_template.mean(0))                              # overall size
    regressor = near.T / near.T.sum(1, keepdims=True)
    return {
        "v_template": v_template, "shapedirs": shapedirs,
        "posedirs": rng.normal(scale=1e-3, size=(778, 3, 135)),
        "J_regressor": regressor, "weights": near / near.sum(1, keepdims=True), "J": regressor @ v_template,
        "f": rng.permuted(np.tile(np.arange(778), (1538, 1)), axis=1)[:, :3],
        "kintree_table": np.array([PARENTS, range(16)]),
        "hands_components": rng.normal(scale=0.05, size=(45, 45)),  # poses of .3 radians
        "hands_mean": rng.normal(scale=0.3, size=45), "hands_coeffs": rng.normal(size=(20, 45))}


class _Select:
    pass


class _Ch:
    pass


class _Csc:
    pass


# As the official files, which Python 2 wrote, name them.
_NAMES = {_Select: "chumpy.reordering\nSelect", _Ch: "chumpy.ch\nCh", _Csc: "scipy.sparse.csc\ncsc_matrix",
          np.ndarray: "numpy\nndarray", np.dtype: "numpy\ndtype", set: "__builtin__\nset"}


class OfficialPickler(pickle._Pickler):
    """Protocol 2 with the opcodes and global names of Python 2 and numpy 1."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file):
        super().__init__(file, protocol=2, fix_imports=False)

    def save_string(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write((b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string

    def save_global(self, item, name=None):
        module = item.__module__.replace("numpy._core", "numpy.core").replace("builtins", "__builtin__")
        known = _NAMES.get(item, f"{module}\n{name or item.__qualname__}")
        self.write(f"c{known}\n".encode())
        self.memoize(item)


def _holder(kind, **state):
    holder = kind()
    holder.__dict__.update(state)
    return holder


def write_official_pickle(path, arrays, permuted=False):
    """Writes `arrays` as MANO's file holds them: chumpy Select over ten columns and ten of junk, scipy csc,
    uint32.

    permuted: the selection is not a plain slice, the case in which only chumpy's own rule gives the right
    numbers. """
    x = np.concatenate([arrays["shapedirs"], 0.1 + np.arange(778 * 3 * 10).reshape(778, 3, 10)], axis=2)
    idxs = np.arange(x.size).reshape(x.shape)[..., :10].ravel()
    if permuted:
        places = np.random.default_rng(1).permutation(x.size)              # value i goes to places[i]
        x, idxs = x.ravel()[np.argsort(places)].reshape(x.shape), places[idxs]
    shapedirs = _holder(_Select, a=_holder(_Ch, x=x, _dirty_vars={"x"}, _itr=None), idxs=idxs,
                        preferred_shape=(778, 3, 10), _cache={"drs": None}, _status="new")
    dense = arrays["J_regressor"]
    columns, rows = np.nonzero(dense.T)
    regressor = _holder(_Csc, data=dense[rows, columns], indices=rows.astype(np.int32), maxprint=50,
                        _shape=dense.shape,
                        indptr=np.searchsorted(columns, np.arange(779)).astype(np.int32))
    kintree = np.asfortranarray(np.where(arrays["kintree_table"] < 0, 2**32 - 1, arrays["kintree_table"]))
    content = dict(arrays, shapedirs=shapedirs, J_regressor=regressor, f=arrays["f"].astype(np.uint32),
                   kintree_table=kintree, bs_style="lbs", bs_type="lrotmin")
    with open(path, "wb") as file:
        OfficialPickler(file).dump(content)
