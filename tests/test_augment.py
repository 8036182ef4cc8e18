"""Augmentation: keyed randomness, each operation against Albumentations or by counting pixels."""

import argparse
import os
import pickle
import sys
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from test_images import MEAN, encoded, photo

from base.errors import DataError, UsageError
from base.parser import parse_augment
from sources import augment, policies
from sources.images import TrainTransform
from sources.randomness import KeyedRandom

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
def test_the_policies_depend_on_the_key_alone(policy):
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
    randomness = KeyedRandom()
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
    randomness = KeyedRandom()
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
    randomness, image = KeyedRandom(), photo(32, 32)
    operation, before = augment.build(name, 8 if name == "cutout" else None, FILL, randomness), image.copy()
    for i in range(30):
        operation(image, randomness.rekey((0, 1, i)))
    assert np.array_equal(image, before)


def test_without_albumentations_only_its_pipelines_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    augment.build("trivialaugment", None, FILL, KeyedRandom())
    with pytest.raises(UsageError, match=r"--augment x\.yaml needs the albumentations package"):
        augment.build("pipeline", "x.yaml", FILL, KeyedRandom())


# --- crops ---------------------------------------------------------------------------------------


def test_random_boxes_have_the_distribution_of_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    randomness, image = KeyedRandom(), np.empty((3, 375, 500), np.uint8)
    ours = np.array([augment.random_resized_box(375, 500, randomness.rekey((0, 1, i))) for i in range(3000)])
    tensor = torch.from_numpy(image)
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
    boxes = [augment.random_resized_box(40, 40, KeyedRandom().rekey((0, 1, i))) for i in range(300)]
    assert any(top + h == 40 > h for top, _, h, _ in boxes) and any(
        left + w == 40 > w for _, left, _, w in boxes
    )


def test_a_panorama_falls_back_to_a_central_box():
    top, left, h, w = augment.random_resized_box(10, 1000, KeyedRandom().rekey((0, 1, 0)))
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
    randomness = KeyedRandom()
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
    randomness, corners = KeyedRandom(), []
    for i in range(300):
        ours = hole(augment.dropout(black, FILL, randomness.rekey((0, 1, i))))
        assert len(ours) == len(reference) == 16 * 16
        assert tuple(np.ptp(ours, 0)) == tuple(np.ptp(reference, 0)) == (15, 15)
        corners.append(ours[0])
    assert np.min(corners, 0).tolist() == [0, 0] and np.max(corners, 0).tolist() == [48, 48]


# --- pipelines of Albumentations -------------------------------------------------------------------

FULL_YAML = str(ROOT / "recipes" / "augment" / "full.yaml")


def saved(A, path, *transforms, data_format="yaml"):
    A.save(A.Compose(list(transforms)), path, data_format=data_format)
    return str(path)


def test_a_pipeline_equals_albumentations_with_the_same_draws(A):
    """Each transform draws its numbers from the one pair of generators, keyed for the sample."""
    transform = TrainTransform((("pipeline", FULL_YAML),), 32, MEAN, crop=1.0)
    reference = A.load(FULL_YAML, data_format="yaml")
    changed = 0
    for i in range(50):
        randomness = KeyedRandom()
        randomness.uses_library = True
        randomness.rekey((3, 1, i))
        reference.set_random_state(randomness.generator, randomness.library)
        randomness.library.random()  # the pipeline is inside a Compose, which draws whether to run
        expected = reference(image=photo(32, 32))["image"]
        assert np.array_equal(transform(photo(32, 32), (3, 1, i)), expected)
        changed += not np.array_equal(expected, photo(32, 32))
    assert changed > 35


def test_the_transforms_of_a_pipeline_fire_independently(A, tmp_path):
    path = saved(A, tmp_path / "p.yaml", A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.InvertImg(p=0.5))
    transform, fired = TrainTransform((("pipeline", path),), 8, MEAN, crop=1.0), []
    corner = np.zeros((8, 8, 3), np.uint8)
    corner[0, 0] = 100
    for i in range(600):
        out = transform(corner, (0, 1, i)).astype(int)
        inverted = np.median(out) == 255
        row, column = np.argwhere((out == (155 if inverted else 100)).all(2))[0]
        fired.append((column > 0, row > 0, inverted))
    correlation = np.corrcoef(np.array(fired).T)
    assert np.abs(correlation - np.eye(3)).max() < 0.15
    assert np.array(fired).mean(0) == pytest.approx(0.5, abs=0.08)


