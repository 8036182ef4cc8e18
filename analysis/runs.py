"""A finished or running run, read from its directory; and what tells several runs apart.

No torch, no pictures: values for plots, tables and the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base import flags
from base.errors import DataError
from harness.log import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """What train.py left in one directory."""

    path: Path
    name: str  # short, and different from the other runs'
    rows: list[dict]  # of metrics.jsonl
    config: dict  # empty where config.json is missing
    env: dict

    @property
    def best(self) -> dict | None:
        """The row of the best checkpoint; None while there is none."""
        return next((row for row in reversed(self.rows) if row.get("best")), None)

    @property
    def best_top1(self) -> float | None:
        return best_score(self.best) if self.best else None

    @property
    def hours(self) -> float:
        return sum(row.get("seconds") or 0 for row in self.rows) / 3600

    @property
    def score(self) -> str:
        """The column the best epoch is judged by: the EMA's top-1 where the run keeps one."""
        return "ema_val_top1" if series(self.rows, "ema_val_top1")[0] else "val_top1"

    def checkpoint(self) -> Path | None:
        """best_*.pt, or last_*.pt while there is no best."""
        found = sorted(self.path.glob("best_*.pt")) or sorted(self.path.glob("last_*.pt"))
        return found[0] if found else None


def read_runs(run_dirs: Sequence[str | Path]) -> list[RunFiles]:
    """Raises DataError for a directory without metrics.jsonl, or with no epoch in it yet."""
    paths = list(dict.fromkeys(map(Path, run_dirs)))
    names = short_names(paths)
    return [read_run(path, names[path]) for path in paths]


def read_run(path: Path, name: str) -> RunFiles:
    from base import schemas

    rows = read_metrics(path)
    if not rows:
        raise DataError(f"{path / 'metrics.jsonl'} has no epoch yet", "wait for the first epoch to end")
    config, env = (
        schemas.read_json(path / file, schema, "delete it, or restore it from a copy", missing={})
        for file, schema in (("config.json", schemas.Config), ("env.json", schemas.Env))
    )
    return RunFiles(path, name, rows, config, env)


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Each directory's name, with as much of the path before it as tells all of them apart."""
    parts = {path: path.resolve().parts for path in paths}
    names = {path: path.name for path in paths}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "-".join(part[-depth:]) for path, part in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def find_runs(directory: str | Path) -> list[Path]:
    """Every directory below (or at) `directory` that holds a run, in order of its name."""
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is no directory", "name one that holds runs")
    return sorted(path.parent for path in Path(directory).rglob("metrics.jsonl") if path.stat().st_size)


def series(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Epochs and values of one column, where it has any: validation may run every few epochs only."""
    pairs = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def best_score(row: dict) -> float | None:
    """The top-1 (percent) an epoch is judged by."""
    return row["val_top1"] if row.get("ema_val_top1") is None else row["ema_val_top1"]


def phases(rows: Sequence[dict]) -> list[tuple[int, int, int]]:
    """(first epoch, image size in px, batch size) of every phase that has begun."""
    found: list[tuple[int, int, int]] = []
    for row in rows:
        if not found or found[-1][1:] != (row["image_size"], row["batch_size"]):
            found.append((row["epoch"], row["image_size"], row["batch_size"]))
    return found


def shown(value: object) -> str:
    """A flag's value as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value in (None, "") else str(value)


def differing_flags(runs: Sequence[RunFiles]) -> list[str]:
    """Flags that change what is learned and are not the same in all `runs` that know them."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    return [
        name
        for name in names
        if name not in flags.FREE_ON_RESUME
        and len({shown(run.config[name]) for run in runs if name in run.config}) > 1
    ]


def apart(runs: Sequence[RunFiles]) -> list[dict[str, str]]:
    """For each run the differing flags in which it is not like most others: flag -> value."""
    usual = {}
    for name in differing_flags(runs):
        counts = Counter(shown(run.config[name]) for run in runs if name in run.config).most_common(2)
        usual[name] = counts[0][0] if counts[0][1] > counts[1][1] else None  # a tie: neither is usual
    return [
        {
            name: shown(run.config[name])
            for name, value in usual.items()
            if name in run.config and shown(run.config[name]) != value
        }
        for run in runs
    ]


def untypical_flags(config: dict) -> dict[str, tuple[str, str]]:
    """flag -> (its value, the default), of those that change what is learned and are not the default."""
    defaults = flags.plain(flags.make_config(flags.defaults()))
    return {
        name: (shown(value), shown(defaults[name]))
        for name, value in config.items()
        if name in defaults and name not in flags.FREE_ON_RESUME and value != defaults[name]
    }


def scores(run: RunFiles) -> list[str]:
    """The cells of a table: name, epochs, best top-1 (percent), its epoch, hours."""
    best = ["-", "-"] if run.best is None else [f"{run.best_top1:.2f}", str(run.best["epoch"])]
    return [run.name, f"{len(run.rows)}/{run.config.get('epochs', '?')}", *best, f"{run.hours:.2f}"]


SCORES = ("run", "epochs", "best top-1 %", "at epoch", "hours")  # what `scores` returns
