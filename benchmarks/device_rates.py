"""What a device can do and what a training step asks of it: bytes and floating-point operations.

Measured and counted, not looked up. Nothing of training is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.summary import count_macs


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7, inner: int = 1) -> float:
    """The shortest of `repeats` timings of `work`, per call; the device's best is what others are held against."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(inner):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / inner)
    return min(times)


def bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by copying a large tensor."""
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, inner=5 if gpu else 1)
    return 2 * source.numel() * source.element_size() / seconds


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product in `dtype`."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = best_seconds(lambda: a @ a, device, inner=5 if gpu else 1)
    return 2 * side**3 / seconds


def step_flops(model: nn.Module, image_size: int) -> float:
    """Floating-point operations of a training step on one image: 2 per multiply-add, forward and twice backward."""
    return 6.0 * count_macs(model, image_size)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that every operation reads and writes, each counted as a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view and operation.namespace == "aten":
            read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in (*read.values(), *written))
        return out


def step_traffic(
    make_model: Callable[[], nn.Module], image_size: int, batch_size: int, dtype: torch.dtype
) -> float:
    """Bytes per image that forward and backward move when no operation is fused with the next.

    Counted on the meta device: nothing is computed and no memory is taken.
    """
    with torch.device("meta"):
        model = make_model().to(dtype).train()
        images = torch.empty(batch_size, 3, image_size, image_size, dtype=dtype)
    with _Traffic() as traffic:
        model(images).sum().backward()
    return traffic.bytes / batch_size
