"""Fixtures of several test files."""
import pytest
from fixtures import call


@pytest.fixture(scope="session")
def hands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hands")
    call("make_synthetic.py", "--out", folder / "train", "--hands", 24, "--videos", 6, "--size", 96)
    call("make_synthetic.py", "--out", folder / "val", "--hands", 8, "--videos", 4, "--size", 96, "--seed", 1)
    return folder
