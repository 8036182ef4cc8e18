"""Results of benchmarks: DIR/<benchmark>.jsonl, a flat JSON object for each row of a table.

{"benchmark": "loader", "row": "64 px, basic, 1 worker, torchvision", "machine": ..., "commit": ...,
 "load": ..., and the columns of the benchmark: numbers, texts or null}

A row is appended as soon as it is measured, so a benchmark that is killed loses at most the row it was
at, and a second run with the same DIR measures only what is missing. `row` names a row within its
benchmark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from base import files, process
from base.errors import DataError

ROW_WIDTH = 60  # of the names of rows in a table
REQUIRED = ("benchmark", "row", "machine", "commit", "load")


def environment(device: str = "cpu") -> dict[str, object]:
    """Return what a record says about where and when it was measured. `load` is the one-minute average."""
    import torch

    from base import device as base_device

    found = base_device.environment(base_device.Runtime(torch.device(device)))
    return {
        "machine": f"{found['device']}, {process.cores()} cores",
        "commit": process.commit(),
        "load": round(os.getloadavg()[0], 1),
        "threads": found["threads"],
        "torch": found["torch"],
        "cuda": found["cuda"],
        "python": found["python"],
    }


def append(directory: str | os.PathLike, record: dict[str, object]) -> dict[str, object]:
    """Append `record` to the file of its benchmark in `directory`, which is made if missing; return it."""
    missing = [name for name in REQUIRED if name not in record]
    nested = [name for name, value in record.items() if isinstance(value, dict | list | tuple)]
    assert not missing and not nested, f"a record without {missing}, with nested {nested}"
    path = Path(directory) / f"{record['benchmark']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # a kill cut the last line
        file.write(b"\n" * torn + json.dumps(files.without_nan(record)).encode() + b"\n")
    return record


def load(directory: str | os.PathLike, benchmark: str = "*") -> list[dict]:
    """Return the records in `directory`, in the order of their files; the latest one of each row.

    Skips a line that a kill cut short. Raises DataError if there is no such directory.
    """
    if not os.path.isdir(directory):
        raise DataError(f"no directory {os.path.abspath(directory)}", "name the --out of a benchmark")
    rows: dict[tuple, dict] = {}
    for path in sorted(Path(directory).glob(f"{benchmark}.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                rows[record["benchmark"], record["row"]] = record
            except (ValueError, TypeError, KeyError):
                continue
    return list(rows.values())


def finished(directory: str | os.PathLike, benchmark: str) -> set[str]:
    """Return the names of the rows that need not be measured again: those of this commit."""
    if not os.path.isdir(directory):
        return set()
    commit = process.commit()
    return {record["row"] for record in load(directory, benchmark) if record.get("commit") == commit}


def table(rows: Iterable[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Return `rows` as Markdown; `columns` are {heading: (column, format)}."""
    heading = "| " + " | ".join([" " * ROW_WIDTH, *(f"{name:>6}" for name in columns)]) + " |"
    below = "| --- |" + " --: |" * len(columns)
    return "\n".join([heading, below, *(line(row, columns) for row in rows)])


def line(row: dict, columns: dict[str, tuple[str, str]]) -> str:
    """Return a line of `table`, to be printed as soon as the row is measured."""
    cells = [f"{row['row']:<{ROW_WIDTH}}"]
    for heading, (column, form) in columns.items():
        value = row.get(column)
        cells.append(f"{'' if value is None else format(value, form):>{max(6, len(heading))}}")
    return f"| {' | '.join(cells)} |"
