"""Tables and the headline picture of recipes/ladder.sh.

    python recipes/ladder_table.py
    python recipes/ladder_table.py --out docs/ladder

Keeps the small parts of the runs in runs/ladder (flags, some lines of the log, scores; no weights), one file
a run, in runs/ladder/table (--out). From these files alone it writes table.md beside them, and
runs/ladder/table.png. So both can be made again without the runs: the second call does so for those that are
kept there.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from draw import curve, save_image  # noqa: E402 (the path above)
from runtime import run  # noqa: E402
from saving import read_json, read_log, write_atomically  # noqa: E402

TITLES = {  # name of a row -> what it is; also the order of the tables
    "untrained": "untrained", "ibot": "iBOT's losses", "handmim": "**HandMIM**",
    "no_keypoints": "HandMIM without keypoints", "no_patches": "HandMIM without patches",
    "no_pixels": "HandMIM without pixels", "pixels": "pixels alone", "patches": "masked patches alone",
    "keypoints": "keypoints alone", "hog": "HOG alone", "handmim_hog": "HandMIM + HOG",
    "contrast": "HandMIM, InfoNCE",
    "similar": "HandMIM, similar hands", "similar_contrast": "HandMIM, similar hands, InfoNCE",
    "hog_similar_contrast": "HandMIM + HOG, similar hands, InfoNCE",
    "simclr": "SimCLR", "peclr": "PeCLR", "simhand": "SiMHand",
    "simhand_handmim": "SiMHand, then HandMIM", "drawn_handmim": "HandMIM, half of the hands drawn",
    "resnet18": "ResNet-18 from scratch"}
SETS = {"": "Upright hands", "anywhere_": "Hands seen from anywhere", "pool_": "Real photographs"}
HEADLINE = ("untrained", "ibot", "handmim", "handmim_hog", "similar", "contrast", "similar_contrast",
            "hog_similar_contrast", "simclr", "peclr", "simhand")
COLUMNS = {  # heading -> (number of a kept file, its form)
    "ridge, mm": ("probe.ridge_pa_mpjpe_mm", ".2f"), "neighbour, mm": ("probe.nearest_pa_mpjpe_mm", ".1f"),
    "ridge, %": ("probe.ridge_pa_2d_percent", ".2f"), "neighbour, %": ("probe.nearest_pa_2d_percent", ".2f"),
    "PCK 5 %": ("probe.ridge_pck_5", ".3f"), "orientation R2": ("probe.orientation_r2", ".2f"),
    "finger R2": ("probe.flexion_r2", ".2f"), "mesh, 10 %, mm": ("mesh_0.1.pa_mpvpe_mm", ".2f"),
    "mesh, all, mm": ("mesh_1.pa_mpvpe_mm", ".2f")}
RAW = {"raw pixels, 16 x 16": "pixels_raw_", "raw HOG, 8 x 8 cells": "hog_raw_"}  # probed beside every run
DROPPED = {"data", "val", "pairs", "probe", "init", "mano", "out", "command", "inputs"}  # of config.json
LINES = 20  # of a log that are kept, beside those of the probe


# ------------------------------------------------------------------------------------------------------- keep
def keep(source, folder):
    """Writes folder/RUN.json, what is kept of a run's folder `source`; nothing of one without scores."""
    kept = {}
    for path in sorted(source.glob("*/metrics.json")) + sorted(source.glob("*/scores/metrics.json")):
        numbers = {name: _short(value) for name, value in read_json(path).items()
                   if isinstance(value, (int, float)) and not name.startswith("untrained_")}
        kept[path.relative_to(source).parts[0]] = numbers
    if not kept:
        return
    if (source / "config.json").exists():
        config = read_json(source / "config.json")
        kept["config"] = {name: value for name, value in config.items() if name not in DROPPED}
        rows = read_log(source / "log.jsonl")
        steps = [row["step"] for row in rows if "loss" in row]
        chosen = {steps[place] for place in np.linspace(0, len(steps) - 1, LINES).astype(int)}
        kept["log"] = [{name: _short(value) for name, value in row.items()} for row in rows
                       if "loss" not in row or row["step"] in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, indent=None).replace(', {"step"', ',\n{"step"')
    write_atomically(folder / f"{source.name}.json", lambda part: part.write_text(text + "\n"))


def _short(value):
    """Five digits of a number."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------- read
def read_kept(folder):
    """{row: [kept file of a seed, ...]}, rows in the order of TITLES, unknown ones last."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        rows.setdefault(path.stem.rpartition(".")[0], []).append(read_json(path))
    order = [prefix + name for prefix in SETS for name in TITLES]
    return dict(sorted(rows.items(), key=lambda item: order.index(item[0]) if item[0] in order else 999))


