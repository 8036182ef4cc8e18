"""Decode images. A damaged file is an error that names it; most decoders return a half-grey image."""

from __future__ import annotations

import io
import re
import warnings

import cv2
import numpy as np
from PIL import Image

from base.errors import DataError

# Only these parsers of Pillow run: an EPS or PSD file named .JPEG must not reach its own.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
UNREAD = {b"ftyphei": "HEIC", b"ftypmif1": "HEIC", b"ftypavif": "AVIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
ORIENTATION_TAG = 0x0112  # of EXIF
_CV2_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where Pillow looks for it
GREY = 128  # what libjpeg fills missing blocks with
# Bytes for a decoder that expects more: noise, then each restart marker followed by noise.
_MORE_DATA = b"".join(
    start + np.random.default_rng(k).integers(0, 255, 200, np.uint8).tobytes()
    for k, start in enumerate([b"", *(bytes((0xFF, marker)) for marker in range(0xD0, 0xD8))])
)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker other than a stuffed byte or a restart
REPLACE = "replace it with an intact image; pack_dataset.py --verify lists all bad images"


class BadImage(DataError):
    """An image that cannot be used: its `name` and the `reason`, which enters the digest of packed data."""

    def __init__(self, name: str, reason: str, fix: str = REPLACE):
        super().__init__(f"bad image {name}: {reason}", fix)
        self.name, self.reason = name, reason

    def __reduce__(self):  # errors cross process boundaries
        return type(self), (self.name, self.reason, self.fix)


def decode(
    data: bytes | np.ndarray, name: str = "", *, thorough: bool = False, exif: bool = False
) -> np.ndarray:
    """Return an encoded image as (H, W, 3) uint8 RGB; an array is returned as it is.

    Grey is repeated, alpha dropped, CMYK converted, 16 bits are scaled to 8, and an animation gives its first
    frame. Raises `BadImage` unless the whole image can be decoded.
    (Overwritten bytes inside a JPEG decode to wrong pixels; no decoder can detect that.)

    exif: turn the image as its EXIF orientation says. Phones store photos as the sensor saw them; published
    scores on ImageNet are those of pixels as stored.

    A JPEG that ends early but has an end marker is detected by its last pixel, which has the grey of missing
    blocks. That costs nothing and finds baseline files cut well before their end. `thorough` also finds
    progressive files and late cuts, and takes about four times as long.
    """
    if isinstance(data, np.ndarray):
        return data
    pixels = _decoded(data, name, thorough)
    return upright(pixels, orientation(data)) if exif else pixels


def _decoded(data: bytes, name: str, thorough: bool) -> np.ndarray:
    # Fast path: a JPEG with both its markers. Anything unusual is left to Pillow.
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
        height, width, channels = jpeg_shape(data)
        if channels in (1, 3) and height * width <= MAX_PIXELS:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_FLAGS)
            if pixels is not None and pixels.shape[:2] == (height, width):
                if thorough or pixels.item(-1) == pixels.item(-2) == pixels.item(-3) == GREY:
                    _refuse_truncated(data, name)
                return pixels
    pixels = _decode_strictly(data, name)
    if data[:2] == b"\xff\xd8":
        _refuse_truncated(data, name)
    return pixels


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1, as the pixels are stored, without one.

    As Pillow reads it, in 0.1 ms, but of a PNG in as long as it takes to decode it. A JPEG without an APP1
    segment, such as a packed one, and a PNG without any of the chunks that may hold it have none.
    """
    if data[:2] == b"\xff\xd8" and b"\xff\xe1" not in data:
        return 1
    if data[:4] == b"\x89PNG" and not any(chunk in data for chunk in PNG_ORIENTATION):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                found = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged EXIF raises anything; the pixels are fine
        return 1
    return found if found in range(1, 9) else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn or mirror (H, W, 3) `pixels`, stored in EXIF `orientation`, as they are to be seen."""
    if orientation == 1:
        return pixels
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if orientation >= 5 else pixels)


def jpeg_shape(data: bytes) -> tuple[int, int, int]:
    """Return (height, width, channels) from a JPEG's frame header (ITU T.81, annex B), or zeros without one.

    Walking over the few segments of a packed image takes 1 us.
    """
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF, but not DHT, JPG or DAC
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return height, width, data[at + 9]
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0, 0, 0


def _refuse_truncated(data: bytes, name: str) -> None:
    """Raise `BadImage` if a JPEG's data end before its picture does, which libjpeg reports only as a warning.

    The file is decoded again with more data before its end marker: a complete picture does not change.
    This uses Pillow, because OpenCV reports the surplus bytes on stderr.
    """
    end = _end_of_scans(data)
    try:
        whole = _outline(data) == _outline(data[:end] + _MORE_DATA + data[end:])
    except Exception:  # as in _decode_strictly; Pillow detects some kinds of missing data itself
        whole = False
    if not whole:
        raise BadImage(name, "the image is truncated")


def _outline(data: bytes) -> bytes:
    """Decode a JPEG at an eighth of its size, which reads all its data; a progressive one at full size."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        warnings.simplefilter("ignore")
        if "progressive" not in image.info:
            image.draft(image.mode, (1, 1))
        return image.tobytes()


def _end_of_scans(data: bytes) -> int:
    """Return the position of the end marker of a JPEG's first picture."""
    at = 2
    while at < len(data) - 3 and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker = data[at + 1]
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xDA:  # entropy-coded data follow
            found = _END_OF_SCAN.search(data, at)
            at = found.start() if found else len(data)
    at = min(at, len(data))
    while data[at - 1] == 0xFF:  # fill bytes, which may stand before any marker, belong to it
        at -= 1
    return at


def _decode_strictly(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise BadImage(name, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, palette transparency: the pixels are fine
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height} px"
                    raise BadImage(name, f"{size} is more than {MAX_PIXELS} pixels")
                return _to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(name, f"it has more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        kind = next((kind for mark, kind in UNREAD.items() if mark in data[:12]), "")
        reason = f"not an image of a known kind; it starts with {data[:16]!r}"
        raise BadImage(name, f"it is {kind}, not a supported kind: convert it" if kind else reason) from None
    except Exception as error:  # hostile bytes make parsers raise anything: SyntaxError, struct.error, ...
        raise BadImage(name, str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion saturates
        wide = np.asarray(image).astype(np.int64)
        grey = np.clip((wide + 128) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
