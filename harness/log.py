"""The log of a run: one row per epoch, in metrics.jsonl, in the trackers asked for, and on the terminal.

Plots, tables and reports read metrics.jsonl. This module does not import torch.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from base import files
from base.errors import DataError, optional
from base.process import say
from base.progress import duration


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """Return the rows of metrics.jsonl, oldest first. Raises DataError if it is missing or malformed."""
    from base import schemas

    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        fix = "name a directory that train.py wrote (--save-dir)"
        raise DataError(f"{path}: {error.strerror}", fix) from None
    rows, fix = [], "delete the line, or resume the run"
    for number, line in enumerate(lines, 1):
        try:
            row = schemas.parse_json(line, schemas.Row, f"{path} line {number}", fix)
        except DataError:
            if number == len(lines):
                break  # the last line may be empty, or cut short by a kill or a full disk
            raise
        rows.append(files.without_nan(row))
    return rows


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Raise UsageError if a tracker cannot be imported, before anything is written."""
    if tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard")
    if wandb:
        optional("wandb", "--wandb")


class MetricLogger:
    """Appends one row per epoch to metrics.jsonl and to TensorBoard and W&B.

    run_dir:       must exist
    rows:          the rows of a resumed checkpoint: metrics.jsonl is cut back to them
    enabled:       False on all ranks but the first
    wandb_project: empty for no W&B
    config:        the flags, for W&B
    plot:          whether `draw` draws
    """

    def __init__(
        self,
        run_dir: Path,
        rows: Sequence[dict] = (),
        *,
        enabled: bool = True,
        tensorboard: bool = False,
        wandb_project: str = "",
        config: dict | None = None,
        plot: bool = False,
    ):
        self.run_dir, self.path, self.enabled = run_dir, run_dir / "metrics.jsonl", enabled
        self.plot, self.plotted = plot and enabled, -math.inf
        self.tensorboard = self.wandb = None
        if not enabled:
            return
        if tensorboard:
            module = optional("torch.utils.tensorboard", "--tensorboard")
            next_epoch = rows[-1]["epoch"] + 1 if rows else 0
            self.tensorboard = module.SummaryWriter(run_dir / "tensorboard", purge_step=next_epoch)
        if wandb_project:
            self.wandb = optional("wandb", "--wandb")
            self.wandb.init(
                project=wandb_project, config=config, dir=run_dir, id=self._wandb_id(), resume="allow"
            )
        files.write(self.path, "".join(_line(row) for row in rows), parents=False)

    def log(self, row: dict) -> None:
        """Append the row of a finished epoch."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:  # closed after each row: a crash loses none
            file.write(_line(row))
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(numbers, step=row["epoch"])

    def draw(self, now: bool = False) -> None:
        """Draw the learning curves if --plot was given: at most once a minute, unless `now`.

        Runs in another process, so that a failing plot cannot end the run.
        """
        if not self.plot or not (now or time.monotonic() - self.plotted >= 60):
            return
        self.plotted = time.monotonic()
        command = [sys.executable, "-m", "analysis.plots", str(self.run_dir.resolve())]
        repository = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        if done.returncode:
            say(f"WARNING: no plots: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def _wandb_id(self) -> str:
        """Return the id of this directory's W&B run, so that a resumed run continues it."""
        path = self.run_dir / "wandb_id"
        if not path.exists():
            path.write_text(os.urandom(8).hex())
        return path.read_text()


def _line(row: dict) -> str:
    return json.dumps(files.without_nan(row)) + "\n"


ROW_HEADER = (
    " epoch   px batch       lr  train loss  top-1 |  val loss  top-1  top-5 |   ema  top-1  top-5 "
    "|   img/s  wait    time"
)
COLUMNS = (  # name, width, format
    ("epoch", 6, "d"), ("image_size", 4, "d"), ("batch_size", 5, "d"), ("lr", 8, ".2e"),
    ("train_loss", 11, ".4f"), ("train_top1", 6, ".2f"), "|",
    ("val_loss", 9, ".4f"), ("val_top1", 6, ".2f"), ("val_top5", 6, ".2f"), "|",
    ("ema_val_loss", 5, ".3f"), ("ema_val_top1", 6, ".2f"), ("ema_val_top5", 6, ".2f"), "|",
    ("images_per_second", 7, ",.0f"), ("data_wait_percent", 4, ".0f"),
)  # fmt: skip


def format_row(row: dict) -> str:
    """Return the row of one epoch as a line that is aligned with `ROW_HEADER`."""
    cells = []
    for column in COLUMNS:
        if column == "|":
            cells.append(column)
            continue
        name, width, spec = column
        cells.append(f"{'-':>{width}}" if row[name] is None else f"{row[name]:>{width}{spec}}")
    words = [row["better"] or "", "best" if row["best"] else ""]
    return (
        " ".join(cells) + f"% {duration(row['seconds']):>7}" + "".join(f"  {word}" for word in words if word)
    )
