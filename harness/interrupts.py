"""Stop signals: the loop finishes its step, saves and stops; workers leave them to their parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

from base.errors import exit_at_once

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Interrupted(BaseException):
    """A stop signal came while nothing was under way. Not an Exception: no code between may take it for an error."""


class StopSignals:
    """Remembers the first stop signal; the loop asks `received` after every step.

    A second signal ends the process at once: checkpoints are renamed into place, so the previous
    one is whole. Repeated within a second it counts once: torchrun hands on what a scheduler may
    have sent to the ranks already. SIGHUP stays ignored where it was (nohup).
    """

    SAME = 1.0  # seconds

    def __init__(self):
        self.received, self.since = 0, 0.0
        self.process = os.getpid()
        self.waiting = False  # for data, between two steps: an `Interrupted` breaks nothing

    def _remember(self, number: int, frame) -> None:
        if os.getpid() != self.process:
            return  # a worker that was just forked
        if self.received:
            if time.monotonic() - self.since > self.SAME:
                exit_at_once(number, frame)
            return
        self.received, self.since = int(number), time.monotonic()
        with suppress(OSError):  # the terminal may be what went away
            os.write(2, b"\nstopping after this step (again: at once)\n")
        if self.waiting:
            raise Interrupted

    @contextmanager
    def installed(self):
        wanted = [
            n for n in STOP_SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)
        ]
        previous = {number: signal.signal(number, self._remember) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def left_to_parent() -> list[int]:
    """The signals that a worker started now ignores: its parent gets them too, and ends it when it has done with it.

    Ctrl-C always, it reaches the whole process group; the others while `StopSignals` are installed, whose
    step needs its workers. Without them SIGTERM must end a worker: that is how multiprocessing does it at exit.
    """
    in_charge = isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), StopSignals)
    return STOP_SIGNALS if in_charge else [signal.SIGINT]


def die_with_parent() -> None:
    """On Linux, ask the kernel to kill this process when its parent dies: no orphans after SIGKILL."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
