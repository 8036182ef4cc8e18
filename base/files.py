"""Tables and numbers as files that other programs open: CSV that a spreadsheet cannot mistake for formulas, JSON without NaN."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from base.errors import ResourceError

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell(value: object) -> object:
    """`value` as a CSV cell; text that a spreadsheet would run gets an apostrophe in front.

    Class and file names come from disks and archives: https://owasp.org/www-community/attacks/CSV_Injection
    """
    if not isinstance(value, str):
        return value
    # A bare carriage return is not quoted by every Python, and ends a line for some readers.
    return ("'" if value.startswith(FORMULA) else "") + value.replace("\r", "\\r")


def csv_text(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in (header, *rows))
    return text.getvalue()


def json_text(content: object) -> str:
    return json.dumps(_without_nan(content), indent=1) + "\n"


def _without_nan(value: object) -> object:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str | os.PathLike, text: str) -> Path:
    """Write `text` to `path`, whole or not at all. Raises ResourceError where that cannot be."""
    path = Path(path)
    # A pipe or a device (/dev/null, /dev/stdout) is written to: a rename would put a file in its place.
    partial = path.with_name(path.name + ".partial") if path.is_file() or not path.exists() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        if partial != path:
            os.replace(partial, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}", "name a writable place") from None
    return path


def write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
