"""Suggest learning rates from the curve of an LR range test.

Rates `lrs` (n,) rise geometrically; `losses` (n,) are those of one step at each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> dict[str, float | None]:
    """Return three rates read off the smoothed curve, all None if the loss did not fall.

    steepest:     where the loss falls fastest per decade
    minimum / 10: a tenth of the rate of the lowest loss, which is already close to divergence
    valley:       two thirds of the way down the longest descent, which single bumps do not end
    """
    curve = smooth(losses)
    bottom = int(curve.argmin())
    falling = curve[: bottom + 1]
    measured = np.asarray(losses[: bottom + 1], float)
    if bottom < 2 or curve[0] - curve[bottom] <= _fall_of_noise(measured, _smoothing_scale(len(losses))):
        return {"steepest": None, "minimum / 10": None, "valley": None}
    slope = np.gradient(falling, np.log10(np.asarray(lrs[: bottom + 1])))
    first, last = longest_descent(falling)
    level = falling[first] - 2 / 3 * (falling[first] - falling[last])
    below = first + int(np.argmax(falling[first : last + 1] <= level))
    return {
        "steepest": float(lrs[int(slope.argmin())]),
        "minimum / 10": float(lrs[bottom]) / 10,
        "valley": float(lrs[below]),
    }


def smooth(losses: Sequence[float], scale: float | None = None) -> np.ndarray:
    """Average losses (n,) with weights exp(-|distance| / scale), normalized at both ends.

    The average is symmetric: one over past losses alone, as torch-lr-finder's, lags and moves the curve to
    higher rates. `scale` is in steps, by default a 25th of the test. Losses above four times the first are
    clipped, so that an explosion at the end does not reach back.
    """
    losses = np.asarray(losses, float)
    clipped = np.minimum(losses, 4 * abs(losses[0]) + 1e-12)
    steps = np.arange(len(losses))
    weights = np.exp(-np.abs(steps[:, None] - steps) / (scale or _smoothing_scale(len(losses))))
    return weights @ clipped / weights.sum(1)


def _smoothing_scale(steps: int) -> float:
    return max(1.0, steps / 25)


def _fall_of_noise(losses: np.ndarray, scale: float) -> float:
    """Return how far a smoothed curve of pure noise may seem to fall: about four standard deviations."""
    noise = np.std(np.diff(losses)) / math.sqrt(2)
    return 4 * noise / math.sqrt(2 * scale) + 1e-9 * abs(losses[0])


def longest_descent(values: Sequence[float]) -> tuple[int, int]:
    """Return the first and last index of the longest strictly falling subsequence of `values` (n,).

    A subsequence can skip single bumps, which makes it robust against noise.
    """
    length, previous = [1] * len(values), [-1] * len(values)
    for i in range(len(values)):
        for j in range(i):
            if values[j] > values[i] and length[j] >= length[i]:
                length[i], previous[i] = length[j] + 1, j
    last = first = max(range(len(values)), key=lambda i: length[i])
    while previous[first] >= 0:
        first = previous[first]
    return first, last


class Divergence:
    """Tells when the running mean of the losses is four times its lowest value and above its first.

    The second condition is for losses close to zero, whose noise exceeds four times the lowest value.
    """

    def __init__(self, decay: float = 0.8):
        self.decay, self.average, self.steps = decay, 0.0, 0
        self.first = self.lowest = math.inf

    def __call__(self, loss: float) -> bool:
        """Add a loss; return whether the losses diverge."""
        self.steps += 1
        self.average = self.decay * self.average + (1 - self.decay) * loss
        running = self.average / (1 - self.decay**self.steps)  # corrects for the start at 0
        if self.steps == 1:
            self.first = running
        self.lowest = min(self.lowest, running)
        return running > 4 * abs(self.lowest) and running > self.first
