"""Augmentation: keyed randomness, each operation against Albumentations or by counting pixels."""

import os
import pickle
import sys

import numpy as np
import pytest
from test_images import MEAN, encoded, photo

from base.errors import UsageError
from sources import augment
from sources.images import TrainTransform

FULL = (("rrc", None), ("flip", None), ("affine", None), ("jitter", None), ("dropout", None))
FILL = (124, 116, 104)


def fixed(*numbers):
    """Return a `Draw` that returns these numbers in turn."""
    return iter(numbers).__next__


@pytest.fixture(scope="module")
def A():
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return pytest.importorskip("albumentations")


# --- randomness ----------------------------------------------------------------------------------


def test_a_sample_depends_on_its_key_alone():
    data = encoded(photo())
    order = [(s, e, i) for s in (0, 1) for e in (1, 2) for i in (0, 7, 123_456)]
    first, second = TrainTransform(FULL, 32, MEAN), TrainTransform(FULL, 32, MEAN)
    one_way = {key: first(data, key) for key in order}
    the_other = {key: second(data, key) for key in reversed(order)}
    for key in order:
        assert np.array_equal(one_way[key], the_other[key]), key
    assert len({image.tobytes() for image in one_way.values()}) == len(order)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_the_library_policies_depend_on_the_key_alone(policy, A):
    data, steps = encoded(photo()), (("rrc", None), (policy, None))
    first, second = TrainTransform(steps, 32, MEAN), TrainTransform(steps, 32, MEAN)
    one_way = [first(data, (0, 1, i)) for i in range(25)]
    the_other = [second(data, (0, 1, i)) for i in reversed(range(25))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(one_way, the_other, strict=True))
    plain = TrainTransform(steps[:1], 32, MEAN)
    changed = sum(not np.array_equal(a, plain(data, (0, 1, i))) for i, a in enumerate(one_way))
    assert changed > 10
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in one_way)


def test_augmentations_fire_independently():
    """With Albumentations' set_random_seed all would fire together (correlation 1)."""
    names, fired = ("flip", "affine", "jitter", "dropout"), []
    randomness = augment.KeyedRandom()
    operations = [augment.build(name, None, FILL, randomness) for name in names]
    image = photo(16, 16)
    for i in range(2000):
        draw, row = randomness.rekey((0, 1, i)), []
        for operation in operations:
            row.append(operation(image, draw) is not image)
        fired.append(row)
    table = np.array(fired, float)
    assert np.abs(table.mean(0) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 0.08


def test_streams_of_neighbouring_keys_do_not_resemble_each_other():
    randomness = augment.KeyedRandom()
    rows = []
    for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]:
        draw = randomness.rekey(key)
        rows.append([draw() for _ in range(1000)])  # more than one block
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.15
    assert len({value for row in rows for value in row}) == 4000


def test_a_used_transform_can_be_pickled():
    transform, data = TrainTransform(FULL, 32, MEAN), encoded(photo())
    expected = transform(data, (3, 2, 1))
    assert np.array_equal(pickle.loads(pickle.dumps(transform))(data, (3, 2, 1)), expected)  # noqa: S301


@pytest.mark.parametrize(
    "name", ["flip", "affine", "jitter", "dropout", "cutout", "randaugment", "trivialaugment"]
)
def test_the_input_is_left_alone(name):
    if name in ("randaugment", "trivialaugment"):
        pytest.importorskip("albumentations")
    randomness, image = augment.KeyedRandom(), photo(32, 32)
    operation, before = augment.build(name, 8 if name == "cutout" else None, FILL, randomness), image.copy()
    for i in range(30):
        operation(image, randomness.rekey((0, 1, i)))
    assert np.array_equal(image, before)


def test_without_albumentations_only_its_policies_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    augment.build("affine", None, FILL, augment.KeyedRandom())
    with pytest.raises(UsageError, match="--augment randaugment needs the albumentations package"):
        augment.build("randaugment", None, FILL, augment.KeyedRandom())


