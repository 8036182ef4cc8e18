"""Pictures of a network's filters: its first kernels, their responses to an image, later feature maps."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from analysis import figures
from analysis.feature_maps import stage_maps
from base.errors import UsageError

STRIDES, PADDINGS = (1, 2, 3), (0, 1, 2)


def draw(model: nn.Module, image: Tensor, pixels: np.ndarray, title: str) -> dict[str, Figure]:
    """Draw everything: {file name: figure}.

    image: (1, 3, S, S), the model's input. pixels: (S, S, 3) uint8, the same image
    """
    weight = first_conv(model).weight.detach()
    return {
        "kernels.png": kernels(weight, title),
        "filtered.png": filtered(weight, image, pixels, title),
        "feature_maps.png": feature_maps(model, image, pixels, title),
        "stride_padding.png": stride_padding(weight, image),
    }


def first_conv(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that sees the image. Raises UsageError if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module
    raise UsageError("this network has no convolution on the image", "use another architecture")


def strongest(weight: Tensor, count: int) -> list[int]:
    """Return the indices of the `count` kernels of weight (C, 3, k, k) with the largest norm."""
    return weight.flatten(1).norm(dim=1).argsort(descending=True)[:count].tolist()


def kernels(weight: Tensor, title: str) -> Figure:
    """Draw the 64 strongest kernels of weight (C, 3, k, k), in colour."""
    chosen = weight[strongest(weight, 64)]
    captions = [f"{kernel.norm().item():.2f}" for kernel in chosen]
    side = f"{weight.shape[2]} x {weight.shape[3]} px"
    note = f"{len(chosen)} strongest of {len(weight)}, {side}; norm below; grey is 0; each scaled on its own"
    images = [as_picture(kernel) for kernel in chosen]
    title = f"First-layer kernels of {title}\n{note}"
    return figures.gallery(images, captions, title=title, columns=16, side=0.75)


def as_picture(kernel: Tensor) -> np.ndarray:
    """(3, k, k) -> (k, k, 3) uint8; zero is mid-grey, the largest weight black or white."""
    scaled = 0.5 + 0.5 * kernel / kernel.abs().max().clamp_min(1e-12)
    return (255 * scaled).round().byte().permute(1, 2, 0).cpu().numpy()


def responses(weight: Tensor, image: Tensor, **options) -> np.ndarray:
    """Return the responses (n, h, w) of kernels (n, 3, k, k) to an image (1, 3, H, W)."""
    return F.conv2d(image, weight, **options)[0].cpu().numpy()


def filtered(weight: Tensor, image: Tensor, pixels: np.ndarray, title: str) -> Figure:
    """Draw the seven strongest kernels above their responses to the image, pixels (S, S, 3)."""
    chosen = strongest(weight, 7)
    maps = responses(weight[chosen], image, padding="same")
    above = [pixels, *map(as_picture, weight[chosen])], ["image", *(f"filter {k}" for k in chosen)]
    ranges = [f"{found.min():.1f} to {found.max():.1f}" for found in maps]
    below = [pixels @ figures.GREY, *maps], ["brightness", *ranges]
    title = f"Learned filters and their responses to an image (stride 1): {title}"
    return figures.strips([above, below], title=f"{title}\nrange below; blue is low, yellow is high")


def feature_maps(model: nn.Module, image: Tensor, pixels: np.ndarray, title: str) -> Figure:
    """Draw the eight channels that vary most in the last map of every resolution."""
    rows, names = [([pixels], ["image"])], [""]
    for name, found in stage_maps(model, image).items():
        maps = found[0].float().cpu().numpy()  # (C, h, w)
        chosen = np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:8]
        rows.append((list(maps[chosen]), [f"channel {k}" for k in chosen]))
        names.append(f"{figures.shorten(name, 14)}\n{maps.shape[1]} x {maps.shape[2]} px")
    title = f"Feature maps from the image to the head: {title}"
    note = "the channels that vary most, each scaled on its own"
    return figures.strips(rows, title=f"{title}\n{note}", side=1.35, names=names)


def stride_padding(weight: Tensor, image: Tensor) -> Figure:
    """Draw the response of the strongest kernel at several strides and paddings, with its size."""
    (k,) = strongest(weight, 1)
    rows, side, size = [], weight.shape[-1], image.shape[-1]
    for stride in STRIDES:
        maps, captions = [], []
        for padding in PADDINGS:
            (found,) = responses(weight[[k]], image, stride=stride, padding=padding)
            maps.append(found)
            captions.append(f"padding {padding}: {found.shape[0]} x {found.shape[1]} px")
        rows.append((maps, captions))
    title = (
        f"Filter {k} ({side} x {side}) on an image of {size} x {size} px\n"
        f"side = floor(({size} + 2 padding - {side}) / stride) + 1; blue is low, yellow is high"
    )
    return figures.strips(rows, title=title, side=2.1, names=[f"stride {stride}" for stride in STRIDES])
