"""The architectures by name: what `--arch` can choose, built from plain values.

A checkpoint stores the arguments of `build_model`, so every tool rebuilds the model it was. Layers,
blocks and torchvision's models live in the modules beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from base.errors import UsageError

from . import torchvision_zoo
from .layers import BLURPOOL_NOTICE, set_drop_path_rate
from .model import preact_resnet50, resnet18, resnet34, resnet50, resnet_tiny

__all__ = ["ARCHS", "build_model", "describe_args", "notes", "set_drop_path_rate"]

RESNETS = {
    "resnet50": resnet50,
    "resnet34": resnet34,
    "resnet18": resnet18,
    "preact_resnet50": preact_resnet50,
    "resnet_tiny": resnet_tiny,
}
ARCHS = (*RESNETS, *torchvision_zoo.ZOO)


def build_model(
    arch: str,
    *,
    num_classes: int,
    drop_path_rate: float = 0.0,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
    image_sizes: Sequence[int] = (),
) -> nn.Module:
    """The named architecture with random weights: images (N, 3, H, W) -> logits (N, num_classes).

    head, stem, drop_path_rate: see `models.model.ResNet`; torchvision's models bring their own head
    image_sizes: the sides in px the run will use; ViT-B/16 is built for exactly one

    Raises UsageError for a name that is unknown and for options the architecture has no place for.
    """
    if arch in RESNETS:
        return RESNETS[arch](num_classes, drop_path_rate, use_blurpool, head, stem)
    if arch not in ARCHS:
        raise UsageError(f"there is no architecture {arch!r}", f"choose one of {', '.join(ARCHS)}")
    if use_blurpool or stem != "imagenet":
        option = "--use-blurpool" if use_blurpool else "--stem"
        raise UsageError(f"{option} is for the ResNets, {arch} has no place for it", f"leave {option} out")
    model = torchvision_zoo.build(arch, num_classes, image_sizes)
    set_drop_path_rate(model, drop_path_rate)
    return model


def notes(use_blurpool: bool) -> list[str]:
    """What the user should be told about this choice; one line each, to be printed by the caller."""
    return [BLURPOOL_NOTICE] if use_blurpool else []


def describe_args(model_args: dict) -> str:
    """`build_model`'s arguments in words, such as "resnet50+blurpool, 1000 classes"."""
    name = model_args["arch"]
    name += "+blurpool" if model_args.get("use_blurpool") else ""
    stem = model_args.get("stem", "imagenet")
    name += "" if stem == "imagenet" else f", {stem} stem"
    return f"{name}, {model_args['num_classes']} classes"
