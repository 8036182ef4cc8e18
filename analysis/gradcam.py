"""Grad-CAM: where in an image the evidence for a class is (https://arxiv.org/abs/1610.02391)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from analysis import arguments
from base import flags
from base.errors import DataError, UsageError, run

EPILOG = """examples:
  python -m analysis.gradcam checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.gradcam CHECKPOINT --misclassified    the most confident mistakes: prediction and truth
  python -m analysis.gradcam CHECKPOINT --files cat.jpg,dog.jpg --layer layer3"""


def build_parser() -> flags.Parser:
    description = "Show where a model sees the evidence for a class."
    parser = arguments.checkpoint_parser("gradcam", description, EPILOG)
    few = flags.number(int, 1, arguments.MOST_PICTURES)
    add, images = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--count", type=few, default=8, metavar="N", help="Number of validation images.")
    images("--misclassified", action="store_true", help="Explain the most confident mistakes.")
    ids = flags.listing(flags.natural)
    numbers = "Explain the validation images with these numbers, from 0."
    images("--ids", type=ids, default=(), metavar="N,...", help=numbers)
    images("--files", type=file_names, default=(), metavar="FILE,...", help="Explain these image files.")
    add("--layer", default="", metavar="NAME", help="Module; by default the last one with a spatial map.")
    size = "Image size; by default the checkpoint's."
    add("--image-size", type=flags.positive, default=None, metavar="PX", help=size)
    return parser


def file_names(text: str) -> tuple[str, ...]:
    """Return the names in a list; a name of a file may itself have commas."""
    return (text,) if os.path.isfile(text) else flags.listing(str)(text)


def main(argv: list[str] | None = None) -> int:
    config, given = arguments.parse(build_parser(), argv)
    if "count" in given and (config.ids or config.files):
        raise UsageError("--count has no effect with --ids and --files", "leave --count out")
    if (asked := len(config.ids or config.files)) > arguments.MOST_PICTURES:
        what = f"{asked} images do not fit into a picture"
        raise UsageError(what, f"name {arguments.MOST_PICTURES} at most")
    from analysis import gradcam_figures
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, given, needs_data=not config.files)
    if config.image_size:
        classifier = classifier.at_size(config.image_size)
    pixels, labels = choose_images(classifier, config)
    name = "gradcam_misclassified.png" if config.misclassified else "gradcam.png"
    arguments.save(config, {name: gradcam_figures.draw(classifier, pixels, labels, config.layer)})
    return 0


def choose_images(classifier, config):
    """Return the images to explain, (n, S, S, 3) uint8, and their labels, (n,), or None for files."""
    if config.files:
        return classifier.pixels([read_file(name) for name in config.files], config.files), None
    if config.misclassified:
        chosen = classifier.predict_val().most_confident_errors()[: config.count]
        if not len(chosen):
            raise DataError("no validation image is misclassified", "leave --misclassified out")
    elif config.ids:
        chosen = classifier.check_ids(config.ids, "--ids")
    else:
        chosen = classifier.spread_ids(config.count)
    return classifier.val_pixels(chosen), classifier.index.val.labels[chosen]


def read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"--files {name}: {error.strerror}", "name image files") from None


if __name__ == "__main__":
    sys.exit(run(main))
