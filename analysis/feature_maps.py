"""The spatial feature maps inside any of our networks: found by watching a forward pass, not by name.

Hooks live for one forward and are always removed: a leaked one keeps every later batch's features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from base.errors import UsageError


def as_map(output: object) -> Tensor | None:
    """A module's output as a map (N, C, h, w); None where it is no map.

    Besides (N, C, h, w) that is (N, h, w, C), as inside Swin, and tokens (N, L, C) of a square grid
    with or without a class token before it, as inside ViT.
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


class Recorder:
    """Within `with`, keeps the outputs of `modules` (name -> module) in the order they were computed."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules, self.outputs, self.handles = modules, {}, []

    def __enter__(self) -> dict[str, object]:
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self._keeper(name)))
        return self.outputs

    def _keeper(self, name: str):
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            self.outputs[name] = output

        return keep

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def named(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below `model` by name."""
    return {name: module for name, module in model.named_modules() if name}


def last_map(model: nn.Module, images: Tensor) -> str:
    """The name of the last module whose output is a map that the logits depend on, all over it.

    images: (1, 3, H, W). A ViT's last block is not it: its logits read the class token alone, so
    nothing reaches the patches after the last attention. Raises UsageError where there is none.
    """
    with Recorder(named(model)) as outputs:
        logits = model(images)
    maps = {name: output for name, output in outputs.items() if as_map(output) is not None}
    grads = torch.autograd.grad(logits.max(), list(maps.values()), allow_unused=True) if maps else ()
    for name, grad in reversed(list(zip(maps, grads, strict=True))):
        # The largest gradient of each channel, per position: more than one position must matter.
        if grad is not None and (as_map(grad).abs().amax(1) > 0).sum() > 1:
            return name
    raise UsageError(
        f"this network has no spatial feature map at {images.shape[-1]} px", "name a larger --image-size"
    )


def module_named(model: nn.Module, name: str) -> nn.Module:
    """Raises UsageError for a name that is none, listing the blocks there are."""
    modules = named(model)
    if name not in modules:
        blocks = ", ".join(n for n in modules if n.count(".") <= 1)
        raise UsageError(
            f"--layer {name}: there is no such module", f"modules of one and two levels: {blocks[:600]}"
        )
    return modules[name]


def stage_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The last map of every resolution, from large to small: name -> (N, C, h, w)."""
    with torch.no_grad(), Recorder(named(model)) as outputs:
        model(images)
    stages: dict[tuple[int, int], tuple[str, Tensor]] = {}
    for name, output in outputs.items():
        found = as_map(output)
        if found is not None:
            stages[tuple(found.shape[2:])] = (name, found)
    return {name: found for _, (name, found) in sorted(stages.items(), reverse=True)}
