"""A folder of one's own photos: its split, its name, its orientation, what is passed over, what is fitted."""

import dataclasses
import io
import json
import os
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from runs import digest, payload

import lr_finder
import pack_dataset
import predict
import train
import validate
from analysis import batch, predictions
from base import flags, process
from base.errors import CheckpointError, DataError, UsageError
from base.phases import fitting_batch, phase_batches
from dataloader import eval_loader, train_loader
from harness import build
from sources import folders, splits
from sources.decode import decode
from sources.images import centre_crop
from sources.index import FileSplit, safe_name
from sources.layouts import open_dataset

SMALL = ["--arch", "resnet_tiny", "--epochs", "1", "--resize-schedule", "16", "--num-workers", "0"]
SMALL += ["--device", "cpu", "--amp", "off", "--lr", "1e-3"]
COUNTS = {"ant": 25, "bee": 10, "cow": 2}


def encoded(k=0, orientation=None, kind="JPEG", size=(24, 16), **options) -> bytes:
    """Return an image without any symmetry, different for each `k`."""
    pixels = np.random.default_rng(k).integers(0, 255, (4, 6, 3), np.uint8)
    image, file = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), io.BytesIO()
    if orientation:
        exif = image.getexif()
        exif[0x0112] = orientation
        options["exif"] = exif
    image.save(file, kind, **options)
    return file.getvalue()


def add(root, name, numbers, orientation=None):
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (root / name / f"{i}.jpg").write_bytes(encoded(i, orientation))


@pytest.fixture
def flat(tmp_path):
    for name, count in COUNTS.items():
        add(tmp_path / "my photos", name, range(count))
    return tmp_path / "my photos"


def parts_of(index) -> dict[str, str]:
    splits_of = {"train": index.train, "val": index.val}
    return {split.name(i): part for part, split in splits_of.items() for i in range(len(split))}


def trained(data, out, *more) -> int:
    return train.main([*SMALL, "--data-dir", str(data), "--save-dir", str(out), *map(str, more)])


# --- the split ---


def test_nothing_is_written_among_the_images(flat, tmp_path):
    for out in (flat / "run", flat / "ant" / "run", flat):
        with pytest.raises(UsageError, match=r"--save-dir .* is inside the images"):
            trained(flat, out)
        with pytest.raises(UsageError, match=r"--out .* is inside the images"):
            pack_dataset.main(["--data-dir", str(flat), "--out", str(out), "--stored-sides", "16"])
    with pytest.raises(UsageError, match=r"--out .* is inside the images"):
        lr_finder.main([*SMALL[:2], "--data-dir", str(flat), "--out", str(flat / "lr")])
    with pytest.raises(UsageError, match=r"--out .* is inside the images"):
        batch.main([*SMALL, "--data-dir", str(flat), "--out", str(flat / "ant")])
    assert sorted(p.name for p in flat.iterdir()) == sorted(COUNTS)
    shutil.copytree(flat, tmp_path / "parts" / "train")
    shutil.copytree(flat, tmp_path / "parts" / "val")
    index = open_dataset("imagenet", tmp_path / "parts")
    folders.check_outside(index, tmp_path / "parts" / "runs", "--save-dir")  # no class would come of it
    with pytest.raises(UsageError, match="is inside the images"):
        folders.check_outside(index, tmp_path / "parts" / "val" / "runs", "--save-dir")
    kaggles = SimpleNamespace(whole=FileSplit(tmp_path / "hundred", ["train.X1/ant/1.JPEG"], [0]))
    index = SimpleNamespace(train=kaggles, val=kaggles, split_file="")
    folders.check_outside(index, tmp_path / "hundred" / "runs", "--save-dir")
    with pytest.raises(UsageError, match="is inside the images"):
        folders.check_outside(index, tmp_path / "hundred" / "train.X1" / "run", "--save-dir")


def test_hidden_folders_are_not_read(flat):
    before = parts_of(open_dataset("imagenet", flat))
    shutil.copytree(flat / "ant", flat / "ant" / ".thumbnails")
    assert parts_of(open_dataset("imagenet", flat)) == before


