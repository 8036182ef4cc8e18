"""Reading a range test's curve: smoothing, divergence, and three suggestions. Numbers only.

Rates `lrs` (n,) rise geometrically, `losses` (n,) are the raw losses of one step at each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def smooth(losses: Sequence[float], scale: float | None = None) -> np.ndarray:
    """(n,) losses averaged with weights exp(-|distance| / scale), normalised at both ends.

    Symmetric: an average of past losses alone, as torch-lr-finder's, lags by its own length and
    moves the whole curve to higher rates. `scale` is in steps; by default a 25th of the test, a
    fifth of a decade of a usual one. Losses above four times the first are taken as just that, so
    that an explosion at the end does not reach back.
    """
    losses = np.asarray(losses, float)
    capped = np.minimum(losses, 4 * abs(losses[0]) + 1e-12)
    steps = np.arange(len(losses))
    weights = np.exp(-np.abs(steps[:, None] - steps) / (scale or _scale(len(losses))))
    return weights @ capped / weights.sum(1)


def _scale(steps: int) -> float:
    return max(1.0, steps / 25)


class Divergence:
    """Says when the running loss is four times its lowest value and above where it began.

    The second half matters where the loss falls to nearly nothing: there, four times nothing is noise.
    """

    def __init__(self, decay: float = 0.8):
        self.decay, self.average, self.steps = decay, 0.0, 0
        self.first = self.lowest = math.inf

    def __call__(self, loss: float) -> bool:
        self.steps += 1
        self.average = self.decay * self.average + (1 - self.decay) * loss
        running = self.average / (1 - self.decay**self.steps)  # without the zero it started from
        if self.steps == 1:
            self.first = running
        self.lowest = min(self.lowest, running)
        return running > 4 * abs(self.lowest) and running > self.first


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> dict[str, float | None]:
    """Three rates read off the smoothed curve; None for all where the loss did not fall.

    steepest:     where the loss falls fastest per decade
    minimum / 10: a tenth of the rate of the lowest loss, which is already on the way out
    valley:       two thirds of the way down the longest descent, which single bumps do not end
    """
    curve = smooth(losses)
    bottom = int(curve.argmin())
    if bottom < 2 or curve[0] - curve[bottom] <= _luck(
        np.asarray(losses[: bottom + 1], float), _scale(len(losses))
    ):
        return {"steepest": None, "minimum / 10": None, "valley": None}
    falling = curve[: bottom + 1]
    slope = np.gradient(falling, np.log10(np.asarray(lrs[: bottom + 1])))
    first, last = longest_descent(falling)
    level = falling[first] - 2 / 3 * (falling[first] - falling[last])
    below = first + int(np.argmax(falling[first : last + 1] <= level))
    return {
        "steepest": float(lrs[int(slope.argmin())]),
        "minimum / 10": float(lrs[bottom]) / 10,
        "valley": float(lrs[below]),
    }


def _luck(losses: np.ndarray, scale: float) -> float:
    """How far a smoothed curve of nothing but noise may seem to fall: about four of its standard deviations."""
    noise = np.std(np.diff(losses)) / math.sqrt(2)
    return 4 * noise / math.sqrt(2 * scale) + 1e-9 * abs(losses[0])


def longest_descent(values: Sequence[float]) -> tuple[int, int]:
    """First and last index of the longest strictly falling subsequence of `values` (n,).

    A subsequence may step over single bumps, which is what makes it robust against noise.
    """
    length, before = [1] * len(values), [-1] * len(values)
    for i in range(len(values)):
        for j in range(i):
            if values[j] > values[i] and length[j] >= length[i]:
                length[i], before[i] = length[j] + 1, j
    last = first = max(range(len(values)), key=lambda i: length[i])
    while before[first] >= 0:
        first = before[first]
    return first, last