def test_the_shipped_pipeline_changes_images_as_the_full_set_does(A):
    """Means over many images; their draws differ."""

    def means(steps):
        transform = TrainTransform(steps, 32, (124 / 255, 116 / 255, 104 / 255), crop=1.0)
        outs = [transform(photo(32, 32), (0, 1, i)).astype(float) for i in range(400)]
        same = np.mean([np.array_equal(out, photo(32, 32)) for out in outs])
        return same, np.mean(outs, axis=0)

    (ours, ours_mean), (theirs, theirs_mean) = means(FULL[1:]), means((("pipeline", FULL_YAML),))
    assert ours == pytest.approx(theirs, abs=0.06) and ours == pytest.approx(1 / 16, abs=0.05)
    assert np.abs(ours_mean - theirs_mean).mean() < 4


def test_json_is_read_too_and_a_single_transform(A, tmp_path):
    A.save(A.InvertImg(p=1.0), tmp_path / "p.json", data_format="json")
    transform = TrainTransform((("pipeline", str(tmp_path / "p.json")),), 32, MEAN, crop=1.0)
    assert np.array_equal(transform(photo(32, 32), (0, 1, 2)), 255 - photo(32, 32))


def pipeline_text(name, **values):
    import yaml

    return yaml.safe_dump({"transform": {"__class_fullname__": name, "p": 1.0, **values}})