def test_a_fifth_of_every_class_is_for_validation(flat):
    index = open_dataset("imagenet", flat)
    assert index.classes == ("ant", "bee", "cow")
    assert np.bincount(index.val.labels).tolist() == [5, 2, 1]
    assert len(parts_of(index)) == len(index.train) + len(index.val) == sum(COUNTS.values())
    names = {index.classes[label]: index.val.name(i) for i, label in enumerate(index.val.labels)}
    assert all(name.startswith(f"{key}/") for key, name in names.items())
    assert open_dataset("imagenet", flat).fingerprint() == index.fingerprint()
    assert not (flat / splits.FILE).exists()  # looking writes nothing


def test_the_split_is_kept_when_images_are_added_and_deleted(flat, tmp_path):
    before = parts_of(index := open_dataset("imagenet", flat))
    assert index.notes[0].endswith(f"training or packing will list them in {flat / splits.FILE}")
    assert trained(flat, tmp_path / "run") == 0
    assert open_dataset("imagenet", flat).notes[0].endswith(f"; {flat / splits.FILE} lists them")
    assert json.loads((flat / splits.FILE).read_text()).keys() == {"train", "val"}
    add(flat, "ant", range(100, 125))
    add(flat, "bee", range(100, 130))
    add(flat, "dog", range(10))
    (flat / "bee" / "3.jpg").unlink()
    index = open_dataset("imagenet", flat)
    after = parts_of(index)
    assert all(after[name] == part for name, part in before.items() if name != "bee/3.jpg")
    assert np.bincount(index.val.labels).tolist() == [10, 8, 1, 2]
    assert trained(flat, tmp_path / "again") == 0
    kept = parts_of(open_dataset("imagenet", flat))
    assert kept == after
    (flat / "bee" / "3.jpg").write_bytes(encoded())  # and is in its part again
    assert parts_of(open_dataset("imagenet", flat)) == after | {"bee/3.jpg": before["bee/3.jpg"]}


def test_without_its_file_the_split_hardly_moves_when_images_are_added(flat):
    add(flat, "ant", range(200))
    before = parts_of(open_dataset("imagenet", flat))
    add(flat, "ant", range(200, 210))
    after = parts_of(open_dataset("imagenet", flat))
    assert sum(after[name] != part for name, part in before.items()) <= 4


def test_a_class_that_lost_a_part_is_divided_anew(flat, tmp_path):
    trained(flat, tmp_path / "run")
    parts = parts_of(open_dataset("imagenet", flat))
    for name, part in parts.items():
        if name.startswith("bee/") and part == "val":
            (flat / name).unlink()
    index = open_dataset("imagenet", flat)
    assert np.bincount(index.val.labels).tolist() == [5, 2, 1]
    rest = {name: part for name, part in parts.items() if not name.startswith("bee/")}
    assert rest.items() <= parts_of(index).items()


