"""Undo a step whose loss or gradients are not finite: weights, optimizer state, BatchNorm statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.device import Runtime
from base.flat import group_by_dtype, is_view_of, move_into_flat


@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step unless `bad`, () on the device, is 1 instead of 0; then nothing moves.

    Does not wait for a GPU. Only step counters, as of LAMB's bias correction, may count skipped steps.
    """
    if optimizer.defaults.get("fused"):
        _start_momentum(optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    moving, kept = _moving(optimizer), getattr(optimizer, "kept", None)
    complete = kept is not None and list(map(id, kept.tensors)) == list(map(id, moving))
    if not complete:  # the first step, or a checkpoint was loaded, or --freeze-epochs ended
        kept = optimizer.kept = Kept(moving)
    kept.take()
    optimizer.step()
    kept.restore_unless(bad == 0.0)
    if not complete:  # this step may have begun the state of some parameters, at zero
        before = set(map(id, moving))
        Kept([value for value in _moving(optimizer) if id(value) not in before]).restore_unless(bad == 0.0)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD's momentum start at zero: a skipped first step would leave it uninitialized."""
    started = len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    if started or not optimizer.defaults.get("momentum"):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _moving(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all weights and their state, without step counters."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.ndim]
    return params + state


class Kept:
    """Copies of tensors, at first zero, from which they are restored after a bad step.

    The copies are used again in every step, so that a step takes four kernels for all tensors of a type,
    and not three for each. Bits are selected as integers: 0 * NaN would be NaN.
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors, self.copies = tensors, [torch.zeros_like(value) for value in tensors]
        by_dtype = zip(group_by_dtype(self.tensors), group_by_dtype(self.copies), strict=True)
        self.bits = [(self.integers(now), self.integers(before)) for now, before in by_dtype]

    @staticmethod
    def integers(values: list[Tensor]) -> list[Tensor]:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values[0].element_size()]
        return [value.view(integer) for value in values]

    def take(self) -> None:
        torch._foreach_copy_(self.copies, self.tensors)

    def restore_unless(self, finite: Tensor) -> None:
        """Undo what happened since `take` if the bool `finite`, () on the device, is False."""
        for now, before in self.bits:
            chosen = finite.to(now[0].dtype)
            torch._foreach_mul_(now, chosen)
            torch._foreach_mul_(before, 1 - chosen)
            torch._foreach_add_(now, before)


class BatchNormBuffers:
    """A model's BatchNorm running statistics: copied before the forward pass, restored after a bad step.

    One NaN in a batch would stay in them for good, even if the optimizer step is skipped. They are moved
    into one buffer, so create this after `model.to(device)`. The counters of BatchNorm are not restored.
    """

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.flats = [move_into_flat(group) for group in group_by_dtype(self.statistics())]
        self.copies = [torch.empty_like(flat) for flat in self.flats]

    def statistics(self) -> list[Tensor]:
        buffers = [buffer for norm in self.norms for buffer in norm.buffers(recurse=False)]
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    def check(self) -> None:
        """Raise RuntimeError if the model's buffers were moved or replaced since they were made flat."""
        if not all(any(is_view_of(buffer, flat) for flat in self.flats) for buffer in self.statistics()):
            raise RuntimeError("the model was moved after BatchNormBuffers(model): create them afterwards")

    @torch.no_grad()
    def take(self) -> None:
        for copy, flat in zip(self.copies, self.flats, strict=True):
            copy.copy_(flat)

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Undo what happened since `take` if the bool `finite`, () on the device, is False."""
        for copy, flat in zip(self.copies, self.flats, strict=True):
            torch.where(finite, flat, copy, out=flat)

    @torch.no_grad()
    def average(self, values: list[Tensor], runtime: Runtime) -> list[Tensor]:
        """Replace the statistics by their means over the ranks, so that all ranks hold the same state.

        The scalars `values` travel with them, in one reduction; return their means.
        """
        sent = torch.cat([torch.stack(values), *(flat.to(values[0].dtype) for flat in self.flats)])
        means = runtime.sum_over_ranks(sent).div_(runtime.world_size)
        means, *averages = means.split([len(values), *map(len, self.flats)])
        for flat, average in zip(self.flats, averages, strict=True):
            flat.copy_(average)
        return list(means)
