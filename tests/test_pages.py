"""README, docs and recipes are true: every command and snippet runs on smaller data; links and flags exist.

The shell reads the pages' blocks and the recipes. In place of `python` and `torchrun` it finds stand-ins,
which only write down how they were called. The calls then run in their order, in this process.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fixtures import call, write_official_pickle
from PIL import Image
from test_layouts import write_assemblyhands, write_dexycb, write_ho3d, write_interhand

from mano import mirror_arrays
from synthetic_hand import synthetic_mano

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["README.md", *(f"docs/{name}.md" for name in (
    "data", "handmim", "contrastive", "mesh", "predict", "weights", "evaluation", "export", "experiments",
    "benchmarks"))]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*ORDER, "CONTRIBUTING.md")}
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh"))

# What is changed in a call, and nothing else: values of flags (None: the flag goes), and flags at its end,
# which overrule earlier ones.
IN_PLACE = {"--epochs": None, "--steps": None, "--arch": "vit_micro", "--videos": "9"}
OTHERS_FLAGS = {"--help", "--nproc", "--nnodes", "--rdzv", "--max-restarts", "--standalone", "--shm-size"}
TRAINING = ["--steps", "2", "--batch-size", "4", "--image-size", "32", "--workers", "0"]
AT_THE_END = {
    "make_synthetic.py": ["--hands", "26", "--size", "64", "--workers", "1"],
    "fit_hands.py": ["--steps", "3", "--most-error", "1"],  # the page's keypoints are those of no hand
    "pretrain_mim.py": [*TRAINING, "--prototypes", "64"],
    "pretrain_contrastive.py": TRAINING,
    "finetune_mesh.py": [*TRAINING, "--head-width", "32"],
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.M | re.S)


def calls_of(script, folder):
    """The calls of python and torchrun that the shell makes when it reads `script` in `folder`."""
    record = folder / "record"
    record.write_bytes(b"")
    path = f"{folder / 'stand-ins'}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "RECORD": str(record), "SEEDS": "0", "JOBS": "1",
                        "ROWS": "untrained handmim similar simhand resnet18 simhand_handmim anywhere_handmim"}
    done = subprocess.run(["bash", "-eu"], input=script, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


def smaller(words):
    """The same call on smaller data."""
    kept = []
    for word in words:
        flag = kept[-1] if kept else ""
        if flag in IN_PLACE:
            kept[-1:] = [flag, IN_PLACE[flag]] if IN_PLACE[flag] else []
        else:
            kept.append(word)
    script = next(word for word in kept if word.endswith(".py"))
    return kept + AT_THE_END.get(script, [])


def write_downloads(folder):
    """What a reader has before the first command: data sets, MANO's files, photographs, a video."""
    hand = synthetic_mano()
    write_official_pickle(folder / "MANO_RIGHT.pkl", hand)
    write_official_pickle(folder / "MANO_LEFT.pkl", mirror_arrays(hand))
    write_ho3d(folder / "HO3D_v2")
    write_dexycb(folder / "DEX_YCB")
    write_assemblyhands(folder / "ASSEMBLYHANDS", split="train")
    write_interhand(folder / "InterHand2.6M", split="train")
    for picture in ("photo.jpg", "my_photographs/photo.jpg", "my_videos/film/frame_000000.png"):
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((120, 100), 60).convert("RGB").save(folder / picture)
    (folder / "boxes.csv").write_text("image,x0,y0,x1,y1,side\nphoto.jpg,10,10,80,80,left\n")
    points = [f"{20 + 3 * k},{30 + 2 * k}" for k in range(21)]
    head = ["image", "side", "score", *(f"{axis}{k}" for k in range(21) for axis in "xy")]
    row = ["film/frame_000000.png", "right", "0.9", *points]
    (folder / "keypoints.csv").write_text(",".join(head) + "\n" + ",".join(row) + "\n")
    joints = ",".join(["image", "side", *head[3:]]) + "\n" + ",".join(["photo.jpg", "left", *points]) + "\n"
    for name in ("joints.csv", "others.csv"):
        (folder / name).write_text(joints)


