"""The loader's worker processes: how they begin, and how they are ended."""

from __future__ import annotations

import multiprocessing
import signal
import weakref

import cv2
import torch

from harness.interrupts import die_with_parent

started: weakref.WeakSet = weakref.WeakSet()  # DataLoader iterators that have workers


def init_worker(ignored: list[int], _worker_id: int) -> None:
    die_with_parent()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)


def end_workers() -> None:
    """Kill all loader workers. In training they ignore SIGTERM, so a hanging one would block the exit."""
    for iterator in list(started):
        if hasattr(iterator, "_pin_memory_thread"):
            # This thread reads from the workers, so it must end before them, as in torch's own shutdown.
            iterator._pin_memory_thread_done_event.set()
            iterator._worker_result_queue.put((None, None))
            iterator._pin_memory_thread.join(5)
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    # torch's handler would report each killed worker as an error.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
