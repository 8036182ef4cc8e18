"""Scores and their log: counting hits, and metrics.jsonl, which every plot and table reads.

TensorBoard and Weights & Biases are copies for those who ask; the file is always there.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import DataError, UsageError

if TYPE_CHECKING:
    pass  # plots and tables of runs read metrics.jsonl without torch: seconds for every picture


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """The rows of a run, oldest first. Raises DataError where there are none, or where a line is no row."""
    from base import schemas

    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", "name a directory that train.py wrote (--save-dir)"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = schemas.parse_json(
                line, schemas.Row, f"{path} line {number}", "delete the line, or resume the run"
            )
        except DataError:
            if number == len(
                lines
            ):  # nothing, or a line cut short by a full disk or a kill; the checkpoint has the row
                break
            raise
        rows.append(_finite(row))
    return rows


def _finite(row: dict) -> dict:
    """JSON has no NaN: a value that is not finite is None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def optional(package: str, needed_for: str):
    """Import `package`. Raises UsageError: how to install it, or why it does not import although it is there."""
    top = package.partition(".")[0]
    name = "tensorboard" if needed_for == "--tensorboard" else top
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name in (package, top, name):
            raise UsageError(f"{needed_for} needs the {name} package", f"pip install {name}") from None
        cause: Exception = error
    except Exception as error:  # whatever the code of others does when it does not fit the rest
        cause = error
    said = (str(cause).strip() or "no reason given").splitlines()[0]
    raise UsageError(
        f"{needed_for}: the {name} package is there but does not import: {type(cause).__name__}: {said}",
        f"mend it, as with pip install --force-reinstall {name}",
    ) from cause


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Raises UsageError where a tracker asked for cannot be imported: before anything is written."""
    if tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard")
    if wandb:
        optional("wandb", "--wandb")


class MetricLogger:
    """Appends one JSON object per epoch to metrics.jsonl, and to the trackers asked for."""

    def __init__(
        self,
        run_dir: Path,
        rows: Sequence[dict] = (),
        *,
        enabled: bool = True,
        tensorboard: bool = False,
        wandb_project: str = "",
        config: dict | None = None,
    ):
        self.path, self.enabled, self.tensorboard, self.wandb = run_dir / "metrics.jsonl", enabled, None, None
        if not enabled:
            return
        if tensorboard:
            module = optional("torch.utils.tensorboard", "--tensorboard")
            purge = rows[-1]["epoch"] + 1 if rows else 0
            self.tensorboard = module.SummaryWriter(run_dir / "tensorboard", purge_step=purge)
        if wandb_project:
            self.wandb = optional("wandb", "--wandb")
            self.wandb.init(
                project=wandb_project, config=config, dir=run_dir, id=_run_id(run_dir), resume="allow"
            )
        # A resumed run goes on from its checkpoint: rows that were logged after it are cut.
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        os.replace(partial, self.path)

    def log(self, row: dict) -> None:
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:  # reopened per row: a crash loses nothing
            file.write(_line(row))
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and v is not None}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(numbers, step=row["epoch"])

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _run_id(run_dir: Path) -> str:
    """One id per run directory, so that a resumed run goes on in the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(8).hex())
    return path.read_text()


def _line(row: dict) -> str:
    return json.dumps(_finite(row)) + "\n"
