"""The augmentations: operations on (H, W, 3) uint8 images, separate from the random numbers they use.

For equal parameters, affine, jitter and dropout equal those of Albumentations 2.0.8, as the tests show. They
call OpenCV directly, because through Albumentations they take 160 us, more than decoding a packed image.
RandAugment and TrivialAugment are in policies.py, Albumentations' own pipelines in pipelines.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from sources import pipelines, policies
from sources.randomness import Draw, KeyedRandom, Operation

Box = tuple[int, int, int, int]  # top, left, height, width in px

P = 0.5  # probability of each of flip, affine, jitter and dropout
SHIFT, SCALE, ANGLE = 0.0625, (0.9, 1.1), 15.0  # affine: share of the side, factor per axis, degrees
HOLE = 0.25  # dropout: the hole's side as a share of the image's
# Brightness, contrast, saturation, hue. No hue by default, as in timm: it costs as much as the other three.
JITTER = (0.2, 0.2, 0.2, 0.0)


def build(name: str, argument: Any, fill: Sequence[int], randomness: KeyedRandom) -> Operation:
    """Return the operation called `name`: (image, draw) -> image of the same shape; its input is not changed.

    `fill` (3 values in 0 ... 255) is the colour of what an operation leaves empty.
    """
    if name == "randaugment" and argument:
        return lambda image, draw: policies.rand_augment(image, *argument, fill, draw)
    if name in ("randaugment", "trivialaugment"):
        return policies.of_torchvision(name, fill)
    if name == "pipeline":
        return pipelines.operation(argument, randomness)
    if name == "cutout":
        return lambda image, draw: cutout(image, argument, fill, draw)
    operation = {
        "flip": lambda image, draw: cv2.flip(image, 1),
        "affine": lambda image, draw: affine(image, *draw_affine(draw), fill),
        "jitter": _jitter_of(argument),
        "dropout": lambda image, draw: dropout(image, fill, draw),
    }[name]
    return lambda image, draw: operation(image, draw) if draw() < P else image


# --- crops ---------------------------------------------------------------------------------------


def random_resized_box(height: int, width: int, draw: Draw, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) -> Box:
    """Draw a box: its share of the area uniform in `scale`, log(width / height) uniform in log(`ratio`).

    After ten boxes that do not fit, return the central box nearest to the image's shape, as torchvision does.
    (Szegedy et al., arXiv:1409.4842.)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        aspect = math.exp(low + (high - low) * draw())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_and_resize(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Cut `box` from `image` (H, W, 3) and resize it to (size, size, 3), bilinear.

    A box of twice the size or more is first averaged over whole blocks of pixels, which prevents aliasing.
    cv2.INTER_AREA with a non-integer factor would do it in one step at five times the cost.
    """
    top, left, h, w = box
    down, across = max(1, h // size), max(1, w // size)
    if down > 1 or across > 1:
        h, w = h // down, w // across
        part = image[top : top + h * down, left : left + w * across]
        part = cv2.resize(part, (w, h), interpolation=cv2.INTER_AREA)
    else:
        part = image[top : top + h, left : left + w]
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)


def padded_crop(image: np.ndarray, pad: int, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """Pad `image` with `pad` px of `fill`; cut a random box of its size. (He et al., arXiv:1512.03385)"""
    h, w = image.shape[:2]
    top, left = int(draw() * (2 * pad + 1)), int(draw() * (2 * pad + 1))
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=tuple(fill))
    return padded[top : top + h, left : left + w]


# --- geometry, colour, holes ---------------------------------------------------------------------


def draw_affine(draw: Draw) -> tuple[list[float], list[float], float]:
    """Draw the shift (x, y) as a share of the side, the scale (x, y), and the angle in degrees."""
    shift = [SHIFT * (2 * draw() - 1) for _ in range(2)]
    scale = [SCALE[0] + (SCALE[1] - SCALE[0]) * draw() for _ in range(2)]
    return shift, scale, ANGLE * (2 * draw() - 1)


def affine(
    image: np.ndarray, shift: Sequence[float], scale: Sequence[float], angle: float, fill: Sequence[int]
) -> np.ndarray:
    """Scale, rotate and shift (by whole pixels) about the centre, bilinear, with `fill` outside."""
    h, w = image.shape[:2]
    x, y = w / 2 - 0.5, h / 2 - 0.5
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    a, b, c, d = cos * scale[0], sin * scale[1], -sin * scale[0], cos * scale[1]
    to_x, to_y = x - a * x - b * y + int(shift[0] * w), y - c * x - d * y + int(shift[1] * h)
    matrix = np.array([[a, b, to_x], [c, d, to_y]])
    return cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR, borderValue=tuple(fill))


def _jitter_of(percent: int | None) -> Operation:
    """Return the operation. `jitter:10` is the documents' CIFAR recipe: hue 0.02, the other strengths 0.1."""
    *strengths, hue = JITTER if percent is None else (*[percent / 100] * 3, percent / 500)

    def apply(image: np.ndarray, draw: Draw) -> np.ndarray:
        amounts = [1 + strength * (2 * draw() - 1) for strength in strengths]
        amounts.append(hue * (2 * draw() - 1))
        return jitter(image, amounts, _ORDERS[int(draw() * len(_ORDERS))])

    return apply


def jitter(image: np.ndarray, amounts: Sequence[float], order: Sequence[int] = (0, 1, 2, 3)) -> np.ndarray:
    """Change brightness, contrast and saturation by factors and the hue by a share of the circle, in `order`.

    `amounts` are these four numbers; (1, 1, 1, 0) changes nothing.
    """
    for i in order:
        image = _CHANGES[i](image, amounts[i])
    return image


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=factor)


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor))


def _saturation(image: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def _hue(image: np.ndarray, shift: float) -> np.ndarray:
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turn = math.floor(180 * shift) % 180
    table = _WHEEL[turn : turn + 256]
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), table), hsv, 0)  # six times as fast as indexing
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


_CHANGES = (_brightness, _contrast, _saturation, _hue)
_ORDERS = tuple(itertools.permutations(range(4)))
_WHEEL = (np.arange(180 + 256) % 180).astype(np.uint8)  # OpenCV's hue is in half degrees: 0 ... 179


def dropout(image: np.ndarray, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """Fill one hole of a quarter of the side, wholly inside the image. (Coarse dropout, arXiv:1708.04896.)"""
    h, w = image.shape[:2]
    height, width = max(1, round(HOLE * h)), max(1, round(HOLE * w))
    return _fill(image, int(draw() * (h - height + 1)), int(draw() * (w - width + 1)), height, width, fill)


def cutout(image: np.ndarray, side: int, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """Fill a hole of `side` px around any point of the image, clipped at the border. (arXiv:1708.04552)"""
    h, w = image.shape[:2]
    top, left = int(draw() * h) - side // 2, int(draw() * w) - side // 2
    bottom, right = min(top + side, h), min(left + side, w)
    top, left = max(top, 0), max(left, 0)
    return _fill(image, top, left, bottom - top, right - left, fill)


def _fill(image: np.ndarray, top: int, left: int, height: int, width: int, fill: Sequence[int]) -> np.ndarray:
    image = image.copy()
    image[top : top + height, left : left + width] = fill
    return image
