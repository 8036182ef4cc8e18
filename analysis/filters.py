"""The filters that a network has learned: its first kernels, their responses to an image, later feature maps.

Also what stride and padding do to the size of a response.
"""

from __future__ import annotations

import sys

from analysis import arguments
from base import flags
from base.errors import UsageError, run

EPILOG = """examples:
  python -m analysis.filters checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.filters CHECKPOINT --id 137
Writes kernels.png, filtered.png, feature_maps.png and stride_padding.png."""
STRIDES, PADDINGS = (1, 2, 3), (0, 1, 2)


def build_parser() -> flags.Parser:
    description = "Show what a network's filters look like and what they do."
    parser = arguments.checkpoint_parser("filters", description, EPILOG)
    parser.add_argument(
        "--id", type=flags.natural, default=0, metavar="N", help="Validation image to filter."
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = arguments.parse(build_parser(), argv)
    from analysis.predictions import check_ids, load_with_data

    classifier = load_with_data(config, typed)
    check_ids([config.id], len(classifier.index.val), "--id")
    pixels = classifier.val_pixels([config.id])
    image, title = classifier.batch(pixels), classifier.title
    weight = first_conv(classifier.model).weight.detach()
    pictures = {
        "kernels.png": kernels(weight, title),
        "filtered.png": filtered(weight, image, pixels[0], title),
        "feature_maps.png": feature_maps(classifier.model, image, pixels[0], title),
        "stride_padding.png": stride_padding(weight, image),
    }
    arguments.save(config, pictures)
    return 0


def first_conv(model):
    """Return the convolution that sees the image. Raises UsageError if there is none."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module
    raise UsageError("this network has no convolution on the image", "use another architecture")


def strongest(weight, count: int) -> list[int]:
    """Return the indices of the `count` kernels of weight (C, 3, k, k) with the largest norm."""
    return weight.flatten(1).norm(dim=1).argsort(descending=True)[:count].tolist()


def kernels(weight, title: str):
    """Draw the 64 strongest kernels of weight (C, 3, k, k), in colour."""
    from analysis import figures

    chosen = weight[strongest(weight, 64)]
    captions = [f"{kernel.norm().item():.2f}" for kernel in chosen]
    side = f"{weight.shape[2]} x {weight.shape[3]} px"
    note = f"{len(chosen)} strongest of {len(weight)}, {side}, norm below; grey is 0, each in its own range"
    images = [as_picture(kernel) for kernel in chosen]
    title = f"First-layer kernels of {title}\n{note}"
    return figures.gallery(images, captions, title=title, columns=16, side=0.75)


def as_picture(kernel):
    """(3, k, k) -> (k, k, 3) uint8; zero is mid-grey, the largest weight black or white."""
    scaled = 0.5 + 0.5 * kernel / kernel.abs().max().clamp_min(1e-12)
    return (255 * scaled).round().byte().permute(1, 2, 0).cpu().numpy()


def responses(weight, image, **options):
    """Return what kernels (n, 3, k, k) make of an image (1, 3, H, W): an array (n, h, w)."""
    from torch.nn import functional as F

    return F.conv2d(image, weight, **options)[0].cpu().numpy()


def filtered(weight, image, pixels, title: str):
    """Draw the seven strongest kernels above their responses to the image, pixels (S, S, 3)."""
    from analysis import figures

    chosen = strongest(weight, 7)
    maps = responses(weight[chosen], image, padding="same")
    above = [pixels, *map(as_picture, weight[chosen])], ["image", *(f"filter {k}" for k in chosen)]
    ranges = [f"{found.min():.1f} to {found.max():.1f}" for found in maps]
    below = [pixels @ figures.GREY, *maps], ["brightness", *ranges]
    title = f"Learned filters and their responses to an image (stride 1): {title}"
    return figures.strips([above, below], title=f"{title}\nrange below; blue is low, yellow is high")


def feature_maps(model, image, pixels, title: str):
    """Draw the eight channels that vary most in the last map of every resolution."""
    import numpy as np

    from analysis import figures
    from analysis.feature_maps import stage_maps

    rows, names = [([pixels], ["image"])], [""]
    for name, found in stage_maps(model, image).items():
        maps = found[0].float().cpu().numpy()  # (C, h, w)
        chosen = np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:8]
        rows.append((list(maps[chosen]), [f"channel {k}" for k in chosen]))
        names.append(f"{figures.shorten(name, 14)}\n{maps.shape[1]} x {maps.shape[2]} px")
    title = (
        f"Feature maps from the image to the head: {title}\nthe channels that vary most, each in its range"
    )
    return figures.strips(rows, title=title, side=1.35, names=names)


def stride_padding(weight, image):
    """Draw the response of the strongest kernel at several strides and paddings, with its size."""
    from analysis import figures

    (k,) = strongest(weight, 1)
    rows, side, size = [], weight.shape[-1], image.shape[-1]
    for stride in STRIDES:
        maps = [responses(weight[[k]], image, stride=stride, padding=padding)[0] for padding in PADDINGS]
        sizes = [f"{found.shape[0]} x {found.shape[1]} px" for found in maps]
        captions = [f"padding {padding}: {found}" for padding, found in zip(PADDINGS, sizes, strict=True)]
        rows.append((maps, captions))
    title = (
        f"Filter {k} ({side} x {side}) on an image of {size} x {size} px\n"
        f"side = floor(({size} + 2 padding - {side}) / stride) + 1; blue is low, yellow is high"
    )
    return figures.strips(rows, title=title, side=2.1, names=[f"stride {stride}" for stride in STRIDES])


if __name__ == "__main__":
    sys.exit(run(main))
