"""What a model costs at an image size: layers, output shapes, parameters, multiply-adds.

Counted on the meta device, so nothing is computed and no memory is taken; timing is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Row:
    """One line of a summary, for one image."""

    layer: str
    shape: tuple[int, ...]  # of its output without the batch axis; () for parameters outside any layer
    params: int
    macs: int  # multiply-adds of convolutions and matrix products


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one forward pass on one image of `image_size` px.

    Convolutions and matrix products only, as published counts do: 4.089e9 for ResNet-50 at 224.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        _meta_forward(model, image_size)
    return counter.get_total_flops() // 2


def smallest_norm_map(model: nn.Module, image_size: int) -> int:
    """Positions (H * W) of the smallest map that a BatchNorm meets at `image_size` px; 0 without BatchNorm."""
    met: list[int] = []
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [
        norm.register_forward_pre_hook(lambda norm, args: met.append(args[0][0, 0].numel())) for norm in norms
    ]
    try:
        _meta_forward(model, image_size)
    finally:
        for handle in handles:
            handle.remove()
    return min(met, default=0)


def rows(model: nn.Module, image_size: int, depth: int = 2) -> list[Row]:
    """One row for each layer of up to `depth` names, in the order of execution.

    For a ResNet and depth 2 that is every block; depth 9 gives every convolution. Parameters used
    outside these layers (ViT's class token) get rows of their own: the sum is the model's.
    """
    layers = dict(_layers(model, depth))
    order, shapes, macs = [], {}, dict.fromkeys(layers, 0)
    counter = FlopCounterMode(display=False)
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        def enter(module, args):
            macs[name] -= counter.get_total_flops() // 2

        def leave(module, args, output):
            macs[name] += counter.get_total_flops() // 2
            shapes[name] = tuple(output.shape[1:])
            if name not in order:
                order.append(name)

        handles.extend((layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)))

    try:
        for name, layer in layers.items():
            watch(name, layer)
        with counter:
            _meta_forward(model, image_size)
    finally:
        for handle in handles:
            handle.remove()
    inside = {f"{name}.{key}" for name in order for key, _ in layers[name].named_parameters()}
    loose = [Row(key, (), p.numel(), 0) for key, p in model.named_parameters() if key not in inside]
    return loose + [Row(name, shapes[name], count_params(layers[name]), macs[name]) for name in order]


def format_table(model: nn.Module, image_size: int, depth: int = 2) -> str:
    """The rows as an aligned text table with a line of totals; no trailing newline."""
    found = rows(model, image_size, depth)
    params, macs = count_params(model), count_macs(model, image_size)
    lines = [("layer", "output shape", "parameters", "multiply-adds")]
    lines += [(r.layer, " x ".join(map(str, r.shape)), f"{r.params:,}", f"{r.macs:,}") for r in found]
    lines.append((f"total at {image_size} px", "", f"{params:,}", f"{macs:,}"))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines
    )


def _layers(module: nn.Module, depth: int, prefix: str = ""):
    for name, child in module.named_children():
        if isinstance(child, nn.Identity):
            continue
        if depth == 1 or not any(child.children()):
            yield prefix + name, child
        else:
            yield from _layers(child, depth - 1, f"{prefix}{name}.")


def _meta_forward(model: nn.Module, image_size: int) -> Tensor:
    """Run `model` on shapes alone, in evaluation mode; its own tensors are not touched."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(model, shapes, image)
    finally:
        for module, training in modes.items():
            module.training = training
