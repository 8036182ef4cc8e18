"""The pictures of a run: what they show, and that they are written completely or not at all."""

from __future__ import annotations

import json

import pytest

from analysis import figures, learning_curves, plots, runs
from base.errors import DataError, ResourceError, UsageError


def row(epoch: int, size: int = 32, batch: int = 64, **values) -> dict:
    scores = {
        "train_loss": 2.0,
        "train_top1": 50.0,
        "val_loss": 1.5,
        "val_top1": 40.0 + epoch,
        "val_top5": 80.0,
    }
    averaged = {"ema_val_loss": None, "ema_val_top1": None, "ema_val_top5": None}
    place = {"epoch": epoch, "image_size": size, "batch_size": batch, "lr": 1e-3}
    return {**place, **scores, **averaged, "best": False, **values}


def write_run(folder, rows: list[dict]):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plots_write_a_runs_curves_beside_it_and_compare_several(tmp_path):
    a = write_run(tmp_path / "x" / "run", [row(1), row(2, 48, 32, best=True)])
    b = write_run(tmp_path / "y" / "run", [row(1, train_loss=None)])
    assert plots.main([str(a)]) == 0
    assert is_png(a / "plots" / "curves.png") and is_png(a / "plots" / "lr.png")
    assert plots.main([str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert written == {"compare.png", *(f"{d}-run/{n}.png" for d in "xy" for n in ("curves", "lr"))}


def test_plots_refuse_what_holds_no_epoch(tmp_path):
    with pytest.raises(DataError, match="no epoch yet"):
        plots.main([str(write_run(tmp_path / "empty", []))])
    with pytest.raises(DataError, match=r"metrics.jsonl"):
        plots.main([str(tmp_path / "nothing")])
    with pytest.raises(UsageError):
        plots.main([])


def test_curves_leave_out_unscored_epochs_and_mark_phases_and_the_best(tmp_path):
    rows = [row(1, val_top1=None, val_loss=None), row(2), row(3, 48, 32, best=True), row(4, 48, 32)]
    assert runs.series(rows, "val_top1") == ([2, 3, 4], [42.0, 43.0, 44.0])
    assert runs.phases(rows) == [(1, 32, 64), (3, 48, 32)]
    _, top1 = learning_curves.curves(runs.read_run(write_run(tmp_path / "run", rows), "a $name$")).axes
    labels = [text.get_text() for text in top1.get_legend().get_texts()]
    assert "best: 43.00 % at epoch 3" in labels and "validation, raw weights" in labels
    assert "validation, EMA weights" not in labels
    assert [t.get_text() for t in top1.texts] == ["32 px\nbatch 64", "48 px\nbatch 32"]


def test_a_short_last_phase_keeps_its_label(tmp_path):
    rows = [row(epoch) for epoch in range(1, 30)] + [row(30, 48, 32)]
    fig = learning_curves.curves(runs.read_run(write_run(tmp_path / "run", rows), "run"))
    for ax in fig.axes:
        assert any("48 px" in text.get_text() for text in ax.texts)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        figures.save(figures.figure(2, 2), tmp_path / "file" / "a.png")
    figures.save(figures.figure(2, 2), tmp_path / "deep" / "a.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_runs_are_told_apart_by_their_flags_and_by_as_much_path_as_it_takes(tmp_path):
    base = {"lr": 0.1, "epochs": 2, "save_dir": "x", "resize_schedule": [32], "ema": True}
    for name, changed in (("a/run", {}), ("b/run", {"lr": 0.2, "save_dir": "y", "ema": False})):
        folder = write_run(tmp_path / name, [row(1, seconds=1800.0), row(2, best=True, seconds=1800.0)])
        (folder / "config.json").write_text(json.dumps({**base, **changed}))
    found = runs.read_runs(runs.find_runs(tmp_path))
    assert [one.scores() for one in found] == [
        ["a-run", "2/2", "42.00", "2", "1.00"],
        ["b-run", "2/2", "42.00", "2", "1.00"],
    ]
    assert runs.differing_flags(found) == ["lr", "ema"]  # not save_dir, which does not affect training
    tie = [{"lr": 0.1, "ema": True}, {"lr": 0.2, "ema": False}]
    assert runs.unusual_flags(found) == tie  # neither value is usual
    assert runs.unusual_flags([found[0], *found])[:2] == [{}, {}]
    changed = runs.changed_flags(found[1].config)
    assert changed == {
        "lr": ("0.2", "0.0003"),
        "epochs": ("2", "90"),
        "resize_schedule": ("32", "64,128,224"),
        "ema": ("off", "on"),
    }


def test_a_config_that_is_not_json_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [row(1)])
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json is unreadable"):
        runs.read_runs([folder])
