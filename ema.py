"""An exponential moving average (EMA) of a model's weights.

`train_utils.train_step` updates it, and `loop.score` scores it beside the raw weights.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from base.errors import CheckpointError
from base.flat import flat_copy, group_by_dtype, is_view_of, move_into_flat


class EMA:
    """A shadow copy of `model` whose weights follow it slowly.

    Floating-point parameters and buffers (BatchNorm's statistics) are averaged,

        shadow = decay * shadow + (1 - decay) * model

    and integer buffers (BatchNorm's counters) are copied. With `ramp`, update n = 1, 2, ... uses the
    decay min(decay, (1 + n) / (10 + n)). Without it, at a decay of 0.9999, the random initial weights
    still make up 90 % of the average after a thousand steps, and validation stays at chance.

    `module` is the shadow: a model of its own, in eval mode, so raw and averaged weights can be scored
    in one pass over the data. Create the EMA after `model.to(device)` and before DDP or torch.compile.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, ramp: bool = True):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.num_updates = decay, ramp, 0
        # Pairs: the slots of the shadow and those of the model, in the same order.
        self._averaged = [_slots(m, floating=True) for m in (self.module, model)]
        self._copied = [_slots(m, floating=False) for m in (self.module, model)]
        self._backup: list[Tensor] | None = None
        self._flat: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self._make_flat()

    def decay_at(self, update: int) -> float:
        """Return the decay of update number `update` (1, 2, ...)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, finite: Tensor | None = None) -> None:
        """Move the shadow towards the model. Call this once after every optimizer step.

        finite: bool, () on the device; if it is False, the shadow stays, but the update counts
        """
        self._refuse_while_applied("update")
        self.num_updates += 1
        weight = 1.0 - self.decay_at(self.num_updates)
        self._make_flat()
        live = group_by_dtype(_read(self._averaged[1]))
        for (flat, gathered, views), tensors in zip(self._flat, live, strict=True):
            torch._foreach_copy_(views, tensors)
            flat.lerp_(gathered, weight if finite is None else finite.to(flat.dtype) * weight)
        _copy(*self._copied)

    def _make_flat(self) -> None:
        """Move the shadow into one buffer per dtype; once more after `module` was copied or moved.

        torch has a kernel that moves one tensor by a weight known only on the device, but none for many.
        The model is gathered in a second buffer.
        """
        shadow = _read(self._averaged[0])
        if not self._flat or not is_view_of(shadow[0], self._flat[0][0]):
            groups = group_by_dtype(shadow)
            self._flat = [(move_into_flat(group), *flat_copy(group)) for group in groups]

    @torch.no_grad()
    def apply_shadow(self) -> None:
        """Put the averaged weights into the model; `restore` brings its own back, bit for bit."""
        self._refuse_while_applied("apply_shadow")
        shadow, live = (a + c for a, c in zip(self._averaged, self._copied, strict=True))
        self._backup = [value.detach().clone() for value in _read(live)]
        _copy(live, shadow)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo `apply_shadow`. Raises RuntimeError without it."""
        if self._backup is None:
            raise RuntimeError("EMA.restore() was called without apply_shadow() before it")
        live = self._averaged[1] + self._copied[1]
        torch._foreach_copy_(_read(live), self._backup)
        self._backup = None

    def state_dict(self) -> dict:
        """Return {"shadow": the shadow's state dict (not a copy), "num_updates": int}."""
        return {"shadow": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises CheckpointError if it is from a run without EMA."""
        if "shadow" not in state:
            what = "the checkpoint holds no averaged weights: it was written by a run without EMA"
            raise CheckpointError(what, "continue with --no-ema")
        self.module.load_state_dict(state["shadow"])
        self.num_updates = state["num_updates"]

    def _refuse_while_applied(self, call: str) -> None:
        if self._backup is not None:
            raise RuntimeError(f"EMA.{call}(): the model holds the averaged weights, call restore() first")


class NoEMA:
    """The stand-in for `EMA` in a run without one: its methods do nothing, and `module` is None."""

    module = None

    def update(self, finite: Tensor | None = None) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Ignore an average that the checkpoint may hold: a run may continue without it."""


Slot = tuple[dict[str, Tensor], str]


def _slots(model: nn.Module, floating: bool) -> list[Slot]:
    """Return the slots of the floating-point (or of the other) tensors of `model`, each tensor once.

    A slot is the dict and the key that hold a tensor, not the tensor: `model.to()` replaces buffers.
    Found once, because walking the modules of a ResNet-50 takes about a millisecond.
    """
    slots: dict[int, Slot] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, value in holder.items():
                if value is not None and value.is_floating_point() == floating:
                    slots.setdefault(id(value), (holder, name))
    return list(slots.values())


def _read(slots: list[Slot]) -> list[Tensor]:
    return [holder[name] for holder, name in slots]


def _copy(to: list[Slot], source: list[Slot]) -> None:
    if to:  # foreach refuses an empty list, and a model without BatchNorm has no counters
        torch._foreach_copy_(_read(to), _read(source))