@pytest.mark.parametrize(("text", "problem"), [
    (pipeline_text("Lambda", __name__="x"), "not a pipeline.*ValueError"),
    (pipeline_text("os.system", command="touch x"), "not a pipeline.*KeyError"),
    (pipeline_text("HorizontalFlip", zzz=1), "not valid for transform"),
    (pipeline_text("Blur", blur_limit=-3), "not a pipeline"),
    ("transform: !!python/object/apply:os.system ['touch x']", "not a pipeline.*ConstructorError"),
    ("transform: [1", "not a pipeline"), ("", "not a pipeline"),
    ("[" * 1000, "not a pipeline"), (None, "No such file"),
])  # fmt: skip
def test_a_file_that_is_no_pipeline_is_refused_and_runs_nothing(A, text, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        augment.build("pipeline", "p.yaml", FILL, KeyedRandom())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", [
    pipeline_text("RandomCrop", height=8, width=8), pipeline_text("Normalize"), pipeline_text("ToTensorV2"),
    pipeline_text("FDA"),  # needs more than the image
])  # fmt: skip
def test_a_pipeline_must_keep_size_and_type(A, text, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    transform = TrainTransform((("pipeline", str(tmp_path / "p.yaml")),), 32, MEAN, crop=1.0)
    with pytest.raises(DataError, match=r"p\.yaml"):
        transform(photo(32, 32), (0, 1, 0))


# --- by counting pixels --------------------------------------------------------------------------


def test_cutout_is_one_square_clipped_by_the_border():
    black, randomness = np.zeros((32, 32, 3), np.uint8), KeyedRandom()
    areas = []
    for i in range(500):
        filled = np.argwhere((augment.cutout(black, 8, FILL, randomness.rekey((0, 1, i))) == FILL).all(2))
        assert len(filled) == np.prod(np.ptp(filled, 0) + 1)  # a rectangle
        areas.append(len(filled))
    assert max(areas) == 64 and min(areas) >= 16
    # Each axis loses 1, 2, ... 4 of 8 px for centres 0 ... 3 and up to 3 on the other side.
    expected = (8 - (4 + 3 + 2 + 1 + 1 + 2 + 3) / 32) ** 2
    assert np.mean(areas) == pytest.approx(expected, rel=0.05)


# --- RandAugment as in timm ------------------------------------------------------------------------

ORDER = ["autocontrast", "equalize", "invert", "posterize", "solarize", "solarize-add", "color", "contrast",
         "brightness", "sharpness", "rotate", "shear-x", "shear-y", "translate-x", "translate-y"]  # fmt: skip


def changed(name, strength, sign=1, size=40):
    """Return a photo and its change by one of timm's operations, both (3, H, W) uint8."""
    import torch
    from PIL import Image

    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    image = photo(size, size) // 2 + 30
    after = policies.TIMM_CHANGES[ORDER.index(name)](Image.fromarray(image), strength, sign * strength, how)
    return (torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in (image, np.asarray(after)))


@pytest.mark.parametrize("strength", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("name", ORDER)
def test_each_change_of_randaugment_is_torchvisions(name, strength):
    from torchvision.transforms.v2 import functional as F

    bilinear = F.InterpolationMode.BILINEAR

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None):
        options = {"interpolation": bilinear, "fill": list(FILL), "center": center}
        return lambda image: F.affine(image, 0.0, list(translate), 1.0, list(shear), **options)

    def enhance(adjust):
        return lambda image: adjust(image, max(0.1, 1 + sign * 0.9 * strength))

    def add(image):
        return (image.int() + int(110 * strength)).clamp(max=255).where(image < 128, image).to(image.dtype)

    for sign in (1, -1):
        degrees = sign * np.degrees(np.arctan(0.3 * strength))
        pixels = -sign * 0.45 * strength * 40
        reference = {
            "autocontrast": F.autocontrast,
            "equalize": F.equalize,
            "invert": F.invert,
            "posterize": lambda image: F.posterize(image, 4 - int(4 * strength)),
            "solarize": lambda image: F.solarize(image, 256 - int(256 * strength)),
            "solarize-add": add,
            "color": enhance(F.adjust_saturation),
            "contrast": enhance(F.adjust_contrast),
            "brightness": enhance(F.adjust_brightness),
            "sharpness": enhance(F.adjust_sharpness),
            "rotate": partial(F.rotate, angle=30 * sign * strength, interpolation=bilinear, fill=list(FILL)),
            "shear-x": affine(shear=(degrees, 0), center=[0, 0]),
            "shear-y": affine(shear=(0, degrees), center=[0, 0]),
            "translate-x": affine(translate=(pixels, 0)),
            "translate-y": affine(translate=(0, pixels)),
        }[name]
        before, after = changed(name, strength, sign)
        difference = (reference(before).int() - after.int()).abs().float()
        assert difference.mean() < 1.5, (sign, difference.mean())
        assert strength == 0.1 or (before.int() - after.int()).abs().float().mean() > 0.5


def test_randaugment_applies_two_changes_half_of_the_time_at_normal_strengths(monkeypatch):
    strengths = []

    def note(picture, strength, signed, how):
        strengths.append((strength, signed / strength if strength else 0))
        return picture

    monkeypatch.setattr(policies, "TIMM_CHANGES", (note,) * 15)
    transform = TrainTransform((("randaugment", (6.0, 0.5)),), 32, MEAN)
    for i in range(2000):
        transform(np.zeros((32, 32, 3), np.uint8), (0, 1, i))
    values, signs = np.array(strengths).T
    assert len(values) == pytest.approx(2000, rel=0.05)  # 2 * 2000 * 0.5
    assert values.mean() == pytest.approx(0.6, abs=0.005) and values.std() == pytest.approx(0.05, abs=0.004)
    assert abs(signs.mean()) < 0.1 and set(signs.round(9)) == {1, -1}


@pytest.mark.parametrize(("name", "of_torchvision"), [("randaugment", "RandAugment"),
                                                      ("trivialaugment", "TrivialAugmentWide")])  # fmt: skip
def test_the_policies_are_torchvisions(name, of_torchvision):
    """Each operation at its smallest, its middle and its largest magnitude, in both directions."""
    import torch
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import autoaugment

    bilinear = transforms.InterpolationMode.BILINEAR
    theirs, wide = getattr(transforms, of_torchvision)(interpolation=bilinear), name == "trivialaugment"
    space = theirs._augmentation_space(31) if wide else theirs._augmentation_space(31, (224, 224))
    names = ["Identity", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Color", "Contrast",
             "Brightness", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"]  # fmt: skip
    assert sorted(names) == sorted(space)
    picture, how = (
        Image.fromarray(photo(224, 224)),
        {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL},
    )
    for change, op in zip(policies.torchvision_changes(wide), names, strict=True):
        magnitudes, signed = space[op]
        for k in (0, 15, 30) if wide else (9,):
            size = float(magnitudes[k]) if magnitudes.ndim else 0.0
            found = []
            for sign in (1, -1):
                expected = autoaugment._apply_op(
                    picture, op, sign * size if signed else size, interpolation=bilinear, fill=list(FILL)
                )
                mine = [np.asarray(change(picture, k / 30, s * k / 30, how), int) for s in (1, -1)]
                # Some directions are named the other way round; both are equally likely.
                found.append(min(np.abs(m - np.asarray(expected, int)).mean() for m in mine))
            # torchvision moves by whole pixels, rounded down.
            assert max(found) < (4.0 if op.startswith("Translate") else 0.6), (op, k, found)
    assert torch.is_tensor(space["Rotate"][0])


def test_randaugment_with_a_magnitude_equals_timms(monkeypatch):
    """The same draws, handed to timm's own code."""
    timm = pytest.importorskip("timm.data.auto_augment")
    policy = timm.rand_augment_transform("rand-m6-mstd0.5-inc1", {"img_mean": FILL})
    names = [op.name.lower() for op in policy.ops]
    ours = {name: ORDER[k] for k, name in enumerate(ORDER)}
    assert sorted(n.removesuffix("increasing").removesuffix("rel") for n in names) == sorted(
        n.replace("-", "") for n in ours
    )
    for k, name in enumerate(ORDER):
        op = next(op for op in policy.ops if op.name.lower().startswith(name.replace("-", "")) and
                  (name != "solarize" or op.name == "SolarizeIncreasing"))  # fmt: skip
        monkeypatch.setattr(op, "prob", 1.0)
        monkeypatch.setattr(timm.random, "gauss", lambda mean, deviation: mean)
        for sign, resample in ((1, 0), (-1, 1)):
            monkeypatch.setattr(timm.random, "random", lambda sign=sign: 0.4 if sign > 0 else 0.6)
            monkeypatch.setattr(timm.random, "choice", lambda options, k=resample: options[k])
            from PIL import Image

            how = {"resample": timm._RANDOM_INTERPOLATION[resample], "fillcolor": FILL}
            picture = Image.fromarray(photo(40, 40))
            mine = policies.TIMM_CHANGES[k](picture, 0.6, sign * 0.6, how)
            assert np.array_equal(np.asarray(mine), np.asarray(op(picture))), name


@pytest.mark.parametrize("text, steps", [
    ("randaugment", (("randaugment", None),)), ("randaugment:6", (("randaugment", (6.0, 0.0)),)),
    ("rrc,randaugment:6:0.5", (("rrc", None), ("randaugment", (6.0, 0.5)))),
])  # fmt: skip
def test_randaugment_takes_a_magnitude_and_its_deviation(text, steps):
    assert parse_augment(text) == steps
    for wrong in (":11", ":6:-1", ":x", ":6:1:2", ":nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_augment(f"randaugment{wrong}")


def test_flip_mirrors():
    randomness = KeyedRandom()
    flip = augment.build("flip", None, FILL, randomness)
    assert np.array_equal(flip(photo(), fixed(0.49)), photo()[:, ::-1])
    assert np.array_equal(flip(photo(), fixed(0.51)), photo())


def test_jitter_takes_its_strength_in_percent():
    weak, strong, default = (augment.build("jitter", n, FILL, KeyedRandom()) for n in (2, 20, None))
    numbers = (0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # fire; every factor at its largest
    change = [np.abs(op(photo(), fixed(*numbers)).astype(int) - photo()).mean() for op in (weak, strong)]
    assert change[1] > 4 * change[0] > 0
    assert np.array_equal(strong(photo(), fixed(*numbers)), augment.jitter(photo(), (1.2, 1.2, 1.2, 0.04)))
    assert np.array_equal(default(photo(), fixed(*numbers)), augment.jitter(photo(), (1.2, 1.2, 1.2, 0.0)))


def test_the_fill_is_the_mean_of_the_data():
    transform = TrainTransform((("dropout", None),), 32, (0.5, 0.25, 1.0))
    outs = [transform(np.zeros((32, 32, 3), np.uint8), (0, 1, i)) for i in range(20)]
    assert any((out == (128, 64, 255)).all(2).sum() == 64 for out in outs)
