"""Memory that loader workers and the training process share, for the pixels of batches."""

from __future__ import annotations

import itertools
import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor


class BatchMemory:
    """Memory of batches that the workers fill and this process reads, used again and again.

    In new shared memory, each 4 kB of each batch cost a page fault in both processes, together as much as
    half of decoding. A worker is asked for a batch when the one `ahead` batches before is taken. So batch k
    can use slot k % (ahead + 2): whoever takes a batch may still hold the one before. Forked workers
    inherit the memory. It is not in /dev/shm, which is small in containers.
    """

    def __init__(self, ahead: int, shape: tuple[int, int, int, int]):
        shape = (ahead + 2, *shape)
        self.slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        self.number = next(_numbers)
        _memories[self.number] = self

    def slot(self, step: int) -> np.ndarray:
        return self.slots[step % len(self.slots)]


_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()


class InMemory:
    """A batch in `BatchMemory`, as a worker sends it; what arrives are tensors."""

    def __init__(self, memory: BatchMemory, step: int, labels: np.ndarray, bad: list[str]):
        self.content = (memory.number, step, labels, bad)

    def __reduce__(self):
        return _received, self.content


def _received(number: int, step: int, labels: np.ndarray, bad: list[str]) -> tuple[Tensor, Tensor, list]:
    images = _memories[number].slot(step)[: len(labels)]
    return torch.from_numpy(images), torch.from_numpy(labels), bad
