"""Many tensors in one buffer, so that one kernel serves them all.

A kernel launch takes microseconds of the host's time, and a ResNet-50 has 161 parameters and 159
BatchNorm buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # elements: kernels read aligned memory in wide words


def group_by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def flat_copy(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a buffer (n,) that holds the values of `tensors`, and a view of it for each of them.

    tensors: of one dtype and device, each dense in memory; a view has the shape and strides of its tensor
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    flat = torch.zeros(end, dtype=tensors[0].dtype, device=tensors[0].device)
    views = [flat.as_strided(t.shape, t.stride(), start) for t, start in zip(tensors, starts, strict=True)]
    torch._foreach_copy_(views, [tensor.detach() for tensor in tensors])
    return flat, views


def move_into_flat(tensors: Sequence[Tensor]) -> Tensor:
    """Move the values of `tensors` into one buffer (n,), of which each tensor becomes a view; return it."""
    flat, views = flat_copy(tensors)
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view
    return flat


def is_view_of(tensor: Tensor, flat: Tensor) -> bool:
    return tensor.untyped_storage()._cdata == flat.untyped_storage()._cdata
