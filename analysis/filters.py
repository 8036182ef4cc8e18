"""The filters a network has learned: its first kernels, what they do to an image, a map of every stage.

Also what stride and padding make of a filter's output. Where evidence for a class lies is Grad-CAM's.
"""

from __future__ import annotations

import sys

from analysis.arguments import add_checkpoint_args, out_dir, parse
from base import flags
from base.errors import UsageError, run

EPILOG = """examples:
  python -m analysis.filters checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.filters CHECKPOINT --id 137
writes kernels.png, filtered.png, feature_maps.png and stride_padding.png"""
STRIDES, PADDINGS = (1, 2, 3), (0, 1, 2)


def build_parser() -> flags.Parser:
    parser = flags.build_parser(
        "-m analysis.filters", "Show what a network's filters look like and do.", EPILOG
    )
    parser.add_argument("--id", type=flags.natural, default=0, metavar="N", help="validation image to filter")
    add_checkpoint_args(parser)
    flags.add_dataset_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = parse(build_parser(), argv)
    from analysis import figures
    from analysis.predictions import check_ids, load_with_data

    classifier = load_with_data(config, typed)
    check_ids([config.id], len(classifier.index.val), "--id")
    pixels = classifier.val_pixels([config.id])
    pictures = {
        "kernels.png": kernels(classifier),
        "filtered.png": filtered(classifier, pixels),
        "feature_maps.png": feature_maps(classifier, pixels),
        "stride_padding.png": stride_padding(classifier, pixels),
    }
    for name, made in pictures.items():
        print(figures.save(made, out_dir(config) / name))
    return 0


def first_conv(model):
    """The convolution that sees the image. Raises UsageError where there is none."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module
    raise UsageError("this network has no convolution on the image", "use another architecture")


def strongest(weight, count: int):
    """Indices of the `count` kernels with the largest norm: weight (C, 3, k, k)."""
    return weight.flatten(1).norm(dim=1).argsort(descending=True)[:count].tolist()


def as_picture(kernel):
    """(3, k, k) -> (k, k, 3) uint8, zero as mid-grey, scaled to its own largest weight."""
    kernel = kernel.detach().cpu()
    scaled = 0.5 + 0.5 * kernel / kernel.abs().max().clamp_min(1e-12)
    return (255 * scaled).round().byte().permute(1, 2, 0).numpy()


def kernels(classifier):
    """The first convolution's kernels as colour pictures, the strongest first."""
    from analysis import figures

    weight = first_conv(classifier.model).weight
    chosen = strongest(weight, 64)
    captions = [f"{weight[k].norm().item():.2f}" for k in chosen]
    title = (
        f"First-layer kernels of {classifier.title}\n{len(chosen)} strongest of {len(weight)}, {weight.shape[2]} x "
        f"{weight.shape[3]} px, norm below; grey is 0, each scaled to its own range"
    )
    return figures.gallery(
        [as_picture(weight[k]) for k in chosen], captions, title=title, columns=16, side=0.75
    )


def filtered(classifier, pixels):
    """The strongest kernels beside what they make of the image, at stride 1."""
    from torch.nn import functional as F

    from analysis import figures

    conv, image = first_conv(classifier.model), classifier.batch(pixels)
    chosen = strongest(conv.weight, 7)
    answers = F.conv2d(image, conv.weight[chosen], padding="same").detach().cpu().numpy()[0]
    above = [pixels[0], *(as_picture(conv.weight[k]) for k in chosen)]
    below = [pixels[0] @ [0.299, 0.587, 0.114], *answers]
    captions = ["brightness", *(f"{a.min():.1f} to {a.max():.1f}" for a in answers)]
    title = f"Learned filters and their answer to an image (stride 1): {classifier.title}\nrange below; blue low, yellow high"
    return figures.strips(
        [(above, ["image", *(f"filter {k}" for k in chosen)]), (below, captions)], title=title
    )


def feature_maps(classifier, pixels):
    """The most varied channels of the last map at every resolution."""
    import numpy as np

    from analysis import figures
    from analysis.feature_maps import stage_maps

    rows, names = [], []
    for name, found in stage_maps(classifier.model, classifier.batch(pixels)).items():
        maps = found[0].float().cpu().numpy()  # (C, h, w)
        chosen = np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:8]
        rows.append((list(maps[chosen]), [f"channel {k}" for k in chosen]))
        names.append(f"{figures.shorten(name, 14)}\n{maps.shape[1]} x {maps.shape[2]} px")
    rows.insert(0, ([pixels[0]], ["image"]))
    title = f"Feature maps from the image to the head: {classifier.title}\nthe channels that vary most; each in its own range"
    return figures.strips(rows, title=title, side=1.35, names=["", *names])


def stride_padding(classifier, pixels):
    """One learned filter at strides 1, 2, 3 and paddings 0, 1, 2: the answers and their sizes."""
    from torch.nn import functional as F

    from analysis import figures

    conv, image = first_conv(classifier.model), classifier.batch(pixels)
    (k,) = strongest(conv.weight, 1)
    side, size = conv.weight.shape[-1], pixels.shape[1]
    rows = []
    for stride in STRIDES:
        answers = [
            F.conv2d(image, conv.weight[[k]], stride=stride, padding=padding)[0, 0].detach().cpu().numpy()
            for padding in PADDINGS
        ]
        rows.append(
            (
                answers,
                [
                    f"padding {p}: {a.shape[0]} x {a.shape[1]} px"
                    for p, a in zip(PADDINGS, answers, strict=True)
                ],
            )
        )
    title = (
        f"Filter {k} ({side} x {side}) on an image of {size} x {size} px, at three strides and paddings\n"
        f"side = floor(({size} + 2 padding - {side}) / stride) + 1; blue low, yellow high"
    )
    return figures.strips(rows, title=title, side=2.1, names=[f"stride {stride}" for stride in STRIDES])


if __name__ == "__main__":
    sys.exit(run(main))
