"""runtime.py and saving.py: schedules and groups by formula, updates by hand, what RUN promises, formats."""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from fixtures import ENV, ROOT
from torch import nn

from runtime import (
    Runtime, adamw, batch_parts, cosine, ema_update, feed, generator, param_groups, run, set_lr, update,
)
from saving import (
    FORMATS, Log, Saves, check_run, check_writable, is_due, load_checkpoint, read_log, refuse_files,
    restore, save_checkpoint, staged_folder, start_run,
)

CPU = torch.device("cpu")


def one_of(rank=0, world=1):
    return Runtime(CPU, torch.float32, rank, world, 0, 0)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_process_of_torchrun_ends_with_the_status_of_its_command_whatever_its_threads_do():
    """gloo's threads sometimes abort a process that takes itself down; a hook at exit stands in for them."""
    for body, status in (("pass", 0), ("raise ValueError('a wrong flag')", 2)):
        text = ("import atexit, os\nfrom runtime import run\natexit.register(os._exit, 134)\n"
                f"def main():\n    print('done')\n    {body}\nrun(main)")
        done = subprocess.run([sys.executable, "-c", text], env=ENV | {"WORLD_SIZE": "2"}, cwd=ROOT,
                              capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "done\n"), done.stderr
        assert ("a wrong flag" in done.stderr) == bool(status)


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "smaller --batch-size"),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), 2, "--workers has died"),
    (RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly"), 2, "--workers: a process"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:5]\nConnection closed by peer"), 1, "another process"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 2, "TMPDIR=FOLDER")])
def test_what_is_no_ones_mistake_is_one_line_too(capsys, error, status, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == status and line.startswith("error: ") and words in line


def test_a_mistake_of_ours_keeps_its_traceback():
    def main():
        raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="size of tensor"):
        run(main)


# -------------------------------------------------------------------------------------- schedules and updates
def test_rates_are_cosines_of_the_step():
    assert [cosine(step, 10, 1.0, warmup=4) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert cosine(7, 10, 1.0, warmup=4) == pytest.approx(0.5)
    assert cosine(10, 10, 1.0, final=0.2) == pytest.approx(0.2) == cosine(99, 10, 1.0, final=0.2)


def test_only_matrices_decay_and_names_scale_the_rate():
    net = small_net()
    groups = param_groups(net.named_parameters(), 0.3, lambda name: 0.1 if name.startswith("0.") else 1.0)
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    optimizer = adamw(groups, CPU)
    set_lr(optimizer, 0.5, weight_decay=0.7)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p
             in group["params"]}
    for name, parameter in net.named_parameters():
        rate = 0.05 if name.startswith("0.") else 0.5
        assert found[id(parameter)] == (pytest.approx(rate), 0.7 if parameter.ndim > 1 else 0), name


def test_an_update_clips_the_whole_gradient_once():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    gradients = [torch.randn(p.shape, generator=generator(1)) for p in before]
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = update(optimizer, one_of().scaler(), list(net.parameters()), clip=0.5)
    size = math.sqrt(sum(float((g ** 2).sum()) for g in gradients))
    assert float(norm) == pytest.approx(size)
    for parameter, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - gradient * 0.5 / size)
        assert parameter.grad is None


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_step_without_a_finite_gradient_changes_nothing(is_fused):
    """Neither weights nor the optimiser's state; the next step goes on as if it had not been."""
    nets = [small_net(), small_net()]
    for net, bad in zip(nets, (False, True), strict=True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=is_fused)
        for step in range(3):
            for k, parameter in enumerate(net.parameters()):
                parameter.grad = torch.full_like(parameter, 1.0 + k + step)
            update(optimizer, one_of().scaler(), list(net.parameters()))
            if bad and step == 1:
                for parameter in net.parameters():
                    parameter.grad = torch.ones_like(parameter)
                net[0].weight.grad[0, 0] = math.inf
                assert not update(optimizer, one_of().scaler(), list(net.parameters())).isfinite()
    for mine, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, other)


def test_the_average_follows_parameters_and_copies_buffers():
    model, average = small_net(), small_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model(torch.randn(8, 3))  # moves the running statistics
    before = [p.detach().clone() for p in average.parameters()]
    ema_update(average, model, 0.9)
    for mine, old, theirs in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), 0.9 * old + 0.1 * theirs.detach())
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(average[1].running_mean, small_net()[1].running_mean)


def test_parts_cover_the_batch_and_the_last_one_says_so():
    parts = list(batch_parts(12, 3))
    assert torch.equal(torch.cat([torch.arange(12)[rows] for rows, _ in parts]), torch.arange(12))
    assert [last for _, last in parts] == [False, False, True]


