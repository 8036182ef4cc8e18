"""Optimizers, weight decay and gradient clipping. `OPTIMIZERS` are the choices of --optimizer.

schedule.py sets the learning rate of every step, undo.py undoes a step that is not finite, and saved.py
loads the optimizer's state from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from base.errors import UsageError
from optim.lamb import Lamb
from optim.muon import Muon

# name: (class, takes --momentum, has a fused kernel)
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, True, True),  # weight decay is added to the gradient
    "adamw": (torch.optim.AdamW, False, True),  # weight decay is decoupled: w -= lr * weight_decay * w
    "adam": (torch.optim.Adam, False, True),  # weight decay is added to the gradient
    "rmsprop": (torch.optim.RMSprop, True, False),
    "lamb": (Lamb, False, False),  # weight decay is inside the trust ratio
    "muon": (Muon, False, False),  # weight decay is decoupled, as in AdamW
}


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
