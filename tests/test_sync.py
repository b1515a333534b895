"""No training loop waits for its device between two logged steps. Needs no GPU: "meta" plays one.

With a GPU, the loops also run with torch.cuda.set_sync_debug_mode("error")."""

import contextlib

import pytest
import torch
from fixtures import call
from sync_counter import DeviceTraffic

import finetune_mesh
import pretrain_contrastive
import pretrain_mim
from runtime import Runtime

TINY = ["--arch", "vit_micro", "--image-size", 64, "--batch-size", 8, "--accumulate", 2, "--workers", 0,
        "--steps", 1000, "--log-every", 1000, "--save-every", 1000]
ALL_LOSSES = ["--prototypes", 64, "--contrast", 0.1, "--hog", 1]
WEIGHTED = ["--method", "peclr", "--weights", "both", "--labelled"]
STAGES = {
    "handmim": (pretrain_mim, [*TINY, *ALL_LOSSES]),
    "ibot": (pretrain_mim, [*TINY, "--prototypes", 64, "--pose-loss", "class"]),
    "peclr": (pretrain_contrastive, [*TINY, *WEIGHTED]),
    "simclr": (pretrain_contrastive, [*TINY, "--method", "simclr", "--color", 1]),
    "resnet": (pretrain_contrastive, [*TINY, *WEIGHTED, "--arch", "resnet50", "--undo", "official"]),
    "mesh": (finetune_mesh, [*TINY, "--head-width", 32, "--eval-every", 1000]),
    "mesh of a resnet": (finetune_mesh, [*TINY, "--head-width", 32, "--eval-every", 1000,
                                         "--arch", "resnet50", "--joint-maps"]),
}


class Enough(Exception):
    pass


class FusedSGD(torch.optim.SGD):
    """Stands in for the fused AdamW, which "meta" does not have."""

    def __init__(self, groups, device):
        super().__init__(groups, lr=0.1)
        self.defaults["fused"] = True

    def step(self):
        for group in self.param_groups:
            learned = [each for each in group["params"] if each.grad is not None]
            gradients = [each.grad for each in learned]
            torch._foreach_add_([each.detach() for each in learned], gradients, alpha=-group["lr"])


def watch_steps(monkeypatch, script, around, steps=3):
    """Lets the script's loop run from step 5 on, `around` (a context) from its second step to its last."""
    stack = contextlib.ExitStack()

    def feed(*given):
        with stack:
            for count, made in enumerate(script_feed(*given)):
                if count == 1:
                    stack.enter_context(around)
                if count == steps:
                    raise Enough
                yield made

    script_feed = script.feed
    monkeypatch.setattr(script, "feed", feed)
    monkeypatch.setattr(script, "restore", lambda state, **parts: 5)


def start(script, flags, hands, out):
    val = ["--val", hands / "val"] if script is finetune_mesh else []
    flags = [str(flag) for flag in ["--data", hands / "train", *val, "--out", out, *flags]]
    with pytest.raises(Enough):
        script.main(flags)


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device(stage, hands, tmp_path, monkeypatch):
    script, flags = STAGES[stage]
    traffic = DeviceTraffic()
    watch_steps(monkeypatch, script, traffic)
    device = Runtime(torch.device("meta"), torch.float32, 0, 1, 0, 0)
    monkeypatch.setattr(script, "setup", lambda args: device)
    monkeypatch.setattr(script, "adamw", FusedSGD)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    if script is finetune_mesh:
        monkeypatch.setattr(script, "upright_views", lambda canvas, *_: canvas)
    start(script, flags, hands, tmp_path / "run")
    assert traffic.queued and not traffic.blocking, "\n".join(sorted(set(traffic.blocking)))


class NoWaiting(contextlib.ContextDecorator):
    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_gpu(stage, hands, tmp_path, monkeypatch):
    script, flags = STAGES[stage]
    watch_steps(monkeypatch, script, NoWaiting())
    start(script, [*flags, "--device", "cuda"], hands, tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["pretrain_mim.py", "finetune_mesh.py"])
def test_a_gpu_learns_what_a_cpu_learns(name, hands, tmp_path):
    """Two steps in fp32: the same losses."""
    val = ["--val", hands / "val"] if name == "finetune_mesh.py" else []
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        call(name, "--data", hands / "train", *val, "--out", out, "--device", device, "--precision", "fp32",
             "--arch", "vit_micro", "--image-size", 64, "--batch-size", 8, "--workers", 0, "--steps", 2)
        found[device] = torch.load(out / "encoder.pt", weights_only=True)["state_dict"]
    for key, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][key], value, atol=2e-4, rtol=1e-3)
