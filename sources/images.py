"""From an encoded image to the uint8 square a batch is made of: decoding, and the two transforms.

`decode` is strict: a damaged file is an error that names it, not a half-grey picture. Both
transforms return uint8; normalisation and mixing happen on the device. The named augmentations
are in `sources.augment`; nothing here knows about datasets, batches or torch.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from base.errors import DataError
from sources import augment

# A crafted EPS or PSD file called .JPEG must never reach the parser of such a format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
MAX_PIXELS = 178_956_970  # where Pillow stops too: a larger image is an attack or a mistake
# EXIF orientation is ignored, as torchvision's and timm's training on ImageNet do: the published
# numbers were made with the pixels as stored.
_CV2_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
GREY = 128  # what libjpeg fills the blocks with for which there are no data
# Data for a decoder that still wants some: noise, and behind each restart marker noise again.
_MORE = b"".join(
    start + np.random.default_rng(k).integers(0, 255, 200, np.uint8).tobytes()
    for k, start in enumerate([b"", *(bytes((0xFF, marker)) for marker in range(0xD0, 0xD8))])
)
_AFTER_SCAN = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # a marker that is neither a stuffed byte nor a restart


class BadImage(DataError):
    """One image that cannot be used: `name` and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"bad image {name}: {reason}",
            "pack_dataset.py --verify lists every bad image; replace or delete them, or train with --on-bad-image skip",
        )
        self.name, self.reason = name, reason

    def __reduce__(self):  # errors cross process boundaries
        return type(self), (self.name, self.reason)


def decode(data: bytes | np.ndarray, name: str = "", *, thorough: bool = False) -> np.ndarray:
    """An encoded image (or pixels, passed through) as (H, W, 3) uint8 RGB.

    Grey is repeated, alpha dropped, CMYK converted, 16 bits scaled to 8, of an animation the first
    frame taken, EXIF orientation ignored. Raises `BadImage` for everything that is not a whole
    image. (A JPEG whose middle bytes were overwritten decodes to wrong pixels: no decoder can tell.)

    A JPEG that lacks data but has its end mark is noticed where its last pixel is the grey of missing blocks,
    which costs nothing: all of a file cut well before its end, but no progressive one. `thorough` notices
    those too; it takes about four times as long.
    """
    if isinstance(data, np.ndarray):
        return data
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":  # whole; anything odd goes the strict way
        height, width, channels = jpeg_shape(data)
        if channels in (1, 3) and height * width <= MAX_PIXELS:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_FLAGS)
            if pixels is not None and pixels.shape[:2] == (height, width):
                if thorough or pixels.item(-1) == pixels.item(-2) == pixels.item(-3) == GREY:
                    _refuse_cut(data, name)
                return pixels
    pixels = _decode_strictly(data, name)
    if data[:2] == b"\xff\xd8":
        _refuse_cut(data, name)
    return pixels


def _refuse_cut(data: bytes, name: str) -> None:
    """Raise where a JPEG's data end before its picture does. No library hands on libjpeg's warning about it.

    So it is decoded with more data at the end: a whole picture never looks at them. (Pillow's libjpeg is
    silent; OpenCV's would report the extra bytes on stderr.)
    """
    end = _end_of_scans(data)
    try:
        whole = _outline(data) == _outline(data[:end] + _MORE + data[end:])
    except Exception:  # as in _decode_strictly; Pillow notices some of what is missing itself
        whole = False
    if not whole:
        raise BadImage(name, "the picture is not whole: its data end early")


def _outline(data: bytes) -> bytes:
    """A JPEG's pixels at an eighth of its size, which all its data are read for; of a progressive one, in full."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        warnings.simplefilter("ignore")
        if "progressive" not in image.info:
            image.draft(image.mode, (1, 1))
        return image.tobytes()


def _end_of_scans(data: bytes) -> int:
    """Where the end mark of a JPEG's first picture stands."""
    at = 2
    while at < len(data) - 3 and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker = data[at + 1]
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xDA:  # entropy-coded data follow
            found = _AFTER_SCAN.search(data, at)
            at = found.start() if found else len(data)
    return min(at, len(data))


def jpeg_shape(data: bytes) -> tuple[int, int, int]:
    """(height, width, channels) from a JPEG's frame header; zeros where it has none.

    A walk over the segments: 1 us for the few of a packed image. (ITU T.81, annex B.)
    """
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF, not DHT, JPG or DAC
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return height, width, data[at + 9]
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0, 0, 0


