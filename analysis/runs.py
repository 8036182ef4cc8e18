"""Runs read from their directories, finished or not, and the flags in which they differ.

Plain values for plots, tables and the report; torch is not needed.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from base import flags
from base.errors import DataError
from harness.log import read_metrics, read_steps

DATA = ("dataset", "num_train", "num_val", "num_classes")  # in env.json
SCORE_COLUMNS = ("run", "epochs", "best top-1 %", "at epoch", "hours")  # of `RunFiles.scores`
VALIDATED = {  # columns of `validated`
    "image_size": "px", "weights": "weights", "bn": "BatchNorm", "tta": "TTA", "crop": "crop",
    "top1": "top-1 %", "top5": "top-5 %", "loss": "loss", "macro_f1": "macro F1", "ece": "ECE %",
}  # fmt: skip


@dataclass(frozen=True)
class RunFiles:
    """What train.py left in one directory."""

    path: Path
    name: str  # short and unique
    rows: list[dict]  # of metrics.jsonl
    config: dict  # empty without config.json
    env: dict  # empty without env.json

    @cached_property
    def steps(self) -> list[dict]:
        """The rows of steps.jsonl, which are many and seldom needed. Raises DataError if it is malformed."""
        return read_steps(self.path)

    @property
    def validation(self) -> dict:
        """The scores that validate.py left in this directory; empty without any, or if of another run."""
        from base import schemas

        path = self.path / "validation" / "scores.json"
        found = schemas.read_json(path, schemas.Scores, "run validate.py again", missing={})
        own, other = self.env.get("run"), found.get("run")
        return {} if own and other and own != other else found

    @property
    def dataset(self) -> str:
        """The name of the data, which may differ from --dataset; empty if unknown."""
        return self.env.get("dataset") or self.config.get("dataset", "")

    @property
    def complete(self) -> bool:
        """Whether the last epoch has ended. A run that stopped early counts as one that may go on."""
        return self.rows[-1]["epoch"] >= self.config.get("epochs", 0)

    @property
    def best(self) -> dict | None:
        """The row of the best checkpoint, if there is one yet."""
        return next((row for row in reversed(self.rows) if row.get("best")), None)

    @property
    def best_top1(self) -> float | None:
        """The top-1 accuracy (percent) by which the best epoch was chosen."""
        ema, raw = ((self.best or {}).get(column) for column in ("ema_val_top1", "val_top1"))
        return raw if ema is None else ema

    @property
    def hours(self) -> float:
        return sum(row.get("seconds") or 0 for row in self.rows) / 3600

    @property
    def score(self) -> str:
        """The column that decides which epoch is best: the top-1 of the EMA weights if the run keeps them."""
        return "ema_val_top1" if series(self.rows, "ema_val_top1")[0] else "val_top1"

    def scores(self) -> list[str]:
        """Return a table row: name, epochs, best top-1 (percent), its epoch, hours."""
        best = [f"{self.best_top1:.2f}", str(self.best["epoch"])] if self.best else ["-", "-"]
        return [self.name, f"{len(self.rows)}/{self.config.get('epochs', '?')}", *best, f"{self.hours:.2f}"]

    def checkpoint(self) -> Path | None:
        """Return best_*.pt, or last_*.pt while there is no best."""
        found = sorted(self.path.glob("best_*.pt")) or sorted(self.path.glob("last_*.pt"))
        return found[0] if found else None


def find_runs(directory: str | Path) -> list[Path]:
    """Return every directory at or below `directory` that holds a run, sorted."""
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is not a directory", "name a directory that holds runs")
    return sorted(path.parent for path in Path(directory).rglob("metrics.jsonl") if path.stat().st_size)


def read_runs(run_dirs: Sequence[str | Path]) -> list[RunFiles]:
    """Read runs. Raises DataError for a directory without metrics.jsonl, or without a finished epoch."""
    paths = list(dict.fromkeys(map(Path, run_dirs)))
    names = unique_names(paths)
    return [read_run(path, names[path]) for path in paths]


def read_run(path: Path, name: str) -> RunFiles:
    from base import schemas

    rows = read_metrics(path)
    if not rows:
        raise DataError(f"{path / 'metrics.jsonl'} has no epoch yet", "wait for the first epoch to end")
    fix = "delete it, or restore it from a copy"
    config = schemas.read_json(path / "config.json", schemas.Config, fix, missing={})
    env = schemas.read_json(path / "env.json", schemas.Env, fix, missing={})
    return RunFiles(path, name, rows, config, env)


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a unique name for each directory: its own, with as much of its path as that takes."""
    parts = {path: path.resolve().parts for path in paths}
    names = {path: path.name for path in paths}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "-".join(part[-depth:]) for path, part in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def validated(scores: dict) -> list[list[str]]:
    """Return the rows of validate.py's scores.json as text; '-' for what is missing or was not finite."""

    def cell(key: str, value: object) -> str:
        digits = {"top1": 2, "top5": 2, "macro_f1": 2, "ece": 2, "loss": 4}
        return "-" if value is None else f"{value:.{digits[key]}f}" if key in digits else str(value)

    return [[cell(key, line.get(key)) for key in VALIDATED] for line in scores["results"]]


