"""LAMB, and the update of Adam that it shares with Muon."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


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
            updates = adam_updates(self.state, params, group)
            weights = [i for i, p in enumerate(params) if p.ndim > 1]
            if weights:
                _apply_trust_ratio([params[i] for i in weights], [updates[i] for i in weights])
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def adam_updates(states: Mapping[Tensor, dict], params: list[Tensor], group: dict) -> list[Tensor]:
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
