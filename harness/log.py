"""The log of a run: a row per epoch in metrics.jsonl and on the terminal, a row every N steps in steps.jsonl.

Both also go to TensorBoard, W&B and Trackio if asked for. Plots, tables and reports read the files. No
torch in here.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from base import files
from base.errors import DataError, nearest_path, optional, tell
from base.process import ROOT, say
from base.progress import duration


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """Return the rows of metrics.jsonl, oldest first. Raises DataError if it is missing or malformed."""
    from base import schemas

    fix = "" if Path(run_dir).exists() else nearest_path(run_dir)
    fix = fix or "name a directory that train.py wrote (--save-dir)"
    return _read_rows(Path(run_dir) / "metrics.jsonl", schemas.Row, fix)


def read_steps(run_dir: str | os.PathLike) -> list[dict]:
    """Return the rows of steps.jsonl, oldest first; none if there is no file. Raises DataError."""
    from base import schemas

    path = Path(run_dir) / "steps.jsonl"
    return _read_rows(path, schemas.StepRow, "make it readable, or delete it") if path.exists() else []


def _read_rows(path: Path, schema: Any, fix: str) -> list[dict]:
    from base import schemas

    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", fix) from None
    rows, fix = [], "delete the line, or resume the run"
    for number, line in enumerate(lines, 1):
        try:
            row = schemas.parse_json(line, schema, f"{path} line {number}", fix)
        except DataError:
            if number == len(lines):
                break  # the last line may be empty, or cut short by a kill or a full disk
            raise
        rows.append(files.without_nan(row))
    return rows


def check_trackers(*, tensorboard: bool, wandb: bool, trackio: bool) -> None:
    """Raise UsageError if a tracker cannot be imported, before anything is written."""
    if tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard")
    if wandb:
        optional("wandb", "--wandb")
    if trackio:
        optional("trackio", "--trackio")


class MetricLogger:
    """Appends a row per epoch to metrics.jsonl, and to the trackers; `steps` logs every few steps.

    run_dir:     must exist
    rows:        the rows of a resumed checkpoint: metrics.jsonl is cut back to them
    step:        its step: steps.jsonl is cut back to it
    enabled:     False on all ranks but the first
    log_every:   steps between two rows of steps.jsonl; 0 for none
    tensorboard: whether to log to run_dir/tensorboard
    wandb:       project of W&B, and `trackio` that of Trackio; empty for none
    config:      the flags, for W&B and Trackio
    plot:        whether `draw` draws
    """

    def __init__(
        self,
        run_dir: Path,
        rows: Sequence[dict] = (),
        step: int = 0,
        *,
        enabled: bool = True,
        log_every: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        trackio: str = "",
        config: dict | None = None,
        plot: bool = False,
    ):
        self.run_dir, self.path, self.enabled = run_dir, run_dir / "metrics.jsonl", enabled
        self.plot, self.plotted, self.drawing = plot and enabled, -math.inf, None
        self.steps = StepLog(run_dir / "steps.jsonl", log_every if enabled else 0)
        self.board, self.trackers = None, []
        if not enabled:
            return
        if tensorboard:
            writer = optional("torch.utils.tensorboard", "--tensorboard").SummaryWriter
            self.board = writer(run_dir / "tensorboard", purge_step=rows[-1]["epoch"] + 1 if rows else 0)
            if log_every:  # in its own directory: `purge_step` applies to all series of one
                self.steps.board = writer(run_dir / "tensorboard" / "steps", purge_step=step + 1)
        for name, project in (("wandb", wandb), ("trackio", trackio)):
            if project:
                tracker, run_id = optional(name, f"--{name}"), self._run_id(name)
                identity = {"id": run_id, "dir": run_dir} if name == "wandb" else {"name": run_id}
                tracker.init(project=project, config=config, resume="allow", **identity)
                self.trackers.append(tracker)
        self.steps.trackers = self.trackers
        files.write(self.path, "".join(_line(row) for row in rows), parents=False)
        self.steps.open(step)

    def log(self, row: dict, step: int) -> None:
        """Append the row of an epoch that ended with `step`."""
        if not self.enabled:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:  # closed after each row: a crash loses none
                file.write(_line(row))
        except OSError as error:  # on a full disk, Python does not say where
            error.filename = os.fspath(self.path)
            raise
        if self.board:
            for name, value in _numbers(row).items():
                self.board.add_scalar(name, value, row["epoch"])
            self.board.flush()
        for tracker in self.trackers:
            tracker.log(_numbers(row), step=step)

    def draw(self, now: bool = False) -> None:
        """Draw the learning curves if --plot was given: at most once a minute, one at a time, unless `now`.

        Runs in another process meanwhile, so that a plot can neither delay nor end the run.
        """
        busy = self.drawing is not None and self.drawing.poll() is None
        if not self.plot or (not now and (busy or time.monotonic() - self.plotted < 60)):
            return
        self._finish_drawing()
        self.plotted = time.monotonic()
        command = [sys.executable, "-m", "analysis.plots", str(self.run_dir.resolve())]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        # In its own session, it does not get the Ctrl-C that stops the run.
        self.drawing = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **silent)

    def _finish_drawing(self) -> None:
        if self.drawing is None:
            return
        _, errors = self.drawing.communicate()
        if self.drawing.returncode:
            lines = errors.strip().splitlines() or ["no reason given"]
            reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
            say(f"WARNING: no plots: {reason}")
        self.drawing = None

    def close(self) -> None:
        self._finish_drawing()
        self.steps.close()
        _close(self.board)
        for tracker in self.trackers:
            tracker.finish()

    def _run_id(self, tracker: str) -> str:
        """Return the id of this directory's run in `tracker`, so that a resumed run continues it."""
        path = self.run_dir / f"{tracker}_id"
        if not path.exists():  # Trackio shows it as the name
            name = f"{self.run_dir.resolve().name}-" if tracker == "trackio" else ""
            path.write_text(name + os.urandom(8).hex(), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class StepLog:
    """Logs a row after each `every` steps and at the end of each phase, in steps.jsonl and the trackers.

    A row describes the steps since the row before it. Their sums are part of the training state, so that a
    resumed run writes the rows of a run that was never stopped. The file stays open: a row is one write.
    """

    def __init__(self, path: Path, every: int):
        self.path, self.every = path, every
        self.file = self.board = None  # the open file, a TensorBoard writer
        self.trackers: Sequence[Any] = ()

    def open(self, step: int) -> None:
        """Delete the rows that a former process wrote after `step`, and what a kill left of a row."""
        if self.path.exists():
            with self.path.open("rb") as file:
                kept = [line for line in file if _step_of(line) <= step]
            with files.replacing(self.path, parents=False) as partial:
                partial.write_bytes(b"".join(kept))
        if self.every:
            self.file = self.path.open("a", encoding="utf-8", buffering=1)  # so a kill loses no finished row

    def add(
        self, sums: dict, row: dict, result: Any, *, images: int, seconds: float, waited: float, last: bool
    ) -> None:
        """Count a step in `sums`, which are those since the last row; write a row if one is due.

        row:     what is true of the step: step, epoch, image_size, batch_size, lr, loss_scale
        result:  its `loss` and gradient `norm` (before clipping) over all ranks, and if both are `finite`
        images:  of all ranks
        seconds: since the step before, of which `waited` for data
        last:    whether the phase ends with this step
        """
        if not self.every:
            return
        if not sums:
            sums |= dict(steps=0, loss=0.0, norm=0.0, norm_max=0.0, bad_steps=0)
            sums |= dict(images=0, seconds=0.0, waited=0.0)
        if result.finite:
            sums["steps"] += 1
            sums["loss"] += result.loss
            sums["norm"] += result.norm
            sums["norm_max"] = max(sums["norm_max"], result.norm)
        else:
            sums["bad_steps"] += 1
        sums["images"] += images
        sums["seconds"] += seconds
        sums["waited"] += waited
        if last or row["step"] % self.every == 0:
            self._write(row | _step_values(sums))
            sums.clear()

    def _write(self, row: dict) -> None:
        numbers = {f"steps/{name}": value for name, value in _numbers(row).items() if name != "step"}
        try:
            if self.file:
                self.file.write(_line(row))
            if self.board:
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, row["step"])
        except OSError as error:  # a full disk, say: not worth the end of the run
            tell(f"WARNING: {self.path} and TensorBoard get no more steps: {error}")
            self.close()
        for tracker in self.trackers:
            tracker.log(numbers, step=row["step"])

    def close(self) -> None:
        _close(self.file, self.board)
        self.file = self.board = None


