"""The pictures of a run: what they show, and that they are written completely or not at all."""

from __future__ import annotations

import json
import math
import shlex
import warnings

import numpy as np
import pytest

import train
from analysis import figures, learning_curves, plots, runs, step_curves
from base import flags
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


def step_row(step: int, size: int = 32, batch: int = 64, **values) -> dict:
    place = {"step": step, "epoch": 1, "image_size": size, "batch_size": batch, "lr": 1e-3}
    speed = {"images_per_second": 900.0, "data_wait_percent": 1.0, "bad_steps": 0, "loss_scale": None}
    return {**place, "train_loss": 2.0, "grad_norm": 1.0, "grad_norm_max": 3.0, **speed, **values}


def write_steps(folder, rows: list[dict]):
    write_run(folder, [row(1)])
    (folder / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
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


def test_a_training_loss_on_another_scale_has_its_own_axis(tmp_path):
    folder = write_run(tmp_path / "run", [row(1, train_loss=690.0), row(2, train_loss=12.0)])
    (folder / "config.json").write_text('{"loss": "bce"}')
    scored, _, training = learning_curves.curves(runs.read_run(folder, "run")).axes
    assert training.get_ylim()[1] > 600 and scored.get_ylim()[1] < 100
    names = [text.get_text() for text in scored.get_legend().get_texts()]
    assert names[:2] == ["training batches", "validation, raw weights"]


def test_a_short_last_phase_keeps_its_label(tmp_path):
    rows = [row(epoch) for epoch in range(1, 30)] + [row(30, 48, 32)]
    fig = learning_curves.curves(runs.read_run(write_run(tmp_path / "run", rows), "run"))
    for ax in fig.axes:
        assert any("48 px" in text.get_text() for text in ax.texts)


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legends(tmp_path):
    found = [runs.read_run(write_steps(tmp_path / n, [step_row(1), step_row(2)]), n) for n in ("_a", "b")]
    epochs = learning_curves.compare(found, "title", "%", lambda run: "val_top1")
    steps = step_curves.compare(found, step_curves.LOSS)
    for fig in (epochs, steps):
        assert [text.get_text().strip() for text in fig.legends[0].get_texts()] == ["_a", "b"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        figures.save(figures.figure(2, 2), tmp_path / "file" / "a.png")
    figures.save(figures.figure(2, 2), tmp_path / "deep" / "a.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_letters_that_no_font_has_are_noted_once(tmp_path, capsys, monkeypatch):
    fig = figures.figure(2, 2, "\ue000\ue001 שלום")
    figures._note_missing_letters.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save(fig, tmp_path / "a.png")
        figures.to_svg(fig)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(fig, "savefig", lambda *_, **__: warnings.warn("another", stacklevel=1))
    with pytest.warns(UserWarning, match="another"):
        figures.to_svg(fig)


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


@pytest.mark.parametrize("words", [
    "--pretrained", "--pretrained --epochs 90 --lr 3e-4", "--pretrained --schedule onecycle --epochs 4",
    "--pretrained --augment full --freeze-epochs 0", "--pretrained --no-ema", "--config digits --lr 0.01",
    "--epochs 30 --drop-path-rate 0.1",
])  # fmt: skip
def test_the_command_of_a_run_repeats_it(words):
    config, _ = flags.parse(train.build_parser(), words.split())
    again = shlex.split(runs.command(flags.plain(config)))
    assert again[:2] == ["python", "train.py"]
    same, _ = flags.parse(train.build_parser(), again[2:])
    free = dict.fromkeys((*flags.FREE_ON_RESUME, "config"))
    assert vars(same) | free == vars(config) | free


def test_a_config_that_is_not_json_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [row(1)])
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json is unreadable"):
        runs.read_runs([folder])


# --- the curves over the steps ---


def test_plots_draw_the_steps_of_runs_that_logged_them(tmp_path):
    folder = write_steps(tmp_path / "run", [step_row(20), step_row(40)])
    assert plots.main([str(folder)]) == 0 and is_png(folder / "plots" / "steps.png")
    with open(folder / "steps.jsonl", "a") as file:
        file.write('{"step": 60, "ep')  # the run is writing
    assert plots.main([str(folder)]) == 0
    with open(folder / "steps.jsonl", "a") as file:
        file.write("och\n")
    with pytest.raises(DataError, match=r"steps\.jsonl line 3"):
        plots.main([str(folder)])


def test_bins_hold_rows_of_one_phase_and_hide_no_spike():
    rng, sizes = np.random.default_rng(0), [32] * 1003 + [48] * 2001
    rows = [
        step_row(20 * k, size, train_loss=float(rng.normal()), grad_norm_max=5.0)
        for k, size in enumerate(sizes, 1)
    ]
    rows[1500] |= {"train_loss": 77.0, "grad_norm_max": 99.0}
    rows[700] |= {"train_loss": None, "grad_norm": None, "grad_norm_max": None, "bad_steps": 20}
    points = step_curves.binned(rows, step_curves.LOSS)
    assert step_curves.BINS / 2 < len(points.step) <= step_curves.BINS and 1003 * 20 in points.step
    first = 0
    for step, *found in zip(*points[:4], strict=True):
        part = [r["train_loss"] for r in rows if first < r["step"] <= step and r["train_loss"] is not None]
        assert found == pytest.approx([math.fsum(part) / len(part), min(part), max(part)])
        assert 7 <= (step - first) / 20 <= 8
        first = step
    assert first == 3004 * 20 and points.highest.max() == 77.0
    assert step_curves.binned(rows, step_curves.NORM).highest.max() == 99.0


def test_few_rows_are_drawn_as_they_are():
    rows = [step_row(5 * k, train_loss=float(k)) for k in range(1, 31)]
    points = step_curves.binned(rows, step_curves.LOSS)
    for values in points[1:]:
        assert values.tolist() == list(range(1, 31))
    assert points.step.tolist() == [row["step"] for row in rows]


def test_smoothing_averages_equally_on_both_sides():
    values = np.array([0.0, 3.0, 9.0, 0.0, 1e30, 2.0])
    means = step_curves.smoothed(values, 1)
    assert means.tolist() == [0.0, 4.0, 4.0, pytest.approx(1e30 / 3), pytest.approx(1e30 / 3), 2.0]
    line = np.arange(50.0)
    np.testing.assert_allclose(step_curves.smoothed(line, 7), line)


def test_the_norm_shows_the_clip_limit_and_skipped_steps_and_all_panels_the_phases(tmp_path):
    rows = [step_row(20), step_row(40, bad_steps=2), step_row(60, 48, 32), step_row(80, 48, 32)]
    folder = write_steps(tmp_path / "run", rows)
    (folder / "config.json").write_text(json.dumps({"clip_norm": 1.5, "clip_mode": "norm"}))
    run = runs.read_run(folder, "run")
    assert step_curves.phases(run.steps) == [(0, 32, 64), (40, 48, 32)]
    axes = step_curves.curves(run).axes
    assert [ax.get_ylabel() for ax in axes] == [
        "loss (nats)", "norm before clipping", "learning rate", "images per second", "waiting (%)"
    ]  # fmt: skip
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert labels == ["mean of 20 steps", "lowest to highest", "clipped to 1.5", "skipped steps"]
    assert axes[1].get_yscale() == "log" and [text.get_text() for text in axes[0].texts] == [
        "32 px\nbatch 64",
        "48 px\nbatch 32",
    ]
    assert all(any(set(line.get_xdata()) == {40} for line in ax.get_lines()) for ax in axes)
    for limit in ("x", 0.0, math.inf, None):
        (folder / "config.json").write_text(json.dumps({"clip_norm": limit, "clip_mode": "norm"}))
        _, norm, *_ = step_curves.curves(runs.read_run(folder, "run")).axes
        assert "clipped" not in str([text.get_text() for text in norm.get_legend().get_texts()])


def test_columns_without_values_are_not_drawn(tmp_path):
    nothing = dict.fromkeys(("train_loss", "grad_norm", "grad_norm_max", "lr", "image_size", "batch_size"))
    rows = [step_row(20, loss_scale=65536.0, **nothing), {"step": 40, "epoch": 1}]
    run = runs.read_run(write_steps(tmp_path / "run", rows), "run")
    assert [panel.column for panel in step_curves.panels(run)] == [
        "images_per_second",
        "data_wait_percent",
        "loss_scale",
    ]
    assert len(step_curves.charts([run])) == 3 and len(step_curves.curves(run).axes) == 3
    empty = runs.read_run(write_run(tmp_path / "old", [row(1)]), "old")
    assert step_curves.charts([empty]) == step_curves.charts([empty, empty]) == []
    assert step_curves.charts([run, empty]) == []
    logged = runs.read_run(write_steps(tmp_path / "logged", [step_row(20)]), "logged")
    assert len(step_curves.charts([run, logged])) == 2
