"""Muon."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from optim.lamb import adam_updates

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, for each singular value


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
                updates_of = _muon_updates if group["hidden"] else adam_updates
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
