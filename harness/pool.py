"""Processes that pack, verify and store crops, a job at a time; the loader's workers are torch's."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator

from base.errors import ResourceError
from harness.interrupts import die_with_parent, held_back


def in_processes(
    work: Callable,
    jobs: Iterable,
    workers: int,
    *,
    flag: str = "--workers",
    again: str = "run the same command again to continue",
) -> Iterator[tuple]:
    """Yield (job, work(job)) for all `jobs`, in the order in which `workers` processes finish them.

    flag, again: how the user sets the number of processes, and how to continue after an error
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    # `work` refers to the whole dataset: a worker receives it once at its start (by fork on Linux).
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=(work,))
    try:
        with held_back([signal.SIGINT]):  # processes start here
            futures = {pool.submit(_run, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        what = "a worker process was killed; the machine may be out of memory"
        raise ResourceError(what, f"use fewer {flag} and {again}") from error
    except ResourceError as error:  # the disk is full
        raise ResourceError(error.what, f"make room and {again}") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable  # what this worker process does with a job


def _init_worker(work: Callable) -> None:
    """Prepare a worker process, which leaves Ctrl-C to its parent and ends with it."""
    import cv2

    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    cv2.setNumThreads(0)


def _run(job: object) -> object:
    return _work(job)
