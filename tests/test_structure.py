"""The shape of the project: who imports whom, files that can be copied alone and whose examples run, help
without a GPU, a network or data, lines that fit a screen."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import data
import model
import photo
import results
import saving
import surfaces
import video

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["make_synthetic", "prepare_data", "fit_hands", "paste_hands", "mine_pairs", "pretrain_mim",
           "pretrain_contrastive", "finetune_mesh", "probe", "evaluate", "predict", "export"]
LIBRARY = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in SCRIPTS)
PACKAGES = {"torch", "numpy", "scipy", "PIL", "tqdm"}
# Of requirements-video.txt and requirements-export.txt, imported where they are used.
EXTRA = {"video": {"cv2", "mediapipe"}, "export": {"onnxruntime"}}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", LIBRARY + SCRIPTS)
def test_imports_run_one_way(name):
    """Library files import nothing of ours, scripts import library files alone."""
    ours = set() if name in LIBRARY else set(LIBRARY)
    allowed = ours | PACKAGES | EXTRA.get(name, set()) | set(sys.stdlib_module_names)
    assert imported(ROOT / f"{name}.py") <= allowed


def test_every_library_file_runs_its_example_alone(tmp_path):
    """Copied to an empty folder, with a licence line for whoever takes it. One process runs them all, each
    with a path that holds its own folder and nothing of the project."""
    runs = []
    for name in LIBRARY:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / f"{name}.py", folder)
        docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
        assert "MIT licence" in docstring, name
        example = re.search(r"Example::\n\n(.*?)\n(?=\S)", docstring, flags=re.S)
        assert example, f"{name}: no example"
        code = textwrap.dedent(example[1])
        assert f"from {name} import" in code or f"import {name}" in code, name
        (folder / "example.py").write_text(code)
        runs.append(str(folder))
    code = """
import os, runpy, sys
libraries = {os.path.basename(folder) for folder in sys.argv[1:]}
clean = list(sys.path)
for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.path[:] = [folder, *clean]
    for name in libraries & set(sys.modules):
        del sys.modules[name]
    runpy.run_path("example.py")
    print("ran", os.path.basename(folder), flush=True)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code, *runs], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert re.findall(r"^ran (\w+)$", done.stdout, flags=re.M) == LIBRARY


def test_what_stands_twice_is_the_same(tmp_path):
    """Library files import nothing of ours, so a few things stand in two of them."""
    assert saving.FORMATS["encoder"] == model.FORMAT
    assert data.SUFFIXES == video.IMAGE_SUFFIXES and data.OVERLAYS == video.OVERLAYS
    points = np.random.default_rng(0).normal(size=(9, 3))
    np.testing.assert_array_equal(photo.unit(points), surfaces._unit(points))
    (tmp_path / "broken.json").write_text("[1, 2")
    for path in (tmp_path / "broken.json", tmp_path / "none.json", tmp_path):
        said = set()
        for read in (saving.read_json, results._read_json):
            with pytest.raises((ValueError, OSError)) as error:
                read(path)
            said.add(str(error.value))
        assert len(said) == 1, said


def test_help_needs_nothing(tmp_path):
    """Every --help in one process without a GPU; each names --out and writes nothing."""
    code = """
import contextlib, importlib, io, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            importlib.import_module(name).main(["--help"])
        except SystemExit as stop:
            assert not stop.code, name
    assert "--out" in text.getvalue(), name
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT), *SCRIPTS], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_script_starts_from_the_command_line(tmp_path):
    script = [sys.executable, str(ROOT / "pretrain_mim.py"), "--data", "nowhere", "--out",
              str(tmp_path / "run")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("error: nowhere is no index (no index.json): make one with "
                           "prepare_data.py or make_synthetic.py\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_stands_last(name):
    functions = [node.name for node in ast.parse((ROOT / f"{name}.py").read_text()).body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert functions[-1] == "main"


def test_lines_fit():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("recipes/*")]
    wide = [f"{path.name}:{number}" for path in files
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert not wide
