"""Grad-CAM: where in an image the evidence for a class is (https://arxiv.org/abs/1610.02391)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from analysis.arguments import add_checkpoint_args, out_dir, parse
from base import flags
from base.errors import DataError, UsageError, run

EPILOG = """examples:
  python -m analysis.gradcam checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.gradcam CHECKPOINT --misclassified         the surest mistakes: evidence for guess and truth
  python -m analysis.gradcam CHECKPOINT --files cat.jpg,dog.jpg --layer layer3"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser(
        "-m analysis.gradcam", "Show where a model sees the evidence for a class.", EPILOG
    )
    add = parser.add_argument
    add("--count", type=flags.positive, default=8, metavar="N", help="images, spread over the validation set")
    add("--misclassified", action="store_true", help="take the surest mistakes of the validation set")
    add(
        "--ids",
        type=flags.listing(flags.natural),
        default=(),
        metavar="N,N,...",
        help="these validation images",
    )
    add(
        "--files",
        type=flags.listing(str),
        default=(),
        metavar="FILE,...",
        help="these files, in place of a dataset",
    )
    add("--layer", default="", metavar="NAME", help="module to look at; empty: the last with a spatial map")
    add("--image-size", type=flags.positive, default=None, metavar="PX", help="default: the checkpoint's")
    add_checkpoint_args(parser)
    flags.add_dataset_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = parse(build_parser(), argv)
    ways = [name for name in ("misclassified", "ids", "files") if getattr(config, name)]
    if len(ways) > 1:
        raise UsageError(f"--{ways[0]} and --{ways[1]} choose the images both", "leave one of the two out")
    if "count" in typed and (config.ids or config.files):
        raise UsageError(f"--count would do nothing: --{ways[0]} names the images", "leave --count out")
    from analysis import figures
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, typed, needs_data=not config.files)
    if config.image_size:
        classifier = replace(classifier, image_size=config.image_size)
    pixels, labels = choose(classifier, config.misclassified, config.ids, config.files, config.count)
    name = "gradcam_misclassified.png" if config.misclassified else "gradcam.png"
    print(figures.save(picture(classifier, pixels, labels, config.layer), out_dir(config) / name))
    return 0


def choose(classifier, misclassified: bool, ids: tuple[int, ...], files: tuple[str, ...], count: int):
    """The images to explain, (n, S, S, 3) uint8, and their labels, (n,), or None for files."""
    from analysis.predictions import check_ids, spread_ids

    if files:
        return classifier.pixels([read_file(name) for name in files], files), None
    split = classifier.index.val
    if misclassified:
        wrong = classifier.predict_val().most_confident_errors()[:count]
        if not len(wrong):
            raise DataError("no validation image is misclassified", "leave --misclassified out")
        chosen = wrong
    else:
        chosen = check_ids(ids, len(split), "--ids") if ids else spread_ids(len(split), count)
    return classifier.val_pixels(chosen), split.labels[chosen]


def read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"--files {name}: {error.strerror}", "name image files") from None


def grad_cam(model, layer, images, classes):
    """Heat maps of the evidence for `classes`, (N, H, W) in [0, 1]; an all-zero map stays zero.

    model:   maps (N, 3, H, W) to logits (N, K), in eval mode
    layer:   one of its modules
    images:  (N, 3, H, W)
    classes: (N,) the class to explain in each image
    Raises UsageError where the layer's output is no spatial map, or the logits do not depend on it.
    """
    import torch
    from torch.nn import functional as F

    from analysis.feature_maps import Recorder, as_map

    with torch.enable_grad(), Recorder({"layer": layer}) as outputs:
        score = model(images).gather(1, classes[:, None]).sum()
        features = as_map(outputs.get("layer"))
        # autograd.grad leaves the parameters' .grad alone
        grads = (
            None if features is None else torch.autograd.grad(score, outputs["layer"], allow_unused=True)[0]
        )
    if grads is None:
        raise UsageError("this layer has no spatial map that the logits depend on", "leave --layer out")
    weights = as_map(grads).mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
    cam = F.relu((weights * features.detach()).sum(dim=1, keepdim=True)).float()  # (N, 1, h, w)
    cam = F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax(dim=(1, 2), keepdim=True)
    return cam / peak.clamp_min(1e-12)


def picture(classifier, pixels, labels, layer_name: str):
    """The images (n, S, S, 3) uint8, the evidence for the guesses and, where some are wrong, for the truth."""
    import torch

    from analysis import figures
    from analysis.feature_maps import last_map, module_named

    images = classifier.batch(pixels)
    layer_name = layer_name or last_map(classifier.model, images[:1])
    layer = module_named(classifier.model, layer_name)
    with torch.no_grad():
        confidence, guess = classifier.model(images).float().softmax(1).max(1)
    names = [figures.shorten(name) for name in classifier.names]
    guessed = [
        f"guess: {names[k]}\n{100 * p:.0f} % sure"
        for k, p in zip(guess.tolist(), confidence.tolist(), strict=True)
    ]
    rows = [(overlay(pixels, grad_cam(classifier.model, layer, images, guess).cpu().numpy()), guessed)]
    above = [""] * len(pixels)
    if labels is not None:
        above = [f"truth: {names[k]}" for k in labels.tolist()]
        truth = torch.as_tensor(labels, device=images.device)
        if (truth != guess).any():
            maps = grad_cam(classifier.model, layer, images, truth).cpu().numpy()
            rows.append((overlay(pixels, maps), [f"for: {names[k]}" for k in labels.tolist()]))
    title = f"Grad-CAM of {layer_name}: {classifier.title}\nbright: evidence for the class below, relative to the image's peak"
    return figures.strips([(pixels, above), *rows], title=title)


def overlay(pixels, maps):
    """The images in grey, their heat maps (n, H, W) in colour over them: (n, H, W, 3) uint8."""
    import matplotlib
    import numpy as np

    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    heat = 255 * matplotlib.colormaps["inferno"](maps)[..., :3]
    share = 0.25 + 0.5 * maps[..., None]
    return ((1 - share) * grey + share * heat).round().astype(np.uint8)


if __name__ == "__main__":
    sys.exit(run(main))
