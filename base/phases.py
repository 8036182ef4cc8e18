"""How epochs and batch sizes are divided among the phases of a run. Usage checks need it without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def share_epochs(epochs: int, weights: Sequence[int] | None, phases: int) -> list[int]:
    """Return the epochs of each phase, in proportion to `weights` (by largest remainder).

    The last phase always gets at least one. By default, the weights of three phases are 30 : 20 : 40;
    any other number of phases gets equal weights.
    """
    weights = weights or ((30, 20, 40) if phases == 3 else (1,) * phases)
    exact = [epochs * weight / sum(weights) for weight in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (exact[k] - shares[k], k), reverse=True)
    for k in by_remainder[: epochs - sum(shares)]:
        shares[k] += 1
    if shares[-1] == 0:
        shares[shares.index(max(shares))] -= 1
        shares[-1] = 1
    return shares


def phase_batches(first: int, phases: int) -> list[int]:
    """Return the batch size of each phase: `first`, halved from phase to phase."""
    return [max(1, first >> k) for k in range(phases)]


def fitting_batch(images: int, phases: int, ranks: int, most: int) -> int:
    """Return a batch size for the first phase that suits so many training images: `ranks` times a power of 2.

    It is at most `most`, and gives an epoch four steps or more. Of fewer than 64 images it holds 16, and if
    there are as many, two for each rank in the last phase, so that halving always works.
    """
    least = min(images, max(16, ranks << phases))
    size = min(most, max(images // 4, least))
    return ranks << max(0, (size // ranks).bit_length() - 1)


def used_epochs(config: Any) -> list[int]:
    """Return the number of epochs of each phase."""
    return share_epochs(config.epochs, config.phase_epochs, len(config.resize_schedule))


def used_phases(config: Any) -> list[tuple[int, bool]]:
    """Return (global batch size, whether it is mixed) of every phase that has an epoch."""
    count = len(config.resize_schedule)
    batches = config.phase_batch_sizes or phase_batches(config.batch_size, count)
    mixes = config.phase_mix or [True] * count
    return [(batch, mix) for batch, mix, n in zip(batches, mixes, used_epochs(config), strict=False) if n]