def test_an_edited_split_is_followed_and_a_wrong_one_refused(flat, tmp_path):
    trained(flat, tmp_path / "run")
    path = flat / splits.FILE
    content = json.loads(path.read_text())
    content["val"].append(content["train"].pop(0))
    path.write_text(json.dumps(content))
    assert parts_of(open_dataset("imagenet", flat))[content["val"][-1]] == "val"
    for wrong in ("{", '{"train": []}', '{"train": ["ant/1.jpg"], "val": ["ant/1.jpg"]}', '{"train": 1}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"split\.json") as caught:
            open_dataset("imagenet", flat)
        assert "delete it" in caught.value.fix


def test_a_directory_that_cannot_be_written_keeps_the_same_split(flat, tmp_path, capsys, monkeypatch):
    def refused(path):
        raise splits.ResourceError(f"cannot write {path}: Read-only file system", "")

    monkeypatch.setattr(splits.files, "durable", refused)
    before = parts_of(open_dataset("imagenet", flat))
    assert trained(flat, tmp_path / "run") == 0
    assert "Read-only file system, so when images are added" in capsys.readouterr().out
    assert parts_of(open_dataset("imagenet", flat)) == before


def test_every_command_sees_the_same_split(flat, tmp_path, capsys):
    assert trained(flat, tmp_path / "run") == 0
    best = next((tmp_path / "run").glob("best_*.pt"))
    assert "29 + 8 images of 3 classes" in capsys.readouterr().out
    assert validate.main([str(best), "--num-workers", "0", "--device", "cpu", "--amp", "off"]) == 0
    assert "8 images of 3 classes" in capsys.readouterr().out
    add(flat, "ant", range(100, 110))
    out = tmp_path / "packed"
    assert pack_dataset.main(["--data-dir", str(flat), "--out", str(out), "--stored-sides", "16"]) == 0
    copy, index = open_dataset("imagenet", out), open_dataset("imagenet", flat)
    assert copy.fingerprint() == index.fingerprint() and copy.name == index.name == "my_photos"
    assert parts_of(copy) == parts_of(index)
    assert index.split_file[1] == ""  # packing wrote it down


def test_all_images_of_a_test_folder_are_scored(flat, tmp_path):
    index, saved = open_dataset("imagenet", flat), flags.defaults() | {"data_dir": str(flat)}
    payload = {"config": flags.plain(flags.make_config(saved)), "fingerprint": index.fingerprint()}
    classifier = predictions.Classifier({}, payload, None, 16, 1)
    splits.write_down(index)
    test, moved = shutil.copytree(flat, tmp_path / "test"), shutil.copytree(flat, tmp_path / "moved")
    for folder in (test, moved):
        (folder / splits.FILE).unlink()
    add(test, "cow", range(10, 20))

    def scored(data, *more) -> int:
        config, given = flags.parse(validate.build_parser(), ["BEST", "--data-dir", str(data), *more])
        return len(predictions.open_data(classifier, config, given, notes.append).index.val)

    notes = []
    assert scored(moved) == len(index.val) == 8  # the very images that the run was validated on
    assert "to train on" in notes.pop()
    assert scored(test) == 47 and not (test / splits.FILE).exists()
    assert notes.pop().startswith("test: all 47 images are for validation: ") and not notes
    assert scored(test, "--classes", "2") == 35 and scored(test, "--holdout", "0.5") == 19
    add(flat, "cow", range(10, 20))  # of which the run may learn some: it is no test folder
    assert scored(flat) == 9
    shutil.copy(flat / splits.FILE, test)
    assert scored(test) == 9


def test_parts_of_a_flat_folder(flat):
    index = open_dataset("imagenet", flat)
    part = open_dataset("imagenet", flat, classes=2, holdout=0.25, subset_size=8)
    official = {index.val.name(i) for i in range(len(index.val))}
    assert part.classes == ("ant", "bee") and len(part.train) == 8
    assert not official & parts_of(part).keys()
    assert len(open_dataset("imagenet", flat, subset_size=20).val) == 2


def test_a_class_mismatch_that_cannot_be_is_noted(flat):
    assert not any("--allow-class-mismatch" in note for note in open_dataset("imagenet", flat).notes)
    (*_, note) = open_dataset("imagenet", flat, allow_class_mismatch=True).notes
    assert note.startswith("note: --allow-class-mismatch is not used")


def test_names_that_are_not_utf8_are_written_down(flat, tmp_path):
    odd = os.path.join(os.fsencode(flat), b"ant", b"\xff\xfe.jpg")
    with open(odd, "wb") as file:
        file.write(encoded())
    before = open_dataset("imagenet", flat)
    splits.write_down(before)
    after = open_dataset("imagenet", flat)
    assert after.split_file[1] == "" and after.fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    ("make", "what", "fix"),
    [
        (lambda root: add(root, "dog", [1]), "fewer than two images in .*: dog\n", "fill or remove"),
        (lambda root: (root / "empty").mkdir(), "fewer than two images in .*: empty\n", "fill or remove"),
        (lambda root: add(root, "val", [1, 2]), "no folder train/", "move val away .*<class>/\\*.jpg"),
        (lambda root: add(root, "train", [1, 2]), "no folder val/", "rename train/ if it is a class"),
        (lambda root: add(root / "cifar", "train", [1, 2]), "no folder train/", "--data-dir .*cifar"),
    ],
)
def test_folders_that_are_no_classes_are_refused(make, what, fix, flat):
    make(flat)
    with pytest.raises(DataError, match=what) as caught:
        open_dataset("imagenet", flat)
    assert caught.match(f"fix: .*{fix}")


