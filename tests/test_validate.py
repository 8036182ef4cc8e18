"""validate.py and what it uses: loading a model, predicting, recalibrating, pictures of scores."""

import csv
import json
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import digest
from sklearn.metrics import confusion_matrix
from torch import nn

import train
import validate
from analysis import figures, misclassified, predictions, score_figures, validation
from analysis.scores import calibration, confused_pairs, read_hits, write_hits
from base import flags, idle
from base.device import Runtime
from base.errors import CheckpointError, DataError, ResourceError, UsageError
from dataloader import eval_loader
from harness import checkpoint, rundir
from sources import layouts
from sources.index import ArraySplit, short_names

CPU = Runtime(torch.device("cpu"))
PLAIN = ["--num-workers", "0", "--device", "cpu", "--amp", "off"]


@pytest.fixture(scope="module")
def scored(photo_run, tmp_path_factory):
    """(folder, scores.json) of one call with all options."""
    out = tmp_path_factory.mktemp("scored")
    (out / "copy.json").symlink_to("linked.json")
    everything = ["--image-sizes", "24,32", "--tta", "flip", "--recalibrate-bn"]
    everything += ["--json", str(out / "copy.json")]
    assert validate.main([str(photo_run), *PLAIN, *everything, "--out", str(out)]) == 0
    return out, json.loads((out / "scores.json").read_text())


def test_the_first_lines_are_what_training_logged(photo_run, scored):
    row = checkpoint.load(photo_run)["rows"][-1]
    by_weights = {
        line["weights"]: line
        for line in scored[1]["results"][::-1]
        if (line["bn"], line["tta"], line["image_size"]) == ("trained", "none", 24)
    }
    for weights, column in (("raw", "val"), ("ema", "ema_val")):
        for name in ("top1", "top5", "loss"):
            assert by_weights[weights][name] == pytest.approx(row[f"{column}_{name}"], rel=1e-5)
        assert by_weights[weights]["num_samples"] == 21


def test_every_combination_is_scored_once(scored):
    lines = [(line["image_size"], line["weights"], line["bn"], line["tta"]) for line in scored[1]["results"]]
    assert len(lines) == len(set(lines)) == 2 * 2 * 2 * 2
    assert scored[1]["details_of"] == next(line for line in scored[1]["results"] if line["weights"] == "ema")
    assert json.loads((scored[0] / "linked.json").read_text()) == scored[1]


def test_the_output_files_agree(scored):
    out, numbers = scored
    matrix = np.array([row[1:] for row in csv.reader((out / "confusion.csv").open())][1:], int)
    per_class = list(csv.DictReader((out / "per_class.csv").open()))
    assert [row["class"] for row in per_class] == ["cat", "dog", "owl"]
    assert matrix.sum(1).tolist() == [int(row["support"]) for row in per_class] == [7, 7, 7]
    assert 100 * matrix.trace() / 21 == pytest.approx(numbers["details_of"]["top1"])
    assert [float(row["recall"]) for row in per_class] == pytest.approx(matrix.diagonal() / 7, abs=1e-6)
    pairs = list(csv.DictReader((out / "confused_pairs.csv").open()))
    assert list(pairs[0]) == ["truth", "prediction", "truth name", "prediction name", "times", "share"]
    assert [pair["prediction_name"] for pair in numbers["confused_pairs"]] == [
        pair["prediction name"] for pair in pairs
    ]
    assert sum(int(pair["times"]) for pair in pairs) == 21 - matrix.trace()
    assert 100 * np.mean([c["f1"] for c in numbers["per_class"]]) == pytest.approx(
        numbers["details_of"]["macro_f1"]
    )
    assert 100 * numbers["calibration"]["ece"] == pytest.approx(numbers["details_of"]["ece"])
    for name in ("confusion.png", "reliability.png"):
        assert (out / name).stat().st_size > 10_000


