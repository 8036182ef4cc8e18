"""RandAugment and TrivialAugment, with Pillow's operations, as timm and torchvision have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sources.randomness import Draw, Operation

# --- RandAugment as in timm ----------------------------------------------------------------------


def rand_augment(
    image: np.ndarray, magnitude: float, deviation: float, fill: Sequence[int], draw: Draw
) -> np.ndarray:
    """Apply two of `TIMM_CHANGES`, each with probability 0.5: for instance timm's rand-m6-mstd0.5-inc1.

    magnitude: mean of the strengths in tenths, from 0 to 10; they are normally distributed with `deviation`
    """
    picture = Image.fromarray(image)
    for _ in range(2):
        change = TIMM_CHANGES[int(draw() * len(TIMM_CHANGES))]
        if draw() < 0.5:
            normal = math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())
            strength = min(max(magnitude + deviation * normal, 0), 10) / 10
            sign = 1 if draw() < 0.5 else -1
            resample = Image.Resampling.BILINEAR if draw() < 0.5 else Image.Resampling.BICUBIC
            picture = change(
                picture, strength, sign * strength, {"resample": resample, "fillcolor": tuple(fill)}
            )
    return np.asarray(picture)


def _warp(coefficients: Callable[[float, int, int], tuple]) -> Callable:
    """Return a change that moves pixels: `coefficients` of (signed strength, width, height), for Pillow."""
    return lambda picture, _, signed, how: picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients(signed, *picture.size), **how
    )


def _enhance(kind: type, factor: float = 0.9, least: float = 0.1) -> Callable:
    return lambda picture, _, signed, how: kind(picture).enhance(max(least, 1 + factor * signed))


def _moves(angle: float, slope: float, share: float) -> tuple[Callable, ...]:
    """Return rotation, both shears and both translations, by so much at strength 1."""
    return (
        lambda picture, _, signed, how: picture.rotate(angle * signed, **how),
        _warp(lambda signed, w, h: (1, slope * signed, 0, 0, 1, 0)),
        _warp(lambda signed, w, h: (1, 0, 0, slope * signed, 1, 0)),
        _warp(lambda signed, w, h: (1, 0, share * signed * w, 0, 1, 0)),
        _warp(lambda signed, w, h: (1, 0, 0, 0, 1, share * signed * h)),
    )


def _solarize_add(picture: Image.Image, strength: float, signed: float, how: dict) -> Image.Image:
    table = [min(255, value + int(110 * strength)) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


ENHANCED = (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
# (picture, strength from 0 to 1, signed strength, how to resample) -> picture
TIMM_CHANGES: tuple[Callable, ...] = (
    lambda picture, *_: ImageOps.autocontrast(picture),
    lambda picture, *_: ImageOps.equalize(picture),
    lambda picture, *_: ImageOps.invert(picture),
    lambda picture, strength, *_: ImageOps.posterize(picture, max(1, 4 - int(4 * strength))),
    lambda picture, strength, *_: ImageOps.solarize(picture, 256 - int(256 * strength)),
    _solarize_add,
    *map(_enhance, ENHANCED),
    *_moves(30.0, 0.3, 0.45),
)


# --- RandAugment and TrivialAugment as in torchvision ---------------------------------------------


def of_torchvision(name: str, fill: Sequence[int]) -> Operation:
    """Return randaugment or trivialaugment.

    randaugment:    two of `torchvision_changes` at magnitude 9 of 30 (arXiv:1909.13719)
    trivialaugment: one of them at any magnitude of the wide space (arXiv:2103.10158)
    """
    wide = name == "trivialaugment"
    changes = torchvision_changes(wide)
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(fill)}

    def apply(image: np.ndarray, draw: Draw) -> np.ndarray:
        picture = Image.fromarray(image)
        for _ in range(1 if wide else 2):
            change, strength = changes[int(draw() * len(changes))], (int(draw() * 31) if wide else 9) / 30
            sign = 1 if draw() < 0.5 else -1
            picture = change(picture, strength, sign * strength, how)
        return np.asarray(picture)

    return apply


def torchvision_changes(wide: bool) -> tuple[Callable, ...]:
    """Return the 14 operations of both papers, as `TIMM_CHANGES`.

    TrivialAugment moves by up to 32 px of 224; at other sizes, by the same share of the side.
    """
    factor, bits = (0.99, 6) if wide else (0.9, 4)
    return (
        lambda picture, *_: picture,
        *_moves(*((135.0, 0.99, 32 / 224) if wide else (30.0, 0.3, 150 / 331))),
        *(_enhance(kind, factor, least=0.0) for kind in ENHANCED),
        lambda picture, strength, *_: ImageOps.posterize(picture, 8 - round(bits * strength)),
        lambda picture, strength, *_: ImageOps.solarize(picture, 255 - 255 * strength),
        lambda picture, *_: ImageOps.autocontrast(picture),
        lambda picture, *_: ImageOps.equalize(picture),
    )