def test_the_classes_are_found_one_floor_down(flat):
    with pytest.raises(DataError, match="no folder train/") as caught:
        open_dataset("imagenet", flat.parent)
    assert caught.value.fix == f"use --data-dir {shlex.quote(str(flat))}"


def test_classes_whose_images_are_all_in_subfolders_are_told_from_datasets(tmp_path):
    for folder in ("cat/2020", "dog/2020", "dog/2021"):
        add(tmp_path, folder, range(4))
    with pytest.raises(DataError, match="no folder train/") as caught:
        open_dataset("imagenet", tmp_path)
    assert caught.value.fix.startswith("if cat, dog are classes, move an image of one of them out of")
    (tmp_path / "cat" / "2020" / "3.jpg").rename(tmp_path / "cat" / "3.jpg")
    index = open_dataset("imagenet", tmp_path)
    assert index.classes == ("cat", "dog") and len(parts_of(index)) == 12


def test_a_lone_class_and_a_lone_train_folder_are_explained(flat, tmp_path):
    add(tmp_path / "one", "cat", range(5))
    with pytest.raises(DataError, match="one class folder only, cat"):
        open_dataset("imagenet", tmp_path / "one")
    (tmp_path / "mine").mkdir()
    shutil.move(flat, tmp_path / "mine" / "train")
    with pytest.raises(DataError, match="no folder val/") as caught:
        open_dataset("imagenet", tmp_path / "mine")
    train_folder = caught.value.fix.split("--data-dir ")[1]
    assert open_dataset("imagenet", train_folder).name == "mine"


def test_photos_that_are_all_of_another_kind_are_explained(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.HEIC").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cat, dog \(skipped 6 files: 6 \.heic; convert them to JPEG\)"):
        open_dataset("imagenet", tmp_path)


# --- the name ---


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/photos", "photos"),
        ("data/photos/", "photos"),
        ("my photos (2026)", "my_photos_2026_"),
        ("..hidden", "hidden"),
        ("Fu\u0308ße", "Füße"),
        ("é" * 200, "é" * 50),
        ("/", "data"),
        ("=cmd|x", "cmd_x"),
        ("a\nb", "a_b"),
    ],
)
def test_a_folder_gives_a_safe_name(path, name):
    from base import schemas

    assert safe_name(path) == name
    assert schemas.check(schemas.FileName, name, "name", DataError, "") == name


def test_own_photos_go_by_their_folders_name(photos, photo_run, flat, tmp_path, capsys):
    assert photo_run.name == f"best_resnet_tiny_{photos.name}.pt"
    assert payload(photo_run.parent, "best")["eval"]["dataset"] == photos.name
    wnids = {"ant": "n00000001", "bee": "n00000002", "cow": "n00000003"}
    for name, wnid in wnids.items():
        (flat / name).rename(flat / wnid)
    index = open_dataset("imagenet", flat)
    assert (index.name, index.exif) == ("imagenet_1k", False)
    (flat / "n00000001").rename(flat / "ant")
    assert open_dataset("imagenet", flat).name == "my_photos"


def as_earlier_version(run_dir) -> None:
    """Rewrite a run as the version before wrote it: imagenet_1k, without orientation."""
    for kind in ("last", "best"):
        (path,) = run_dir.glob(f"{kind}_*.pt")
        content = torch.load(path, weights_only=True)
        content["eval"]["dataset"] = "imagenet_1k"
        del content["eval"]["exif"]
        torch.save(content, run_dir / f"{kind}_resnet_tiny_imagenet_1k.pt")
        path.unlink()
    env = json.loads((run_dir / "env.json").read_text())
    (run_dir / "env.json").write_text(json.dumps(env | {"checkpoint": "resnet_tiny_imagenet_1k.pt"}))


