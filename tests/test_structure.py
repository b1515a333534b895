"""The shape of the project: who imports whom, files that can be copied alone, help without a GPU, a network or data."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ["mano", "synthetic_hand", "model", "data", "views", "metrics", "runtime", "draw", "layouts"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in LIBRARY)


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
    allowed = set() if name in LIBRARY else set(LIBRARY)
    packages = {"torch", "numpy", "scipy", "PIL", "tqdm"} | ({"cv2", "mediapipe"} if name == "prepare_data" else set())       # the extra
    assert imported(ROOT / f"{name}.py") <= allowed | packages | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_file_works_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = (f"import importlib.util, sys; spec = importlib.util.spec_from_file_location('{name}', r'{tmp_path / name}.py'); "
            "sys.modules[spec.name] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)")
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)       # -I: the folder is not on the path


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_nothing(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--out" in done.stdout and not list(tmp_path.iterdir())
