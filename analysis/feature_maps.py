"""The spatial feature maps of any of our networks, found by watching a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from base.errors import UsageError


def as_map(output: object) -> Tensor | None:
    """Return a module's output as a map (N, C, h, w), or None if it is not a map.

    Accepts (N, C, h, w); (N, h, w, C), as inside Swin; and (N, L, C) tokens of a square grid, with or
    without a class token before them, as inside ViT.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        _, a, b, c = output.shape
        found = output.permute(0, 3, 1, 2) if a == b != c else output
    elif output.ndim == 3:
        length = output.shape[1]
        tokens = output if math.isqrt(length) ** 2 == length else output[:, 1:]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            return None
        found = tokens.transpose(1, 2).unflatten(2, (side, side))
    else:
        return None
    return found if found.shape[2] * found.shape[3] > 1 else None


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, object]]:
    """Yield a dict that receives the outputs of `modules` (by name) in the order they are computed.

    The hooks are removed at the end: a hook left behind would keep the features of every later batch.
    """
    outputs, handles = {}, []

    def keep(name: str, module: nn.Module, args: tuple, output: object) -> None:
        outputs[name] = output

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(keep, name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules inside `model` by name."""
    return {name: module for name, module in model.named_modules() if name}


def module_named(model: nn.Module, name: str) -> nn.Module:
    """Return a module. Raises UsageError for an unknown name and lists some that exist."""
    modules = named(model)
    if name not in modules:
        known = ", ".join(known for known in modules if known.count(".") <= 1)
        raise UsageError(f"--layer {name}: no such module", f"name one of {known[:600]}")
    return modules[name]


def last_map(model: nn.Module, images: Tensor) -> str:
    """Return the name of the last module whose output is a map that affects the logits at several positions.

    images: (1, 3, H, W). In a ViT this is not the last block: the logits read its class token alone, so
    no gradient reaches the patches after the last attention. Raises UsageError if there is no map.
    """
    with recorded(named(model)) as outputs:
        logits = model(images)
    maps = {name: output for name, output in outputs.items() if as_map(output) is not None}
    grads = torch.autograd.grad(logits.max(), list(maps.values()), allow_unused=True) if maps else ()
    for name, grad in reversed(list(zip(maps, grads, strict=True))):
        # The largest gradient over the channels at each position: more than one position must matter.
        if grad is not None and (as_map(grad).abs().amax(1) > 0).sum() > 1:
            return name
    size = images.shape[-1]
    raise UsageError(f"this network has no spatial map at {size} px", "give a larger --image-size")


def stage_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the last map of every resolution, the largest first: name -> (N, C, h, w)."""
    with torch.no_grad(), recorded(named(model)) as outputs:
        model(images)
    stages: dict[tuple[int, int], tuple[str, Tensor]] = {}
    for name, output in outputs.items():
        found = as_map(output)
        if found is not None:
            stages[tuple(found.shape[2:])] = (name, found)
    return {name: found for _, (name, found) in sorted(stages.items(), reverse=True)}
