"""The augmentations by name: arithmetic on (H, W, 3) uint8 images, apart from the random draws.

affine, jitter and dropout are those of Albumentations 2.0.8 with the arguments of the documents'
recipe, computed directly: through its Compose they cost 160 us an image, more than decoding a
packed one. The tests hold each equal to Albumentations' for the same parameters. randaugment and
trivialaugment, which nobody runs at 64 px for speed, are built from Albumentations' own transforms.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Sequence

import cv2
import numpy as np

Draw = Callable[[], float]  # the next uniform number in [0, 1)
Box = tuple[int, int, int, int]  # top, left, height, width in px
Operation = Callable[[np.ndarray, Draw], np.ndarray]

P = 0.5  # how often flip, affine, jitter and dropout are applied
SHIFT, SCALE, ANGLE = 0.0625, (0.9, 1.1), 15.0  # affine: of the side, per axis, degrees
HOLE = 0.25  # dropout: side of the one hole, of the image's
JITTER = (
    0.2,
    0.2,
    0.2,
    0.0,
)  # brightness, contrast, saturation, hue: no hue, as in timm; it costs as much as the rest
_BLOCK = 64  # numbers drawn at once; a default recipe uses at most 60


class KeyedRandom:
    """One stream of random numbers per key (seed, epoch, sample id), whoever asks and in any order.

    Philox is counter-based: setting its state costs microseconds, where seeding costs a hundred.
    Key words are seed and epoch, the highest counter word is the sample: streams never overlap.
    (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.)
    """

    def __init__(self):
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.library = random.Random()  # Albumentations draws from both kinds
        self.uses_library = False
        self._state = self.bits.state  # of a generator that has drawn nothing yet

    def rekey(self, key: tuple[int, int, int]) -> Draw:
        state = self._state
        state["state"]["key"][:] = (key[0] & 0xFFFFFFFFFFFFFFFF, key[1])
        state["state"]["counter"][:] = (0, 0, 0, key[2])
        self.bits.state = state
        if self.uses_library:
            self.library.seed(int(self.generator.integers(1 << 63)))
        return self._numbers().__next__

    def _numbers(self):
        while True:
            yield from self.generator.random(_BLOCK).tolist()


def build(name: str, argument: int | None, mean: Sequence[int], randomness: KeyedRandom) -> Operation:
    """The operation called `name`: (image, draw) -> image of the same shape, the input untouched.

    `mean` (3 values in 0 ... 255) fills what an operation leaves empty.
    """
    if name in ("randaugment", "trivialaugment"):
        return _library_policy(name, mean, randomness)
    makers = {
        "flip": lambda: _sometimes(lambda image, draw: cv2.flip(image, 1)),
        "affine": lambda: _sometimes(lambda image, draw: affine(image, *draw_affine(draw), fill=mean)),
        "jitter": lambda: _sometimes(_jitter_by(*_jitter_amounts(argument))),
        "dropout": lambda: _sometimes(lambda image, draw: dropout(image, mean, draw)),
        "cutout": lambda: lambda image, draw: cutout(image, argument, mean, draw),
    }
    if name not in makers:
        raise ValueError(f"no augmentation is called {name!r}")
    return makers[name]()


def _sometimes(operation: Operation) -> Operation:
    return lambda image, draw: operation(image, draw) if draw() < P else image


# --- crops ---------------------------------------------------------------------------------------


def random_resized_box(height: int, width: int, draw: Draw, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) -> Box:
    """Where to cut: area uniform in `scale` of the image's, log of width / height uniform in `ratio`.

    After ten boxes that do not fit, the central one nearest to the image's shape.
    (Szegedy et al., arXiv:1409.4842; the fallback is torchvision's.)
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
    """The `box` of `image` (H, W, 3) as (size, size, 3).

    Bilinear; from twice the size on after an average over whole blocks of pixels, so that nothing
    aliases. cv2.INTER_AREA alone does the same for a broken factor at five times the cost.
    """
    top, left, h, w = box
    down, across = max(1, h // size), max(1, w // size)
    if down > 1 or across > 1:
        h, w = h // down, w // across
        part = image[top : top + h * down, left : left + w * across]
        return _bilinear(cv2.resize(part, (w, h), interpolation=cv2.INTER_AREA), size)
    return _bilinear(image[top : top + h, left : left + w], size)


def _bilinear(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def padded_crop(image: np.ndarray, pad: int, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """`image` shifted by up to `pad` px both ways, `fill` moving in. (He et al., arXiv:1512.03385, 4.2)"""
    h, w = image.shape[:2]
    top, left = int(draw() * (2 * pad + 1)), int(draw() * (2 * pad + 1))
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=tuple(fill))
    return padded[top : top + h, left : left + w]


# --- geometry, colour, holes ---------------------------------------------------------------------


def draw_affine(draw: Draw) -> tuple[float, float, float, float, float]:
    """(shift x, shift y) of the side, (scale x, scale y), and an angle in degrees."""
    shifts = [SHIFT * (2 * draw() - 1) for _ in range(2)]
    scales = [SCALE[0] + (SCALE[1] - SCALE[0]) * draw() for _ in range(2)]
    return *shifts, *scales, ANGLE * (2 * draw() - 1)


def affine(
    image: np.ndarray,
    shift_x: float,
    shift_y: float,
    scale_x: float,
    scale_y: float,
    angle: float,
    *,
    fill: Sequence[int],
) -> np.ndarray:
    """Scale, rotate and shift (by whole pixels) about the centre, bilinear, `fill` outside."""
    h, w = image.shape[:2]
    x, y = w / 2 - 0.5, h / 2 - 0.5
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    a, b, c, d = cos * scale_x, sin * scale_y, -sin * scale_x, cos * scale_y
    matrix = np.array(
        [[a, b, x - a * x - b * y + int(shift_x * w)], [c, d, y - c * x - d * y + int(shift_y * h)]]
    )
    return cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR, borderValue=tuple(fill))


_WHEEL = (np.arange(180 + 256) % 180).astype(np.uint8)
_ORDERS = tuple(itertools.permutations(range(4)))


def _jitter_amounts(percent: int | None) -> tuple[float, float, float, float]:
    """`jitter:10` is brightness, contrast and saturation .1 and hue .02, the documents' CIFAR recipe."""
    return JITTER if percent is None else (percent / 100, percent / 100, percent / 100, percent / 500)


def _jitter_by(brightness: float, contrast: float, saturation: float, hue: float) -> Operation:
    def apply(image: np.ndarray, draw: Draw) -> np.ndarray:
        factors = [1 + amount * (2 * draw() - 1) for amount in (brightness, contrast, saturation)]
        shift = hue * (2 * draw() - 1)
        return jitter(image, *factors, shift, order=_ORDERS[int(draw() * len(_ORDERS))])

    return apply


def jitter(
    image: np.ndarray,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: Sequence[int] = (0, 1, 2, 3),
) -> np.ndarray:
    """Three factors and a shift of the hue (as a part of the circle), taken in `order`."""
    changes = (
        lambda x: cv2.convertScaleAbs(x, alpha=brightness),
        lambda x: _contrast(x, contrast),
        lambda x: _saturation(x, saturation),
        lambda x: _hue(x, hue),
    )
    for i in order:
        image = changes[i](image)
    return image


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor))


