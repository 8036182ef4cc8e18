"""The architectures of --arch, built from plain values.

A checkpoint stores the arguments of `build_model`, so every tool can rebuild its model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from base.errors import UsageError
from base.flags import ARCHS

from . import model, torchvision_zoo
from .convert import head_of
from .layers import set_drop_path_rate


def build_model(
    arch: str,
    *,
    num_classes: int,
    drop_path_rate: float = 0.0,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
    image_sizes: Sequence[int] = (),
    width: int | None = None,
) -> nn.Module:
    """Return `arch` with random weights: images (N, 3, H, W) -> logits (N, num_classes).

    drop_path_rate:           see `models.layers.set_drop_path_rate`
    use_blurpool, head, stem: see `models.model.ResNet`; torchvision's models have a head of their own
    image_sizes:              image sizes in px that the run uses; ViT-B/16 is built for exactly one
    width:                    `base_width` of a ResNet, if not its own

    Raises UsageError for an unknown architecture, or for an option that it does not have.
    """
    if arch not in ARCHS:
        raise UsageError(f"there is no architecture {arch!r}", f"choose one of {', '.join(ARCHS)}")
    if arch not in torchvision_zoo.ZOO:
        scaled = {"base_width": width} if width else {}
        return getattr(model, arch)(num_classes, drop_path_rate, use_blurpool, head, stem, **scaled)
    if use_blurpool or stem != "imagenet" or width:
        option = "--use-blurpool" if use_blurpool else "--width" if width else "--stem"
        raise UsageError(f"{option} works with the ResNets only, not with {arch}", f"leave {option} out")
    network = torchvision_zoo.build(arch, num_classes, image_sizes)
    set_drop_path_rate(network, drop_path_rate)
    return network


def classifier_of(network: nn.Module) -> nn.Module:
    """Return the last layer, which has an output for each class."""
    return network.get_submodule(head_of(network.state_dict()))


def train_mode(network: nn.Module, head_only: bool = False) -> None:
    """Put `network` into training mode: all of it, or with `head_only` its classifier alone.

    The layers below are then in eval mode and get no gradients: they keep their BatchNorm statistics and
    drop nothing, so the classifier learns from exactly the features that it will be scored on.
    (Batches of a few images would move the statistics; Keras' guide to fine-tuning does the same.)
    """
    network.train(not head_only).requires_grad_(not head_only)
    classifier_of(network).train().requires_grad_()
