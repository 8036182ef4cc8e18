"""Random numbers for augmentations: a stream for each sample of each epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

Draw = Callable[[], float]  # returns the next uniform number in [0, 1)
Operation = Callable[[np.ndarray, Draw], np.ndarray]  # (H, W, 3) uint8 -> the same shape
_BLOCK = 64  # numbers drawn at once; the default recipe uses at most 60


class KeyedRandom:
    """One stream of random numbers per key (seed, epoch, sample id), the same in any process and at any time.

    Philox is counter-based: setting its state takes microseconds, seeding a new generator a hundred. Seed
    and epoch are its key and the sample is the highest word of its counter, so streams never overlap.
    (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.)
    """

    def __init__(self):
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.library = random.Random()  # Albumentations draws from a NumPy and from a Python generator
        self.uses_library = False
        self._state = self.bits.state  # before anything was drawn

    def rekey(self, key: tuple[int, int, int]) -> Draw:
        """Restart the stream of `key`; return the function that draws from it."""
        state = self._state
        state["state"]["key"][:] = (key[0] & 0xFFFFFFFFFFFFFFFF, key[1])
        state["state"]["counter"][:] = (0, 0, 0, key[2])
        self.bits.state = state
        if self.uses_library:
            self.library.seed(int(self.generator.integers(1 << 63)))
        return self._numbers().__next__

    def _numbers(self) -> Iterator[float]:
        while True:
            yield from self.generator.random(_BLOCK).tolist()
