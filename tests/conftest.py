"""Fixtures of several test files."""

import pytest
import torch
from fixtures import call

torch.set_num_threads(1)  # tiny data: more threads only wait for each other


@pytest.fixture(scope="session")
def hands(tmp_path_factory):
    """Two small indices of drawn hands: train (24 hands of 6 videos) and val (8 of 4)."""
    folder = tmp_path_factory.mktemp("hands")
    call("make_synthetic.py", "--out", folder / "train", "--hands", 24, "--videos", 6, "--size", 96)
    call("make_synthetic.py", "--out", folder / "val", "--hands", 8, "--videos", 4, "--size", 96, "--seed", 1)
    return folder


@pytest.fixture(scope="session")
def checkpoint(hands, tmp_path_factory):
    """A mesh network after one step: it predicts anything, as fast as any."""
    run = tmp_path_factory.mktemp("run") / "mesh"
    tiny = ["--arch", "vit_micro", "--image-size", 32, "--head-width", 32, "--batch-size", 4, "--workers", 0]
    call("finetune_mesh.py", "--data", hands / "train", "--val", hands / "val", "--out", run, *tiny,
         "--steps", 1)
    return run / "last.pt"


def pytest_collection_modifyitems(items):
    """Marks what runs commands, so that `make quick` can leave it out."""
    for item in items:
        if {"hands", "mesh", "freihand", "pairs", "tmp_run"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.commands)
