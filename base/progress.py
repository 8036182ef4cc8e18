"""Progress: a bar on a terminal, a line per minute in a log file; and the remaining time of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from base.errors import printable

LINE_EVERY = 60.0  # seconds, if stderr is not a terminal
BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{postfix}"


def duration(seconds: float) -> str:
    """Format seconds: 4000 -> '1h06m', 75 -> '1m15s', 9 -> '9s'."""
    seconds = max(0, round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """Shows on stderr how many of `total` are done; `update` may add a few words to show beside it."""

    def __init__(self, total: int, desc: str, *, unit: str = "it", initial: int = 0, enabled: bool = True):
        self.total, self.desc, self.unit, self.enabled = total, printable(desc), unit, enabled
        self.initial = self.count = initial
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=self.desc, initial=initial, leave=False, dynamic_ncols=True, bar_format=BAR
            )

    def update(self, n: int = 1, words: str = "") -> None:
        self.count += n
        with suppress(OSError):  # the terminal may be gone, which must not end the run here
            self._show(n, words)

    def _show(self, n: int, words: str) -> None:
        if self.bar:
            self.bar.set_postfix_str(words or self._rate(), refresh=False)
            self.bar.update(n)
        elif self.enabled and time.monotonic() - self.last_line >= LINE_EVERY:
            self.last_line = time.monotonic()
            done = f"{100 * self.count / max(1, self.total):3.0f}% {self.count}/{self.total} {self.unit}"
            print(f"{self.desc} {done}  {words or self._rate()}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        done, elapsed = self.count - self.initial, time.monotonic() - self.started
        if done <= 0 or elapsed <= 0:
            return ""
        left = duration(elapsed / done * (self.total - self.count))
        return f"{left} left, {done / elapsed:,.0f} {self.unit}/s"

    def over(self, items: Iterable) -> Iterator:
        """Yield `items` and count them."""
        for item in items:
            yield item
            self.update()

    def close(self) -> None:
        if self.bar:
            with suppress(OSError):
                self.bar.close()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class Eta:
    """Estimates the remaining seconds of a run whose phases differ in cost.

    Assumes that the cost of a step is proportional to batch size x side^2, or a third of that if only the
    classifier is trained; and that of scoring to side^2, at `eval_size` or the size of the phase, in every
    `eval_every`-th epoch and the last. The rates are the latest ones measured.
    """

    def __init__(self, phases: Sequence, num_val: int, eval_size: int | None = None, eval_every: int = 1):
        self.phases, self.num_val, self.eval_size, self.eval_every = phases, num_val, eval_size, eval_every
        self.train_rate = self.eval_rate = 0.0  # seconds per pixel

    def observe_training(self, phase: Any, images: int, seconds: float) -> None:
        self.train_rate = seconds / max(1, images * self._cost(phase))

    def observe_validation(self, image_size: int, seconds: float) -> None:
        self.eval_rate = seconds / max(1, self.num_val * image_size**2)

    def remaining(self, step: int, epochs: int) -> float:
        """Return the seconds left after `step` steps and `epochs` finished epochs."""
        eval_rate = self.eval_rate or self.train_rate / 3  # a forward pass takes about a third of a step
        seconds = 0.0
        for phase in self.phases:
            steps = phase.steps - min(max(step - phase.first_step, 0), phase.steps)
            scorings = self._scorings(phase.last_epoch) - self._scorings(max(phase.first_epoch - 1, epochs))
            eval_size = self.eval_size or phase.image_size
            seconds += steps * phase.batch_size * self._cost(phase) * self.train_rate
            seconds += max(0, scorings) * self.num_val * eval_size**2 * eval_rate
        return seconds

    def _cost(self, phase: Any) -> float:
        """Return what training on an image costs, in pixels."""
        return phase.image_size**2 / (3 if phase.head_only else 1)

    def _scorings(self, epoch: int) -> int:
        """Return how many of the epochs up to `epoch` are scored."""
        is_last = epoch == self.phases[-1].last_epoch
        return -(-epoch // self.eval_every) if is_last else epoch // self.eval_every
