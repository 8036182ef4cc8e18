"""Stop signals: the loop finishes its step, saves and stops; loader workers leave them to their parent."""

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
    """A stop signal that arrived while the loop was waiting for data.

    Not an Exception, so that no handler in between swallows it.
    """


class StopSignals:
    """Remembers the first stop signal; the loop reads `received` after every step.

    A second signal ends the process at once, which is safe: checkpoints are renamed into place. One that
    repeats within a second counts once, since torchrun forwards what a scheduler may have sent to the
    ranks already. SIGHUP stays ignored if it was (nohup).
    """

    SAME = 1.0  # seconds

    def __init__(self):
        self.received, self.since = 0, 0.0
        self.process = os.getpid()
        self.waiting = False  # for data, between two steps, where `Interrupted` breaks nothing

    def _remember(self, number: int, frame) -> None:
        if os.getpid() != self.process:
            return  # a worker that was just forked
        if self.received:
            if time.monotonic() - self.since > self.SAME:
                exit_at_once(number, frame)
            return
        self.received, self.since = int(number), time.monotonic()
        with suppress(OSError):  # the terminal may be what went away
            os.write(2, b"\nFinishing this step, then saving. Press Ctrl-C again to quit now.\n")
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
    """Return the signals that a worker started now must ignore, because its parent handles them.

    SIGINT always: Ctrl-C reaches the whole process group. The others only while `StopSignals` are
    installed, whose last step needs its workers; otherwise SIGTERM has to end a worker, because that is
    how multiprocessing ends it at exit.
    """
    handler = signal.getsignal(signal.SIGTERM)
    return STOP_SIGNALS if isinstance(getattr(handler, "__self__", None), StopSignals) else [signal.SIGINT]


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent dies: no orphans after SIGKILL."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
