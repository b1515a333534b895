"""recipes/ladder_table.py: what it keeps of runs, and that its table and picture come from that alone."""

import json

import numpy as np
import pytest
from fixtures import ROOT


@pytest.fixture
def ladder_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    import ladder_table
    return ladder_table


def write_run(runs, name, ridge, mesh, steps=200):
    run = runs / name
    (run / "probe").mkdir(parents=True)
    (run / "mesh_0.1/scores").mkdir(parents=True)
    scores = {"ridge_pa_mpjpe_mm": ridge, "pixels_raw_ridge_pa_mpjpe_mm": 12.5, "orientation_r2": 0.1234567}
    (run / "probe/metrics.json").write_text(json.dumps(scores))
    (run / "mesh_0.1/scores/metrics.json").write_text(json.dumps({"pa_mpvpe_mm": mesh}))
    config = {"batch_size": 32, "lr": 0.1, "out": "/somewhere/else", "data": ["/somewhere/else"]}
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)]
    rows += [{"step": step, "probe_ridge_mm": ridge + 10 / step} for step in (100, 200)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_and_picture_come_from_the_kept_files_alone(ladder_table, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "docs/ladder"
    for seed, ridge in enumerate((11.0, 12.0, 13.0)):
        write_run(runs, f"handmim.{seed}", ridge, mesh=8.0)
    write_run(runs, "pool_new.0", 14.0, mesh=9.0)
    (runs / "ibot.0").mkdir()  # it has just begun
    ladder_table.main(["--runs", str(runs), "--out", str(out)])
    table, picture = out / "table.md", tmp_path / "docs/ladder.png"
    lines = table.read_text().splitlines()
    assert "| **HandMIM** | 6,400 | 3 | 12.00 ± 1.00 | 0.12 ± 0.00 | 8.00 ± 0.00 |" in lines
    assert "| new | 6,400 | 1 | 14.00 | 0.12 | 9.00 |" in lines and "**Real photographs**" in lines
    assert "| raw pixels, 16 x 16 |  |  | 12.50 |  |  |" in lines and "iBOT's" not in table.read_text()
    kept = (out / "handmim.0.json").read_text()
    assert "/somewhere" not in kept and len(kept) < 4000
    rows = json.loads(kept)["log"]
    assert [row["step"] for row in rows if "probe_ridge_mm" in row] == [100, 200]
    assert rows[0]["step"] == 1 and max(row["step"] for row in rows if "loss" in row) == 200
    before = table.read_text(), picture.read_bytes()
    ladder_table.main(["--runs", str(tmp_path / "gone"), "--out", str(out)])
    assert (table.read_text(), picture.read_bytes()) == before


def test_the_picture_averages_the_seeds_over_the_hands_they_have_seen(ladder_table, tmp_path, monkeypatch):
    drawn = {}

    def curve(series, size, **more):
        drawn.update(series=series, **more)

    monkeypatch.setattr(ladder_table, "curve", curve)
    for seed, ridge in enumerate((11.0, 13.0)):
        write_run(tmp_path / "runs", f"handmim.{seed}", ridge, mesh=8.0)
        ladder_table.keep(tmp_path / "runs" / f"handmim.{seed}", tmp_path / "kept")
    ladder_table.headline(ladder_table.read_kept(tmp_path / "kept"))
    seen, mean = drawn["series"]["HandMIM"]
    assert seen == [3200, 6400] and mean == pytest.approx([12.1, 12.05])
    _, low, high = drawn["bands"]["HandMIM"]
    assert high - low == pytest.approx(np.full(2, 2 * 2 ** 0.5))


def test_without_runs_it_says_so(ladder_table, tmp_path):
    with pytest.raises(ValueError, match="run recipes/ladder.sh"):
        ladder_table.main(["--runs", str(tmp_path), "--out", str(tmp_path / "docs")])
