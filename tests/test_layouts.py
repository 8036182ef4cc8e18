"""Every layout of a dataset on disk, and everything that can be wrong with one."""

import dataclasses
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from base.errors import DataError, UsageError
from sources import folders, generated, imagenet, layouts
from sources.index import stratified_split
from sources.layouts import open_dataset

ROOT = Path(__file__).parent.parent
IDS = ["n01440764", "n01443537", "n01484850"]  # tench, goldfish, great white shark
TRAIN = {f"{wnid}_{i}.JPEG": wnid for wnid in IDS for i in (7, 12)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": IDS[i % 3] for i in range(1, 7)}


def encoded(form, colour, size=(20, 16)):
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


JPEG = encoded("JPEG", (90, 60, 30))


def put(path, content=JPEG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_folders(root, train=TRAIN, val=VAL):
    for part, images in (("train", train), ("val", val)):
        for name, wnid in images.items():
            put(root / part / wnid / name)
    return root


def make_flat(root, below=""):
    for name, wnid in TRAIN.items():
        put(root / below / "train" / wnid / name)
    for name in VAL:
        put(root / below / "val" / name)
    return root


def add_csv(place):
    rows = [f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for name, wnid in VAL.items()]
    put(place / "LOC_val_solution.csv", ("ImageId,PredictionString\n" + "".join(rows)).encode())


def add_xml(place):
    for name, wnid in VAL.items():
        text = (
            f"<annotation><filename>{name[:-5]}</filename><object><name>{wnid}</name></object></annotation>"
        )
        put(place / "Annotations/CLS-LOC/val" / f"{name[:-5]}.xml", text.encode())


def add_devkit(place):
    from scipy.io import savemat

    data = place / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    numbers = {
        wnid: number for number, wnid in enumerate(reversed(IDS), start=1)
    }  # not in the order of the ids
    rows = np.array([(n, w) for w, n in numbers.items()], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(data / "meta.mat", {"synsets": rows.reshape(-1, 1)})
    lines = [f"{numbers[VAL[name]]}\n" for name in sorted(VAL)]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))


def class_of(found, split):
    """{file name: class} of a split."""
    return {split.name(i).rpartition("/")[2]: found.classes[split.labels[i]] for i in range(len(split))}


def layout_folders(root):
    make_folders(root)


def layout_kaggle_csv(root):
    add_csv(make_flat(root, "ILSVRC/Data/CLS-LOC"))


def layout_kaggle_xml(root):
    add_xml(make_flat(root, "ILSVRC/Data/CLS-LOC") / "ILSVRC")


def layout_flat_devkit(root):
    add_devkit(make_flat(root))


def layout_flat_csv(root):
    add_csv(make_flat(root))


LAYOUTS = [layout_folders, layout_kaggle_csv, layout_kaggle_xml, layout_flat_devkit, layout_flat_csv]


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_every_layout_of_the_same_data_gives_the_same_labels(make, tmp_path):
    make(tmp_path)
    found = open_dataset("imagenet", tmp_path)
    assert (found.name, found.classes) == ("imagenet_1k", tuple(IDS))
    assert class_of(found, found.train) == TRAIN
    assert class_of(found, found.val) == VAL
    assert found.class_names == ("tench", "goldfish", "great white shark")
    assert os.path.isfile(found.train.path(0)) and found.val.read([0]) == [JPEG]


def test_the_ilsvrc_tree_is_found_from_each_of_its_levels(tmp_path):
    layout_kaggle_csv(tmp_path)
    prints = [
        open_dataset("imagenet", tmp_path / below).fingerprint()
        for below in ("", "ILSVRC", "ILSVRC/Data/CLS-LOC")
    ]
    assert prints[0] == prints[1] == prints[2]


def test_a_datasets_fingerprint_does_not_depend_on_its_place(tmp_path):
    one, other = make_folders(tmp_path / "a"), make_folders(tmp_path / "b")
    assert open_dataset("imagenet", one).fingerprint() == open_dataset("imagenet", other).fingerprint()
    (other / "val" / IDS[0] / "ILSVRC2012_val_00000003.JPEG").rename(other / "val" / IDS[0] / "renamed.JPEG")
    assert open_dataset("imagenet", one).fingerprint() != open_dataset("imagenet", other).fingerprint()


def test_class_names_that_only_look_alike_are_explained(tmp_path):
    for part, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        put(tmp_path / part / name / "x.jpg")
    with pytest.raises(DataError, match=r"only in train: caf.*; only in val: caf") as caught:
        open_dataset("imagenet", tmp_path)
    assert "look alike" in caught.value.fix


def test_files_that_are_not_images_are_skipped_and_counted(tmp_path):
    make_folders(tmp_path)
    for name in (".DS_Store", "._n01440764_7.JPEG", "Thumbs.db", "list.txt", "moving.gif"):
        put(tmp_path / "train" / IDS[0] / name)
    put(tmp_path / "train" / ".ipynb_checkpoints" / "n01440764_7.JPEG")
    put(tmp_path / "train" / "#recycle" / "n01440764_7.JPEG")
    put(tmp_path / "train" / IDS[0] / "@eaDir" / "n01440764_7.JPEG" / "SYNOPHOTO_THUMB_M.jpg")
    put(tmp_path / "train" / IDS[0] / "LOUD.PNG")
    put(tmp_path / "train" / IDS[0] / "deeper" / "x.webp")
    found = open_dataset("imagenet", tmp_path)
    assert len(found.train) == len(TRAIN) + 2
    assert "ignored 7 files that are not images" in found.notes[0] and ".DS_Store" in found.notes[0]
    assert found.notes[1] == "skipped 1 file: 1 .gif; convert it to JPEG"


@pytest.mark.parametrize(
    "name", [b"with space.jpg", b"new\nline.jpg", "Füße.jpg".encode(), b"\xff\xfe.jpg", b"$(x);.jpg"]
)
def test_odd_file_names_work(name, tmp_path):
    make_folders(tmp_path)
    with open(os.path.join(os.fsencode(tmp_path), b"train", IDS[0].encode(), name), "wb") as file:
        file.write(b"odd")
    found = open_dataset("imagenet", tmp_path)
    assert b"odd" in found.train.read(range(len(found.train)))
    assert len(found.fingerprint()["train"]) == 64


def refused(kind, *args, **options):
    with pytest.raises(kind) as caught:
        open_dataset(*args, **options)
    assert "\n" not in caught.value.what and "\n" not in caught.value.fix
    return caught.value


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "test"])
def test_a_validation_folder_with_another_name_is_found(name, tmp_path):
    for part in ("train", name):
        for key in ("cat", "dog"):
            put(tmp_path / part / key / "a.jpg")
    assert refused(DataError, "imagenet", tmp_path).fix == f"rename {name}/ to val/"


