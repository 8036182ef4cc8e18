"""How the weights move: parameter groups, optimizers, gradient clipping, learning-rate schedules.

Two tables, `OPTIMIZERS` and `SCHEDULES`, hold what --optimizer and --schedule can be. Schedules
are closed forms of the optimizer step, so a resumed run needs the step's number and nothing else.
When a step is taken, and whether its gradients are finite, is `train_utils`' business.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from base.errors import CheckpointError, UsageError, one_line


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, weights and the rest; only the weights decay. Frozen parameters are left out.

    The rest are the parameters of at most one dimension: biases and the scales of normalisation
    layers. Decided by shape, because names lie (torchvision's `downsample.1` is a BatchNorm).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Lamb(torch.optim.Optimizer):
    """LAMB, Adam with layer-wise step lengths (https://arxiv.org/abs/1904.00962, algorithm 2).

        m, v   = Adam's moving averages, both bias-corrected
        update = m / (sqrt(v) + eps) + weight_decay * w
        w     -= lr * |w| / |update| * update

    as used by ResNet Strikes Back (https://arxiv.org/abs/2110.00476). The trust ratio |w| / |update|
    is 1 where either norm is 0, and for parameters of at most one dimension, the ones that do not
    decay either: the norm of a BatchNorm's shift says nothing about how far it should move, and a
    shift that starts at 0 would not move at all. Gradients are not clipped here.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on every parameter that has a gradient. Nothing in it waits for a GPU."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_add_(params, self._updates(params, group), alpha=-group["lr"])

    def _updates(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Advance the averages; return trust ratio * update for each parameter."""
        (beta1, beta2), grads = group["betas"], [p.grad for p in params]
        states = [self._advanced_state(p) for p in params]
        steps = [state["step"] for state in states]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = list(torch._foreach_div(means, roots))
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        weights = [i for i, p in enumerate(params) if p.ndim > 1]
        _apply_trust_ratio([params[i] for i in weights], [updates[i] for i in weights])
        return updates

    def _advanced_state(self, param: Tensor) -> dict:
        state = self.state[param]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        return state


def _apply_trust_ratio(params: list[Tensor], updates: list[Tensor]) -> None:
    if params:
        weight_norm = torch.stack(torch._foreach_norm(params))
        update_norm = torch.stack(torch._foreach_norm(updates))
        defined = (weight_norm > 0) & (update_norm > 0)
        ratio = torch.where(defined, weight_norm / update_norm, 1.0)
        torch._foreach_mul_(updates, list(ratio.unbind()))


@dataclass(frozen=True)
class _Choice:
    make: Callable[..., torch.optim.Optimizer]
    uses_momentum: bool = False  # takes --momentum, as opposed to betas of its own
    has_fused: bool = True  # torch has a kernel that does a whole step at once


OPTIMIZERS: dict[str, _Choice] = {
    "sgd": _Choice(torch.optim.SGD, uses_momentum=True),  # weight decay added to the gradient
    "adamw": _Choice(torch.optim.AdamW),  # weight decay beside the gradient, times lr
    "adam": _Choice(torch.optim.Adam),  # weight decay added to the gradient, then scaled with it
    "rmsprop": _Choice(torch.optim.RMSprop, uses_momentum=True, has_fused=False),
    "lamb": _Choice(Lamb, has_fused=False),  # weight decay inside the trust ratio
}


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer called `name` over `param_groups(model)`; build it after `model.to(device)`.

    `momentum` is that of SGD and RMSprop; the others' betas (0.9, 0.999) are torch's defaults and
    it does not touch them. `nesterov` is SGD's alone and a UsageError elsewhere.
    """
    choice = OPTIMIZERS[name]
    options = {"momentum": momentum} if choice.uses_momentum else {}
    if nesterov:
        if name != "sgd" or momentum <= 0:
            raise UsageError(
                f"--nesterov does not go with --optimizer {name} --momentum {momentum:g}",
                "leave it out, or use --optimizer sgd with a positive --momentum",
            )
        options["nesterov"] = True
    if choice.has_fused and all(p.device.type in ("cuda", "cpu") for p in model.parameters()):
        options["fused"] = True  # else torch chooses: foreach on a GPU
    return choice.make(param_groups(model, weight_decay), lr=lr, **options)


def keeps_alike(name: str, momentum: float, other: str, others_momentum: float) -> bool:
    """Whether two optimizers keep the same things for a parameter: one can go on from the other's state."""
    return name == other and (not OPTIMIZERS[name].uses_momentum or bool(momentum) == bool(others_momentum))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take each parameter's state from a checkpoint, and nothing else: the options are this run's own.

    The kernels check no shapes: a tensor of another size ends the process, one of another type is
    trained on. So each must be what the optimizer would have made. Raises CheckpointError.
    """
    own = optimizer.state_dict()
    if [group["params"] for group in saved["param_groups"]] != [
        group["params"] for group in own["param_groups"]
    ]:
        raise _misfit("its parameter groups are other ones")
    if not saved["state"]:  # no step was taken
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if saved["state"].keys() != set(range(count)):
        raise _misfit(f"it has state for {len(saved['state'])} parameters, or others than this run's {count}")
    taken: dict[int, dict] = {}
    for group in optimizer.param_groups:
        like = _state_of_one(optimizer, group)
        for param in group["params"]:
            taken[len(taken)] = _fitting(saved["state"][len(taken)], like, param, f"parameter {len(taken)}")
    optimizer.load_state_dict(own | {"state": taken})


def _state_of_one(optimizer: torch.optim.Optimizer, group: dict) -> dict:
    """What the optimizer keeps for a parameter, from a step of its like on a single number."""
    one = torch.zeros(1, requires_grad=True)
    one.grad = torch.zeros(1)
    like = type(optimizer)([{**group, "params": [one]}])
    like.step()
    return like.state[one]


def _fitting(state: dict, like: dict, param: Tensor, where: str) -> dict:
    if state.keys() != like.keys():
        raise _misfit(
            f"{where} has {', '.join(map(str, state)) or 'nothing'}, not {', '.join(like) or 'nothing'}"
        )
    taken = {}
    for name, example in like.items():
        value, counts = state[name], not isinstance(example, Tensor) or example.ndim == 0
        fits = type(value) is type(example)
        if fits and isinstance(example, Tensor):
            shape, dtype = ((), example.dtype) if counts else (param.shape, param.dtype)
            fits = value.shape == shape and value.dtype == dtype and value.layout is torch.strided
        if not fits or (counts and not 0 <= value < math.inf):
            raise _misfit(
                f"{where} has another {name} than a {type(param).__name__} of {tuple(param.shape)} makes"
            )
        # A copy of its own: tensors in a file may share memory.
        taken[name] = (
            value if not isinstance(value, Tensor) else value.clone() if counts else _like(param, value)
        )
    return taken


def _like(param: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(param, requires_grad=False).copy_(value)


def _misfit(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's optimizer state does not fit: {one_line(reason)}",
        "use a checkpoint that train.py wrote with this --optimizer",
    )


def clip_gradients(params: Iterable[Tensor], mode: str, limit: float) -> Tensor:
    """Clip gradients in place and return their total 2-norm before that (a scalar on their device).

    mode "norm":  scale all gradients by one factor so that the total norm is at most `limit`
    mode "value": clamp every element to [-limit, limit]

    A `limit` of 0 or infinity measures and changes nothing. No call waits for a GPU. If the result
    is not finite, the gradients are useless and the step must be skipped.
    """
    if mode not in ("norm", "value"):
        raise ValueError(f"clip mode must be norm or value, got {mode}")
    params = [p for p in params if p.grad is not None]
    norm = get_total_norm([p.grad for p in params])
    if 0 < limit < math.inf:
        if mode == "norm":
            clip_grads_with_norm_(params, limit, norm)
        else:
            clip_grad_value_(params, limit)
    return norm


@dataclass(frozen=True)
class _Plan:
    """What the closed forms below know besides the step."""

    total_steps: int
    warmup_steps: int
    cycles: int
    milestones: tuple[float, ...]


START, END = 1 / 25, 1 / 25e4  # of the peak: OneCycleLR's div_factor and final_div_factor


def _onecycle(step: int, plan: _Plan) -> float:
    """torch's OneCycleLR with its defaults (https://arxiv.org/abs/1708.07120), momentum not cycled."""
    top, last = 0.3 * plan.total_steps - 1, plan.total_steps - 1
    if step <= top:
        return _cosine_between(START, 1.0, step / top)
    # A run of up to 3 steps has no way up: `top` is negative, and it starts part of the way down.
    start = top
    return _cosine_between(1.0, END, (step - start) / (last - start))


def _cosine(step: int, plan: _Plan) -> float:
    """Straight up over the warm-up steps, then half a cosine to 0: https://arxiv.org/abs/1706.02677."""
    if step < plan.warmup_steps:
        return (step + 1) / (plan.warmup_steps + 1)
    return _cosine_between(1.0, 0.0, (step - plan.warmup_steps) / (plan.total_steps - plan.warmup_steps))


def _restarts(step: int, plan: _Plan) -> float:
    """torch's CosineAnnealingWarmRestarts (https://arxiv.org/abs/1608.03983), cycles of one length.

    Rounded up to whole steps, so that no crumb of a cycle begins just before the end.
    """
    length = math.ceil(plan.total_steps / plan.cycles)
    return _cosine_between(1.0, 0.0, step % length / length)


def _triangular2(step: int, plan: _Plan) -> float:
    """torch's CyclicLR(mode="triangular2") from peak / 25 (https://arxiv.org/abs/1506.01186).

    Straight up and down in every cycle; each peak is half as far above the base as the one before.
    """
    turns = step * plan.cycles / plan.total_steps
    height = 1.0 - abs(2.0 * (turns % 1.0) - 1.0)
    return START + (1.0 - START) * height / 2.0 ** math.floor(turns)


def _step(step: int, plan: _Plan) -> float:
    """A tenth at each milestone, given as fractions of the run."""
    return 0.1 ** sum(step >= round(milestone * plan.total_steps) for milestone in plan.milestones)


def _constant(step: int, plan: _Plan) -> float:
    return 1.0


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[int, _Plan], float]] = {
    "onecycle": _onecycle,
    "cosine": _cosine,
    "restarts": _restarts,
    "step": _step,
    "triangular2": _triangular2,
    "plateau": _constant,  # times the drops that `Schedule.observe` decides
    "constant": _constant,
}


class Schedule:
    """Sets every group's learning rate; `step()` goes right after each optimizer step.

    Step k = 0, 1, ... uses `lr_at(k)` = peak_lr * SCHEDULES[name] * `lr_scale(k)`. For plateau it
    is also divided by ten each time the observed loss has not improved for `patience` + 1
    evaluations in a row, as torch's ReduceLROnPlateau does.

    phases:       (steps, factor) for each phase of the run, for --lr-scale; () is one of factor 1.
                  The steps add up to total_steps.
    warmup_steps: of cosine; what a schedule has no use for, it does not look at
    cycles:       how many cycles of restarts or triangular2 the run is divided into
    milestones:   of step, as fractions of the run; by default epochs 30, 60 and 80 of 90
    patience:     of plateau
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        *,
        peak_lr: float,
        total_steps: int,
        phases: tuple[tuple[int, float], ...] = (),
        warmup_steps: int = 0,
        cycles: int = 4,
        milestones: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9),
        patience: int = 4,
    ):
        _check(name, total_steps, warmup_steps, cycles)
        phases = phases or ((total_steps, 1.0),)
        if sum(steps for steps, _ in phases) != total_steps:
            raise ValueError(f"the phases {phases} do not add up to {total_steps} steps")
        self.optimizer, self.name, self.peak_lr, self.total_steps = optimizer, name, peak_lr, total_steps
        self.patience = patience
        self._plan = _Plan(total_steps, warmup_steps, cycles, milestones)
        self._phase_ends = list(accumulate(steps for steps, _ in phases))
        self._phase_factors = [factor for _, factor in phases]
        self.position = 0  # optimizer steps taken
        self.drops, self.best, self.bad_evaluations = 0, math.inf, 0
        self.last_lr = self.lr_at(0)
        self._set(self.last_lr)

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0-based (plateau: if no further drop comes)."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"the schedule has {self.total_steps} steps (0-based) and no step {step}")
        return self.peak_lr * SCHEDULES[self.name](step, self._plan) * self.lr_scale(step) * 0.1**self.drops

    def lr_scale(self, step: int) -> float:
        """The factor of the phase that `step` is in."""
        return self._phase_factors[bisect_right(self._phase_ends, step)]

    def step(self) -> None:
        """Move on to the next step. `last_lr` becomes what the step just taken has used."""
        if self.position >= self.total_steps:
            raise RuntimeError(
                f"optimizer step {self.position + 1} of a schedule planned for {self.total_steps}: "
                "the loader yields more batches than the plan counts"
            )
        self.last_lr = self.optimizer.param_groups[0]["lr"]
        self.position += 1
        self._set_current()

    def observe(self, loss: float) -> None:
        """Tell plateau the loss of an evaluation, once per evaluated epoch; others do not listen.

        Better means by more than 0.01 %, and a nan is never better.
        """
        if self.name != "plateau":
            return
        if loss < self.best * (1 - 1e-4):
            self.best, self.bad_evaluations = float(loss), 0
        else:
            self.bad_evaluations += 1
        if self.bad_evaluations > self.patience:
            self.drops, self.bad_evaluations = self.drops + 1, 0
        self._set_current()

    def seek(self, position: int) -> None:
        """Go on as if `position` steps had been taken: after a change of the plan."""
        self.position = position
        self._set_current()

    _STATE = ("position", "last_lr", "drops", "best", "bad_evaluations")

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict) -> None:
        """Go on at a saved position."""
        if state["position"] > self.total_steps:
            raise CheckpointError(
                f"the checkpoint is at optimizer step {state['position']}, this run's plan has {self.total_steps}",
                "continue with the epochs, batch sizes and data it was trained with",
            )
        for name in self._STATE:
            setattr(self, name, state[name])
        self._set(self.last_lr)  # of a finished run no other comes
        self._set_current()

    def _set_current(self) -> None:
        if self.position < self.total_steps:
            self._set(self.lr_at(self.position))

    def _set(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def _check(name: str, total_steps: int, warmup_steps: int, cycles: int) -> None:
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {total_steps}")
    if name == "cosine" and not 0 <= warmup_steps < total_steps:
        raise UsageError(
            f"a warm-up of {warmup_steps} steps does not fit into a run of {total_steps}",
            "shorten the warm-up or train for more epochs",
        )
    if name in ("restarts", "triangular2") and not 1 <= cycles <= total_steps:
        raise UsageError(
            f"{total_steps} steps cannot have {cycles} cycles", "ask for fewer cycles or more epochs"
        )
