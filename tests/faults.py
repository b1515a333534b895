"""Accidents on purpose, on tiny data: CONTRIBUTING.md, "The fault suite", says what must hold.

    python tests/faults.py [SECTION ...] [--seed 0] [--share 1 | --quick | --case N [END]] [--out out/faults]

Prints a line a section, with its seconds. Where something fell short, it prints the case and how to repeat
it, keeps the case's folder, and exits with status 1. Linux only."""

import argparse
import json
import os
import shutil
import sys
import time
import traceback
import zlib
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
if __name__ == "__main__" and any(os.environ.get(name) != "1" for name in THREADS):
    # Numpy reads them when it is imported; a process with threads cannot be forked.
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | THREADS)
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import fault_files  # noqa: E402
import fault_geometry  # noqa: E402
import fault_runs  # noqa: E402

# name: how many cases, how many of them with --quick, how many at a time, what each must do, and the function
# that does one: (number, rng, folder, work) -> what is wrong, or an empty text
SECTIONS = {
    "geometry": (400, 20, 2, "hold", fault_geometry.case),
    "files": (400, 40, 2, "read or refused in a line, nothing run, nothing half-written", fault_files.case),
    "kills": (130, 3, 2, "end bit-identical", fault_runs.kill),
    "disk": (20, 1, 2, "one line, the last checkpoint whole, resumed to the same bits", fault_runs.disk),
    "torchrun": (20, 0, 1, "recovered, same bits", fault_runs.torchrun),
    "memory": (5, 0, 2, "grow by less than 0.5 MB in 1,000 steps, or hold less than is allowed",
               fault_runs.memory),
}


def run_case(section, seed, work, number):
    """What is wrong with a case; its folder stays then."""
    folder = work / f"{section}-{number}"
    folder.mkdir()
    rng = np.random.default_rng([seed, zlib.crc32(section.encode()), number])
    try:
        problem = SECTIONS[section][-1](number, rng, folder, work)
    except Exception:
        problem = traceback.format_exc()
    if problem:
        print(f"{section} {number}: {problem.strip()}\n    again: python tests/faults.py {section} --seed "
              f"{seed} --case {number}; its folder: {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    return problem


def in_lanes(lanes, numbers, work, run):
    """run(number) for all numbers, in as many processes as `lanes` -> {number: what is wrong}."""
    pids = []
    for lane in range(lanes):
        pids.append(os.fork())
        if pids[-1] == 0:
            found = {number: run(number) for number in numbers[lane::lanes]}
            (work / f"lane{lane}.json").write_text(json.dumps(found))
            os._exit(0)
    found = dict.fromkeys(map(str, numbers), "its process ended")
    for lane, pid in enumerate(pids):
        os.waitpid(pid, 0)
        result = work / f"lane{lane}.json"
        if result.exists():
            found |= json.loads(result.read_text())
            result.unlink()
    return found


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    cli.add_argument("--seed", type=int, default=0, help="another seed, other cases")
    cli.add_argument("--share", type=float, default=1.0, help="share of the cases (default 1)")
    cli.add_argument("--quick", action="store_true", help="the few cases of tests/test_faults.py")
    cli.add_argument("--case", type=int, nargs="+", metavar=("N", "END"),
                     help="one case alone, or those from N to before END")
    cli.add_argument("--out", type=Path, default=HERE.parent / "out" / "faults", help="folder to work in")
    args = cli.parse_args(argv)
    if set(args.sections) - set(SECTIONS):
        cli.error(f"sections are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    work = args.out.resolve()
    shutil.rmtree(work, ignore_errors=True)
    fault_runs.make_base(work / "base")
    is_good = True
    for section in args.sections or SECTIONS:
        count, some, lanes, wish, _ = SECTIONS[section]
        order = np.random.default_rng(0).permutation(count).tolist()  # a share has some of all kinds
        numbers = order[:some if args.quick else max(1, round(args.share * count))]
        if args.case:
            first, end = (*args.case, args.case[0] + 1)[:2]
            numbers = list(range(first, min(end, count)))
        if not numbers:
            continue
        begin = time.monotonic()
        found = in_lanes(lanes, numbers, work, partial(run_case, section, args.seed, work))
        good = list(found.values()).count("")
        print(f"{section}: {good} of {len(found)} {wish}; {time.monotonic() - begin:.0f} s", flush=True)
        is_good &= good == len(found)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