def test_a_run_of_an_earlier_version_goes_on_under_its_name(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    assert trained(photos, folder, "--batch-size", 8, "--epochs", 4, "--stop-after", 29) == 0
    as_earlier_version(folder)
    assert train.main(["--resume", "auto", "--save-dir", str(folder)]) == 0
    found = payload(folder)
    assert len(found["rows"]) == 4 and found["eval"]["dataset"] == "imagenet_1k"
    assert "exif" not in found["eval"]
    assert {path.name for path in folder.glob("best_*")} == {"best_resnet_tiny_imagenet_1k.pt"}
    assert validate.main([str(folder / "best_resnet_tiny_imagenet_1k.pt"), "--num-workers", "0"]) == 0
    assert "72 + 21 images" in capsys.readouterr().out


def test_packing_that_an_earlier_version_began_is_finished_as_it_began(photos, tmp_path):
    out, argv = tmp_path / "out", ["--data-dir", str(photos), "--stored-sides", "16", "--eval-sizes", "none"]
    assert pack_dataset.main([*argv, "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["exif"] and manifest["name"] == photos.name
    del manifest["exif"]
    (out / "manifest.json").write_text(json.dumps(manifest | {"name": "imagenet_1k"}))
    (out / "val/00000.arrow").unlink()
    assert pack_dataset.main([*argv, "--out", str(out)]) == 0
    index = open_dataset("imagenet", out)
    assert (index.name, index.exif) == ("imagenet_1k", False)


# --- orientation ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_pillow(orientation, kind):
    data = encoded(3, orientation, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        expected, stored = np.asarray(ImageOps.exif_transpose(image)), np.asarray(image)
    assert np.array_equal(decode(data, exif=True), expected)
    assert np.array_equal(decode(data), stored)
    assert np.array_equal(stored, expected) == (orientation == 1)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_orientation_of_unusual_jpegs(mode):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encoded())).convert(mode).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), exif=True).shape == (24, 16, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value):
    data = encoded(1, value or None)
    assert np.array_equal(decode(data, exif=True), decode(data))


def test_damaged_exif_leaves_the_pixels(flat):
    data = encoded(1, 6)
    at = data.index(b"Exif\0\0")
    for k in range(at + 6, at + 32):
        broken = data[:k] + bytes([data[k] ^ 0xFF]) + data[k + 1 :]
        pixels = decode(broken, exif=True)
        assert sorted(pixels.shape) == [3, 16, 24]


def test_training_and_scoring_see_upright_images_of_own_photos_only(tmp_path):
    for name in ("ant", "bee"):
        add(tmp_path / "own", name, range(5), orientation=6)
    shutil.copytree(tmp_path / "own", tmp_path / "net")
    for k, name in enumerate(("ant", "bee")):
        (tmp_path / "net" / name).rename(tmp_path / "net" / f"n0000000{k}")
    sizes = {"image_size": 16, "batch_size": 2}
    for folder, turned in (("own", True), ("net", False)):
        index = open_dataset("imagenet", tmp_path / folder)
        assert index.exif == turned
        ((seen, _),) = eval_loader(index.val, index, **sizes, crop=1.0)
        trained_on = [
            image for batch, _ in train_loader(index, augment=(), crop=1.0, **sizes) for image in batch
        ]
        for split, found in ((index.val, seen), (index.train, trained_on)):
            wanted = []
            for i in range(len(split)):
                with Image.open(split.path(i)) as image:
                    image = ImageOps.exif_transpose(image) if turned else image
                    wanted.append(centre_crop(np.asarray(image), 16, 16))
            restored = [
                np.rint((image.permute(1, 2, 0).numpy() * index.std + index.mean) * 255) for image in found
            ]
            assert {w.tobytes() for w in wanted} == {r.astype(np.uint8).tobytes() for r in restored}