def test_two_crops_are_refused():
    with pytest.raises(ValueError, match="at most one crop"):
        TrainTransform((("rrc", None), ("padcrop", 4)), 32, MEAN)(photo(), (0, 1, 2))


# --- crops ---------------------------------------------------------------------------------------


def test_random_boxes_have_the_distribution_of_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    randomness, image = augment.KeyedRandom(), np.empty((3, 375, 500), np.uint8)
    ours = np.array([augment.random_resized_box(375, 500, randomness.rekey((0, 1, i))) for i in range(3000)])
    tensor = pytest.importorskip("torch").from_numpy(image)
    theirs = np.array(
        [RandomResizedCrop.get_params(tensor, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    )
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 10)
        difference = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(difference).max() < 20, column
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 375).all() and (left + w <= 500).all()
    assert (h * w).min() > 0.079 * 375 * 500


def test_the_last_row_and_column_can_be_cut():
    boxes = [augment.random_resized_box(40, 40, augment.KeyedRandom().rekey((0, 1, i))) for i in range(300)]
    assert any(top + h == 40 > h for top, _, h, _ in boxes) and any(
        left + w == 40 > w for _, left, _, w in boxes
    )


def test_a_panorama_falls_back_to_a_central_box():
    top, left, h, w = augment.random_resized_box(10, 1000, augment.KeyedRandom().rekey((0, 1, 0)))
    assert (top, h, w) == (0, 10, 13) and left == (1000 - 13) // 2


def test_a_crop_of_the_right_size_is_not_resampled():
    image = photo(50, 60)
    assert np.array_equal(augment.cut_and_resize(image, (7, 5, 32, 32), 32), image[7:39, 5:37])


@pytest.mark.parametrize("factor", [2, 3, 7])
def test_shrinking_averages_pixels(factor):
    image = np.random.default_rng(0).integers(0, 256, (32 * factor, 32 * factor, 3), dtype=np.uint8)
    blocks = image.reshape(32, factor, 32, factor, 3).mean((1, 3))
    ours = augment.cut_and_resize(image, (0, 0, 32 * factor, 32 * factor), 32)
    assert np.abs(ours - blocks).max() <= 1
    # No aliasing for non-integer factors either: noise of standard deviation 74 must average out.
    assert (
        augment.cut_and_resize(image, (0, 0, 32 * factor - 5, 32 * factor - 3), 32).std() < 74 / factor * 1.5
    )


def test_padcrop_shifts_by_every_offset_and_fills_with_the_mean():
    image, offsets = photo(8, 8), set()
    randomness = augment.KeyedRandom()
    padded = np.empty((12, 12, 3), np.uint8)
    padded[:] = FILL
    padded[2:10, 2:10] = image
    for i in range(400):
        out = augment.padded_crop(image, 2, FILL, randomness.rekey((0, 1, i)))
        offsets |= {
            (y, x) for y in range(5) for x in range(5) if np.array_equal(out, padded[y : y + 8, x : x + 8])
        }
    assert len(offsets) == 25


# --- against Albumentations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, scale, angle", [(0.06, 0.9, 15), (-0.03, 1.1, -7), (0.0, 1.0, 3), (0.0625, 1.05, 0)]
)
def test_affine_is_albumentations(A, shift, scale, angle):
    image = photo(64, 64)
    theirs = A.Affine(
        translate_percent={"x": (shift, shift), "y": (-shift / 2, -shift / 2)},
        scale={"x": (scale, scale), "y": (1.02, 1.02)},
        rotate=(angle, angle),
        fill=FILL,
        p=1.0,
    )
    ours = augment.affine(image, (shift, -shift / 2), (scale, 1.02), angle, FILL)
    assert np.array_equal(ours, theirs(image=image)["image"])


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("amount", [-0.2, -0.05, 0.1, 0.2])
def test_each_part_of_jitter_is_albumentations(A, which, amount):
    values = [1.0, 1.0, 1.0, 0.0]
    values[which] += amount / 5 if which == 3 else amount
    pairs = [(value, value) for value in values]
    theirs = A.ColorJitter(*pairs, p=1.0)(image=photo(64, 64))["image"].astype(int)
    ours = augment.jitter(photo(64, 64), values).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - photo(64, 64)).max() > 2


