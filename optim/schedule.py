"""The learning rate of every step. `SCHEDULES` are the choices of --schedule.

The learning rate of step t is `Schedule.lr_at(t)`, a function of t, so a run can be resumed from the number
of the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from base.errors import UsageError


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; those of the backbone get `backbone_lr` times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("backbone_lr", 1.0)


class Schedule:
    """Sets the learning rate, see `set_lr`. Call `step()` after each optimizer step.

    name:         a key of `SCHEDULES`
    peak_lr:      the highest learning rate, before the factor of a phase
    phases:       (steps, learning-rate factor) of each phase; () is one phase with factor 1
    warmup_steps: for "cosine"
    cycles:       for "restarts" and "triangular2": the number of cycles in the run
    patience:     evaluations without improvement before the rate drops, see `observe`; None never drops it,
                  except that "plateau" then takes 4

    Raises UsageError if the warm-up or the cycles do not fit into the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        *,
        peak_lr: float,
        total_steps: int,
        phases: Sequence[tuple[int, float]] = (),
        warmup_steps: int = 0,
        cycles: int = 4,
        patience: int | None = None,
    ):
        phases = phases or [(total_steps, 1.0)]
        if total_steps < 1 or sum(steps for steps, _ in phases) != total_steps:
            raise ValueError(f"total_steps is {total_steps}, but must be positive and the sum of {phases}")
        if name == "cosine" and not 0 <= warmup_steps < total_steps:
            raise UsageError(
                f"a warm-up of {warmup_steps} steps does not fit into a run of {total_steps}",
                "shorten the warm-up or train for more epochs",
            )
        if name in ("restarts", "triangular2") and not 1 <= cycles <= total_steps:
            raise UsageError(
                f"{cycles} cycles do not fit into a run of {total_steps} steps",
                "ask for fewer cycles or train for more epochs",
            )
        self.optimizer, self.name, self.peak_lr, self.total_steps = optimizer, name, peak_lr, total_steps
        self.warmup_steps, self.cycles = warmup_steps, cycles
        self.patience = PATIENCE if patience is None and name == "plateau" else patience
        self.phase_ends = list(accumulate(steps for steps, _ in phases))
        self.phase_factors = [factor for _, factor in phases]
        self.position = 0  # optimizer steps taken
        self.drops, self.best, self.bad_evaluations = 0, math.inf, 0  # with a patience
        self.last_lr = self.lr = self.lr_at(0)  # of the last step taken, and of the next one
        self._set(self.lr)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0.

        It is peak_lr * formula in SCHEDULES * factor of the step's phase * 0.1 per drop so far.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"the schedule has {self.total_steps} steps (counted from 0) and no step {step}")
        phase_factor = self.phase_factors[bisect_right(self.phase_ends, step)]
        return self.peak_lr * SCHEDULES[self.name](step, self) * phase_factor * 0.1**self.drops

    def step(self) -> None:
        """Set the learning rate of the next step, and `last_lr` to that of the step just taken."""
        if self.position >= self.total_steps:
            raise RuntimeError(
                f"optimizer step {self.position + 1} of a schedule planned for {self.total_steps}: "
                "the loader yields more batches than the plan counts"
            )
        self.last_lr = self.lr
        self.seek(self.position + 1)

    def seek(self, position: int) -> None:
        """Continue as if `position` steps had been taken."""
        self.position = position
        if position < self.total_steps:
            self._set(self.lr_at(position))

    def observe(self, loss: float, comparable: bool = True) -> None:
        """Note the loss of an evaluation; without a patience it is ignored.

        comparable: with the losses before; otherwise, it counts as the first
        As in torch's ReduceLROnPlateau, the learning rate drops to a tenth after patience + 1 evaluations
        in a row that did not improve the best loss by 0.01 %. NaN is no improvement.
        """
        if self.patience is None:
            return
        if not comparable:
            self.best, self.bad_evaluations = math.inf, 0
        if loss < self.best * (1 - 1e-4):
            self.best, self.bad_evaluations = float(loss), 0
        else:
            self.bad_evaluations += 1
        if self.bad_evaluations > self.patience:
            self.drops, self.bad_evaluations = self.drops + 1, 0
        self.seek(self.position)

    _STATE = ("position", "last_lr", "drops", "best", "bad_evaluations")

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict) -> None:
        """Continue at a saved position."""
        for name in self._STATE:
            setattr(self, name, state[name])
        if self.patience is None:  # the run may have had one
            self.drops, self.best, self.bad_evaluations = 0, math.inf, 0
        self._set(self.last_lr)  # for a finished run, which has no next step
        self.seek(self.position)

    def _set(self, lr: float) -> None:
        self.lr = lr
        set_lr(self.optimizer, lr)


