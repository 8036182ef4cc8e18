"""Turn images into the square uint8 images of a batch: the training and the evaluation transform.

Normalization and mixing happen on the device, on whole batches. `sources.augment` holds the augmentations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sources import augment
from sources.decode import decode
from sources.randomness import Draw, KeyedRandom

Steps = Sequence[tuple[str, Any]]  # augmentations in order, with their arguments: ("cutout", 8)
EVAL_CROP = 0.875  # share of the resized image's short side that validation and prediction use


def default_crop(image_size: int, native_size: int | None) -> float:
    """Return the `crop` of `EvalTransform` for data at `native_size` px: the whole image at that size."""
    return 1.0 if image_size == native_size else EVAL_CROP


class EvalTransform:
    """Resize the short side to `image_size / crop` px and take the centre, for validation and prediction.

    This uses Pillow's antialiased bilinear filter and torchvision's rounding, so that reference weights
    reach their published scores (timm rounds down: 235 instead of 236 px for 224 and 0.95). Only the cropped
    part of the image is resampled. With `crop` 1, a square image of `image_size` px is returned as it is.
    `exif` is that of `decode`.
    """

    def __init__(self, image_size: int, crop: float = EVAL_CROP, exif: bool = False):
        self.image_size, self.crop, self.exif = image_size, crop, exif

    def __call__(self, image: bytes | np.ndarray, name: str = "") -> np.ndarray:
        """Return (image_size, image_size, 3) uint8 RGB. Raises `BadImage`."""
        pixels = decode(image, name, exif=self.exif)
        return centre_crop(pixels, self.image_size, round(self.image_size / self.crop))


def centre_crop(pixels: np.ndarray, size: int, short_side: int) -> np.ndarray:
    """Resize (H, W, 3) `pixels` to a short side of `short_side` px and return the central (size, size, 3)."""
    height, width = pixels.shape[:2]
    if height <= width:
        new_height, new_width = short_side, max(short_side, int(short_side * width / height))
    else:
        new_height, new_width = max(short_side, int(short_side * height / width)), short_side
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    if (height, width) == (new_height, new_width):
        return pixels[top : top + size, left : left + size]
    x_scale, y_scale = width / new_width, height / new_height
    right, bottom = min((left + size) * x_scale, width), min((top + size) * y_scale, height)
    box = (left * x_scale, top * y_scale, right, bottom)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box))


class TrainTransform:
    """Decode, crop and augment an image; the result depends only on the image and the key.

    The crop always comes first. `rrc` cuts a random box from the decoded image and resizes only that;
    `padcrop` shifts the image resized to `image_size`; without either, it is the crop of `EvalTransform`.
    `steps` come from `parser.parse_augment`. `mean`, of pixels in [0, 1], is the fill colour; `exif` is that
    of `decode`.
    """

    def __init__(
        self,
        steps: Steps,
        image_size: int,
        mean: Sequence[float],
        crop: float = EVAL_CROP,
        exif: bool = False,
    ):
        crops = [step for step in steps if step[0] in ("rrc", "padcrop")]
        self.crop_name, self.pad = crops[0] if crops else ("centre", None)
        self.steps = [step for step in steps if step not in crops]
        self.image_size, self.crop, self.exif = image_size, crop, exif
        self.fill = tuple(round(255 * m) for m in mean)
        self._operations = self._randomness = None  # made on first use, for each process its own

    def __getstate__(self):
        return {**self.__dict__, "_operations": None, "_randomness": None}

    def __call__(self, image: bytes | np.ndarray, key: tuple[int, int, int]) -> np.ndarray:
        """Return (image_size, image_size, 3) uint8; `key` is (seed, epoch, sample id). Raises `BadImage`."""
        if self._operations is None:
            self._randomness = KeyedRandom()
            self._operations = [augment.build(*step, self.fill, self._randomness) for step in self.steps]
        draw = self._randomness.rekey(key)
        pixels = self._cropped(decode(image, exif=self.exif), draw)
        for operation in self._operations:
            pixels = operation(pixels, draw)
        return pixels

    def _cropped(self, pixels: np.ndarray, draw: Draw) -> np.ndarray:
        size = self.image_size
        if self.crop_name == "rrc":
            return augment.cut_and_resize(pixels, augment.random_resized_box(*pixels.shape[:2], draw), size)
        if self.crop_name == "padcrop":
            return augment.padded_crop(centre_crop(pixels, size, size), self.pad, self.fill, draw)
        return centre_crop(pixels, size, round(size / self.crop))
