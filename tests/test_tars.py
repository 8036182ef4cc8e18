"""ImageNet read directly from its tar files: the same dataset as when unpacked, and what is refused."""

import io
import tarfile

import numpy as np
import pytest
from scipy.io import savemat
from test_images import encoded, photo

import pack_dataset
from base.errors import DataError
from sources.archives import ilsvrc, tars
from sources.packed import open_packed

CLASSES = ("n01440764", "n01443537")


def add(archive: tarfile.TarFile, name: str, data: bytes, **attributes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def tar(members: dict[str, bytes], path=None, mode="w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            add(archive, name, data)
    if path:
        path.write_bytes(file.getvalue())
    return file.getvalue()


@pytest.fixture
def archives(tmp_path):
    """The three published files, two classes of five images; class 2 of the devkit is the first in order."""
    data = tmp_path / "tars"
    data.mkdir()
    inner = {
        f"{name}.tar": tar({f"{name}_{i}.JPEG": encoded(photo(30, 40, seed=10 * c + i)) for i in range(5)})
        for c, name in enumerate(CLASSES)
    }
    tar(inner, data / tars.TRAIN)
    tar(
        {f"ILSVRC2012_val_{i:08d}.JPEG": encoded(photo(30, 40, seed=50 + i)) for i in (1, 2, 3)},
        data / tars.VAL,
    )
    meta = io.BytesIO()
    synsets = np.array([(2, CLASSES[0]), (1, CLASSES[1])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    savemat(meta, {"synsets": synsets})
    contents = (meta.getvalue(), b"2\n1\n2\n")
    paths = [f"{ilsvrc.DEVKIT_FOLDER}/{name}" for name in ilsvrc.DEVKIT_LABELS]
    devkit = dict(zip(paths, contents, strict=True))
    tar(devkit, data / tars.DEVKIT, "w:gz")
    return data


def test_the_archives_are_the_dataset(archives):
    index = tars.imagenet_tars(archives)
    assert index.classes == CLASSES and index.class_names[0].startswith("tench")
    assert index.train.labels.tolist() == [0] * 5 + [1] * 5 and index.val.labels.tolist() == [0, 1, 0]
    assert index.train.name(7) == "train/n01443537/n01443537_2.JPEG"
    assert index.train.read([7, 0]) == [encoded(photo(30, 40, seed=12)), encoded(photo(30, 40, seed=0))]
    assert index.val.read([2]) == [encoded(photo(30, 40, seed=53))]


def test_packing_straight_from_the_archives(archives, tmp_path):
    out = tmp_path / "out"
    arguments = ["--data-dir", str(archives), "--out", str(out), "--stored-sides", "16", "--workers", "2"]
    assert pack_dataset.main(arguments) == 0
    copy = open_packed(out)
    assert copy.name == "imagenet_1k" and len(copy.train) == 10 and copy.val.labels.tolist() == [0, 1, 0]
    assert copy.fingerprint() == tars.imagenet_tars(archives).fingerprint()


def test_other_members_are_never_touched(archives):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        add(archive, "n01440764_0.JPEG", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "../../n01440764_1.JPEG", b"x")  # the name is a label, nothing is written
        add(archive, "notes.txt", b"x")
    inner = {"n01440764.tar": file.getvalue(), "readme": b"x"}
    tar(inner, archives / tars.TRAIN)
    found = tars._entries(archives / tars.TRAIN, tars._train_images)
    assert [name for name, _, _ in found] == ["train/n01440764/n01440764_1.JPEG"]


def test_an_image_that_ends_outside_its_class_is_refused(archives):
    inner = tar({"n01440764_1.JPEG": b"x" * 600})
    cut = inner[:1024]  # the header says 600 bytes, 512 are there
    tar({"n01440764.tar": cut, "n01443537.tar": inner}, archives / tars.TRAIN)
    with pytest.raises(DataError, match="ends without"):
        tars.imagenet_tars(archives)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.65])
def test_a_truncated_archive_is_refused(archives, keep):
    path = archives / tars.TRAIN
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=tars.TRAIN):
        tars.imagenet_tars(archives)


def test_a_missing_archive_is_named(archives):
    (archives / tars.DEVKIT).unlink()
    with pytest.raises(DataError, match="labels of its images were not found"):
        tars.imagenet_tars(archives)
    (archives / tars.VAL).unlink()
    with pytest.raises(DataError, match=tars.VAL):
        tars.imagenet_tars(archives)


def test_a_web_page_is_not_taken_for_an_archive(archives):
    (archives / tars.VAL).write_text("<html>" + "x" * 2000)
    with pytest.raises(DataError, match=tars.VAL):
        tars.imagenet_tars(archives)
