"""Grad-CAM: where in an image the evidence for a class is (https://arxiv.org/abs/1610.02391)."""

from __future__ import annotations

import sys
from dataclasses import replace
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
    add, images = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--count", type=flags.positive, default=8, metavar="N", help="Number of validation images.")
    images("--misclassified", action="store_true", help="Explain the most confident mistakes.")
    ids, names = flags.listing(flags.natural), flags.listing(str)
    images("--ids", type=ids, default=(), metavar="N,...", help="Explain these validation images.")
    images("--files", type=names, default=(), metavar="FILE,...", help="Explain these image files.")
    add(
        "--layer", default="", metavar="NAME", help="Module to look at. Default: the last with a spatial map."
    )
    size = "Image size. Default: the checkpoint's."
    add("--image-size", type=flags.positive, default=None, metavar="PX", help=size)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = arguments.parse(build_parser(), argv)
    if "count" in typed and (config.ids or config.files):
        raise UsageError("--count has no effect with --ids and --files", "leave --count out")
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, typed, needs_data=not config.files)
    if config.image_size:
        classifier = replace(classifier, image_size=config.image_size)
    pixels, labels = choose_images(classifier, config)
    name = "gradcam_misclassified.png" if config.misclassified else "gradcam.png"
    arguments.save(config, {name: picture(classifier, pixels, labels, config.layer)})
    return 0


def choose_images(classifier, config):
    """Return the images to explain, (n, S, S, 3) uint8, and their labels, (n,), or None for files."""
    from analysis.predictions import check_ids, spread_ids

    if config.files:
        return classifier.pixels([read_file(name) for name in config.files], config.files), None
    split = classifier.index.val
    if config.misclassified:
        chosen = classifier.predict_val().most_confident_errors()[: config.count]
        if not len(chosen):
            raise DataError("no validation image is misclassified", "leave --misclassified out")
    elif config.ids:
        chosen = check_ids(config.ids, len(split), "--ids")
    else:
        chosen = spread_ids(len(split), config.count)
    return classifier.val_pixels(chosen), split.labels[chosen]


def read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"--files {name}: {error.strerror}", "name image files") from None


def picture(classifier, pixels, labels, layer_name: str):
    """Draw images with the evidence for their predictions and, if one is wrong, the evidence for the truth.

    pixels: (n, S, S, 3) uint8, labels: (n,) or None, layer_name: '' for the last module with a spatial map
    """
    import torch

    from analysis import figures
    from analysis.feature_maps import as_map, last_map, module_named, recorded

    model, images = classifier.model, classifier.batch(pixels)
    layer_name = layer_name or last_map(model, images[:1])
    layer = module_named(model, layer_name)
    with torch.no_grad(), recorded({"layer": layer}) as outputs:
        confidence, predicted = model(images).float().softmax(1).max(1)
    names = [figures.shorten(name) for name in classifier.names]
    sure = zip(predicted.tolist(), confidence.tolist(), strict=True)
    captions = [f"prediction: {names[k]}\n{100 * p:.0f} % sure" for k, p in sure]
    rows = [(overlay(pixels, grad_cam(model, layer, images, predicted)), captions)]
    above = [""] * len(pixels)
    if labels is not None:
        above = [f"truth: {names[k]}" for k in labels]
        truth = torch.as_tensor(labels, device=images.device)
        if (truth != predicted).any():
            captions = [f"for the truth: {names[k]}" for k in labels]
            rows.append((overlay(pixels, grad_cam(model, layer, images, truth)), captions))
    height, width = as_map(outputs["layer"]).shape[2:]
    title = (
        f"Grad-CAM of {layer_name} ({height} x {width} map): {classifier.title}\n"
        "bright: evidence for the class below, relative to the strongest in the image"
    )
    return figures.strips([(pixels, above), *rows], title=title)


def grad_cam(model, layer, images, classes):
    """Return heat maps of the evidence for `classes`, (n, H, W) in [0, 1]; all zero if there is none.

    model:   maps (n, 3, H, W) to logits (n, K), in eval mode
    layer:   one of its modules
    images:  (n, 3, H, W)
    classes: (n,) the class to explain in each image
    Raises UsageError if the layer's output is no spatial map, or if the logits do not depend on it.
    """
    import torch
    from torch.nn import functional as F

    from analysis.feature_maps import as_map, recorded

    grads = None
    with torch.enable_grad(), recorded({"layer": layer}) as outputs:
        score = model(images).gather(1, classes[:, None]).sum()
        features = as_map(outputs.get("layer"))
        if features is not None:  # autograd.grad leaves the parameters' .grad alone
            (grads,) = torch.autograd.grad(score, outputs["layer"], allow_unused=True)
    if grads is None:
        raise UsageError("this layer has no spatial map that the logits depend on", "leave --layer out")
    weights = as_map(grads).mean(dim=(2, 3), keepdim=True)  # (n, C, 1, 1)
    cam = F.relu((weights * features.detach()).sum(dim=1, keepdim=True)).float()  # (n, 1, h, w)
    cam = F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def overlay(pixels, maps):
    """Return images (n, H, W, 3) uint8 in grey with their heat maps (n, H, W) in colour over them."""
    import matplotlib
    import numpy as np

    from analysis.figures import GREY

    maps = maps.cpu().numpy()
    heat = 255 * matplotlib.colormaps["inferno"](maps)[..., :3]
    share = 0.25 + 0.5 * maps[..., None]
    return ((1 - share) * (pixels @ GREY)[..., None] + share * heat).round().astype(np.uint8)


if __name__ == "__main__":
    sys.exit(run(main))