def set_of(row):
    """The prefix in SETS of a row's name."""
    return next((prefix for prefix in SETS if prefix and row.startswith(prefix)), "")


def number(kept, place):
    """The number at "part.name" of a kept file, or None. "mesh_0.1" is a part."""
    part, _, name = place.rpartition(".")
    return kept.get(part, {}).get(name)


def hands_of_step(kept):
    """Hands that a run learns from in a step; of SiMHand pairs of hands."""
    return kept["config"]["batch_size"] if kept["config"]["lr"] else 0


# ----------------------------------------------------------------------------------------------------- tables
def table(rows):
    """Lines of a table of {row: kept files}: mean and deviation over the seeds of the numbers there are."""
    columns = {heading: place for heading, place in COLUMNS.items()
               if any(number(kept, place[0]) is not None for files in rows.values() for kept in files)}
    lines = [["", "hands or pairs", "seeds", *columns]]
    for row, files in rows.items():
        name = row.removeprefix(set_of(row))
        seen = [kept["log"][-1]["step"] * hands_of_step(kept) for kept in files if kept.get("log")]
        cells = [_spread([number(kept, place) for kept in files], form) for place, form in columns.values()]
        lines.append([TITLES.get(name, name), f"{max(seen, default=0):,}", str(len(files)), *cells])
    probes = {}
    for files in rows.values():
        for kept in files:
            probes |= kept.get("probe", {})
    for title, feature in RAW.items():
        cells = [_spread([probes.get(place.replace("probe.", feature))], form)
                 for place, form in columns.values()]
        lines.append([title, "", "", *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _spread(values, form):
    """Mean and standard deviation (n - 1) as text; the mean alone of one value."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean = format(np.mean(values), form)
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else mean


# ---------------------------------------------------------------------------------------------------- picture
def headline(rows, size=(720, 440)):
    """The chart of HEADLINE: the live probe's ridge error against the hands seen, with a band of one standard
    deviation to either side where a row has several seeds. An untrained network is a level line."""
    lines, bands = {}, {}
    for row in HEADLINE:
        files = [dict(probe_curve(kept)) for kept in rows.get(row, ())]
        steps = sorted(set.intersection(*map(set, files))) if files else []
        if not steps:
            continue
        errors = np.array([[curve_of_seed[step] for step in steps] for curve_of_seed in files])  # (seeds, K)
        mean = errors.mean(0)
        title = TITLES[row].strip("*")
        lines[title] = steps, mean
        if len(files) > 1:
            deviation = errors.std(0, ddof=1)
            bands[title] = steps, mean - deviation, mean + deviation
    longest = max((steps[-1] for steps, _ in lines.values()), default=0)
    for some in (lines, bands):
        if "untrained" in some:
            _, *levels = some["untrained"]
            some["untrained"] = [0, longest], *(np.repeat(level[0], 2) for level in levels)
    return curve(lines, size, title="PA-MPJPE of frozen features in mm (live probe)",
                 x_label="hands seen (SiMHand: pairs)", bands=bands)


def probe_curve(kept):
    """[(hands seen, ridge error in mm)] of a run."""
    return [(row["step"] * hands_of_step(kept), row["probe_ridge_mm"]) for row in kept.get("log", ())
            if "probe_ridge_mm" in row]


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder of the runs")
    cli.add_argument("--out", type=Path, help="folder of what is kept of them (default: RUNS/table)")
    args = cli.parse_args(argv)
    args.out = args.out or args.runs / "table"
    for folder in sorted(args.runs.glob("*.[0-9]*/")):
        keep(folder, args.out)
    rows = read_kept(args.out)
    if not rows:
        raise ValueError(f"--runs {args.runs}: no run has scores yet, and {args.out} holds none: "
                         "run recipes/ladder.sh")
    text = ["Written by `recipes/ladder_table.py` from the files beside it."]
    for prefix, title in SETS.items():
        some = {row: files for row, files in rows.items() if set_of(row) == prefix}
        if some:
            text += ["", f"**{title}**", "", *table(some)]
    text = "\n".join(text) + "\n"
    write_atomically(args.out / "table.md", lambda part: part.write_text(text, encoding="utf-8"))
    save_image(args.out.with_suffix(".png"), headline(rows))
    print(text + f"\nwrote {args.out / 'table.md'} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
