"""predict.py: validation's pixels, bad images by name, and predictions as table, JSON and CSV."""

import csv
import io
import json
import shutil

import pytest
import torch

import predict
from analysis import predictions
from base.device import Runtime
from base.errors import CheckpointError, DataError, ResourceError, UsageError
from dataloader import eval_loader
from sources import layouts

CPU = Runtime(torch.device("cpu"))
PLAIN = ["--num-workers", "0", "--device", "cpu", "--amp", "off"]


def asked(capsys, *arguments):
    assert predict.main([str(a) for a in arguments] + PLAIN) == 0
    return capsys.readouterr().out


def test_predictions_are_those_of_validation_bit_for_bit(photos, photo_run):
    index = layouts.open_dataset("imagenet", photos)
    classifier = predictions.load(str(photo_run), "ema", CPU)
    ((images, _),) = eval_loader(index.val, index, image_size=24, batch_size=64)
    best = predictions.logits_of(classifier.model, images, CPU).softmax(1).topk(3)
    files = [index.val.path(i) for i in range(len(index.val))]
    found, bad = classifier.predict_files(files, top=3, batch_size=64, num_workers=0)
    assert not bad and [image["file"] for image in found] == files
    rows = [image["predictions"] for image in found]
    probabilities = torch.tensor([[each["probability"] for each in row] for row in rows])
    assert torch.equal(probabilities, best.values)
    labels = [[classifier.classes.index(each["class"]) for each in row] for row in rows]
    assert labels == best.indices.tolist()


def test_files_folders_and_flags_in_any_order(photos, photo_run, capsys):
    one = photos / "train" / "owl" / "owl_3.JPEG"
    found = json.loads(asked(capsys, "--top", 2, photo_run, one, "--json", "-", photos / "val", one))
    assert [image["file"] for image in found["images"]][:2] == [
        str(one),
        str(photos / "val" / "cat" / "cat_0.JPEG"),
    ]
    assert len(found["images"]) == 1 + 21 + 1 and found["images"][0] == found["images"][-1]
    assert all(len(image["predictions"]) == 2 for image in found["images"])
    assert found["bad"] == [] and found["image_size"] == 24 and found["weights"] == "ema"


def test_linked_folders_are_searched_once(photos, photo_run, tmp_path, capsys):
    (tmp_path / "linked").symlink_to(photos / "val")
    (tmp_path / "again").symlink_to(tmp_path)
    found = json.loads(asked(capsys, photo_run, tmp_path, "--json", "-"))
    assert len(found["images"]) == 21 and found["bad"] == []


def test_folders_are_read_as_in_training(photos, photo_run, tmp_path, capsys):
    for folder in (".thumbnails", "@eaDir", "#recycle", "b", "line\nbreak"):
        (tmp_path / folder).mkdir()
        shutil.copy(photos / "val" / "cat" / "cat_0.JPEG", tmp_path / folder / "x.jpg")
    (tmp_path / "a").symlink_to(tmp_path / "b")  # of two names for a folder, the link comes last
    found = json.loads(asked(capsys, photo_run, tmp_path, "--json", "-"))["images"]
    assert [image["file"] for image in found] == [str(tmp_path / d / "x.jpg") for d in ("b", "line\nbreak")]
    table = asked(capsys, photo_run, tmp_path, "--top", "1").splitlines()
    assert len(table) == 2 and "line\\nbreak/x.jpg" in table[1]


def test_probabilities_sum_to_one_and_fall(photos, photo_run, capsys):
    rows = list(csv.DictReader(io.StringIO(asked(capsys, photo_run, photos / "val" / "dog", "--csv", "-"))))
    assert len(rows) == 7 * 3  # no more than there are classes
    for k in range(0, len(rows), 3):
        three = [float(row["probability"]) for row in rows[k : k + 3]]
        assert three == sorted(three, reverse=True) and sum(three) == pytest.approx(1, abs=1e-5)
        assert [row["rank"] for row in rows[k : k + 3]] == ["1", "2", "3"]


def test_the_table_names_file_class_and_percent(photos, photo_run, capsys):
    file = photos / "val" / "cat" / "cat_0.JPEG"
    lines = asked(capsys, photo_run, file, "--weights", "raw").splitlines()
    assert len(lines) == 3 and lines[0].startswith(str(file)) and " % " in lines[0]
    assert {line.split()[-1] for line in lines} == {"cat", "dog", "owl"}


def test_bad_images_are_named_and_the_others_predicted(photos, photo_run, tmp_path, capsys):
    names = ["=cmd()\x1b.png", "caf\udce9.jpg", "fine.JPEG", "truncated.JPEG"]
    data = (photos / "val" / "cat" / "cat_0.JPEG").read_bytes()
    for name, content in zip(names, [b"no image", data, data, data[:300]], strict=True):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    images = [str(tmp_path), str(tmp_path / "none.jpg"), str(tmp_path / "empty")]
    (tmp_path / "out.csv").symlink_to("linked.csv")
    where = ["--csv", str(tmp_path / "out.csv"), "--json", str(tmp_path / "out.json")]
    with pytest.raises(DataError, match="4 of 6 images") as error:
        predict.main([str(photo_run), *images, *PLAIN, *where])
    assert error.value.exit_code == 3
    said = capsys.readouterr().err
    for words in (
        "=cmd()\\x1b.png: not an image",
        "truncated.JPEG: ",
        "none.jpg: No such file",
        "empty: no images",
    ):
        assert words in said
    assert "\x1b" not in said and "caf" not in said
    found = json.loads((tmp_path / "out.json").read_text())
    assert [image["file"] for image in found["images"]] == [str(tmp_path / name) for name in names[1:3]]
    assert {bad["file"].rpartition("/")[2] for bad in found["bad"]} == {
        names[0],
        names[3],
        "none.jpg",
        "empty",
    }
    assert len(list(csv.DictReader((tmp_path / "linked.csv").open()))) == 2 * 3


def test_predictions_do_not_depend_on_workers(photos, photo_run, tmp_path, capsys):
    shutil.copy(photos / "val" / "cat" / "cat_0.JPEG", tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"")
    outputs = []
    for workers in (0, 2):
        more = ["--json", "-", "--batch-size", "4", "--num-workers", str(workers)]
        with pytest.raises(DataError):
            predict.main([str(photo_run), str(tmp_path), str(photos / "val"), *PLAIN, *more])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and json.loads(outputs[0])["bad"][0]["reason"] == "the file is empty"


@pytest.mark.parametrize("flag", ["--csv", "--json"])
@pytest.mark.parametrize("place", [".", "file/out"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    flag, place, photos, photo_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("analysis.predictions.load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write") as error:
        predict.main([str(photo_run), str(photos / "val"), *PLAIN, flag, str(tmp_path / place)])
    assert flag in error.value.fix


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no image"), (["a.jpg", "--json", "-", "--csv", "-"], "both write to -"),
    (["a.jpg", "--export", "pdf"], "--export"), (["a.jpg", "--out", "x"], "--out would do nothing"),
    (["--export", "onnx", "--top", "3"], "--top would do nothing"),
    (["a.jpg", "--top", "0"], "--top"), (["a.jpg", "--weight", "raw"], "--weight"),
])  # fmt: skip
def test_wrong_usage(arguments, message, photo_run):
    with pytest.raises(UsageError, match=message):
        predict.main([str(photo_run), *arguments])


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        predict.main([str(tmp_path / "x.pt"), "a.jpg"])