def series(rows: Sequence[dict], column: str) -> tuple[list[int], list[float]]:
    """Return the epochs and values of a column; epochs without a value (no validation) are left out."""
    pairs = [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def phases(rows: Sequence[dict]) -> list[tuple[int, int, int]]:
    """Return (first epoch, image size in px, batch size) of every phase that has begun."""
    groups = groupby(rows, key=lambda row: (row["image_size"], row["batch_size"]))
    return [(next(group)["epoch"], size, batch) for (size, batch), group in groups]


def shown(value: object) -> str:
    """Return the text of a flag's value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)


def differing_flags(runs: Sequence[RunFiles]) -> list[str]:
    """Return the flags that affect training and are not the same in all `runs` that know them."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in flags.SAME_TRAINING)
    return [name for name in names if len({shown(r.config[name]) for r in runs if name in r.config}) > 1]


def differing_data(runs: Sequence[RunFiles]) -> list[str]:
    """Return the keys of env.json by which the runs did not have the same data."""
    return [key for key in DATA if len({run.env.get(key) for run in runs}) > 1]


def unusual_flags(runs: Sequence[RunFiles]) -> list[dict]:
    """Return, for each run, the differing flags with a value that most other runs do not have."""
    unusual = [{} for _ in runs]
    for name in differing_flags(runs):
        values = [shown(run.config[name]) if name in run.config else None for run in runs]
        first, second = Counter(value for value in values if value is not None).most_common(2)
        usual = first[0] if first[1] > second[1] else None  # after a tie no value is usual
        for run, value, differs in zip(runs, values, unusual, strict=True):
            if value not in (None, usual):
                differs[name] = run.config[name]
    return unusual


def listing(runs: Sequence[RunFiles]) -> str:
    """Return the runs as an aligned text table, with the flags that set each of them apart."""
    rows = [[*SCORE_COLUMNS, "what differs"]]
    data = differing_data(runs)
    for run, unusual in zip(runs, unusual_flags(runs), strict=True):
        words = flags.to_argv(unusual) + [f"{key}={run.env.get(key, '?')}" for key in data]
        rows.append([*run.scores(), " ".join(words)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(SCORE_COLUMNS))]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)


def command(config: dict) -> str:
    """Return the command that repeats a run, also one whose last start was --resume."""
    usual = flags.defaults()
    if config.get("pretrained"):
        usual |= flags.finetuning(flags.train_parser(), {"epochs": config["epochs"]}) | {"pretrained": ""}
    start = [name for name in flags.OF_A_START & config.keys() if config[name] != usual[name]]
    values = {name: config[name] for name in (*start, *changed_flags(config, usual))}
    return shlex.join(["python", "train.py", *flags.to_argv(values)])


def changed_flags(config: dict, usual: dict | None = None) -> dict[str, tuple[str, str]]:
    """Return {flag: (value, default)} of the flags that affect training and are not at their default.

    usual: the defaults, if they are not those of the parser
    """
    values = {name: (shown(config.get(name)), shown(v)) for name, v in (usual or flags.defaults()).items()}
    known = [name for name in config if name in values and name not in flags.FREE_ON_RESUME]
    return {name: values[name] for name in known if values[name][0] != values[name][1]}