def _close(*writers: Any) -> None:
    """Close what is open. What could not be written before, to a full disk, may fail once more."""
    for writer in filter(None, writers):
        with suppress(OSError):
            writer.close()


def _step_values(sums: dict) -> dict:
    """Return the columns of a row of steps.jsonl that are means, maxima and counts over its steps."""
    steps, seconds = sums["steps"], sums["seconds"]
    return {
        "train_loss": sums["loss"] / steps if steps else None,
        "grad_norm": sums["norm"] / steps if steps else None,
        "grad_norm_max": sums["norm_max"] if steps else None,
        "images_per_second": sums["images"] / seconds if seconds else None,
        "data_wait_percent": 100 * sums["waited"] / seconds if seconds else None,
        "bad_steps": sums["bad_steps"],
    }


def _step_of(line: bytes) -> float:
    """Return the step of a line of steps.jsonl; infinity if it is damaged or was not written to its end."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf


def _numbers(row: dict) -> dict:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _line(row: dict) -> str:
    return json.dumps(files.without_nan(row)) + "\n"


# Of the table on the terminal. Where it is narrow, the columns of the highest rank are left out.
COLUMNS = (  # rank, group, heading, width, name in the row, format
    (0, "", "left", 7, "left", ""), (0, "", "epoch", 8, "epoch", ""), (0, "", "px", 5, "image_size", "d"),
    (6, "", "batch", 6, "batch_size", "d"), (5, "", "lr", 8, "lr", ".1e"),
    (2, "train", "loss", 7, "train_loss", ".3f"), (3, "train", "top-1", 6, "train_top1", ".1f"),
    (1, "val", "loss", 7, "val_loss", ".3f"), (0, "val", "top-1", 7, "val_top1", ".2f"),
    (2, "val", "top-5", 7, "val_top5", ".2f"),
    (6, "ema", "loss", 7, "ema_val_loss", ".3f"), (0, "ema", "top-1", 7, "ema_val_top1", ".2f"),
    (3, "ema", "top-5", 7, "ema_val_top5", ".2f"),
    (4, "", "img/s", 7, "images_per_second", ",.0f"), (4, "", "wait %", 7, "data_wait_percent", ".0f"),
    (3, "", "time", 7, "seconds", ""), (0, "", "best", 5, "best", ""),
)  # fmt: skip


class Table:
    """The table of epochs, for the width of the terminal, or 80 columns in a file.

    epochs: of the whole run
    """

    def __init__(self, epochs: int, width: int = 0):
        width = width or shutil.get_terminal_size().columns  # 80 where there is no terminal
        fits = max(
            rank for rank in range(7) if _width(c for c in COLUMNS if c[0] <= rank) <= width or not rank
        )
        self.epochs, self.columns = epochs, [column for column in COLUMNS if column[0] <= fits]

    def heading(self) -> str:
        """Return two lines: the groups of columns, and the columns."""
        groups = ""
        for group, columns in itertools.groupby(self.columns, key=lambda column: column[1]):
            width = _width(columns)
            groups += f" {group:-^{width - 1}}" if group else " " * width
        return f"{groups.rstrip()}\n" + "".join(
            f"{name:>{width}}" for _, _, name, width, _, _ in self.columns
        )

    def row(self, row: dict, left: float) -> str:
        """Return the line of one epoch. left: seconds until the run is complete"""
        values = row | {
            "left": duration(left),
            "epoch": f"{row['epoch']}/{self.epochs}",
            "seconds": duration(row["seconds"]),
            "best": "best" * row["best"],
        }
        cells = ""
        for _, _, _, width, name, spec in self.columns:
            cells += f"{'-' if values[name] is None else format(values[name], spec):>{width}}"
        return cells.rstrip()


def _width(columns: Iterable[tuple]) -> int:
    return sum(column[3] for column in columns)
