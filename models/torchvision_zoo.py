"""EfficientNet-B0, MobileNetV3-L, ViT-B/16 and Swin-T from torchvision, without trained weights.

torchvision takes seconds to import, so it is imported here only, when one of these models is built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from base.errors import UsageError

ZOO = ("efficientnet_b0", "mobilenet_v3_large", "vit_b_16", "swin_t")

PATCH = 16  # side of a ViT-B/16 patch in px


def build(arch: str, num_classes: int, image_sizes: Sequence[int]) -> nn.Module:
    """Return torchvision's `arch` with random weights and its own classifier for `num_classes`.

    image_sizes: image sizes in px that the run uses; only ViT depends on them
    Raises UsageError for sizes that ViT-B/16 cannot use.
    """
    size = {"image_size": vit_size(image_sizes)} if arch == "vit_b_16" else {}
    import torchvision.models

    return getattr(torchvision.models, arch)(weights=None, num_classes=num_classes, **size)


def vit_size(image_sizes: Sequence[int]) -> int:
    """Return the image size of ViT-B/16, whose position embedding has an entry for each patch.

    Raises UsageError for several sizes, or for one that is not a multiple of the patch size.
    """
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
