"""Errors that a user can fix, and the one place that turns them into exit codes.

Code anywhere raises a `UserError`; `run` prints it as two lines (what is wrong and where, then the fix)
and returns its exit code. Tests call `main(argv)` and catch the exception.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from types import ModuleType

from base import process


class UserError(Exception):
    """An error that the user can fix: `what` is wrong and where, and how to `fix` it."""

    exit_code = 1

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\nfix: {fix}")
        self.what, self.fix = what, fix.rstrip()
        self.rank: int | None = None  # of the process that must print the error, if not the main one

    def __reduce__(self):  # it crosses from loader workers to the main process
        return type(self), (self.what, self.fix)


class UsageError(UserError):
    """A flag is wrong, or its value cannot work with this data."""

    exit_code = 2


class DataError(UserError):
    """The data on disk is missing, unreadable, damaged, or not laid out as expected."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, malformed, or of another run."""

    exit_code = 4


class DivergedError(UserError):
    """The loss or the gradients are no longer finite."""

    exit_code = 5


class ResourceError(UserError):
    """Disk space, memory, or a device is missing."""

    exit_code = 6


class Stopped(Exception):
    """The run was stopped by a signal, after finishing its step and saving its state."""

    def __init__(self, signal_number: int, message: str = ""):
        super().__init__(message)
        self.exit_code = 130 if signal_number == signal.SIGINT else 143


debug = False  # whether to show tracebacks; the parser sets it when it finds --debug


def run(main: Callable[[list[str] | None], int | None]) -> int:
    """Call `main(None)` and return the exit code. Only --debug and bugs show a traceback."""
    global debug
    debug = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, exit_at_once)
    try:
        with redirect_stdout(Printable(sys.stdout)):
            code = main(None) or 0
        sys.stdout.flush()  # inside the try, so that a closed pipe is handled below
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        report(error)
        return error.exit_code
    except Stopped as stop:
        if str(stop) and process.is_main():
            tell(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        known = missing_package(error) if isinstance(error, ModuleNotFoundError) else resource_error(error)
        if known is None or debug:
            raise
        if isinstance(known, ResourceError):  # other ranks may not meet it
            known.rank = process.rank() or None
        report(known)
        return known.exit_code


def exit_at_once(number: int, frame) -> None:
    """Handle a stop signal by ending the process: outside training there is nothing to save."""
    os._exit(130 if number == signal.SIGINT else 143)


def report(error: UserError) -> None:
    """Print an error as two lines on stderr: on the first rank of each node, and on rank `error.rank`."""
    rank = process.rank() if error.rank is None and not process.is_main() else error.rank
    where = "error" if rank is None else f"error on rank {rank}"
    if process.is_main() or process.local_rank() == 0 or error.rank is not None:
        tell(f"{where}: {one_line(error.what)}\nfix: {error.fix}")


def tell(text: str) -> None:
    """Print `printable` text on stderr."""
    with suppress(OSError):  # the terminal may be gone
        print(printable(text), file=sys.stderr, flush=True)


# --- hints ------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean X? " for the known word that is most like `word`, or ''."""
    near = closest(word, known)
    return f"did you mean {near}? " if near else ""


def nearest_path(path: str | os.PathLike) -> str:
    """Return "did you mean X? " for the existing path that is most like `path`, or '' if it exists itself."""
    found = Path()
    for part in Path(path).parts:
        if not (found / part).exists():
            with suppress(OSError):
                part = closest(part, (entry.name for entry in islice(os.scandir(found), 2000)), 0.7)
            if not part or not (found / part).exists():
                return ""
        found /= part
    return f"did you mean {found}? " if found != Path(path) else ""


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return the known word that is most like `word`, whatever the case of its letters; '' if none is."""
    from difflib import get_close_matches  # not needed behind --help

    words = {each.lower(): each for each in known}
    near = get_close_matches(word.lower(), words, 1, likeness)
    return words[near[0]] if near else ""


def doing(what: str) -> None:
    """Say on stderr what takes the next seconds: importing torch may take twenty, which looks like a hang."""
    if process.is_main():
        tell(f"{what} ...")


# --- text that any terminal can show ----------------------------------------------------------------


def printable(text: str, stream=None) -> str:
    """Escape control characters, and characters that the encoding of `stream` (default: stderr) lacks."""
    encoding = getattr(stream or sys.stderr, "encoding", None) or "ascii"
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    """Return `printable` text without line breaks, for a message that quotes names from files or disks."""
    return printable(text).replace("\n", "\\n")


class Printable:
    """A text stream that writes `printable` text: names of files and classes may contain anything."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, self.stream))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


# --- errors of the machine --------------------------------------------------------------------------

OUT_OF_MEMORY = (  # in messages of RuntimeErrors; torch.OutOfMemoryError does not cover all cases
    "can't allocate memory", "not enough memory: you tried", "out of memory", "unable to find an engine",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
DISK_ERRORS = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")} - {None}
MACHINE_ERRORS = DISK_ERRORS | {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by its name, because torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def resource_error(error: BaseException) -> ResourceError | None:
    """Return a ResourceError for a fault of the machine, or None for a bug."""
    if is_out_of_memory(error):
        reason = f": {str(error).splitlines()[0]}" if str(error) else ""
        fix = "free memory, or ask for less: smaller batches, fewer --num-workers"
        return ResourceError(f"out of memory{reason}", fix)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised wherever we are
        fix = "free memory or lower --num-workers, then run the command again (train.py with --resume auto)"
        return ResourceError(f"a loader worker died: {str(error).splitlines()[0]}", fix)
    if any(base.__name__ == "TorchDynamoException" for base in type(error).__mro__):
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip() or "no reason given").splitlines()[0]
        what = f"torch.compile failed: {type(cause).__name__}: {reason}"
        return ResourceError(what, "use --no-compile or --no-cuda-graphs; --debug shows the compiler's error")
    # An OSError without a file name is a bug, unless its number is one that only the machine causes.
    if not isinstance(error, OSError) or not (error.filename or error.errno in MACHINE_ERRORS):
        return None
    verb = "write" if error.errno in DISK_ERRORS else "use"
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    what = f"cannot {verb} {file}: {error.strerror or error}"
    return ResourceError(what, "check that it exists, that you may use it, and that the disk has room")


def missing_package(error: ModuleNotFoundError) -> UsageError | None:
    """Return a UsageError for a package that this Python lacks, or None if a module of ours is missing."""
    package = (error.name or "").partition(".")[0]
    if not package or (process.ROOT / package).exists() or (process.ROOT / f"{package}.py").exists():
        return None
    fix = f"run make setup and use .venv/bin/python; or {sys.executable} -m pip install -r requirements.txt"
    return UsageError(f"{sys.executable} has no package {package}", fix)


def optional(package: str, needed_for: str) -> ModuleType:
    """Import `package`. Raises UsageError that says how to install it, or why it cannot be imported."""
    top = package.partition(".")[0]
    name = "tensorboard" if needed_for == "--tensorboard" else top
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name in (package, top, name):
            raise UsageError(f"{needed_for} needs the {name} package", f"pip install {name}") from None
        cause: Exception = error
    except Exception as error:  # a broken package can raise anything
        cause = error
    reason = (str(cause).strip() or "no reason given").splitlines()[0]
    what = f"{needed_for}: {name} is installed but cannot be imported: {type(cause).__name__}: {reason}"
    raise UsageError(what, f"reinstall it: pip install --force-reinstall {name}") from cause