@pytest.mark.commands
def test_every_command_and_snippet_runs(tmp_path, monkeypatch):
    (tmp_path / "stand-ins").mkdir()
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "stand-ins" / name
        # Through a file of its own: recipes call two at once, and cat appends a whole line.
        # What a recipe asks with -c, such as the number of cores, is answered.
        stand_in.write_text(f"""#!/bin/sh\n[ "$1" != -c ] || {{ echo 2; exit; }}
{{ printf '%s\\0' {name} "$@"; echo; }} > "$RECORD.$$"
cat "$RECORD.$$" >> "$RECORD"\nrm "$RECORD.$$"\n""")
        stand_in.chmod(0o755)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    write_downloads(tmp_path)
    calls = [["python", "make_synthetic.py", "--out", "FreiHAND_pub_v2", "--layout", "freihand"]]
    for page in ORDER:
        for block in blocks(page, "bash"):
            calls += calls_of(block, tmp_path)
    for recipe in RECIPES:
        calls += calls_of(f"bash recipes/{recipe}", tmp_path)
    calls = [smaller(words) for words in calls]
    once = [[word for word in words if word not in ("--resume", "auto")] for words in calls]
    calls = [words for k, words in enumerate(calls) if once[k] not in once[:k]]
    assert len(calls) >= 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "recipes")
    for words in calls:
        start = time.perf_counter()
        first = next(k for k, word in enumerate(words) if word.endswith(".py"))
        call(*words[first:], processes=1 if words[0] == "python" and first == 1 else 2)
        print(f"{time.perf_counter() - start:6.1f} s ", *words)
    for page in ORDER:
        for snippet in blocks(page, "python"):
            exec(compile(snippet, f"snippet of {page}", "exec"), {})


def anchors(page):
    """The anchors that a page's headings make on code-hosting sites."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(os.path.relpath(file.resolve(), ROOT)), f"{page}: {target}"


def test_flags_files_and_make_targets_exist():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("recipes/*.py"), ROOT / "tests" / "benchmark.py",
                ROOT / "tests" / "faults.py"]
    sources = {path.name: path.read_text(encoding="utf-8") for path in programs}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = PAGES | {name: (ROOT / "recipes" / name).read_text(encoding="utf-8") for name in RECIPES}
    for name, text in texts.items():
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - OTHERS_FLAGS:
            assert f'"{flag}"' in "".join(sources.values()), f"{name}: {flag}"
        for script, rest in re.findall(r"^\S*python\"? (\w+\.py)((?:.*\\\n)*.*)$", text, flags=re.M):
            for flag in re.findall(r"(?<!\w)--[a-z][a-z0-9-]+", rest):
                assert f'"{flag}"' in sources[script] + sources["runtime.py"], f"{name}: {script} {flag}"
        for file in re.findall(r"\b\w+\.py\b", text):
            places = (ROOT, ROOT / "tests", ROOT / "recipes")
            assert any((place / file).exists() for place in places), f"{name}: {file}"
        for recipe in re.findall(r"recipes/(\w+\.sh)", text):
            assert recipe in RECIPES, f"{name}: {recipe}"
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.M):
            assert re.search(rf"^{target}:", makefile, flags=re.M), f"{name}: make {target}"
    tree = PAGES["README.md"]
    assert all(re.search(rf"\b{re.escape(path.name)}\b", tree) for path in ROOT.glob("*.py")), "README's tree"
    assert all(f"{name}.sh" in tree for name in ("laptop", "freihand", "ladder", "release"))


def test_pages_are_short_and_nothing_waits_to_be_filled_in():
    assert (ROOT / "README.md").stat().st_size <= 14 * 1024
    for name, text in PAGES.items():
        assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", text), name
        wide = [line for line in text.splitlines() if len(line) > 140 and not line.startswith("|")]
        assert not wide, f"{name}: {wide[0]}"
