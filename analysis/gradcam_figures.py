"""Grad-CAM maps of a network and their picture (https://arxiv.org/abs/1610.02391)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from analysis import figures
from analysis.feature_maps import as_map, last_map, module_named, recorded
from analysis.predictions import Classifier
from base.errors import UsageError

BATCH = 32  # images explained at a time: their activations must fit into the memory
COLUMNS = 8


def draw(
    classifier: Classifier, pixels: np.ndarray, labels: np.ndarray | None, layer_name: str = ""
) -> Figure:
    """Draw images with the evidence for their predictions and, if one is wrong, the evidence for the truth.

    pixels: (n, S, S, 3) uint8. labels: (n,) if known. layer_name: by default the last with a spatial map
    """
    model, images = classifier.model, classifier.batch(pixels)
    layer_name = layer_name or last_map(model, images[:1])
    layer = module_named(model, layer_name)
    with torch.no_grad(), recorded({"layer": layer}) as outputs:
        model(images[:1])
    # Of both views, if training scored mirror images as well; the maps are of the image as it is.
    confidence, predicted = in_batches(classifier.logits, images).softmax(1).max(1)
    names = [figures.shorten(name) for name in classifier.names]
    sure = zip(predicted.tolist(), confidence.tolist(), strict=True)
    captions = [f"prediction: {names[k]}\n{100 * p:.0f} % sure" for k, p in sure]
    explain = partial(grad_cam, model, layer)
    rows = [(overlay(pixels, in_batches(explain, images, predicted)), captions)]
    above = [""] * len(pixels)
    if labels is not None:
        above = [f"truth: {names[k]}" for k in labels]
        truth = torch.as_tensor(labels, device=images.device)
        if (truth != predicted).any():
            captions = [f"truth: {names[k]}" for k in labels]
            rows.append((overlay(pixels, in_batches(explain, images, truth)), captions))
    height, width = as_map(outputs["layer"]).shape[2:]
    title = (
        f"Grad-CAM of {layer_name} ({height} x {width} map): {classifier.title}\n"
        "bright: evidence for the class below, relative to the strongest in the image"
    )
    strips = [
        (row[start : start + COLUMNS], texts[start : start + COLUMNS])
        for start in range(0, len(pixels), COLUMNS)
        for row, texts in [(pixels, above), *rows]
    ]
    return figures.strips(strips, title=title)


def in_batches(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    parts = zip(*(tensor.split(BATCH) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return heat maps of the evidence for `classes`, (n, H, W) in [0, 1]; all zero if there is none.

    model:   maps (n, 3, H, W) to logits (n, K), in eval mode
    layer:   one of its modules
    images:  (n, 3, H, W)
    classes: (n,) the class to explain in each image
    Raises UsageError if the layer's output is no spatial map, or if the logits do not depend on it.
    """
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


def overlay(pixels: np.ndarray, maps: Tensor) -> np.ndarray:
    """Return images (n, H, W, 3) uint8 in grey with their heat maps (n, H, W) in colour over them."""
    maps = maps.cpu().numpy()
    heat = 255 * matplotlib.colormaps["inferno"](maps)[..., :3]
    share = 0.25 + 0.5 * maps[..., None]
    return ((1 - share) * (pixels @ figures.GREY)[..., None] + share * heat).round().astype(np.uint8)
