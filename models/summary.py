"""The cost of a model at an image size: output shapes, parameters and multiply-adds.

Counted on a copy on torch's meta device, so nothing is computed and the model does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Row:
    """A line of the summary."""

    layer: str
    shape: tuple[int, ...]  # of the output for one image; () for parameters outside any layer
    params: int
    macs: int  # multiply-adds of convolutions and matrix products, for one image


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, image_size: int) -> int:
    """Return the multiply-adds of a forward pass on one image of `image_size` px.

    Counts convolutions and matrix products, as published numbers do: 4.089e9 for ResNet-50 at 224 px.
    """
    return _forward(_without_data(model), image_size).get_total_flops() // 2


def smallest_norm_map(model: nn.Module, image_size: int) -> int:
    """Return H * W of the smallest map that enters a BatchNorm at `image_size` px; 0 without BatchNorm."""
    model, positions = _without_data(model), []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, args: positions.append(args[0][0, 0].numel()))
    _forward(model, image_size)
    return min(positions, default=0)


def rows(model: nn.Module, image_size: int, depth: int = 2) -> list[Row]:
    """Return one row for each layer, down to `depth` levels of modules, in the order of execution.

    For a ResNet, depth 2 shows every block and depth 9 every convolution. Parameters outside of these
    layers (such as ViT's class token) get rows of their own, so that the rows add up to the model.
    """
    model, shapes = _without_data(model), {}
    layers = dict(_layers(model, depth))
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    flops = _forward(model, image_size).get_flop_counts()
    inside = tuple(f"{name}." for name in shapes)
    found = [Row(k, (), p.numel(), 0) for k, p in model.named_parameters() if not k.startswith(inside)]
    for name, shape in shapes.items():
        macs = sum(flops.get(f"{type(model).__name__}.{name}", {}).values()) // 2
        found.append(Row(name, shape, count_params(layers[name]), macs))
    return found


def format_table(model: nn.Module, image_size: int, depth: int = 2) -> str:
    """Return the rows and their totals as an aligned text table, without a trailing newline."""
    lines = [("layer", "output shape", "parameters", "multiply-adds")]
    for row in rows(model, image_size, depth):
        lines.append((row.layer, " x ".join(map(str, row.shape)), f"{row.params:,}", f"{row.macs:,}"))
    params, macs = count_params(model), count_macs(model, image_size)
    lines.append((f"total at {image_size} px", "", f"{params:,}", f"{macs:,}"))
    w = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{w[0]}}  {b:<{w[1]}}  {c:>{w[2]}}  {d:>{w[3]}}" for a, b, c, d in lines)


def _layers(module: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Identity):
            continue
        if depth == 1 or not any(child.children()):
            yield prefix + name, child
        else:
            yield from _layers(child, depth - 1, f"{prefix}{name}.")


def _without_data(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy takes what it finds in this memo instead of copying.
    empty = {id(tensor): nn.Parameter(tensor.detach().to("meta"), False) for tensor in tensors}
    return copy.deepcopy(model, empty).eval()


@torch.no_grad()
def _forward(model: nn.Module, image_size: int) -> FlopCounterMode:
    """Run a model on the meta device on one image; return torch's counter (a multiply-add is two flops)."""
    dtype = next(model.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta"))
    return counter
