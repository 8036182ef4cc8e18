"""What a run prints: a table and a bar that fit the terminal, and commands at the end that work."""

import fcntl
import io
import os
import re
import shlex
import struct
import sys
import termios

import pytest

import predict
import train
import validate
from base.progress import Progress
from harness import log
from harness.log import COLUMNS, Table

ROW = dict.fromkeys(name for *_, name, _ in COLUMNS) | {
    "epoch": 61, "image_size": 224, "batch_size": 64, "lr": 3e-4, "train_loss": 6.9078, "train_top1": 100.0,
    "val_loss": 1.2345, "val_top1": 77.126, "val_top5": 100.0, "ema_val_loss": 1.1, "ema_val_top1": 78.004,
    "ema_val_top5": 94.5, "images_per_second": 12345.6, "data_wait_percent": 3.4, "seconds": 4000,
    "best": True,
}  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 300])
def test_the_table_fits_and_every_column_is_named(width):
    table = Table(90, width)
    groups, names = table.heading().splitlines()
    row = table.row(ROW, left=123.5 * 3600)
    assert len(groups) <= len(names) == len(row) <= max(width, 40)
    ends = [match.end() for match in re.finditer(r"wait %|\S+", names)]
    assert [match.end() for match in re.finditer(r"\S+", row)] == ends and ends[0] == len("   left")
    assert row.startswith("123h30m   61/90") and row.endswith(" best") and "78.00" in row
    assert len(names) == sum(column[3] for column in COLUMNS) or width < 120
    assert "94.50" in row or width < 80


def test_what_was_not_measured_is_a_dash_and_only_the_best_is_marked():
    row = Table(90, 80).row(ROW | {"ema_val_top1": None, "ema_val_top5": None, "best": False}, left=0)
    assert " ".join(row.split()) == "0s 61/90 224 6.908 100.0 1.234 77.13 100.00 - - 1h06m"


def test_the_width_is_the_terminals_and_80_without_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "115")
    assert len(Table(9).columns) == len(COLUMNS)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # not a terminal: it has no file number
    assert len(Table(9).row(ROW, 9)) == 80


def test_the_bar_keeps_the_time_left_in_80_columns(monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(theirs, "w"))
    with Progress(10010, " 12/90 224 px", unit="steps") as bar:
        bar.update(5005, "123h05m left  loss 6.908  12,345 img/s  wait 100%  lr 1.0e-04")
        bar.bar.refresh()
        shown = ""
        while " 50%|" not in shown:  # a read may end anywhere
            shown += os.read(ours, 10_000).decode()
        shown = next(line for line in shown.split("\r") if " 50%|" in line)
    assert shown.startswith(" 12/90 224 px  50%|") and "123h05m left  loss" in shown and len(shown) <= 80


def test_the_end_of_a_run_names_commands_that_work(photos, tmp_path, capsys):
    small = "--arch resnet_tiny --resize-schedule 16 --epochs 1 --batch-size 8 --num-workers 0 --device cpu"
    run_dir = tmp_path / "a run"
    assert train.main([*small.split(), "--data-dir", str(photos), "--save-dir", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.split("done: ")[0].splitlines())) <= 80
    commands = [shlex.split(line) for line in said.split("next:\n")[1].splitlines()]
    assert [words[:3] for words in commands][2:] == [
        ["python", "-m", "analysis.misclassified"], ["python", "-m", "analysis.report"]
    ]  # fmt: skip
    assert commands[3][3] == str(run_dir) and commands[2][3] == commands[0][2] == commands[1][2]
    assert predict.main([*commands[0][2:], "--num-workers", "0", "--device", "cpu"]) == 0
    assert validate.main([*commands[1][2:], "--num-workers", "0", "--device", "cpu"]) == 0
    assert log.read_metrics(run_dir)[0]["best"]
