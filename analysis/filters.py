"""Show a network's filters: first-layer kernels, their responses to an image, and later feature maps.

Also shows what stride and padding do to the size of a response.
"""

from __future__ import annotations

import sys

from analysis import arguments
from base import flags
from base.errors import run

EPILOG = """examples:
  python -m analysis.filters checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.filters CHECKPOINT --id 137
Writes kernels.png, filtered.png, feature_maps.png and stride_padding.png."""


def build_parser() -> flags.Parser:
    description = "Show what a network's filters look like and what they do."
    parser = arguments.checkpoint_parser("filters", description, EPILOG)
    number = "Number of the validation image to filter."
    parser.add_argument("--id", type=flags.natural, default=0, metavar="N", help=number)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = arguments.parse(build_parser(), argv)
    from analysis import filter_figures
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, given)
    pixels = classifier.val_pixels(classifier.check_ids([config.id], "--id"))
    images = classifier.batch(pixels)
    arguments.save(config, filter_figures.draw(classifier.model, images, pixels[0], classifier.title))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
