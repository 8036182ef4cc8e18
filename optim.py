"""Optimizers, gradient clipping, and the learning rate of every step.

`OPTIMIZERS` and `SCHEDULES` are the choices of --optimizer and --schedule. The learning rate of step t
is `Schedule.lr_at(t)`, a function of t, so a run can be resumed from the number of the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import CheckpointError, UsageError, one_line
from base.flat import group_by_dtype


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    backbone_lr: float = 1.0,
    head: Iterable[Tensor] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer called `name` over `param_groups(model)`. Call this after `model.to(device)`.

    `momentum` is for SGD and RMSprop; Muon keeps 0.95, the others torch's betas (0.9, 0.999). The learning
    rate of all parameters but those in `head` is multiplied by `backbone_lr`. Raises UsageError for
    `nesterov` without SGD and a positive momentum.
    """
    optimizer, uses_momentum, has_fused = OPTIMIZERS[name]
    options = {"momentum": momentum} if uses_momentum else {}
    if nesterov:
        if name != "sgd" or momentum <= 0:
            raise UsageError(
                f"--nesterov does not go with --optimizer {name} --momentum {momentum:g}",
                "leave it out, or use --optimizer sgd with a positive --momentum",
            )
        options["nesterov"] = True
    if has_fused and all(p.device.type in ("cuda", "cpu") for p in model.parameters()):
        options["fused"] = True
    groups = (muon_groups if name == "muon" else param_groups)(model, weight_decay)
    if backbone_lr != 1.0:
        groups = slowed_below(groups, {id(p) for p in head}, backbone_lr)
    return optimizer(groups, lr=lr, **options)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: `weights_of(model)`, with weight decay, and the rest. Frozen ones are left out."""
    weights = {id(p) for p in weights_of(model)}
    decayed, others = [], []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if id(p) in weights else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def weights_of(model: nn.Module) -> list[Tensor]:
    """Return the parameters that are weights: what weight decay and --l1 make smaller.

    Biases and the scales of normalization layers are not: they have at most one dimension. Nor are the
    class token and position embedding of ViT (https://arxiv.org/abs/2012.12877) and the position biases of
    Swin (https://arxiv.org/abs/2103.14030): their names do not end in "weight".
    """
    return [p for name, p in model.named_parameters() if p.ndim > 1 and name.endswith("weight")]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the groups of `param_groups` without the hidden weights, and a group of these.

    They are the weights of convolutions and linear layers, except for the first and the last, as the
    author of Muon advises: input and output layers, embeddings, biases and scales stay with AdamW.
    """
    hidden = {id(p) for p in weights_of(model)[1:-1]}
    decayed, rest = param_groups(model, weight_decay)
    matrices = [p for p in decayed["params"] if id(p) in hidden]
    decayed["params"] = [p for p in decayed["params"] if id(p) not in hidden]
    return [decayed, rest, {"params": matrices, "weight_decay": weight_decay, "hidden": True}]


def slowed_below(groups: list[dict], head: Collection[int], backbone_lr: float) -> list[dict]:
    """Split each group in two: parameters whose id is in `head`, and the rest, which get `backbone_lr`.

    That is a factor of the learning rate, see `set_lr`. The head comes first.
    """
    of_head = [group | {"params": [p for p in group["params"] if id(p) in head]} for group in groups]
    below = [group | {"params": [p for p in group["params"] if id(p) not in head]} for group in groups]
    slowed = [group | {"backbone_lr": backbone_lr} for group in below]
    return [group for group in of_head + slowed if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; those of the backbone get their part of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("backbone_lr", 1.0)


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam with layer-wise step lengths (https://arxiv.org/abs/1904.00962, algorithm 2).

        m, v   = Adam's moving averages, both bias-corrected
        update = m / (sqrt(v) + eps) + weight_decay * w
        w     -= lr * |w| / |update| * update

    as in ResNet Strikes Back (https://arxiv.org/abs/2110.00476), without clipping. The trust ratio
    |w| / |update| is 1 where either norm is 0, and for parameters with at most one dimension: the norm
    of a BatchNorm's shift says nothing about how far it should move.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient. `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = _adam_updates(self.state, params, group)
            weights = [i for i, p in enumerate(params) if p.ndim > 1]
            if weights:
                _apply_trust_ratio([params[i] for i in weights], [updates[i] for i in weights])
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def _adam_updates(states: Mapping[Tensor, dict], params: list[Tensor], group: dict) -> list[Tensor]:
    """Update Adam's moving averages; return m / (sqrt(v) + eps) + weight_decay * w for each parameter."""
    grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
    own = [states[p] for p in params]
    for p, state in zip(params, own, strict=True):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
    steps, means, squares = ([s[name] for s in own] for name in ("step", "exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(roots, group["eps"])
    updates = list(torch._foreach_div(means, roots))
    torch._foreach_div_(updates, [1 - beta1**step for step in steps])
    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
    return updates


def _apply_trust_ratio(params: list[Tensor], updates: list[Tensor]) -> None:
    weight_norm = torch.stack(torch._foreach_norm(params))
    update_norm = torch.stack(torch._foreach_norm(updates))
    defined = (weight_norm > 0) & (update_norm > 0)
    ratio = torch.where(defined, weight_norm / update_norm, 1.0)
    torch._foreach_mul_(updates, list(ratio.unbind()))


class Muon(torch.optim.Optimizer):
    """Muon for groups with `hidden`, AdamW for the others (https://kellerjordan.github.io/posts/muon).

        B  = 0.95 * B + 0.05 * gradient, and O = the orthogonal matrix nearest to 0.95 * B + 0.05 * gradient
        w -= lr * (0.2 * sqrt(max(rows, columns)) * O + weight_decay * w)

    for each weight as a matrix (out, rest). The factor gives the update a root mean square of 0.2, as
    AdamW's typically have, so that both share AdamW's learning rate and weight decay: "match_rms_adamw"
    of torch.optim.Muon (https://arxiv.org/abs/2502.16982), which takes nothing but matrices.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, hidden=False):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hidden": hidden}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient. `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                updates_of = _muon_updates if group["hidden"] else _adam_updates
                torch._foreach_add_(params, updates_of(self.state, params, group), alpha=-group["lr"])


def _muon_updates(states: Mapping[Tensor, dict], params: list[Tensor], group: dict) -> list[Tensor]:
    """Update the momentum; return what --lr multiplies, for each parameter: see `Muon`."""
    for p in params:
        if not states[p]:
            states[p]["momentum_buffer"] = torch.zeros_like(p)
    grads, momenta = [p.grad for p in params], [states[p]["momentum_buffer"] for p in params]
    torch._foreach_lerp_(momenta, grads, 1 - MUON_MOMENTUM)
    directions = torch._foreach_lerp(grads, momenta, MUON_MOMENTUM)  # Nesterov's
    matrices = [direction.reshape(len(direction), -1) for direction in directions]
    updates = [
        # In the memory layout of p: foreach operations on unlike layouts launch a kernel for each tensor.
        torch.mul(matrix.view(p.shape), 0.2 * math.sqrt(max(matrix.shape)), out=torch.empty_like(p))
        for p, matrix in zip(params, orthogonalized(matrices), strict=True)
    ]
    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
    return updates


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Return U V^T for each matrix U S V^T, roughly: five Newton-Schulz steps bring S to 0.7 ... 1.2.

    Matrices of one shape, or its transpose, are stacked, so that each step is three kernels for all of
    them. Computed in their own precision: bfloat16, as published, is slow where it is emulated.
    """
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    results: list[Tensor] = [None] * len(matrices)
    for shape in dict.fromkeys(matrix.shape for matrix in wide):
        of_shape = [k for k, matrix in enumerate(wide) if matrix.shape == shape]
        stack = torch.stack([wide[k] for k in of_shape])
        stack = stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = stack @ stack.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=NEWTON_SCHULZ[1], alpha=NEWTON_SCHULZ[2])
            stack = torch.baddbmm(stack, polynomial, stack, beta=NEWTON_SCHULZ[0])
        for k, matrix in zip(of_shape, stack, strict=True):
            results[k] = matrix if wide[k] is matrices[k] else matrix.T
    return results


MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, for each singular value

# name: (class, takes --momentum, has a fused kernel)
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, True, True),  # weight decay is added to the gradient
    "adamw": (torch.optim.AdamW, False, True),  # weight decay is decoupled: w -= lr * weight_decay * w
    "adam": (torch.optim.Adam, False, True),  # weight decay is added to the gradient
    "rmsprop": (torch.optim.RMSprop, True, False),
    "lamb": (Lamb, False, False),  # weight decay is inside the trust ratio
    "muon": (Muon, False, False),  # weight decay is decoupled, as in AdamW
}


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


def clip_gradients(params: Iterable[Tensor], mode: str, limit: float) -> Tensor:
    """Clip the gradients in place; return their total 2-norm before clipping, a scalar on their device.

    mode "norm":  scale all gradients by one factor, so that their total norm is at most `limit`
    mode "value": clamp every element to [-limit, limit]

    A `limit` of 0 or infinity clips nothing. Does not wait for a GPU. If the norm is not finite, the
    step must be skipped.
    """
    if mode not in ("norm", "value"):
        raise ValueError(f"clip mode must be norm or value, got {mode}")
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if 0 < limit < math.inf:
        if mode == "norm":
            # torch.nn.utils does the same, but sorts the gradients by device and dtype at every step.
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
        else:
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)
    return norm


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

    def observe(self, loss: float) -> None:
        """Note the loss of an evaluation; without a patience it is ignored.

        As in torch's ReduceLROnPlateau, the learning rate drops to a tenth after patience + 1 evaluations
        in a row that did not improve the best loss by 0.01 %. NaN is no improvement.
        """
        if self.patience is None:
            return
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
MILESTONES = (1 / 3, 2 / 3, 8 / 9)  # of "step", as fractions of the run: epochs 30, 60 and 80 of 90
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


# --- the optimizer's state in a checkpoint -----------------------------------------------------------


def same_state(flags: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether the optimizers that two sets of flags describe can continue from each other's state.

    Momentum of 0 keeps none, and a `backbone_lr` other than 1 puts the parameters into other groups.
    """
    name = flags["optimizer"]
    same = name == others["optimizer"] and (flags["backbone_lr"] == 1) == (others["backbone_lr"] == 1)
    return same and (not OPTIMIZERS[name][1] or bool(flags["momentum"]) == bool(others["momentum"]))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, head: Iterable[Tensor] = ()) -> None:
    """Load each parameter's state from a checkpoint; the options (lr, weight decay) stay this run's.

    head: parameters that may be the only ones with a state, because only they have been trained yet

    Fused kernels do not check their inputs: a tensor of another size crashes the process, and one of
    another dtype trains silently. So every value is compared with what this optimizer would keep.
    Raises CheckpointError.
    """
    if not saved["state"]:  # saved before the first step, or by another optimizer
        return
    own = optimizer.state_dict()
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in own["param_groups"]]:
        raise _misfit("its parameter groups differ")
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    trained_first = {id(p) for p in head}
    of_head = {k for k, (param, _) in enumerate(params) if id(param) in trained_first}
    if saved["state"].keys() not in (set(range(len(params))), of_head):
        what = f"it has state for {len(saved['state'])} parameters that are not this run's {len(params)}"
        raise _misfit(what)
    examples = {id(group): example_state(optimizer, group) for group in optimizer.param_groups}
    state = {
        k: _checked_state(saved["state"][k], examples[id(group)], param, f"parameter {k}")
        for k, (param, group) in enumerate(params)
        if k in saved["state"]
    }
    optimizer.load_state_dict(own | {"state": state})


def example_state(optimizer: torch.optim.Optimizer, group: dict) -> dict:
    """Return the state that the optimizer keeps for a parameter, found by a step on a single number."""
    param = torch.zeros(1, requires_grad=True)
    param.grad = torch.zeros(1)
    probe = type(optimizer)([{**group, "params": [param]}])
    probe.step()
    return probe.state[param]


def _checked_state(state: dict, example: dict, param: Tensor, where: str) -> dict:
    """Return a copy of one parameter's `state`, with the names and types of `example`.

    Its tensors get the memory layout of `param`; those of a file may share memory. Raises CheckpointError.
    """
    if state.keys() != example.keys():
        found, wanted = (", ".join(map(str, keys)) or "nothing" for keys in (state, example))
        raise _misfit(f"{where} has {found}; it needs {wanted}")
    checked = {}
    for name, like in example.items():
        value, is_counter = state[name], not isinstance(like, Tensor) or like.ndim == 0
        fits = type(value) is type(like)
        if fits and isinstance(like, Tensor):
            own = torch.empty_like(like if is_counter else param)
            fits = (value.shape, value.dtype, value.layout) == (own.shape, own.dtype, own.layout)
            value = own.copy_(value) if fits else value
        if not fits or (is_counter and not 0 <= value < math.inf):
            raise _misfit(f"{where} has a wrong {name} for a tensor of shape {tuple(param.shape)}")
        checked[name] = value
    return checked


def _misfit(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's optimizer state does not fit: {one_line(reason)}",
        "use a checkpoint that train.py wrote with this --optimizer",
    )
