"""The optimizer's state in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from base.errors import CheckpointError, one_line
from optim import OPTIMIZERS


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