def test_gradients_are_exchanged_with_the_last_part_alone():
    class Net:
        def no_sync(self):
            return "no exchange"

    two = one_of(0, 2)
    assert two.sync_gradients(Net(), False) == "no exchange" and two.sync_gradients(Net(),
                                                                                    True) != "no exchange"
    assert one_of().sync_gradients(Net(), False) != "no exchange"


def test_processes_take_consecutive_rows():
    drawn = torch.arange(24).reshape(2, 12)
    halves = [one_of(rank, 2).local_rows(drawn, dim=1) for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), drawn) and halves[1][0, 0] == 6
    thirds = [one_of(rank, 3).local_rows(torch.arange(7)) for rank in range(3)]
    assert torch.equal(torch.cat(thirds), torch.arange(7))


def test_things_are_due_every_so_many_steps_and_at_the_end():
    assert [step for step in range(10) if is_due(step, 4, 10)] == [3, 7, 9]


# -------------------------------------------------------------------------------------------------------- run
def arguments(out, **more):
    usual = {"out": str(out), "resume": None, "lr": 0.1, "ema": 0.9, "workers": 2, "precision": "fp32",
             "accumulate": 1, "steps": 8}
    return argparse.Namespace(**usual | more)


def begin(args, inputs=None, kind="mim"):
    """Starts or continues a run; returns its folder and the checkpoint that it goes on from."""
    inputs = inputs or {"data": "these hands"}
    state = check_run(args, one_of(), kind, inputs)
    return start_run(args, one_of(), state, inputs), state


def test_a_run_is_continued_with_its_own_flags_and_hands(tmp_path):
    out, state = begin(arguments(tmp_path / "run", data=["here"]))
    assert state is None and json.loads((out / "config.json").read_text())["format"] == FORMATS["run"]
    save_checkpoint(out / "last.pt", "mim", step=7)
    with pytest.raises(ValueError, match="not empty"):
        begin(arguments(out))
    with pytest.raises(ValueError, match="--ema is 0.2"):
        begin(arguments(out, resume="yes", ema=0.2))
    with pytest.raises(ValueError, match="--data holds something else"):
        begin(arguments(out, resume="yes"), {"data": "other hands"})
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps(json.loads(config) | {"pairs": "pairs.npz"}))
    with pytest.raises(ValueError, match="--pairs is None, but .* says pairs.npz"):
        begin(arguments(out, resume="yes", pairs=None))
    (out / "config.json").write_text(config)
    with pytest.raises(ValueError, match="kind 'mim', needed 'mesh'"):
        begin(arguments(out, resume="yes"), kind="mesh")
    with pytest.raises(ValueError, match="no run in"):
        begin(arguments(tmp_path / "none", resume="yes"))
    free = {"workers": 0, "data": ["there"], "compile": True, "eval_every": 5, "save_minutes": 1}
    assert begin(arguments(out, resume="yes", **free))[1]["step"] == 7
    assert not (out / "log.jsonl").exists()
    assert begin(arguments(out, resume="yes", lr=0.2, data=["there"]))[1]["step"] == 7
    more = {"precision": "bf16", "accumulate": 4, "steps": 9}
    assert begin(arguments(out, resume="yes", lr=0.2, data=["there"], **more))[1]["step"] == 7
    changed = {"accumulate": [1, 4], "precision": ["fp32", "bf16"], "steps": [8, 9]}
    assert read_log(out / "log.jsonl") == [{"step": 7, "changed": {"lr": [0.1, 0.2]}},
                                           {"step": 7, "changed": changed}]


def test_auto_starts_or_goes_on_and_torchrun_restarts_are_auto(tmp_path, monkeypatch):
    out, state = begin(arguments(tmp_path / "run", resume="auto"))
    assert state is None
    save_checkpoint(out / "last.pt", "mim", step=7)
    assert begin(arguments(out, resume="auto"))[1]["step"] == 7
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="not empty"):
        begin(arguments(out))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(arguments(out))[1]["step"] == 7
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.json.part").touch()  # as early as a kill can come
    assert begin(arguments(tmp_path / "killed", resume="auto"))[1] is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ValueError, match="no run in"):
        begin(arguments(tmp_path / "other", resume="auto"))


def test_only_the_checkpoint_decides_and_the_one_before_stands_in(tmp_path, capsys):
    out, _ = begin(arguments(tmp_path / "run"))
    (out / "encoder.pt").touch()  # it comes after last.pt, so it says nothing
    assert begin(arguments(out, resume="yes"))[1] is None
    assert "starting at step 0" in capsys.readouterr().err
    for step in (3, 6):
        save_checkpoint(out / "last.pt", "mim", step=step)
    assert begin(arguments(out, resume="yes"))[1]["step"] == 6
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:100])
    assert begin(arguments(out, resume="yes"))[1]["step"] == 3
    assert "last.prev.pt, step 3" in capsys.readouterr().err
    (out / "last.pt").unlink()  # killed between the two renames of a save
    assert begin(arguments(out, resume="yes"))[1]["step"] == 3
    (out / "last.pt").write_bytes(whole[:100])
    (out / "last.prev.pt").write_bytes(whole[:50])
    with pytest.raises(ValueError, match="last.pt: no checkpoint"):
        begin(arguments(out, resume="yes"))