def _saturation(image: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def _hue(image: np.ndarray, shift: float) -> np.ndarray:
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # H in half degrees: 0 ... 179
    turn = math.floor(180 * shift) % 180
    table = _WHEEL[turn : turn + 256]
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), table), hsv, 0)  # indexing costs six times that
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def dropout(image: np.ndarray, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """One hole of a quarter of the side, wholly inside. (Coarse dropout, arXiv:1708.04896.)"""
    h, w = image.shape[:2]
    height, width = max(1, round(HOLE * h)), max(1, round(HOLE * w))
    return _fill(image, int(draw() * (h - height + 1)), int(draw() * (w - width + 1)), height, width, fill)


def cutout(image: np.ndarray, side: int, fill: Sequence[int], draw: Draw) -> np.ndarray:
    """A hole of `side` px about a point anywhere, clipped by the border. (arXiv:1708.04552)"""
    h, w = image.shape[:2]
    top, left = int(draw() * h) - side // 2, int(draw() * w) - side // 2
    bottom, right = min(top + side, h), min(left + side, w)
    top, left = max(top, 0), max(left, 0)
    return _fill(image, top, left, bottom - top, right - left, fill)


def _fill(image: np.ndarray, top: int, left: int, height: int, width: int, fill: Sequence[int]) -> np.ndarray:
    image = image.copy()
    image[top : top + height, left : left + width] = fill
    return image


# --- policies, from Albumentations' transforms ------------------------------------------------------


def _library_policy(name: str, mean: Sequence[int], randomness: KeyedRandom) -> Operation:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for news
    import albumentations as A

    if name == "randaugment":  # two operations at magnitude 9 of 30, either direction (arXiv:1909.13719)
        choice = A.SomeOf(_operations(A, mean, 0.3, fixed=True, wide=False), n=2, replace=True, p=1.0)
    else:  # one operation at any magnitude of the wide space (arXiv:2103.10158)
        choice = A.OneOf(_operations(A, mean, 1.0, fixed=False, wide=True), p=1.0)
    policy = A.Compose([choice])
    # Never set_random_seed: it gives every transform the same stream, so they all fire together.
    policy.set_random_state(randomness.generator, randomness.library)
    randomness.uses_library = True
    return lambda image, draw: policy(image=image)["image"]


def _operations(A, mean: Sequence[int], magnitude: float, *, fixed: bool, wide: bool) -> list:
    """The 14 operations of both papers; `magnitude` in 0 ... 1 is exact (`fixed`) or the largest."""
    shear, shift, angle, factor, bits = (
        (0.99, 32 / 224, 135.0, 0.99, 6) if wide else (0.3, 150 / 331, 30.0, 0.9, 4)
    )

    def both_ways(limit: float, make: Callable) -> object:
        limit *= magnitude
        if fixed:
            return A.OneOf([make((-limit, -limit)), make((limit, limit))], p=1.0)
        return make((-limit, limit))

    def sheared(axis: str) -> Callable:
        degrees = lambda r: tuple(math.degrees(math.atan(v)) for v in r)  # noqa: E731
        return lambda r: A.Affine(shear={axis: degrees(r), other[axis]: (0.0, 0.0)}, fill=mean, p=1.0)

    def coloured(what: str) -> Callable:
        neutral = {
            "brightness": (1.0, 1.0),
            "contrast": (1.0, 1.0),
            "saturation": (1.0, 1.0),
            "hue": (0.0, 0.0),
        }
        return lambda r: A.ColorJitter(**{**neutral, what: (1 + r[0], 1 + r[1])}, p=1.0)

    def shifted(axis: str) -> Callable:
        return lambda r: A.Affine(translate_percent={axis: r, other[axis]: (0.0, 0.0)}, fill=mean, p=1.0)

    other = {"x": "y", "y": "x"}
    weakest = magnitude if fixed else 0.0
    fewest_bits = 8 - round(bits * magnitude)
    return [
        A.NoOp(p=1.0),
        *(both_ways(shear, sheared(axis)) for axis in "xy"),
        *(both_ways(shift, shifted(axis)) for axis in "xy"),
        both_ways(angle, lambda r: A.Affine(rotate=r, fill=mean, p=1.0)),
        *(both_ways(factor, coloured(what)) for what in ("brightness", "saturation", "contrast")),
        A.Sharpen(alpha=(factor * weakest, factor * magnitude), lightness=(1.0, 1.0), p=1.0),
        A.Posterize(num_bits=(fewest_bits, fewest_bits if fixed else 8), p=1.0),
        A.Solarize(threshold_range=(1 - magnitude, 1 - weakest), p=1.0),
        A.AutoContrast(p=1.0),
        A.Equalize(p=1.0),
    ]
