"""What can go wrong through the user's input, and the one place that turns it into an exit code.

Code anywhere raises a `UserError`; `run` prints it as two lines (what and where, then what to do)
and returns the exit code. Tests call `main(argv)` and catch the exception instead.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress

from base import process


class UserError(Exception):
    """Something the user can mend: `what` says what and where, `fix` what to do about it."""

    exit_code = 1

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\nfix: {fix}")
        self.what, self.fix = what, fix
        self.rank: int | None = None  # the only rank that knows of it, if one of many does

    def __reduce__(self):  # crosses from loader workers to the main process
        return type(self), (self.what, self.fix)


class UsageError(UserError):
    """A flag, or a value that cannot work with this data."""

    exit_code = 2


class DataError(UserError):
    """The data on disk: missing, unreadable, damaged, or not laid out as expected."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, refused, or of another run."""

    exit_code = 4


class DivergedError(UserError):
    """Training left the finite numbers."""

    exit_code = 5


class ResourceError(UserError):
    """Disk, memory or device ran out, or was never there."""

    exit_code = 6


class Stopped(Exception):
    """A stop signal was honoured: the step was finished and the state saved."""

    def __init__(self, signal_number: int, message: str = ""):
        super().__init__(message)
        self.exit_code = 130 if signal_number == 2 else 143  # SIGINT; SIGTERM and the rest


def printable(text: str, stream=None) -> str:
    """`text` as any terminal can show it: undecodable bytes and control characters escaped."""
    encoding = getattr(stream or sys.stderr, "encoding", None) or "ascii"
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    """`printable`, without line breaks: for names from files and disks inside a message."""
    return printable(text).replace("\n", "\\n")


class Printable:
    """A text stream that writes only what any terminal can show: file and class names may hold anything."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, self.stream))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def report(error: UserError) -> None:
    """Two lines on stderr: from the first rank, or from the one that alone knows of the error."""
    where = "error" if error.rank is None else f"error on rank {error.rank}"
    if process.is_main() or error.rank is not None:
        tell(f"{where}: {one_line(error.what)}\nfix: {error.fix}")


def tell(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(printable(text), file=sys.stderr, flush=True)


def exit_at_once(number: int, frame) -> None:
    """What a stop signal does until training begins: nothing is half written that a restart would trip over."""
    os._exit(130 if number == signal.SIGINT else 143)


# Only a GPU has an exception of its own, and not for all that its libraries say when memory runs out.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory: you tried",
    "out of memory",
    "unable to find an engine",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, not imported here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


DISK_TROUBLE = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)
}
# Of the machine, whatever was being done; other trouble with a file is the user's where the file has a name.
MACHINE = DISK_TROUBLE | {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def resource_error(error: BaseException) -> ResourceError | None:
    """What the machine lacks, in our words; None for what is a bug of ours."""
    if is_out_of_memory(error):
        reason = f": {str(error).splitlines()[0]}" if str(error) else ""
        fix = "free memory, or ask for less: smaller batches, fewer --num-workers"
        lack = ResourceError(f"out of memory{reason}", fix)
        lack.rank = process.rank() or None  # the others have theirs
        return lack
    if not isinstance(error, OSError) or not (error.filename or error.errno in MACHINE):
        return None
    verb = "write" if error.errno in DISK_TROUBLE else "use"
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    return ResourceError(
        f"cannot {verb} {file}: {error.strerror or error}",
        "see that it is there, that it may be used, and that there is room",
    )


debug = False  # show tracebacks: the parser sets it where it meets --debug


def run(main: Callable[[list[str] | None], int | None]) -> int:
    """Call `main()` and return the exit code; a traceback only with --debug or for our own bugs."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), exit_at_once)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, exit_at_once)
    try:
        with redirect_stdout(Printable(sys.stdout)):  # all that is printed passes here; stderr is for `tell`
            code = main(None) or 0
        sys.stdout.flush()  # here, where a closed pipe is not a traceback
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
    except BrokenPipeError:  # `| head` closed our output: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError) as error:
        known = resource_error(error)
        if known is None or debug:
            raise
        report(known)
        return known.exit_code