# --- formulas: the learning rate of a step as a fraction of the peak ---------------------------------

START, END = 1 / 25, 1 / 25e4  # of OneCycleLR: 1 / div_factor, 1 / (div_factor * final_div_factor)
# Of "step", as fractions of all steps: with one batch size, epochs 30, 60 and 80 of 90.
MILESTONES = (1 / 3, 2 / 3, 8 / 9)
PATIENCE = 4  # of "plateau", unless another is given


def _onecycle(step: int, schedule: Schedule) -> float:
    """torch's OneCycleLR with its defaults (https://arxiv.org/abs/1708.07120); momentum is not cycled.

    Half a cosine up to the peak over 30 % of the steps, then half a cosine down.
    """
    peak, last = 0.3 * schedule.total_steps - 1, schedule.total_steps - 1
    if step <= peak:
        return _cosine_between(START, 1.0, step / peak)
    # With 3 steps or fewer, `peak` is negative, and the run starts on the way down, as in torch.
    return _cosine_between(1.0, END, (step - peak) / (last - peak))


def _cosine(step: int, schedule: Schedule) -> float:
    """Linear warm-up (https://arxiv.org/abs/1706.02677), then half a cosine down to 0."""
    warmup, total = schedule.warmup_steps, schedule.total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _cosine_between(1.0, 0.0, (step - warmup) / (total - warmup))


def _restarts(step: int, schedule: Schedule) -> float:
    """torch's CosineAnnealingWarmRestarts (https://arxiv.org/abs/1608.03983) with cycles of equal length.

    Their length is rounded up to whole steps, unless that leaves less than half of a cycle for the last one.
    """
    total, cycles = schedule.total_steps, schedule.cycles
    length = math.ceil(total / cycles)
    if total < (cycles - 0.5) * length:  # in whole numbers: a rounded quotient ends a cycle a step late
        return _cosine_between(1.0, 0.0, step * cycles % total / total)
    return _cosine_between(1.0, 0.0, step % length / length)


def _step(step: int, schedule: Schedule) -> float:
    """A tenth at each milestone (https://arxiv.org/abs/1512.03385)."""
    return 0.1 ** sum(step >= round(milestone * schedule.total_steps) for milestone in MILESTONES)


def _triangular2(step: int, schedule: Schedule) -> float:
    """torch's CyclicLR(mode="triangular2") from peak / 25 (https://arxiv.org/abs/1506.01186).

    Linear up and down in every cycle; each peak is half as far above the base as the one before.
    """
    cycles = step * schedule.cycles / schedule.total_steps
    height = 1.0 - abs(2.0 * (cycles % 1.0) - 1.0)
    return START + (1.0 - START) * height / 2.0 ** math.floor(cycles)


def _constant(step: int, schedule: Schedule) -> float:
    return 1.0


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[int, Schedule], float]] = {
    "onecycle": _onecycle,
    "cosine": _cosine,
    "restarts": _restarts,
    "step": _step,
    "triangular2": _triangular2,
    "plateau": _constant,  # times the drops that `Schedule.observe` decides on
    "constant": _constant,
}