def test_checkpoints_keep_the_orientation_and_packed_copies_are_upright(tmp_path, capsys):
    data, packed, run = tmp_path / "own", tmp_path / "packed", tmp_path / "run"
    for name in ("ant", "bee"):
        add(data, name, range(8), orientation=8)
    assert trained(data, run, "--batch-size", 4) == 0
    assert payload(run)["eval"]["exif"] is True
    argv = ["--data-dir", str(data), "--out", str(packed), "--stored-sides", "8", "--raw-sides", "12"]
    assert pack_dataset.main([*argv, "--eval-sizes", "16"]) == 0
    whole, copy = open_dataset("imagenet", data), open_dataset("imagenet", packed)
    assert copy.exif
    for side in copy.train.copies():
        for stored in side.read(range(len(side))):
            assert decode(stored).shape[0] > decode(stored).shape[1]  # upright without EXIF
    scores = []
    for index in (whole, copy):
        scores.append(next(iter(eval_loader(index.val, index, image_size=16, batch_size=4)))[0])
    assert torch.equal(*scores)
    capsys.readouterr()
    best = str(next(run.glob("best_*.pt")))
    plain = ["--num-workers", "0", "--device", "cpu", "--amp", "off"]
    photo = str(data / "ant" / "1.jpg")
    assert predict.main([best, photo, "--json", "-", *plain]) == 0
    turned = json.loads(capsys.readouterr().out)
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    assert predict.main([best, str(tmp_path / "turned.png"), "--json", "-", *plain]) == 0
    upright = json.loads(capsys.readouterr().out)
    assert turned["images"][0]["predictions"] == upright["images"][0]["predictions"]


# --- files that are passed over ---


def test_what_is_passed_over_is_counted_in_one_line(photos, photo_run, tmp_path, capsys):
    data = shutil.copytree(photos, tmp_path / "data")
    for i in range(10):
        (data / ("train" if i % 2 else "val") / "cat" / f"{i}.HEIC").write_bytes(b"x")
    for name in ("a.gif", "b.GIF", "._c.gif"):
        (data / "train" / "dog" / name).write_bytes(b"x")
    (data / "train" / "loose.jpg").write_bytes(encoded())
    line = "skipped 12 files: 10 .heic, 2 .gif; convert them to JPEG"
    notes = open_dataset("imagenet", data).notes
    assert notes[-1] == line and sum("skipped" in note for note in notes) == 1
    assert "train: ignored 1 images that are in no class folder (train/loose.jpg)" in notes
    assert "train: ignored 1 files that are not images (train/dog/._c.gif)" in notes
    assert predict.main([str(photo_run), str(data / "train"), "--num-workers", "0", "--json", "-"]) == 0
    output = capsys.readouterr()
    assert f"{data / 'train'}: skipped 7 files: 5 .heic, 2 .gif; convert them to JPEG" in output.err
    json.loads(output.out)


def test_every_kind_that_is_passed_over_is_not_read():
    assert not set(folders.OTHER_IMAGES) & set(folders.IMAGE_EXTENSIONS)


# --- defaults that fit ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_fitted_batches_work_in_every_phase(ranks):
    for phases in (1, 2, 3, 4):
        for images_ in (*range(ranks << phases, 300), 511, 1023):
            first = fitting_batch(images_, phases, ranks, 256)
            batches = phase_batches(first, phases)
            assert first <= min(images_, 256) and all(batch % ranks == 0 for batch in batches)
            assert batches[-1] >= 2 * ranks
            assert images_ // first >= 4 or first <= max(16, ranks << phases)
    assert fitting_batch(1024, 3, ranks, 256) == (256 if ranks & (ranks - 1) == 0 else 192)