def _decode_strictly(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise BadImage(name, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, palette transparency: the pixels are fine
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(
                        name, f"{image.width} x {image.height} px is more than {MAX_PIXELS} pixels"
                    )
                return _to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(name, f"it has more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(name, f"not an image of a known kind; it starts with {data[:16]!r}") from None
    except Exception as error:  # hostile bytes make parsers raise anything: SyntaxError, struct.error, ...
        raise BadImage(name, f"{error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion saturates
        wide = np.asarray(image).astype(np.int64)
        grey = np.clip((wide + 128) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


CROP = 0.875  # the part of the resized image's short side that evaluation looks at


class EvalTransform:
    """Resize the short side to `image_size / crop`, take the centre: for validation and prediction.

    Pillow's antialiased bilinear filter with torchvision's rounding, so that reference weights score
    what they are published with. Only the part of the image under the crop is resampled.
    """

    def __init__(self, image_size: int, crop: float = 0.875):
        self.image_size, self.crop = image_size, crop

    def __call__(self, image: bytes | np.ndarray, name: str = "") -> np.ndarray:
        """(image_size, image_size, 3) uint8 RGB. Raises `BadImage`."""
        return centre_crop(decode(image, name), self.image_size, round(self.image_size / self.crop))


def centre_crop(pixels: np.ndarray, size: int, short_side: int) -> np.ndarray:
    """The central (size, size, 3) of `pixels` (H, W, 3) after its short side became `short_side` px."""
    height, width = pixels.shape[:2]
    if height <= width:
        new_height, new_width = short_side, max(short_side, int(short_side * width / height))
    else:
        new_height, new_width = max(short_side, int(short_side * height / width)), short_side
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    if (height, width) == (new_height, new_width):
        return pixels[top : top + size, left : left + size]
    across, down = width / new_width, height / new_height
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box))


class TrainTransform:
    """Decode, crop and augment; what comes out is a function of the image and the key alone.

    `steps` are ((name, N or None), ...) as `flags.parse_augment` gives them, applied in that order
    but for the crop, which always comes first: `rrc` cuts from the decoded image and resizes only
    the cut; `padcrop` shifts the image resized to `image_size`; with neither, the eval transform.
    """

    def __init__(
        self,
        steps: Sequence[tuple[str, int | None]],
        image_size: int,
        mean: Sequence[float],
        crop: float = 0.875,
    ):
        self.steps, self.image_size, self.crop = tuple(steps), image_size, crop
        self.mean = tuple(round(255 * m) for m in mean)
        self._operations = None  # built where it is used: a generator is not shared between processes

    def __getstate__(self):
        return {**self.__dict__, "_operations": None}

    def _build(self) -> None:
        names = [name for name, _ in self.steps]
        self._crop_names = [name for name in names if name in ("rrc", "padcrop")]
        if len(self._crop_names) > 1:
            raise ValueError(f"at most one crop, not {' and '.join(self._crop_names)}")
        self._pad = dict(self.steps).get("padcrop")
        self._randomness = augment.KeyedRandom()
        self._operations = [
            augment.build(name, argument, self.mean, self._randomness)
            for name, argument in self.steps
            if name not in ("rrc", "padcrop")
        ]

    def __call__(self, image: bytes | np.ndarray, key: tuple[int, int, int], name: str = "") -> np.ndarray:
        """(image_size, image_size, 3) uint8 RGB; `key` is (seed, epoch, sample id). Raises `BadImage`."""
        if self._operations is None:
            self._build()
        draw = self._randomness.rekey(key)
        pixels = self._cropped(decode(image, name), draw)
        for operation in self._operations:
            pixels = operation(pixels, draw)
        return pixels

    def _cropped(self, pixels: np.ndarray, draw: augment.Draw) -> np.ndarray:
        size = self.image_size
        if self._crop_names == ["rrc"]:
            box = augment.random_resized_box(*pixels.shape[:2], draw)
            return augment.cut_and_resize(pixels, box, size)
        if self._crop_names == ["padcrop"]:
            return augment.padded_crop(centre_crop(pixels, size, size), self._pad, self.mean, draw)
        return centre_crop(pixels, size, round(size / self.crop))