def test_runs_and_checkpoints_of_another_format_are_refused(tmp_path):
    out, _ = begin(arguments(tmp_path / "run"))
    config = json.loads((out / "config.json").read_text())
    del config["format"]  # as written before files had numbers
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another version"):
        begin(arguments(out, resume="yes"))
    torch.save({"kind": "mim", "step": 3}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=f"format 1 of 'mim', this version reads {FORMATS['mim']}"):
        load_checkpoint(tmp_path / "old.pt", "mim")
    torch.save({"kind": "mesh", "step": 3}, tmp_path / "old.pt")  # unchanged since
    assert load_checkpoint(tmp_path / "old.pt", "mesh")["step"] == 3
    with pytest.raises(ValueError, match="kind 'mesh', needed 'mim'"):
        load_checkpoint(tmp_path / "old.pt", "mim")


def test_a_full_disk_is_one_line_and_the_last_save_stays(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", "mim", step=3)

    def full(state, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="last.pt could not be written .is the disk full"):
        save_checkpoint(tmp_path / "last.pt", "mim", step=6)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt", "mim")["step"] == 3


def test_a_folder_of_results_appears_at_once_and_what_a_kill_left_goes(tmp_path, monkeypatch):
    out = tmp_path / "results"
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    of_killed = f".results.{platform.node()}.{killed.pid}.0123abcd.part"
    of_running = f".results.{platform.node()}.{os.getpid()}.0123abcd.part"  # as in containers of one name
    for name in (of_killed, of_running, ".results.part"):  # the last is the user's
        (tmp_path / name / "deep").mkdir(parents=True)
    with pytest.raises(KeyError), staged_folder(out) as folder:
        (folder / "half").touch()
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {of_running, ".results.part"}
    for name in (of_running, ".results.part"):
        (tmp_path / name / "deep").rmdir()
        (tmp_path / name).rmdir()
    with staged_folder(out) as folder:
        (folder / "index.json").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "index.json"]
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(b.name) or replace(a, b))
    with staged_folder(out) as folder:
        for name in ("index.json", "a.npy", "z.npy"):
            (folder / name).write_text(name)
    assert moved[-1] == "index.json" and (out / "index.json").read_text() == "index.json"
    assert sorted(path.name for path in out.iterdir()) == ["a.npy", "index.json", "z.npy"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux names open files")
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power finds the old file or the new one, whole; and then the name too."""
    done = []
    sync, replace = os.fsync, os.replace

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda file: (done.append(f"fsync {name_of(file)}"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"{a.name} > {b.name}"), replace(a, b)))
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path / "run/last.pt", "mesh", step=step)
    once = ["fsync last.pt.part", "last.pt.part > last.pt", "fsync run"]
    assert done == [*once, once[0], "last.pt > last.prev.pt", *once[1:]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_saves_are_due_by_steps_by_minutes_and_after_a_signal(monkeypatch, number):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saves = Saves(one_of(), every=4, minutes=1, steps=10)
    due = []
    for step in range(10):
        clock[0] += 70 if step == 5 else 1
        due.append(saves.due(step))
    assert [step for step, is_due in enumerate(due) if is_due] == [3, 5, 7, 9]
    assert not any(Saves(one_of(1, 2), 1, 0, 10).due(step) for step in range(10))  # process 0 alone saves

    saves, done = Saves(one_of(), every=100, minutes=100, steps=100), []
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        for step in saves.watch(range(100)):
            if step == 4:
                os.kill(os.getpid(), number)
            done.append((step, saves.due(step)))
    assert stop.value.code == 143 and done[-1] == (4, True) and not any(due for _, due in done[:-1])
    assert signal.getsignal(number) is before


def test_a_folder_in_which_a_killed_command_began_is_empty(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".results.{platform.node()}.{killed.pid}.0123abcd.part/images").mkdir(parents=True)
    refuse_files(tmp_path)
    (tmp_path / ".results.part").touch()  # the user's
    with pytest.raises(ValueError, match="files already"):
        refuse_files(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/results: cannot be written"):
        check_writable(tmp_path / "file/results")
    check_writable(tmp_path / "new/results")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_restores_its_parts(tmp_path):
    net = small_net()
    optimizer = adamw(param_groups(net.named_parameters(), 0.1), CPU)
    net(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "last.pt", "mesh", step=5, net=net.state_dict(),
                    optimizer=optimizer.state_dict())
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    again = adamw(param_groups(other.named_parameters(), 0.1), CPU)
    assert restore(load_checkpoint(tmp_path / "last.pt", "mesh"), net=other, optimizer=again) == 5
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert again.state_dict()["state"][0]["exp_avg"].any()
    assert restore(None, net=other) == 0


def test_the_log_drops_what_a_killed_run_wrote_past_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"st\x00p": 2}\n[2]\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = Log(path, 1, 10, 8, one_of(), every=2)
    log(2, {"loss": 1.5, "lr": 0.1, "gradient_norm": torch.ones(())})
    log(3, {"loss": 1.4, "lr": 0.1, "gradient_norm": torch.ones(())})
    log.warn(3, "careful")
    log.close()
    rows = read_log(path)
    assert [(row["step"], row.get("loss")) for row in rows] == [(1, 3), (2, 1.5), (3, None)]
    assert rows[2]["warning"] == "careful" and rows[1]["images_per_second"] > 0
    assert log.curves["loss"] == [(1, 3), (2, 1.5)]


def test_a_long_curve_keeps_its_ends_and_a_bounded_number_of_points(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, 10 ** 6, 8, one_of(), every=1)
    for step in range(1, 20001):
        log.write({"step": step, "loss": 1.0 / step})
    assert 2000 <= len(log.curves["loss"]) <= 4000
    assert log.curves["loss"][0] == (1, 1.0) and log.curves["loss"][-1][0] > 19980


def test_skipped_steps_are_counted_and_many_in_a_row_end_the_run(tmp_path):
    """Steps 2, 3 and 5 have no finite gradient; then all of them."""
    log = Log(tmp_path / "log.jsonl", 0, 100, 8, one_of(), every=4)
    with pytest.raises(FloatingPointError, match="step 28: .* 22 steps in a row: .* --lr"):
        for step in range(1, 101):
            norm = math.nan if step in (2, 3, 5) or step > 6 else 1.0
            log(step, {"loss": norm, "lr": 0.1, "gradient_norm": torch.tensor(norm)})
    rows = read_log(tmp_path / "log.jsonl")
    told = {row["step"]: row["warning"].split()[0] for row in rows if "warning" in row}
    assert told == {4: "2", 8: "3", 12: "4", 16: "4", 20: "4", 24: "4"}
    assert rows[0]["loss"] == 1 and rows[2]["loss"] is None


def test_what_is_not_finite_is_not_saved(tmp_path):
    save_checkpoint(tmp_path / "last.pt", "mesh", step=1, model={"weight": torch.ones(2)})
    with pytest.raises(FloatingPointError, match="model.weight is not finite"):
        save_checkpoint(tmp_path / "last.pt", "mesh", step=2, model={"weight": torch.tensor([1, math.nan])})
    assert load_checkpoint(tmp_path / "last.pt", "mesh")["step"] == 1


# --------------------------------------------------------------------------------------------- draws and feed
def test_draws_are_a_function_of_their_key():
    keys = ((0, 5, 2), (0, 5, 2), (0, 5, 2, 0), (0, 5, 3), (2 ** 32, 1), (0, 1, 1), (52, 0))
    first, again, *others = (torch.rand(3, generator=generator(*key)) for key in keys)
    assert torch.equal(first, again)
    assert len({tuple(each.tolist()) for each in (first, *others)}) == 6


def test_any_number_of_processes_draws_the_same():
    """300 rows are three blocks; shares of 300, 100 and 5 rows begin anywhere in them."""
    def draw(rows, generator):
        return torch.rand(2, rows, 3, generator=generator)

    whole = one_of().draw(draw, 300, 7, 1, dim=1)
    assert whole.shape == (2, 300, 3) and len(whole.flatten().unique()) > 1700
    for world in (3, 60):
        shares = [one_of(rank, world).draw(draw, 300, 7, 1, dim=1) for rank in range(world)]
        assert torch.equal(torch.cat(shares, 1), whole)
    assert not torch.equal(one_of().draw(draw, 300, 7, 2, dim=1), whole)


def test_the_feed_makes_the_next_step_while_one_is_used():
    """In order, from the step where it starts; a mistake in the loader arrives in the loop."""
    events = []

    def loader():
        for k in range(3):
            events.append(f"load {k}")
            yield {"canvas": torch.full((2,), k)}
        raise ValueError("a broken file")

    def draw(step):
        events.append(f"draw {step}")
        return {"theta": torch.tensor(step), "masked": [torch.tensor([step])]}

    used = []
    with pytest.raises(ValueError, match="a broken file"):
        for step, batch, drawn in feed(loader(), draw, 5, CPU):
            assert drawn["theta"] == step == int(drawn["masked"][0])
            used.append((step, int(batch["canvas"][0])))
    assert used == [(5, 0), (6, 1), (7, 2)]
    assert events == ["load 0", "draw 5", "load 1", "draw 6", "load 2", "draw 7"]