@pytest.mark.parametrize(
    ("images_", "batch"), [(1024, 256), (1_281_167, 256), (1023, 128), (160, 32), (64, 16), (20, 16), (5, 4)]
)
def test_a_default_batch_follows_the_number_of_images(images_, batch):
    config, given = flags.parse(train.build_parser(), ["--num-workers", "0"])
    fitted, line = flags.fit_to_data(config, given, images_)
    assert fitted.batch_size == batch
    assert line == ("" if batch == 256 else f"batch size {batch}: fitted to {images_:,} images")
    assert dataclasses.replace(fitted, batch_size=256) == config


def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    shares = {"": 16, "1": 16, "4": 4, "5": 3, "32": 1, "0": 16, "many": 16}
    for ranks, share in shares.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert process.cores() == share, ranks


def test_a_line_names_all_that_was_fitted(monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: 2)
    config, given = flags.parse(train.build_parser(), ["--schedule", "cosine", "--epochs", "1"])
    fitted, line = flags.fit_to_data(config, given, 160)
    assert (fitted.batch_size, fitted.warmup_epochs, fitted.num_workers) == (32, 0.5, 8)
    assert line == "batch size 32, warm-up 0.5 epochs, 2 workers: fitted to 160 images, 1 epoch, 2 cores"


@pytest.mark.parametrize("words", ["--schedule cosine --epochs 10", "--schedule cosine", "--epochs 1", ""])
def test_a_warm_up_that_fits_is_left_alone(words):
    config, _ = flags.parse(train.build_parser(), words.split())
    assert config.warmup_epochs == 5.0


def test_only_a_typed_value_is_refused(flat, tmp_path):
    for words, what in (
        ("--batch-size 64", "batch size 64 at 16 px is larger than the 29 training images"),
        ("--schedule cosine --warmup-epochs 5", "--warmup-epochs 5 leaves none of 1 epochs"),
    ):
        with pytest.raises(UsageError, match=what):
            trained(flat, tmp_path / "run", *words.split())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch-size: 64\n")
    with pytest.raises(UsageError, match="batch size 64"):
        trained(flat, tmp_path / "run", "--config", recipe)
    assert trained(flat, tmp_path / "run", "--schedule", "cosine") == 0


def test_a_resumed_run_keeps_what_was_fitted(flat, tmp_path, capsys):
    words = ["--schedule", "cosine", "--epochs", "2"]
    assert trained(flat, tmp_path / "whole", *words) == 0
    assert trained(flat, tmp_path / "cut", *words, "--stop-after", "2") == 0
    capsys.readouterr()
    assert trained(flat, tmp_path / "cut", *words, "--resume", "auto") == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["batch_size"], config["warmup_epochs"]) == (16, 1.0)
    assert "fitted" not in capsys.readouterr().out


def test_images_added_to_a_run_are_noticed(flat, tmp_path):
    assert trained(flat, tmp_path / "run", "--epochs", "2", "--stop-after", "1") == 0
    add(flat, "ant", range(100, 110))
    with pytest.raises(CheckpointError, match=r"training images \(29 then, 37 now\)"):
        train.main(["--resume", "auto", "--save-dir", str(tmp_path / "run")])


def test_ranks_share_a_fitted_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    config, given = flags.parse(train.build_parser(), [])
    fitted, line = flags.fit_to_data(config, given, 10_000)
    assert fitted.batch_size == 192 and "batch size 192" in line and "10,000 images and 3 ranks" in line
    index = open_dataset("synthetic:train=10000,val=10,size=8", "")
    assert [phase.batch_size for phase in build.make_plan(fitted, index, 3)] == [192, 96, 48]


# --- hostile folders ---


def test_a_link_in_the_data_is_not_followed_when_the_split_is_written(flat, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (flat / "split.json.partial").symlink_to(tmp_path / "mine")
    splits.write_down(open_dataset("imagenet", flat))
    assert (tmp_path / "mine").read_text() == "precious" and (flat / "split.json").is_file()
    for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to("nowhere"), lambda p: p.mkdir()):
        path = flat / "split.json"
        path.unlink()
        make(path)
        with pytest.raises(DataError, match=r"split\.json"):
            open_dataset("imagenet", flat)