def test_a_missing_or_empty_directory_names_the_path_and_the_accepted_layouts(tmp_path):
    error = refused(DataError, "imagenet", tmp_path)
    assert str(tmp_path) in error.what and "train/<class>" in error.fix and "val/<class>" in error.fix
    error = refused(DataError, "imagenet", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in error.what and "--data-dir" in error.fix
    assert "--dataset digits" in error.fix and "download_imagenet.py --dataset cifar10" in error.fix


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_part_is_named(missing, tmp_path):
    make_folders(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert f"no folder {missing}/" in refused(DataError, "imagenet", tmp_path).what


def test_all_classes_without_images_are_listed(tmp_path):
    make_folders(tmp_path)
    for name in ("n00000001", "n00000002"):
        (tmp_path / "train" / name).mkdir()
        put(tmp_path / "val" / name / "x.JPEG")
    error = refused(DataError, "imagenet", tmp_path)
    assert "n00000001, n00000002" in error.what and IDS[0] not in error.what


def test_differing_classes_are_listed_and_val_is_mapped_by_train(tmp_path):
    val = {name: wnid for name, wnid in VAL.items() if wnid != IDS[0]}
    make_folders(tmp_path, val=val)
    error = refused(DataError, "imagenet", tmp_path)
    assert f"only in train: {IDS[0]}" in error.what and "--allow-class-mismatch" in error.fix
    found = open_dataset("imagenet", tmp_path, allow_class_mismatch=True)
    assert class_of(found, found.val) == val  # not shifted by the missing first class
    put(tmp_path / "val" / "n00000009" / "x.JPEG")
    for allow in (False, True):
        assert (
            "only in val: n00000009"
            in refused(DataError, "imagenet", tmp_path, allow_class_mismatch=allow).what
        )


def test_an_empty_validation_class_is_a_missing_one(tmp_path):
    make_folders(tmp_path, val={name: wnid for name, wnid in VAL.items() if wnid != IDS[1]})
    (tmp_path / "val" / IDS[1]).mkdir()
    assert f"only in train: {IDS[1]}" in refused(DataError, "imagenet", tmp_path).what


def test_a_flat_val_without_labels_is_explained(tmp_path):
    error = refused(DataError, "imagenet", make_flat(tmp_path))
    assert (
        "no class folders" in error.what
        and "LOC_val_solution.csv" in error.fix
        and "download_imagenet.py" in error.fix
    )


def test_a_flat_val_with_an_image_that_has_no_label(tmp_path):
    layout_flat_csv(tmp_path)
    put(tmp_path / "val" / "ILSVRC2012_val_00000099.JPEG")
    assert "ILSVRC2012_val_00000099" in refused(DataError, "imagenet", tmp_path).what


def test_linked_folders_count_once(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train" / IDS[0] / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / IDS[0] / "self").symlink_to(tmp_path / "train" / IDS[0])
    (tmp_path / "train" / IDS[0] / "other").symlink_to(tmp_path / "train" / IDS[1])
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train" / IDS[2])
    found = open_dataset("imagenet", tmp_path)
    assert class_of(found, found.train) == TRAIN
    assert any("links to folders" in note for note in found.notes)


def test_a_linked_dataset_works(tmp_path):
    make_folders(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    for part in ("train", "val"):
        (tmp_path / "linked" / part).mkdir()
        for wnid in IDS:  # as imagenet100 is often made
            (tmp_path / "linked" / part / wnid).symlink_to(tmp_path / "real" / part / wnid)
    found = open_dataset("imagenet", tmp_path / "real")
    assert open_dataset("imagenet", tmp_path / "root").fingerprint() == found.fingerprint()
    assert open_dataset("imagenet", tmp_path / "linked").fingerprint() == found.fingerprint()


def test_broken_links_are_listed(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train" / IDS[0] / "gone.JPEG").symlink_to(tmp_path / "nowhere.JPEG")
    (tmp_path / "train" / IDS[1] / "self.JPEG").symlink_to("self.JPEG")
    (tmp_path / "val" / "n00000005").symlink_to(tmp_path / "nowhere")
    error = refused(DataError, "imagenet", tmp_path)
    assert "2 links" in error.what and "gone.JPEG" in error.what and "self.JPEG" in error.what


def test_an_unreadable_folder_is_an_error_not_fewer_samples():
    with tempfile.TemporaryDirectory() as name:
        root = make_folders(Path(name))
        os.chmod(root, 0o755)
        os.chmod(root / "train" / IDS[1], 0o000)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)  # root may read everything
            error = refused(DataError, "imagenet", root)
        finally:
            os.seteuid(was)
            os.chmod(root / "train" / IDS[1], 0o755)
    assert "Permission denied" in error.what and IDS[1] in error.what


def test_class_lists(tmp_path):
    make_folders(tmp_path)
    wanted = tmp_path / "list.txt"
    wanted.write_text(f"{IDS[2]} great white shark\n\n# two of them\n{IDS[0]}\n", "utf-8-sig")  # Notepad
    for dataset in ("imagenet", "imagenet100"):
        found = open_dataset(dataset, tmp_path, class_list=wanted)
        assert found.classes == (IDS[0], IDS[2])
        assert class_of(found, found.val) == {n: w for n, w in VAL.items() if w != IDS[1]}
    layout_flat_csv(tmp_path / "flat")
    assert len(open_dataset("imagenet", tmp_path / "flat", class_list=wanted).val) == 4
    wanted.write_text(f"{IDS[0]}\nn00000001\nn00000002\n")
    assert "n00000001, n00000002" in refused(DataError, "imagenet", tmp_path, class_list=wanted).what
    assert "cannot read" in refused(DataError, "imagenet", tmp_path, class_list=tmp_path / "no.txt").what
    wanted.write_text(f"{IDS[0]}\n")
    assert "names 1 class" in refused(DataError, "imagenet", tmp_path, class_list=wanted).what


def test_imagenet100_is_the_published_list_over_imagenet(tmp_path):
    listed = imagenet.read_class_list(ROOT / "sources/imagenet100.txt")
    names = [
        line.split(" ", 1) for line in (ROOT / "sources/imagenet_names.txt").read_text().splitlines()[2:]
    ]
    ids = [wnid for wnid, _ in names]
    assert len(listed) == 100 and listed <= {wnid.encode() for wnid in ids}
    assert len(ids) == 1000 == len({name for _, name in names}) and ids == sorted(ids)
    keep = sorted(wnid.decode() for wnid in listed)
    classes = [*keep, *(wnid for wnid in ids if wnid not in keep)][:102]
    make_folders(
        tmp_path, {f"{wnid}_1.JPEG": wnid for wnid in classes}, {f"v{wnid}.JPEG": wnid for wnid in classes}
    )
    found = open_dataset("imagenet100", tmp_path)
    assert (found.name, list(found.classes)) == ("imagenet100", keep)
    assert len(open_dataset("imagenet", tmp_path).classes) == 102


def test_imagenet100_as_class_folders_is_used_as_it_is(tmp_path):
    assert open_dataset("imagenet100", make_folders(tmp_path)).classes == tuple(IDS)


def test_imagenet100_as_on_kaggle(tmp_path):
    for part, wnids in (("train.X1", IDS[:2]), ("train.X2", IDS[2:]), ("val.X", IDS)):
        for wnid in wnids:
            for name in (n for n, w in (VAL if part == "val.X" else TRAIN).items() if w == wnid):
                put(tmp_path / part / wnid / name)
    found = open_dataset("imagenet100", tmp_path)
    assert class_of(found, found.train) == TRAIN and class_of(found, found.val) == VAL
    assert refused(DataError, "imagenet", tmp_path).fix == "this looks like --dataset imagenet100"


def make_tiny(root, per_class=(3, 2)):
    rows = []
    for c, wnid in enumerate(["n01443537", "n01629819"]):
        for i in range(per_class[0]):
            put(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        put(root / "train" / wnid / f"{wnid}_boxes.txt")
        for i in range(per_class[1]):
            name = f"val_{10 * i + c}.JPEG"  # classes alternate
            put(root / "val" / "images" / name)
            rows.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    put(root / "val" / "val_annotations.txt", "".join(sorted(rows)).encode())
    put(root / "words.txt", b"n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")
    put(root / "test" / "images" / "test_0.JPEG")
    return root


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_as_published(below, tmp_path):
    make_tiny(tmp_path / below)
    found = open_dataset("tiny-imagenet", tmp_path)
    assert (len(found.train), len(found.val), found.native_size) == (6, 4, 64)
    assert class_of(found, found.val) == {
        "val_0.JPEG": "n01443537",
        "val_10.JPEG": "n01443537",
        "val_1.JPEG": "n01629819",
        "val_11.JPEG": "n01629819",
    }
    assert found.class_names == ("goldfish", "European fire salamander")
    assert found.notes == () and found.mean == imagenet.TINY_MEAN


@pytest.mark.parametrize("split", ["official", "70-30"])
def test_tiny_imagenet_has_only_the_listed_classes(split, tmp_path):
    make_tiny(tmp_path)
    put(tmp_path / "train" / "n09246464" / "images" / "other.JPEG")
    put(tmp_path / "val" / "images" / "val_99.JPEG")
    with open(tmp_path / "val" / "val_annotations.txt", "a") as rows:
        rows.write("val_99.JPEG\tn09246464\t0\t32\t44\t62\n")
    wanted = tmp_path / "list.txt"
    wanted.write_text("# two\nn01629819 a salamander\nn01443537\n")
    found = open_dataset("tiny-imagenet", tmp_path, class_list=wanted, split=split)
    assert found.classes == ("n01443537", "n01629819") and len(found.train) + len(found.val) == 10
    assert set(found.train.labels) | set(found.val.labels) == {0, 1}
    wanted.write_text("n01443537\nn00000001\n")
    assert "n00000001" in refused(DataError, "tiny-imagenet", tmp_path, class_list=wanted).what


def test_tiny_imagenet_70_30_pools_and_splits_anew(tmp_path):
    make_tiny(tmp_path, per_class=(12, 8))
    official, found = (
        open_dataset("tiny-imagenet", tmp_path),
        open_dataset("tiny-imagenet", tmp_path, split="70-30"),
    )
    assert np.bincount(found.train.labels).tolist() == [14, 14] and np.bincount(
        found.val.labels
    ).tolist() == [6, 6]
    pool = class_of(found, found.train) | class_of(found, found.val)
    assert pool == class_of(official, official.train) | class_of(official, official.val)
    assert found.fingerprint() == open_dataset("tiny-imagenet", tmp_path, split="70-30").fingerprint()
    assert os.path.isfile(found.val.path(0)) and found.class_names == official.class_names


def test_70_30_of_the_real_sizes_is_77000_and_33000():
    labels = np.repeat(np.arange(200), 550)
    train, val = stratified_split(labels, 0.3, seed=0)
    assert (len(train), len(val)) == (77_000, 33_000)
    assert set(np.bincount(labels[val])) == {165} and not set(train) & set(val)


def test_only_a_class_folder_whose_name_is_not_text_is_refused(photos, tmp_path):
    """Class names go into checkpoints, tables and pages; file names only into messages."""
    root = os.fsencode(shutil.copytree(photos, tmp_path / "d"))
    for part in (b"train", b"val"):
        image = min(os.listdir(os.path.join(root, part, b"cat")))
        os.rename(
            os.path.join(root, part, b"cat", image), os.path.join(root, part, b"cat", b"\xff\xfe\x1b.JPEG")
        )
        put(Path(os.fsdecode(os.path.join(root, part, b"cat", b"\xff\x1b.txt"))), b"")
    found = open_dataset("imagenet", os.fsdecode(root))
    assert len(found.train) == 72 and all(note.isprintable() and note.isascii() for note in found.notes)
    for part in (b"train", b"val"):
        os.rename(os.path.join(root, part, b"dog"), os.path.join(root, part, b"\xff\xfe"))
    error = refused(DataError, "imagenet", os.fsdecode(root))
    assert r"b'\xff\xfe'" in error.what and "rename" in error.fix
    with pytest.raises(DataError, match="not valid text"):
        dataclasses.replace(found, class_names=("a", "b", os.fsdecode(b"\xff")))


@pytest.mark.parametrize("damage", [
    b"", b"a,b\n1,2\n", b"ImageId,PredictionString\n\xff\xff,n01440764\n", b"ImageId,PredictionString\nx\n",
    b"ImageId,PredictionString\nx,\n", b"ImageId,PredictionString\nx," + b"n" * 200_000,
    b"ImageId\0,PredictionString\nx,n\0",
], ids=range(7))  # fmt: skip
def test_damaged_labels_have_no_traceback(damage, tmp_path):
    make_flat(tmp_path)
    put(tmp_path / "LOC_val_solution.csv", damage)
    refused(DataError, "imagenet", tmp_path)
    (tmp_path / "LOC_val_solution.csv").unlink()
    devkit = tmp_path / "ILSVRC2012_devkit_t12/data"
    put(devkit / "ILSVRC2012_validation_ground_truth.txt", b"x\n1\n")
    refused(DataError, "imagenet", tmp_path)  # without meta.mat
    put(devkit / "meta.mat", damage)
    assert str(devkit) in refused(DataError, "imagenet", tmp_path).what


def test_only_the_beginning_of_an_annotation_is_read(tmp_path):
    """Without an XML parser, entities that expand to gigabytes do nothing; of a huge file, little is read."""
    make_flat(tmp_path)
    laughs = (
        b"<!DOCTYPE x [<!ENTITY a '"
        + b"ha" * 1000
        + b"'>]><x>"
        + b"&a;" * 1000
        + b"<name>n01440764</name></x>"
    )
    for name in VAL:
        put(tmp_path / "Annotations/CLS-LOC/val" / f"{name[:-5]}.xml", laughs)
    put(tmp_path / "Annotations/CLS-LOC/val" / os.fsdecode(b"\xff.xml"), b"<name>n01440764</name>")
    assert len(open_dataset("imagenet", tmp_path, allow_class_mismatch=True).val) == 6
    path = tmp_path / "Annotations/CLS-LOC/val" / "ILSVRC2012_val_00000001.xml"
    path.write_bytes(b" " * imagenet.XML_BYTES + laughs)
    assert "have no label" in refused(DataError, "imagenet", tmp_path).what


class Py2:
    """Pickles as Python 2 did, which made CIFAR's files: byte strings with opcodes Python 3 never writes."""

    def string(self, value):
        return b"T" + len(value).to_bytes(4, "little") + value

    def value(self, value):
        if isinstance(value, dict):
            return b"}(" + b"".join(self.string(k) + self.value(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.value, value)) + b"e"
        if isinstance(value, int):
            return b"J" + value.to_bytes(4, "little", signed=True)
        if isinstance(value, np.ndarray):
            empty = (
                b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85"
                + self.string(b"b")
                + b"tR"
            )
            dtype = (
                b"cnumpy\ndtype\n("
                + self.string(b"u1")
                + b"K\x00K\x01tR"
                + b"(K\x03"
                + self.string(b"|")
                + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            shape = b"(" + b"".join(map(self.value, value.shape)) + b"t"
            return empty + b"(K\x01" + shape + dtype + b"\x89" + self.string(value.tobytes()) + b"tb"
        return self.string(value)

    def dumps(self, value):
        return b"\x80\x02" + self.value(value) + b"."


class Py3:
    def __init__(self, protocol):
        self.protocol = protocol

    def dumps(self, value):
        return pickle.dumps(value, protocol=self.protocol)


def make_cifar(root, which, dumps):
    """Write a small CIFAR archive; return the training images (n, 32, 32, 3) and labels."""
    rng = np.random.default_rng(0)
    folder = root / which.folder
    names = [b"class%d" % i for i in range(4)]
    put(folder / which.meta, dumps({which.class_names: names, b"num_cases_per_batch": 2}))
    images, labels = [], []
    for file in (*which.train, which.val):
        batch, numbers = rng.integers(0, 256, (4, 32, 32, 3), np.uint8), rng.permutation(4).tolist()
        rows = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)).reshape(4, 3072)
        put(
            folder / file,
            dumps({b"data": rows, which.labels: numbers, b"filenames": [b"a.png", b"", b"\xe9", b"\0"]}),
        )
        if file != which.val:
            images.append(batch)
            labels += numbers
    return np.concatenate(images), labels


@pytest.mark.parametrize(
    "writer", [Py2(), *map(Py3, range(6))], ids=["py2", *(f"protocol{k}" for k in range(6))]
)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_from_its_python_archive(dataset, writer, tmp_path):
    from sources.cifar import CIFAR10, CIFAR100

    which = CIFAR10 if dataset == "cifar10" else CIFAR100
    images, labels = make_cifar(tmp_path, which, writer.dumps)
    for data_dir in (tmp_path, tmp_path / which.folder):
        found = open_dataset(dataset, data_dir)
        assert np.array_equal(np.stack(found.train.read(range(len(images)))), images)
        assert found.train.labels.tolist() == labels and len(found.val) == 4
        assert found.classes == ("class0", "class1", "class2", "class3") and found.native_size == 32
    if dataset == "cifar100":  # 004_* of the documents
        assert found.mean == (0.5071, 0.4865, 0.4409) and found.std == (0.2673, 0.2564, 0.2762)


class Runs:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("payload", [os.system, os.mkdir, eval, print], ids=lambda f: f.__name__)
def test_code_in_a_cifar_archive_is_refused(payload, tmp_path, monkeypatch):
    from sources.cifar import CIFAR100

    monkeypatch.chdir(tmp_path)
    make_cifar(tmp_path, CIFAR100, pickle.dumps)
    argument = {"system": "mkdir sentinel", "eval": "__import__('os').mkdir('sentinel')"}.get(
        payload.__name__, "sentinel"
    )
    (tmp_path / CIFAR100.folder / "train").write_bytes(pickle.dumps({b"data": Runs(payload, argument)}))
    assert "contains code" in refused(DataError, "cifar100", tmp_path).what
    assert not (tmp_path / "sentinel").exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
TYPE = b"cnumpy\ndtype\n(X\x02\0\0\0%bK\x00K\x01tR"
HOSTILE = {
    "another codec": b"c_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0hextR",
    "another function of the codecs": b"c_codecs\ndecode\n(C\x01aX\x06\0\0\0latin1tR",
    "no text at all": b"c_codecs\nencode\n(K\x05X\x06\0\0\0latin1tR",
    "the same text a thousand times": b"X\x00\x40\0\0" + b"a" * 0x4000 + b"q\x010"
    + b"c_codecs\nencode\n(h\x01X\x06\0\0\0latin1tR0" * 1000 + b"N",
    "many empty bytes at once": b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR",
    "a memo of four gigabytes": b"Nr\xff\xff\xff\x0f",
    "a shape of a petabyte": ARRAY + b"(K\x01(\x8a\x07\0\0\0\0\0\0\x04t" + TYPE % b"u1" + b"\x89C\x00tb",
    "objects from raw bytes": ARRAY + b"(K\x01(K\x01t" + TYPE % b"O8"
    + b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    + b"\x89C\x08AAAAAAAAtb",
    "an array that is never filled": ARRAY,
    "a class of ours": b"csources.cifar\nPlainUnpickler\n(C\x00tR",
    "a name that leads on": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    "an array class": b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR",
}  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_cifar_archive_is_refused_in_little_memory(value, tmp_path):
    import resource

    from sources.cifar import CIFAR100

    make_cifar(tmp_path, CIFAR100, pickle.dumps)
    (tmp_path / CIFAR100.folder / "train").write_bytes(
        b"\x80\x04}(C\x04data" + value + b"C\x0bfine_labels]K\x00au."
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(DataError, "cifar100", tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize(
    "meta", [{}, {b"fine_label_names": 5}, {b"fine_label_names": [1, 2]}, {b"fine_label_names": [b"\xff"]}]
)
def test_a_cifar_archive_with_other_contents_is_refused(meta, tmp_path):
    from sources.cifar import CIFAR100

    make_cifar(tmp_path, CIFAR100, pickle.dumps)
    path = tmp_path / CIFAR100.folder
    (path / "meta").write_bytes(pickle.dumps(meta))
    refused(DataError, "cifar100", tmp_path)
    make_cifar(tmp_path, CIFAR100, pickle.dumps)
    for content in (
        {},
        {b"data": 1, b"fine_labels": 1},
        {b"data": [], b"fine_labels": []},
        {b"data": b"x", b"fine_labels": {}},
        {b"data": np.zeros((0, 3072), np.uint8), b"fine_labels": []},
    ):
        (path / "train").write_bytes(pickle.dumps(content))
        refused(DataError, "cifar100", tmp_path)


@pytest.mark.parametrize("damage", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>", lambda b: b[:-1],
    lambda b: pickle.dumps({b"data": np.zeros((4, 3072)), b"fine_labels": [0] * 4}),
    lambda b: pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [9] * 4}),
    lambda b: pickle.dumps([1]),
])  # fmt: skip
def test_a_damaged_cifar_archive_is_refused(damage, tmp_path):
    from sources.cifar import CIFAR100

    make_cifar(tmp_path, CIFAR100, pickle.dumps)
    path = tmp_path / CIFAR100.folder / "train"
    path.write_bytes(damage(path.read_bytes()))
    assert "cifar-100-python" in refused(DataError, "cifar100", tmp_path).what


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    found, bundle = open_dataset("digits", "not used"), load_digits()
    assert (len(found.train), len(found.val), found.native_size) == (1438, 359, 8)
    assert np.ptp(np.bincount(found.val.labels)) <= 2
    everything = np.concatenate([found.train.images, found.val.images])
    assert np.allclose(everything.mean() / 255, found.mean, atol=1e-4)
    assert np.allclose(everything.std() / 255, found.std, atol=1e-4)
    pairs = {
        (image.tobytes(), label)
        for s in (found.train, found.val)
        for image, label in zip(s.images, s.labels, strict=True)
    }
    grey = np.rint(bundle.images * 255 / 16).astype(np.uint8)
    assert pairs == {(np.dstack([g] * 3).tobytes(), t) for g, t in zip(grey, bundle.target, strict=True)}
    assert open_dataset("digits", "").fingerprint() == found.fingerprint()


def test_synthetic_images_depend_on_their_id_alone_and_show_their_class():
    found = open_dataset("synthetic:classes=6,train=90,val=60,size=32", "not used")
    assert np.array_equal(found.train.read([7, 3])[1], found.train.read([3])[0])
    train, val = (np.stack(s.read(range(len(s)))) for s in (found.train, found.val))
    assert train.dtype == np.uint8 and train.shape == (90, 32, 32, 3) and len(np.unique(train, axis=0)) == 90
    assert not any((image == train).all((1, 2, 3)).any() for image in val[:10])
    colour = train.mean((1, 2))
    centres = np.stack([colour[found.train.labels == k].mean(0) for k in range(6)])
    guesses = np.linalg.norm(val.mean((1, 2))[:, None] - centres, axis=-1).argmin(1)
    assert (guesses == found.val.labels).mean() > 0.6  # chance is 0.17
    assert open_dataset("synthetic", "").fingerprint() != found.fingerprint()


def test_a_huge_synthetic_dataset_costs_labels_only():
    found = open_dataset("synthetic:classes=1000,train=1281167,val=50000,size=224", "")
    assert len(found.train) == 1_281_167 and found.train.read([1_281_166])[0].shape == (224, 224, 3)
    assert not [
        key for key, value in vars(found.train).items() if isinstance(value, np.ndarray) and key != "labels"
    ]


@pytest.mark.parametrize("text", ["classes=0", "classes=x", "colour=3", "classes", "train=-1"])
def test_an_impossible_size_is_a_usage_error(text):
    assert "synthetic" in refused(UsageError, f"synthetic:{text}", "").fix


@pytest.mark.parametrize("dataset", ["imagnet", "hf", "hf:", "digits:3", "digits:", ""])
def test_an_unknown_dataset_is_a_usage_error_that_lists_the_known(dataset, tmp_path):
    assert "hf:<" in refused(UsageError, dataset, tmp_path).fix


def test_options_of_one_dataset_are_refused_for_another(tmp_path):
    assert "tiny-imagenet" in refused(UsageError, "digits", tmp_path, split="70-30").fix
    assert "imagenet100" in refused(UsageError, "cifar10", tmp_path, class_list="x").fix


def test_a_packed_directory_is_opened_whatever_dataset_is_named(tmp_path, monkeypatch):
    put(tmp_path / "manifest.json", b"{}")
    monkeypatch.setitem(
        sys.modules, "sources.packed", type("Stub", (), {"open_packed": staticmethod(lambda path: path)})
    )
    assert open_dataset("imagenet", tmp_path) == str(tmp_path) == open_dataset("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("sign,dataset", [
    ("tiny-imagenet-200/x", "tiny-imagenet"), ("cifar-100-python/meta", "cifar100"),
    ("cifar-10-batches-py/x", "cifar10"), ("train.X1/a/b.jpg", "imagenet100"),
])  # fmt: skip
def test_another_dataset_than_the_named_one_is_recognised(sign, dataset, tmp_path):
    put(tmp_path / sign)
    assert refused(DataError, "imagenet", tmp_path).fix == f"this looks like --dataset {dataset}"


def test_archives_beside_their_unpacked_folders_are_not_the_fix_of_another_error(tmp_path):
    make_folders(tmp_path)
    put(tmp_path / "ILSVRC2012_img_train.tar")
    error = refused(DataError, "imagenet", tmp_path, class_list=str(tmp_path / "typo.txt"))
    assert "typo.txt" in error.what and "unpack the archives" not in error.fix


def test_an_unfinished_packed_copy_is_called_that(tmp_path):
    put(tmp_path / "packing.json")
    error = refused(DataError, "imagenet", tmp_path)
    assert error.what.endswith("is unfinished") and "pack_dataset.py" in error.fix


def test_archives_that_are_not_unpacked_are_recognised(tmp_path):
    put(tmp_path / "ILSVRC2012_img_val.tar")
    assert "download_imagenet.py --method manual" in refused(DataError, "imagenet", tmp_path).fix


def make_hub(datasets, root, train=(1, 0, 1), val=(0, 1), kind=None, first=True):
    """A dataset of the Hub as a local folder of parquet files: by default 3 + 2 images of cat and dog.

    first: whether the first row of each part has an image
    """
    kind = kind or datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"label": kind, "image": datasets.Image()})
    root.mkdir(parents=True, exist_ok=True)
    for part, labels in (("train", train), ("validation", val)):
        images = [{"bytes": png(k), "path": None} if k or first else None for k in range(len(labels))]
        rows = {"label": labels, "image": images}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{part}.parquet")


