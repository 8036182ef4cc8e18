"""How far a run is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from base.errors import printable

LINE_EVERY = 60.0  # seconds between lines where there is no terminal


def duration(seconds: float) -> str:
    """4000 -> '1h06m', 75 -> '1m15s'."""
    seconds = max(0, round(seconds))
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Counts up to `total`; `update` may carry a few words to show beside the count."""

    def __init__(
        self,
        total: int,
        desc: str,
        *,
        unit: str = "it",
        initial: int = 0,
        enabled: bool = True,
        line_every: float = LINE_EVERY,
        file=None,
    ):
        self.total, self.desc, self.unit, self.count = total, printable(desc), unit, initial
        self.enabled, self.line_every, self.file = enabled, line_every, file or sys.stderr
        self.started = self.last_line = time.monotonic()
        self.first = initial
        self.bar = None
        if enabled and self.file.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total,
                desc=self.desc,
                unit=unit,
                initial=initial,
                leave=False,
                file=self.file,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, n: int = 1, words: str = "") -> None:
        self.count += n
        with suppress(OSError):  # the terminal is gone: that is for a stop signal to end, not for a bar
            self._show(n, words)

    def _show(self, n: int, words: str) -> None:
        if self.bar:
            self.bar.set_postfix_str(words or self._eta(), refresh=False)
            self.bar.update(n)
        elif self.enabled and time.monotonic() - self.last_line >= self.line_every:
            self.last_line = time.monotonic()
            percent = 100 * self.count / max(1, self.total)
            print(
                f"{self.desc} {percent:3.0f}% {self.count}/{self.total} {self.unit}  {words or self._eta()}",
                file=self.file,
                flush=True,
            )

    def over(self, items: Iterable) -> Iterator:
        """`items`, counted as they are taken."""
        for item in items:
            yield item
            self.update()

    def _eta(self) -> str:
        done = self.count - self.first
        if done <= 0:
            return ""
        elapsed = time.monotonic() - self.started
        return f"{done / max(elapsed, 1e-9):,.0f} {self.unit}/s, {duration(elapsed / done * (self.total - self.count))} left"

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
    """Seconds left of a whole run whose phases differ in cost.

    A step costs about batch x side^2, which is exact enough between phases; the current phase is
    always projected from its own measured rate. Validation is counted at the size it runs at.
    """

    def __init__(self, phases: Sequence, num_val: int):
        self.phases, self.num_val = phases, num_val
        self.train_rate = self.eval_rate = 0.0  # seconds per pixel

    def observe_training(self, image_size: int, images: int, seconds: float) -> None:
        self.train_rate = seconds / max(1, images * image_size**2)

    def observe_validation(self, image_size: int, seconds: float) -> None:
        self.eval_rate = seconds / max(1, self.num_val * image_size**2)

    def remaining(self, step: int, scored_epochs: int) -> float:
        """From optimizer step `step` on, with `scored_epochs` epochs behind."""
        eval_rate = self.eval_rate or self.train_rate / 3  # a forward is a third of a step
        seconds = 0.0
        for phase in self.phases:
            pixels = phase.image_size**2
            steps = phase.steps - min(max(step - phase.first_step, 0), phase.steps)
            epochs = phase.epochs - min(max(scored_epochs - phase.first_epoch + 1, 0), phase.epochs)
            seconds += pixels * (
                steps * phase.batch_size * self.train_rate + epochs * self.num_val * eval_rate
            )
        return seconds