def test_jitter_in_each_order_stays_next_to_albumentations(A):
    from albumentations.augmentations.pixel import functional as F

    steps = (
        F.adjust_brightness_torchvision,
        F.adjust_contrast_torchvision,
        F.adjust_saturation_torchvision,
        F.adjust_hue_torchvision,
    )
    values = (1.15, 0.85, 1.2, 0.03)
    for order in augment._ORDERS:
        expected = photo(32, 32)
        for i in order:
            expected = steps[i](expected, values[i])
        ours = augment.jitter(photo(32, 32), values, order).astype(int)
        difference = ours - expected
        assert np.abs(difference).mean() < 1.5, order  # one of 180 hues: earlier rounding may shift it by one


def test_dropout_is_albumentations_coarse_dropout(A):
    theirs = A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=(0.25, 0.25),
        hole_width_range=(0.25, 0.25),
        fill=FILL,
        p=1.0,
    )
    black = np.zeros((64, 64, 3), np.uint8)
    hole = lambda image: np.argwhere((image == FILL).all(2))  # noqa: E731
    reference = hole(theirs(image=black)["image"])
    randomness, corners = augment.KeyedRandom(), []
    for i in range(300):
        ours = hole(augment.dropout(black, FILL, randomness.rekey((0, 1, i))))
        assert len(ours) == len(reference) == 16 * 16
        assert tuple(np.ptp(ours, 0)) == tuple(np.ptp(reference, 0)) == (15, 15)
        corners.append(ours[0])
    assert np.min(corners, 0).tolist() == [0, 0] and np.max(corners, 0).tolist() == [48, 48]


# --- by counting pixels --------------------------------------------------------------------------


def test_cutout_is_one_square_clipped_by_the_border():
    black, randomness = np.zeros((32, 32, 3), np.uint8), augment.KeyedRandom()
    areas = []
    for i in range(500):
        filled = np.argwhere((augment.cutout(black, 8, FILL, randomness.rekey((0, 1, i))) == FILL).all(2))
        assert len(filled) == np.prod(np.ptp(filled, 0) + 1)  # a rectangle
        areas.append(len(filled))
    assert max(areas) == 64 and min(areas) >= 16
    # Each axis loses 1, 2, ... 4 of 8 px for centres 0 ... 3 and up to 3 on the other side.
    expected = (8 - (4 + 3 + 2 + 1 + 1 + 2 + 3) / 32) ** 2
    assert np.mean(areas) == pytest.approx(expected, rel=0.05)


def test_flip_mirrors():
    randomness = augment.KeyedRandom()
    flip = augment.build("flip", None, FILL, randomness)
    assert np.array_equal(flip(photo(), fixed(0.49)), photo()[:, ::-1])
    assert np.array_equal(flip(photo(), fixed(0.51)), photo())


def test_jitter_takes_its_strength_in_percent():
    weak, strong, default = (augment.build("jitter", n, FILL, augment.KeyedRandom()) for n in (2, 20, None))
    numbers = (0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # fire; every factor at its largest
    change = [np.abs(op(photo(), fixed(*numbers)).astype(int) - photo()).mean() for op in (weak, strong)]
    assert change[1] > 4 * change[0] > 0
    assert np.array_equal(strong(photo(), fixed(*numbers)), augment.jitter(photo(), (1.2, 1.2, 1.2, 0.04)))
    assert np.array_equal(default(photo(), fixed(*numbers)), augment.jitter(photo(), (1.2, 1.2, 1.2, 0.0)))


def test_the_fill_is_the_mean_of_the_data():
    transform = TrainTransform((("dropout", None),), 32, (0.5, 0.25, 1.0))
    outs = [transform(np.zeros((32, 32, 3), np.uint8), (0, 1, i)) for i in range(20)]
    assert any((out == (128, 64, 255)).all(2).sum() == 64 for out in outs)
