"""EfficientNet-B0, MobileNetV3-L, ViT-B/16 and Swin-T from torchvision, without trained weights.

The only file of the package that imports torchvision (5 s), and only when a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from base.errors import UsageError

ZOO = ("efficientnet_b0", "mobilenet_v3_large", "vit_b_16", "swin_t")

PATCH = 16  # side of a ViT-B/16 patch in px


def build(arch: str, num_classes: int, image_sizes: Sequence[int]) -> nn.Module:
    """Return torchvision's `arch` with random weights and its own classifier for `num_classes`.

    image_sizes: every side in px that the run uses, in training and validation; matters to ViT only
    """
    size = {"image_size": vit_size(image_sizes)} if arch == "vit_b_16" else {}
    import torchvision.models

    return getattr(torchvision.models, arch)(weights=None, num_classes=num_classes, **size)


def vit_size(image_sizes: Sequence[int]) -> int:
    """Return the one image size of a ViT: its position embedding has one entry per patch."""
    sizes = sorted(set(image_sizes)) or [224]
    if len(sizes) > 1:
        listed = ", ".join(map(str, sizes))
        raise UsageError(
            f"vit_b_16 works at one image size only, this run has {listed}",
            f"give one size: --resize-schedule {sizes[-1]}",
        )
    if sizes[0] % PATCH:
        raise UsageError(
            f"vit_b_16 cuts images into patches of {PATCH} px, and {sizes[0]} px is not a multiple of that",
            f"give --resize-schedule {max(PATCH, round(sizes[0] / PATCH) * PATCH)}",
        )
    return sizes[0]