def test_json_on_standard_output_is_nothing_but_json(photo_run, tmp_path, capsys):
    assert validate.main([str(photo_run), *PLAIN, "--json", "-", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["results"]) == 2 and "macro F1" in said.err


def copy_of(photos, tmp_path, names: dict):
    """The photos with their classes under other names; '' leaves a class out."""
    for split in ("train", "val"):
        for old, new in names.items():
            if new:
                shutil.copytree(photos / split / old, tmp_path / split / new)
    return tmp_path


def test_fewer_classes_keep_their_labels(photos, photo_run, tmp_path, capsys):
    """owl alone is class 0 of its data and class 2 of the model."""
    data = copy_of(photos, tmp_path / "data", {"owl": "owl", "dog": "dog"})
    where = ["--data-dir", str(data), "--json", "-", "--out", str(tmp_path / "out")]
    assert validate.main([str(photo_run), *PLAIN, *where]) == 0
    said = capsys.readouterr()
    assert "2 of the model's 3 classes" in said.err
    numbers = json.loads(said.out)
    assert [line["class"] for line in numbers["per_class"]] == ["dog", "owl"]
    models = predictions.load(str(photo_run), "ema", CPU).models
    whole = predictions.predict(models, batches_of(photos, [1, 2]), CPU)["ema"]
    assert numbers["details_of"]["top1"] == pytest.approx(100 * whole.hits[:, 0].mean())


def test_scores_of_other_images_than_the_runs_are_kept_apart(photos, photo_run, tmp_path, capsys):
    checkpoint_file = tmp_path / photo_run.name
    shutil.copy(photo_run, checkpoint_file)
    assert validate.main([str(checkpoint_file), *PLAIN, "--data-dir", str(photos), "--holdout", "0.2"]) == 0
    assert "may have been trained on some" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"validation_other_data"}
    assert validate.main([str(checkpoint_file), *PLAIN, "--data-dir", str(photos)]) == 0
    assert "validated on" not in capsys.readouterr().out and (tmp_path / "validation").is_dir()


def batches_of(photos, classes):
    index = layouts.open_dataset("imagenet", photos)
    for images, labels in eval_loader(index.val, index, image_size=24, batch_size=64):
        keep = torch.isin(labels, torch.tensor(classes))
        yield images[keep], labels[keep]


