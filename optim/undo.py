"""Optimizer steps that change nothing if the loss or the gradients were not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from base.flat import group_by_dtype


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
    """Let SGD's momentum start at zero: a skipped first step would leave it uninitialised."""
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
