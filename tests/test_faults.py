"""The quick part of the fault suite: faults.py, and CONTRIBUTING.md."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.commands
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_accidents_end_well(tmp_path):
    program = Path(__file__).resolve().parent / "faults.py"
    done = subprocess.run([sys.executable, program, "--quick", "--out", tmp_path / "work"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