def test_classes_the_model_does_not_know_are_refused(photos, photo_run, tmp_path):
    data = copy_of(photos, tmp_path / "data", {"cat": "cat", "dog": "=cow", "owl": "ape"})
    message = r"does not know 2 of the data's 3 classes: =cow, ape \(it was trained on photos\d+: cat"
    with pytest.raises(DataError, match=message):
        validate.main([str(photo_run), *PLAIN, "--data-dir", str(data), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_wrong_input(photos, photo_run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        validate.main([str(photo_run) + "x"])
    with pytest.raises(CheckpointError) as caught:
        validate.main([str(photo_run.parent)])
    assert photo_run.name in caught.value.fix
    with pytest.raises(DataError, match="no data directory"):
        validate.main([str(photo_run), "--data-dir", str(tmp_path / "none")])
    with pytest.raises(UsageError, match="CHECKPOINT"):
        validate.main([])
    with pytest.raises(UsageError, match="--image-sizes"):
        validate.main([str(photo_run), "--image-sizes", "224,4"])
    vit = predictions.Classifier({}, {"model_args": {"arch": "vit_b_16"}}, CPU, image_size=224, crop=0.875)
    assert vit.at_size(224) == vit
    with pytest.raises(UsageError, match="224 px only, not at 256"):
        vit.at_size(256)


def test_recalibration_without_batch_norm_is_refused(photo_run, monkeypatch):
    monkeypatch.setattr(idle, "NO_BATCH_NORM", ("resnet_tiny",))
    with pytest.raises(UsageError, match="resnet_tiny has no BatchNorm"):
        validate.main([str(photo_run), *PLAIN, "--recalibrate-bn"])


def test_running_out_of_memory_is_an_error_with_a_fix(photo_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictions, "predict", full)
    with pytest.raises(ResourceError, match="at 24 px, batch 64") as error:
        validate.main([str(photo_run), *PLAIN, "--out", str(tmp_path)])
    assert "--batch-size" in error.value.fix


def test_data_flags_come_from_the_checkpoint_unless_typed():
    saved = {"data_dir": "there", "dataset": "imagenet", "split": "official", "class_list": ""}
    saved |= {"allow_class_mismatch": True, "subset": True, "subset_size": 30}
    typed = ["x.pt", "--no-subset", "--data-dir", "here"]
    found = rundir.with_saved_data(*flags.parse(validate.build_parser(), typed), saved)
    assert (found.data_dir, found.subset) == ("here", False)
    assert (found.subset_size, found.allow_class_mismatch) == (30, True)


@pytest.mark.parametrize(
    "trained, device, auto, expected",
    [
        ("fp32", "cpu", "bf16", "fp32"),
        ("fp32", "cuda", "bf16", "fp32"),
        ("bf16", "cpu", "bf16", "bf16"),
        ("bf16", "cpu", "fp32", "fp32"),  # a CPU that would emulate it
        ("bf16", "cuda", "fp16", "fp16"),  # a GPU that would emulate it
        ("fp16", "cuda", "bf16", "fp16"),
        ("fp16", "cpu", "bf16", "bf16"),
    ],
)
def test_a_run_is_scored_in_its_precision_where_the_device_is_fast_in_it(trained, device, auto, expected):
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    runtime = Runtime(torch.device(device), amp_dtype=dtypes[auto])
    classifier = predictions.Classifier({}, {"precision": trained}, runtime, image_size=16, crop=1.0)
    assert classifier.in_its_precision().runtime.precision == expected


def test_the_split_of_a_dataset_does_not_go_to_another():
    saved = {"dataset": "tiny-imagenet", "split": "70-30", "class_list": "some.txt", "data_dir": "there"}
    for typed, expected in ((["--dataset", "cifar10"], ("official", "")), ([], ("70-30", "some.txt"))):
        found = rundir.with_saved_data(*flags.parse(validate.build_parser(), ["x.pt", *typed]), saved)
        assert (found.split, found.class_list) == expected


# --- predicting ---


class Colour(nn.Module):
    """Logits from the left half of a picture alone, so that its mirror image differs."""

    def forward(self, images):
        return images[..., : images.shape[-1] // 2].mean((2, 3)) * 5


def test_flip_averages_the_logits_of_both_pictures():
    images = torch.randn(4, 3, 6, 6)
    found = predictions.predict({"m": Colour()}, [(images, torch.tensor([0, 1, 2, 0]))], CPU, flip=True)
    left, right = (half.mean((2, 3)) * 5 for half in images.chunk(2, dim=3))  # the mirrored mean is the same
    probabilities = ((left + right) / 2).softmax(1)
    assert found["m flip"].confidence == pytest.approx(probabilities.max(1).values.numpy(), rel=1e-5)
    assert found["m flip"].losses == pytest.approx(
        -probabilities[range(4), [0, 1, 2, 0]].log().numpy(), rel=1e-4
    )
    assert found["m"].confidence == pytest.approx(Colour()(images).softmax(1).max(1).values.numpy())


def test_a_file_that_describes_a_huge_network_takes_no_memory(photo_run, tmp_path):
    payload = checkpoint.load(photo_run)
    payload["model_args"] = payload["model_args"] | {"arch": "resnet50", "width": 1024}  # 26 GB of weights
    checkpoint.save(tmp_path / "last_x.pt", payload)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        checkpoint.load_model(tmp_path / "last_x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_an_output_that_cannot_be_written_is_refused_before_the_scoring(photo_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(validation, "score", None)
    with pytest.raises(ResourceError, match="cannot write to"):
        validate.main([str(photo_run), "--device", "cpu", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(ResourceError, match="it is a directory"):
        validate.main([str(photo_run), "--device", "cpu", "--json", str(tmp_path)])


def test_what_is_written_does_not_become_a_class(photos, photo_run):
    for command in (validate.main, misclassified.main):
        with pytest.raises(UsageError, match="would become a class"):
            command([str(photo_run), "--device", "cpu", "--out", str(photos / "train" / "plots")])
    assert not (photos / "train" / "plots").exists()


def test_names_are_cut_at_their_comma_only_if_they_stay_unique():
    assert short_names(["tench, Tinca tinca", "owl"]) == ["tench", "owl"]
    assert short_names(["Paris, France", "Paris, Texas"]) == ["Paris, France", "Paris, Texas"]


def test_recalibration_mixes_the_classes_of_data_that_is_stored_by_class():
    train = ArraySplit(np.zeros((400, 8, 8, 3), np.uint8), np.repeat(np.arange(20), 20))
    part = validation.recalibration_split(train, 320, 64)
    assert len(part) == 320 and np.bincount(part.labels).tolist() == [16] * 20
    assert min(len({*part.labels[k : k + 64].tolist()}) for k in range(0, 320, 64)) >= 17
    again = validation.recalibration_split(train, 320, 64)
    assert np.array_equal(part.ids, again.ids)


def test_recalibration_gives_the_mean_over_batches_and_leaves_the_model_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    batches = [(torch.randn(8, 3, 4, 4) * k + k, None) for k in (1.0, 2.0, 3.0)]
    found = predictions.recalibrate(model, batches, CPU)
    assert torch.allclose(
        found[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x, _ in batches]).mean(0), atol=1e-5
    )
    assert torch.allclose(
        found[0].running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x, _ in batches]).mean(0)
    )
    assert not any(module.training for module in found.modules())
    assert torch.equal(model[0].running_mean, torch.zeros(3)) and torch.equal(
        found[2].weight, model[2].weight
    )


def test_the_average_is_the_mean_of_weights_and_statistics(photo_run, tmp_path):
    paths = [str(tmp_path / f"{k}.pt") for k in range(3)]
    payloads = []
    for k in range(3):
        payload = checkpoint.load(photo_run)
        del payload["schema"]
        generator = torch.Generator().manual_seed(k)
        for name, value in payload["model"].items():
            if value.is_floating_point():
                change = 0.01 * torch.randn(value.shape, generator=generator)
                payload["model"][name] = value + (change.abs() if "var" in name else change)
            else:
                payload["model"][name] = value + k
        checkpoint.save(tmp_path / f"{k}.pt", payload)
        payloads.append(payload["model"])
    classifier = predictions.load_average(paths, CPU)
    assert list(classifier.models) == ["average"]
    for name, found in classifier.model.state_dict().items():
        values = [payload[name] for payload in payloads]
        expected = sum(v.double() for v in values) / 3 if found.is_floating_point() else values[-1]
        torch.testing.assert_close(found, expected.to(found.dtype))
    options = [*PLAIN, "--average", "--recalibrate-bn", "--out", str(tmp_path / "out")]
    assert validate.main([*paths, *options]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(row["weights"], row["bn"]) for row in scores["results"]] == [
        ("average", "trained"), ("average", "recalibrated")
    ]  # fmt: skip
    assert scores["checkpoint"] == "0.pt, 1.pt, 2.pt"
    # By hand, from the averaged state dict in a checkpoint of its own.
    del payload["ema"]["shadow"], payload["ema"]["num_updates"]
    checkpoint.save(tmp_path / "mean.pt", payload | {"model": classifier.model.state_dict()})
    assert validate.main([str(tmp_path / "mean.pt"), *PLAIN, "--out", str(tmp_path / "mean")]) == 0
    mean = json.loads((tmp_path / "mean" / "scores.json").read_text())["results"][0]
    assert mean | {"weights": "average"} == scores["results"][0]


def test_what_cannot_be_averaged_is_refused(photo_run, tmp_path):
    with pytest.raises(UsageError, match="several checkpoints"):
        validate.main([str(photo_run), str(photo_run), *PLAIN])
    with pytest.raises(UsageError, match="there is one checkpoint"):
        validate.main([str(photo_run), "--average", *PLAIN])
    own = checkpoint.load(photo_run)
    del own["schema"]
    two = [str(tmp_path / "other.pt"), str(photo_run)]
    for name, value in (("classes", own["eval"]["classes"][::-1]), ("mean", [0.1, 0.2, 0.3])):
        checkpoint.save(tmp_path / "other.pt", own | {"eval": own["eval"] | {name: value}})
        with pytest.raises(CheckpointError, match="differ in their models, classes or normalization"):
            validate.main([*two, "--average", *PLAIN])
    trained = own["model_args"] | {"drop_path_rate": 0.9, "image_sizes": [8]}  # which the weights do not tell
    checkpoint.save(tmp_path / "other.pt", own | {"model_args": trained})
    assert predictions.load_average(two, CPU).weights == "average"


def test_raw_weights_are_used_without_an_ema(photo_run, tmp_path):
    classifier = predictions.load(str(photo_run), "both", CPU)
    assert list(classifier.models) == ["raw", "ema"] and classifier.weights == "ema"
    payload = {name: value for name, value in classifier.payload.items() if name != "schema"}
    checkpoint.save(tmp_path / "x.pt", payload | {"ema": {}})
    for weights in ("both", "ema", "raw"):
        classifier = predictions.load(tmp_path / "x.pt", weights, CPU)
        assert list(classifier.models) == ["raw"] and classifier.weights == "raw"


def test_one_normalization_for_pictures_and_for_the_loader(photos, photo_run):
    """Pixels that a command of analysis shows become exactly the input of validation."""
    index = layouts.open_dataset("imagenet", photos)
    classifier = replace(predictions.load(str(photo_run), "ema", CPU), index=index)
    ((images, _),) = eval_loader(index.val, index, image_size=24, batch_size=64)
    assert torch.equal(classifier.batch(classifier.val_pixels(range(21))), images)
    ((same, _),) = classifier.loader(index.val)
    assert torch.equal(same, images)


# --- pictures ---


@pytest.mark.parametrize("num_classes", [2, 30, 200, 1000])
def test_pictures_of_any_number_of_classes(num_classes, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 500)
    predicted = np.where(rng.random(500) < 0.7, labels, rng.integers(0, num_classes, 500))
    matrix = confusion_matrix(labels, predicted, labels=range(num_classes))
    names = [f"a $class$ with_a long name {k}" for k in range(num_classes)]
    made = score_figures.confusion(matrix, names, confused_pairs(matrix), "title")
    shown = made.axes[0].images[0].get_array()
    assert max(shown.shape) <= 250 and shown.sum(1).max() == pytest.approx(100)
    assert len(made.axes[0].get_xticklabels()) <= 40
    if num_classes < 100:
        figures.save(made, tmp_path / "x.png")


def test_mistakes_made_once_are_not_listed_beside_the_matrix():
    matrix, names = np.array([[5, 2, 1], [0, 4, 1], [0, 0, 3]]), ["a", "b", "c"]
    listed = score_figures.confusion(matrix, names, confused_pairs(matrix), "title").axes[1]
    assert [label.get_text() for label in listed.get_yticklabels()] == ["a → b"]
    matrix = np.array([[5, 1], [0, 4]])
    listed = score_figures.confusion(matrix, names, confused_pairs(matrix), "title").axes[1]
    assert listed.get_title() == "no pair was confused twice"


def test_a_perfect_model_has_pictures_too(tmp_path):
    matrix = np.diag([3, 4])
    figures.save(score_figures.confusion(matrix, ["a", "b"], [], "perfect"), tmp_path / "a.png")
    figures.save(
        score_figures.reliability(calibration(np.ones(7), np.ones(7, bool)), "perfect"), tmp_path / "b.png"
    )


def test_the_hits_of_each_image_add_up_to_the_scores(photo_run, tmp_path):
    options = [str(photo_run), *PLAIN, "--image-sizes", "24,32", "--tta", "flip", "--recalibrate-bn"]
    assert validate.main([*options, "--save-hits", "--out", str(tmp_path)]) == 0
    hits = read_hits(tmp_path / "hits.npz")
    rows = json.loads((tmp_path / "scores.json").read_text())["results"]
    for weights in ("raw", "ema"):
        plain = next(row for row in rows if row["weights"] == weights)  # 24 px, trained BatchNorm, no TTA
        assert 100 * hits[weights].mean() == pytest.approx(plain["top1"]) and len(hits[weights]) == 21
        recalibrated = next(row for row in rows if (row["weights"], row["bn"]) == (weights, "recalibrated"))
        assert 100 * hits[f"{weights} bn"].mean() == pytest.approx(recalibrated["top1"])


def test_hits_are_one_bit_each_and_always_the_same_bytes(tmp_path):
    hits = {"raw": np.random.default_rng(0).random(10_001) < 0.6, "ema": np.zeros(10_001, bool)}
    for name in ("a", "b"):
        write_hits(tmp_path / name, hits)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < 2 * 10_001 / 8 + 900
    found = read_hits(tmp_path / "a")
    assert found.keys() == hits.keys() and all((found[name] == hits[name]).all() for name in hits)
    assert read_hits(tmp_path / "nothing") == {}


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_damaged_hits_are_refused(content, tmp_path):
    (tmp_path / "hits.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"hits\.npz is damaged"):
        read_hits(tmp_path / "hits.npz")


def test_a_run_with_held_out_images_resumes_and_is_scored_on_the_official_ones_on_request(tmp_path, capsys):
    """Training and validate.py see the held-out images; `--holdout 0` chooses the official ones."""
    run = "--dataset digits --arch resnet_tiny --width 4 --classes 6 --holdout 0.1 --epochs 2 --batch-size 64"
    run += " --resize-schedule 16 --augment none --num-workers 0 --device cpu --amp off --save-dir"
    halves, whole = str(tmp_path / "halves"), str(tmp_path / "whole")
    assert train.main([*run.split(), halves, "--stop-after", "17"]) == 0
    assert train.main(["--save-dir", halves, "--resume", "auto", "--num-workers", "0"]) == 0
    assert train.main([*run.split(), whole]) == 0
    assert digest(tmp_path / "halves") == digest(tmp_path / "whole")
    checkpoint_path = str(next((tmp_path / "whole").glob("last_*.pt")))
    counts = {}
    for name, extra in (("held", []), ("official", ["--holdout", "0"])):
        out = tmp_path / name
        assert validate.main([checkpoint_path, *PLAIN, *extra, "--out", str(out)]) == 0
        counts[name] = json.loads((out / "scores.json").read_text())["results"][0]
    index = layouts.open_dataset("digits", "", classes=6)
    assert counts["held"]["num_samples"] == round(len(index.train) * 0.1)
    assert counts["official"]["num_samples"] == len(index.val)
    row = checkpoint.load(checkpoint_path)["rows"][-1]
    assert counts["held"]["top1"] == pytest.approx(row["val_top1"])
    assert validate.main([checkpoint_path, *PLAIN, "--holdout", "0"]) == 0
    assert (tmp_path / "whole" / "validation").is_dir() and "validated on" not in capsys.readouterr().out
    assert validate.main([checkpoint_path, *PLAIN, "--holdout", "0", "--data-dir", str(tmp_path)]) == 0
    assert (tmp_path / "whole" / "validation_other_data").is_dir()  # official images, but of which data?
    with pytest.raises(CheckpointError, match=r"--holdout was 0\.1, now 0"):
        train.main(["--save-dir", whole, "--resume", "auto", "--holdout", "0"])
