"""Writing files completely or not at all; CSV without formulas, JSON without NaN."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from base.errors import ResourceError, UsageError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # from filesystems without locks
DESCRIPTORS = ("/dev/std", "/dev/fd/", "/proc/")  # names of open files
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet's formula may begin with


@contextmanager
def replacing(path: str | os.PathLike, *, parents: bool = True) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` at the end, or is deleted if anything fails.

    parents: create the directory of `path`
    A pipe or a device (/dev/stdout) is written directly, because a rename would replace it by a file.
    Raises ResourceError if `path` cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial") if path.is_file() or not path.exists() else path
    made = parents and not path.parent.exists()
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        if partial != path:
            partial.unlink(missing_ok=True)  # someone may have put a link to any file there
        yield partial
        if partial != path:
            os.replace(partial, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}", "use a writable directory") from error
    finally:
        with suppress(OSError):
            if partial != path:
                partial.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()  # which a directory with a file in it refuses


@contextmanager
def durable(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that takes its name once its content is on disk, so that a power cut cannot empty it."""
    with replacing(path) as partial, open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def check_file(path: str, size: int, crc32: int | None = None) -> str | None:
    """Return what is wrong with the file, or None. Its content is read only if a checksum is given."""
    try:
        found = os.path.getsize(path)
        if found != size:
            return f"it has {found:,} bytes instead of {size:,}"
        if crc32 is not None and file_crc32(path) != crc32:
            return "its checksum is wrong"
    except OSError as error:
        return error.strerror or str(error)
    return None


def file_crc32(path: str) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def write(path: str | os.PathLike, text: str, *, parents: bool = True) -> Path:
    """Write `text` to `path` through `replacing`."""
    with replacing(path, parents=parents) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def make_directory(path: Path, flag: str = "--out") -> Path:
    """Make an output directory before the work that fills it, and try it. Raises ResourceError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        what = f"cannot write to {path}: {error.strerror}"
        raise ResourceError(what, f"choose a writable directory with {flag}") from None
    return path


def check_output(path: str, flag: str) -> None:
    """Raise an error if `write` could not write the file, before the work whose result it will hold."""
    if os.path.isdir(path):
        raise ResourceError(f"cannot write {path}: it is a directory", f"name a file with {flag}")
    if os.path.isfile(path) and os.path.abspath(path).startswith(DESCRIPTORS):
        fix = f"name that file with {flag}" + ", or '-' for standard output" * (flag != "--out")
        raise UsageError(f"{flag} {path} is a link to the file {os.path.realpath(path)}", fix)
    if os.path.isfile(path) or not os.path.exists(path):  # not a pipe or a device
        make_directory(Path(followed(path)).parent, flag)


def followed(path: str) -> str:
    """Return the file that a link leads to, so that it is replaced and not the link; any other path as it is.

    For paths from the command line only: links in data or run directories may lead anywhere.
    """
    to_file = os.path.isfile(path) or not os.path.exists(path)
    return os.path.realpath(path) if to_file and os.path.islink(path) else path


def rewrite(paths: Iterable[Path], change: Callable[[str], str]) -> list[Path]:
    """Replace the text of each file by change(text); return the files that are different now."""
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return [write(path, new) for path, text in texts.items() if (new := change(text)) != text]


def fill_parts(text: str, kind: str, made: Callable[[str], str]) -> str:
    """Replace what stands between `<!-- kind: NAME -->` and `<!-- end of kind -->` by made(NAME)."""
    marked = re.compile(rf"(<!-- {kind}: ([\w-]+) -->\n).*?(<!-- end of {kind} -->)", re.DOTALL)
    return marked.sub(lambda part: f"{part[1]}{made(part[2]).rstrip()}\n{part[3]}", text)


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool] | None = None
) -> str:
    """Return a table in Markdown. right: which columns are aligned to the right"""
    rule = ["--:" if of_numbers else "---" for of_numbers in right or [False] * len(header)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: str | os.PathLike, content: object, *, parents: bool = True) -> Path:
    return write(path, json_text(content), parents=parents)


def json_text(content: object) -> str:
    return json.dumps(without_nan(content), indent=1) + "\n"


def without_nan(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in (header, *rows))
    return text.getvalue()


def cell(value: object) -> object:
    """Return `value` as a CSV cell, with an apostrophe before text that a spreadsheet would execute.

    Names of classes and files may contain anything: https://owasp.org/www-community/attacks/CSV_Injection
    """
    if not isinstance(value, str):
        return value
    # Not every Python quotes a bare carriage return, which ends a line for some readers.
    return ("'" if value.startswith(FORMULA) else "") + value.replace("\r", "\\r")
