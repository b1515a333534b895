"""The README is true: every command in it runs, in its order, on smaller data; every file it links to is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from fixtures import write_official_pickle

from synthetic_hand import synthetic_mano

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
SMALLER = [                                                        # what is changed in a command, and nothing else
    (r"--hands \d+", "--hands 26 --size 96"),
    (r"--videos \d+", "--videos 9"),
    (r"--(epochs|steps) \d+", "--steps 2 --workers 0"),
    (r"--batch-size \d+", ""),
    (r"--arch vit_(tiny|small|base|micro)", "--arch vit_micro --image-size 32 --batch-size 4"),
    (r"^torchrun --nproc_per_node=8", f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"),
    (r"^python", sys.executable),
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)


def run(command, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_every_command_and_snippet_of_the_readme_runs(tmp_path):
    for script in ROOT.glob("*.*"):
        if script.suffix in (".py", ".html"):
            (tmp_path / script.name).symlink_to(script)
    write_official_pickle(tmp_path / "MANO_RIGHT.pkl", synthetic_mano())
    run([sys.executable, "make_synthetic.py", "--out", "FreiHAND_pub_v2", "--hands", "26", "--size", "96",
         "--layout", "freihand"], tmp_path)
    (tmp_path / "my_photographs").mkdir()
    for name in ("photo.jpg", "my_photographs/photo.jpg"):
        shutil.copy(tmp_path / "FreiHAND_pub_v2/training/rgb/00000000.jpg", tmp_path / name)
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nphoto.jpg,10,10,80,80,left\n")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 12
    for line in lines:
        for pattern, smaller in SMALLER:
            line = re.sub(pattern, smaller, line)
        run(shlex.split(line), tmp_path)
    for snippet in blocks("python"):
        run([sys.executable, "-c", snippet], tmp_path)


def test_links_and_flags_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for flag in set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--nproc", "--help"}:
        assert f'"{flag}"' in sources, flag


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert not re.findall(r"@[A-Z]+@", TEXT)
