"""Stop signals: the training loop finishes its step, saves and stops; loader workers ignore them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from base.errors import exit_at_once

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """Raised by a stop signal that arrives while the loop waits for data.

    A BaseException, so that no `except Exception` in between swallows it.
    """


class StopSignals:
    """Remembers the first stop signal in `received`, which the loop reads after every step.

    A second signal ends the process at once, which is safe because checkpoints are written atomically.
    Signals within a second count as one: torchrun forwards a signal to ranks that a scheduler may have
    sent it to already. SIGHUP stays ignored if it was (nohup).
    """

    SAME = 1.0  # seconds

    def __init__(self):
        self.received, self.since = 0, 0.0  # the signal's number; when it came
        self.process = os.getpid()
        self.waiting = False  # set by the loop where it waits for data and `Interrupted` may be raised

    def _remember(self, number: int, frame) -> None:
        if os.getpid() != self.process:
            return  # forked by another library: the loader's workers never get here
        if self.received:
            if time.monotonic() - self.since > self.SAME:
                exit_at_once(number, frame)
            return
        self.received, self.since = int(number), time.monotonic()
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nFinishing this step, then saving. Press Ctrl-C again to quit now.\n")
        if self.waiting:
            raise Interrupted

    @contextmanager
    def installed(self):
        ignored = [n for n in STOP_SIGNALS if n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN]
        previous = {n: signal.signal(n, self._remember) for n in STOP_SIGNALS if n not in ignored}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def left_to_parent() -> list[int]:
    """Return the signals that a worker started now must ignore, because its parent handles them.

    SIGINT always, because Ctrl-C reaches the whole process group. The others only while `StopSignals`
    is installed, since the last step still needs the workers. Otherwise SIGTERM has to work:
    multiprocessing ends workers with it at exit.
    """
    handler = signal.getsignal(signal.SIGTERM)
    return STOP_SIGNALS if isinstance(getattr(handler, "__self__", None), StopSignals) else [signal.SIGINT]


@contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """Start processes in here: they inherit that `signals` are blocked, until they ignore them.

    Otherwise Ctrl-C would kill a worker that is still importing torch. This process gets the signals later.
    """
    if sys.platform != "linux":  # spawning starts this helper first, which would unblock SIGINT and SIGTERM
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent() -> None:
    """End this process when its parent dies, even by SIGKILL: by the kernel on Linux, else by a thread.

    On Linux it must have been forked by its parent, not by a fork server.
    """
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if parent and os.getppid() != parent.pid:  # it has died before: no signal will come
            os._exit(1)
    elif parent:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