def png(value):
    return encoded("PNG", (value, 0, 0))


def test_hugging_face_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_hub(datasets, tmp_path / "pets")
    found = open_dataset(f"hf:{tmp_path / 'pets'}", "not used")
    assert (found.name, found.classes, found.train.labels.tolist()) == ("pets", ("cat", "dog"), [1, 0, 1])
    assert found.train.read([2, 0]) == [png(2), png(0)] and found.val.labels.tolist() == [0, 1]
    assert found.fingerprint() == open_dataset(f"hf:{tmp_path / 'pets'}", "").fingerprint()
    assert "cannot load" in refused(DataError, f"hf:{tmp_path / 'nothing'}", "").what
    make_hub(datasets, tmp_path / "words", ["cat", "dog"], ["cat"], datasets.Value("string"))
    assert "not class numbers" in refused(DataError, f"hf:{tmp_path / 'words'}", "").what


@pytest.mark.parametrize(("train", "val", "words"), [
    ([0, -1, 1], [0], r"column label of .*/train holds -1, none of the 2 classes"),
    ([0, None, 1], [0], r"column label of .*/train holds -1, none of the 2 classes"),
    ([0, 1], [None, None], ".* has no labelled validation split"),
    ([0, 1, 0], [1, 2], r"column label of .*/validation holds 2, none of the 2 classes"),
    ([0, 1, 2], [1, 2], ""),
])  # fmt: skip
def test_hugging_face_labels_that_are_no_class_are_refused(train, val, words, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_hub(datasets, tmp_path / "pets", train, val, datasets.Value("int64"))
    monkeypatch.setattr(datasets.Dataset, "__iter__", None)  # row by row takes 90 times as long
    if words:
        assert re.match(words, refused(DataError, f"hf:{tmp_path / 'pets'}", "").what)
    else:
        assert len(open_dataset(f"hf:{tmp_path / 'pets'}", "").classes) == 3


def test_a_hugging_face_row_without_an_image_is_an_empty_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_hub(datasets, tmp_path / "pets", first=False)
    assert open_dataset(f"hf:{tmp_path / 'pets'}", "").train.read([0, 1]) == [b"", png(1)]


def test_hf_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(UsageError, "hf:someone/something", "").fix == "pip install datasets"


def test_human_names_come_from_the_data_where_ours_do_not_know(tmp_path):
    put(tmp_path / "words.txt", b"n00000001\tthing, object\nn01440764\tsomething else\n")
    assert imagenet.human_names(("n01440764", "n00000001", "n00000002"), tmp_path) == (
        "tench",
        "thing",
        "n00000002",
    )
    (tmp_path / "words.txt").write_bytes(b"n00000002\tsecond, 2nd \xff\nno tab\n\n")
    assert imagenet.human_names(("n00000002",), tmp_path) == ("second",)
    assert imagenet.human_names(("cat", "dog"), tmp_path) is None


def test_an_incomplete_imagenet_is_noted():
    names = [
        line.split(" ")[0].encode()
        for line in (ROOT / "sources/imagenet_names.txt").read_text().splitlines()[2:]
    ]
    full = {"train": [1300] * 732 + [1232] * 267 + [622], "val": [50] * 1000}
    listings = {
        k: folders.Listing(b"/", {n: [b"x"] * c for n, c in zip(names, v, strict=True)})
        for k, v in full.items()
    }
    found = folders.from_listings("imagenet_1k", listings["train"], listings["val"])
    assert len(found.val) == 50_000
    assert imagenet._count_notes(found) == [
        f"train has {sum(full['train']):,} of ImageNet's 1,281,167 images"
    ]


def test_indexing_needs_no_torch(tmp_path):
    make_folders(tmp_path)
    code = f"""import sys; from sources.layouts import open_dataset
open_dataset("imagenet", {str(tmp_path)!r}); open_dataset("digits", ""); open_dataset("synthetic", "")
assert not {{"torch", "torchvision", "datasets", "pyarrow"}} & sys.modules.keys()"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_size_of_the_synthetic_dataset_is_in_its_name():
    assert generated.synthetic_sizes("synthetic") == generated.SYNTHETIC
    sizes = generated.synthetic_sizes("synthetic:size=32,classes=3")
    assert sizes == {**generated.SYNTHETIC, "size": 32, "classes": 3}


def test_a_subset_larger_than_the_data_is_noted():
    def notes(size: int) -> tuple[str, ...]:
        return layouts.open_dataset("synthetic:classes=4,train=40,val=8,size=8", "", subset_size=size).notes

    assert notes(40) == () and notes(41) == ("note: all 40 training images are used: --subset-size is 41",)


# --- parts of a dataset: first classes, held-out images, subsets ---

PARTS = "synthetic:classes=5,train=103,val=20,size=8"


def held(index):
    """Return the positions of the training and of the validation images in the official training set."""
    return index.train.ids, index.val.ids


@pytest.mark.parametrize(("holdout", "images"), [(0.2, 20), (30, 30)])
def test_held_out_images_are_disjoint_stratified_and_always_the_same(holdout, images):
    whole, index = open_dataset(PARTS, ""), open_dataset(PARTS, "", holdout=holdout)
    train, val = held(index)
    assert sorted([*train, *val]) == list(range(103))  # each official training image once, no other
    assert abs(len(val) - images) <= 2
    for label in range(5):
        share = (index.val.labels == label).sum() / (whole.train.labels == label).sum()
        assert share == pytest.approx(images / 103, abs=0.03)
    assert (index.val.labels == whole.train.labels[val]).all()
    again = open_dataset(PARTS, "", holdout=holdout)
    assert all((one == two).all() for one, two in zip(held(index), held(again), strict=True))
    assert index.fingerprint() == again.fingerprint() != whole.fingerprint()


def test_a_subset_leaves_the_held_out_images_as_they_are():
    index = open_dataset(PARTS, "", holdout=30)
    small = open_dataset(PARTS, "", holdout=30, subset_size=20)
    assert (small.val.ids == index.val.ids).all() and len(small.train) == 20
    assert set(small.train.base.ids[small.train.ids]) <= set(index.train.ids)


@pytest.mark.parametrize("holdout", [103, 500, 0.001, 0.999])
def test_a_holdout_that_leaves_nothing_is_refused(holdout):
    with pytest.raises(UsageError, match=r"--holdout .* for training, .* held out"):
        open_dataset(PARTS, "", holdout=holdout)


def test_the_first_classes_come_before_the_held_out_images():
    index = open_dataset(PARTS, "", classes=3, holdout=0.5)
    assert index.classes == open_dataset(PARTS, "").classes[:3]
    assert set(index.train.labels) == set(index.val.labels) == {0, 1, 2}
    official = open_dataset(PARTS, "", classes=3)
    assert len(official.train) == len(index.train) + len(index.val) and len(official.val) == 12
    with pytest.raises(UsageError, match="--classes 6: there are only 5"):
        open_dataset(PARTS, "", classes=6)


def test_cifar_from_png_files_in_class_folders(tmp_path):
    from sources.cifar import CIFAR10

    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "airplane"):
            for i in range(count):
                put(tmp_path / part / name / f"{i}.png", encoded("PNG", (i, 60, 30), (32, 32)))
    index = open_dataset("cifar10", tmp_path)
    assert (index.name, index.classes, index.native_size) == ("cifar10", ("airplane", "cat"), 32)
    assert (index.mean, len(index.train), len(index.val)) == (CIFAR10.mean, 6, 4)
    assert index.val.name(0) == "test/airplane/0.png"
