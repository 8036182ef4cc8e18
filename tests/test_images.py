"""Decoding: what is accepted, what is refused and with which message; and the evaluation transform."""

import io
import pickle
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from base.errors import DataError
from sources import decode as decoding
from sources.decode import BadImage, decode
from sources.images import EvalTransform, TrainTransform

MEAN = (0.485, 0.456, 0.406)


def photo(height=60, width=80, seed=0) -> np.ndarray:
    """A smooth picture: (height, width, 3) uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(pixels, kind="JPEG", mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def test_a_jpeg_decodes_to_pillows_pixels_on_the_fast_path(monkeypatch):
    monkeypatch.setattr(decoding, "_decode_strictly", None)
    for options in ({}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}):
        data = encoded(photo(), **options)
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)))), options
    grey = encoded(photo(), mode="L")
    assert np.array_equal(decode(grey), np.asarray(Image.open(io.BytesIO(grey)).convert("RGB")))


def test_bytes_after_the_end_of_a_jpeg_are_harmless():
    data = encoded(photo())
    assert np.array_equal(decode(data + b"\0\0trailing"), decode(data))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "PPM"])
def test_other_formats_decode_whatever_the_file_is_called(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(photo(), kind, **options), "n02105855_2933.JPEG"), photo())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
def test_grey_and_alpha_become_three_channels(mode):
    data = encoded(photo(), "PNG", mode)
    assert np.array_equal(decode(data), np.asarray(Image.fromarray(photo()).convert(mode).convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours():
    picture = Image.new("P", (4, 3), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(encoded(picture, "PNG", None, transparency=bytes([0, 128])))
    assert (pixels == (200, 100, 50)).all()


def test_cmyk_is_converted_as_pillow_does():
    data = encoded(photo(), "JPEG", "CMYK")
    assert decoding.jpeg_shape(data) == (60, 80, 4)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decode(data).astype(int) - photo()).mean() < 4


def test_sixteen_bits_are_scaled_not_saturated():
    wide = np.linspace(0, 65535, 12 * 8).astype(np.uint16).reshape(8, 12)
    expected = np.round(wide / 257.0).astype(np.uint8)
    data = encoded(Image.fromarray(wide), "PNG", None)
    assert np.array_equal(decode(data), np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, None, save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0, 0] > 250 and decode(data)[0, 0, 2] < 5


def test_exif_orientation_is_ignored_on_both_paths():
    exif = Image.Exif()
    exif[0x0112] = 6
    for shape in ((32, 64), (32, 32)):
        data = encoded(photo(*shape), exif=exif)
        assert decode(data).shape == (*shape, 3)
        assert np.array_equal(decode(data), decoding._decode_strictly(data, ""))


def test_a_png_is_decoded_once_and_its_orientation_is_read_where_it_has_one(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoding.orientation(encoded(photo(), "PNG", exif=exif)) == 6
    plain, opened = encoded(photo(), "PNG"), []
    monkeypatch.setattr(decoding.Image, "open", lambda *_, **options: opened.append(options))
    assert decoding.orientation(plain) == 1 and not opened


def test_corrupt_exif_is_ignored():
    data = encoded(photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).shape == (60, 80, 3)
        assert decoding._decode_strictly(data, "").shape == (60, 80, 3)


@pytest.mark.parametrize("keep", [0.5, 0.9, -3, -20])
def test_a_truncated_jpeg_is_an_error(keep):
    data = encoded(photo(200, 200), quality=95)
    cut = data[: int(len(data) * keep)] if keep > 0 else data[:keep]
    with pytest.raises(BadImage, match=r"cut\.JPEG"):
        decode(cut, "cut.JPEG")


CUTS = (0.2, 1 / 3, 0.5, 0.7, 0.9)
KINDS = ({}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_blocks": 7})


def cut(data: bytes, keep: float) -> bytes:
    """The first part of a JPEG with an end mark after it."""
    return data[: int(len(data) * keep)].rstrip(b"\xff") + b"\xff\xd9"


@pytest.mark.parametrize("keep", CUTS)
@pytest.mark.parametrize("options", KINDS)
def test_a_jpeg_cut_before_its_end_mark_is_an_error(options, keep):
    for seed in range(5):
        data = encoded(photo(100 + seed, 150, seed), **options)
        with pytest.raises(BadImage, match=r"truncated|Truncated"):
            decode(cut(data, keep), "cut.JPEG")
        decode(data, thorough=True)


@pytest.mark.parametrize("mode, options", [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})])
def test_a_thorough_check_finds_other_truncated_jpegs(mode, options, capfd):
    data = encoded(photo(100, 150), mode=mode, **options)
    decode(data, thorough=True)
    assert capfd.readouterr().err == ""  # a line for each of a million images would be too much
    for keep in (*CUTS, 0.98):
        with pytest.raises(BadImage):
            decode(cut(data, keep), thorough=True)
        with pytest.raises(BadImage):
            decode(cut(data, keep) + b"trailing", thorough=True)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 7}])
def test_fill_bytes_before_the_end_mark_are_no_damage(options):
    data = encoded(photo(100, 150), **options)
    filled = data[:-2] + b"\xff\xff\xff\xd9"
    assert np.array_equal(decode(filled, thorough=True), decode(data))
    with pytest.raises(BadImage):
        decode(cut(data, 0.7)[:-2] + b"\xff\xff\xff\xd9", thorough=True)


def test_a_grey_corner_is_no_damage():
    grey = photo(100, 150)
    grey[40:] = 128
    data = encoded(grey)
    assert decode(data)[-1, -1].tolist() == [128, 128, 128]
    assert decode(data + data, thorough=True).shape == (100, 150, 3)  # two pictures in one file


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Please log in</html>", "DOCTYPE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff\xd9", "not an image"),
        (b"\x00\x05\x16\x07" + bytes(60), "not an image"),  # AppleDouble
        (encoded(photo(), "PNG")[:300], "truncated"),
    ],
)
def test_an_incomplete_image_is_named(data, words):
    with pytest.raises(BadImage, match=words) as caught:
        decode(data, "n01/x.JPEG")
    assert isinstance(caught.value, DataError) and caught.value.name == "n01/x.JPEG"
    assert "n01/x.JPEG" in caught.value.what and "--verify" in caught.value.fix


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_more_pixels_than_the_limit_are_refused_before_decoding(monkeypatch, kind):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(BadImage, match="80 x 60"):
        decode(encoded(photo(), kind), "bomb")


def test_a_decompression_bomb_is_refused():
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG", None)
    with pytest.raises(BadImage, match="pixels"):
        decode(data, "bomb.png")


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    def fail(image):
        raise MemoryError

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    monkeypatch.setattr(decoding, "_to_rgb", fail)
    with pytest.raises(BadImage, match="MemoryError"):
        decoding._decode_strictly(file.getvalue(), "x.png")


def test_the_error_crosses_process_boundaries():
    error = pickle.loads(pickle.dumps(BadImage("a.JPEG", "it is empty")))  # noqa: S301
    assert (error.name, error.reason) == ("a.JPEG", "it is empty")
    assert error.what == BadImage("a.JPEG", "it is empty").what


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_bytes_give_an_image_or_a_bad_image(data):
    whole = bytearray(
        encoded(photo(16, 16), data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP"])))
    )
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(whole), "fuzz")
    except BadImage:
        return
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


@pytest.mark.parametrize("height, width", [(60, 80), (80, 60), (71, 97), (33, 33), (300, 401), (20, 90)])
def test_the_eval_transform_is_torchvisions(height, width):
    from torchvision import transforms

    data = encoded(photo(height, width), "PNG")
    reference = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    expected = np.asarray(reference(Image.fromarray(photo(height, width)))).astype(int)
    ours = EvalTransform(32)(data)
    assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
    assert np.abs(ours - expected).max() <= 1


@pytest.mark.parametrize("height, width", [(300, 401), (500, 375), (200, 180)])
def test_another_crop_is_torchvisions_too(height, width):
    """Procedure A3 is scored at 224 px with crop .95."""
    from torchvision import transforms

    reference = transforms.Compose([transforms.Resize(236), transforms.CenterCrop(224)])
    expected = np.asarray(reference(Image.fromarray(photo(height, width)))).astype(int)
    assert np.abs(EvalTransform(224, 0.95)(photo(height, width)) - expected).max() <= 1


def test_an_image_of_the_right_size_is_left_alone_with_crop_one():
    assert np.array_equal(EvalTransform(32, 1.0)(photo(32, 32)), photo(32, 32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("steps", [(("rrc", None),), (), (("padcrop", 4),)])
def test_tiny_and_extreme_shapes_work(shape, steps):
    pixels = np.full((*shape, 3), 77, np.uint8)
    assert TrainTransform(steps, 32, MEAN)(pixels, (0, 1, 2)).shape == (32, 32, 3)
    assert (EvalTransform(32)(pixels) == 77).all()
