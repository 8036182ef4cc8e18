"""--eval-size, --eval-crop, --eval-flip: train.py, and what reads its checkpoints, score in the same way."""

import json

import numpy as np
import pytest
import torch
from inprocess import tiny_run
from PIL import Image
from runs import TINY, digest, payload
from torch.nn import functional as F
from torchvision import transforms

import loop
import predict
import train
import validate
from analysis import export, predictions
from base import flags
from base.device import Runtime
from base.errors import CheckpointError, ResourceError, UsageError
from base.progress import Eta
from dataloader import eval_loader, train_loader
from harness import checkpoint, preflight, rundir
from harness.log import read_metrics
from sources import layouts
from sources.images import EvalTransform
from sources.index import ArraySplit, DatasetIndex
from train_utils import Phase, evaluate

CPU = Runtime(torch.device("cpu"))
PLAIN = ["--num-workers", "0", "--device", "cpu", "--amp", "off"]
SCORED = ["--eval-size", "40", "--eval-crop", "0.95", "--eval-flip"]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """Three epochs at 16, 24 and 32 px, scored at 40 px with crop .95 and mirror images."""
    folder = tmp_path_factory.mktemp("run")
    where = ["--data-dir", str(photos), "--save-dir", str(folder), "--num-workers", "0"]
    assert train.main([*TINY, *where, *SCORED]) == 0
    return folder


@pytest.fixture(scope="module")
def last(run):
    return next(run.glob("last_*.pt"))


def reference(path, photos, weights: str, *, size: int, crop: float, flip: bool, part: str = "val"):
    """Return (logits, labels) of the photos, prepared by torchvision."""
    model, content = checkpoint.load_model(path, weights)
    mean, std, labels = content["eval"]["mean"], content["eval"]["std"], []
    steps = [transforms.Resize(round(size / crop)), transforms.CenterCrop(size), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    images = []
    for label, folder in enumerate(sorted((photos / part).iterdir())):
        for file in sorted(folder.iterdir()):
            images.append(prepare(Image.open(file)))
            labels.append(label)
    with torch.no_grad():
        logits = [model(image[None])[0] for image in images]
        if flip:
            mirrored = [
                model(torch.from_numpy(image.numpy()[None, :, :, ::-1].copy()))[0] for image in images
            ]
            logits = [(a + b) / 2 for a, b in zip(logits, mirrored, strict=True)]
    return torch.stack(logits), torch.tensor(labels)


def test_a_row_has_the_scores_of_torchvisions_crops_and_of_mirror_images_averaged_by_hand(run, last, photos):
    row = read_metrics(run)[-1]
    for weights, column in (("raw", "val"), ("ema", "ema_val")):
        logits, labels = reference(last, photos, weights, size=40, crop=0.95, flip=True)
        assert row[f"{column}_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=2e-4)
        assert row[f"{column}_top1"] == pytest.approx(
            100 * float((logits.argmax(1) == labels).float().mean())
        )
        for other in ({"size": 32}, {"crop": 0.875}, {"flip": False}):  # each of the three matters
            logits, _ = reference(last, photos, weights, **{"size": 40, "crop": 0.95, "flip": True} | other)
            assert row[f"{column}_loss"] != pytest.approx(float(F.cross_entropy(logits, labels)), rel=2e-4)


def test_the_training_sample_is_scored_in_the_same_way(photos, tmp_path, monkeypatch):
    scored, real = [], loop.evaluate

    def spy(models, batches, *more, flip):
        batches = list(batches)
        scored.append((list(models), {tuple(images.shape[2:]) for images, _ in batches}, flip))
        return real(models, batches, *more, flip=flip)

    monkeypatch.setattr(loop, "evaluate", spy)
    where = ["--data-dir", str(photos), "--save-dir", str(tmp_path), "--num-workers", "0"]
    assert train.main([*TINY, *where, *SCORED]) == 0
    assert scored == 3 * [(["val", "ema_val"], {(40, 40)}, True), (["train"], {(40, 40)}, True)]
    assert [row["image_size"] for row in read_metrics(tmp_path)] == [16, 24, 32]  # training's


def test_training_is_the_same_however_it_is_scored(run, photos, tmp_path):
    where = ["--data-dir", str(photos), "--save-dir", str(tmp_path), "--num-workers", "0"]
    assert train.main([*TINY, *where]) == 0
    for part in ("model", "ema", "optimizer", "step"):
        assert digest(run)[part] == digest(tmp_path)[part]
    assert digest(run)["rows"] != digest(tmp_path)["rows"]


def test_a_batch_of_scoring_has_the_pixels_of_one_of_training(tmp_path):
    big = ["--phase-batch-sizes", "400,200,8", "--subset-size", "480"]
    big += ["--dataset", "synthetic:classes=4,train=500,val=8,size=8"]
    plain, own = tiny_run(tmp_path, *big), tiny_run(tmp_path, *big, "--eval-size", 16)
    assert [plain.scored_as(phase) for phase in plain.phases] == [(8, 400), (16, 200), (24, 64)]
    assert [own.scored_as(phase) for phase in own.phases] == [(16, 100), (16, 200), (16, 64)]
    pieces = tiny_run(tmp_path, *big, "--accumulate", 4)  # which are all that the device trains at once
    assert [pieces.scored_as(phase) for phase in pieces.phases] == [(8, 100), (16, 64), (24, 64)]


class LeftHalf(torch.nn.Module):
    """Logits from the left half of a picture, so that its mirror image differs."""

    def forward(self, images):
        return images[..., : images.shape[-1] // 2].mean((2, 3)) * 5


def test_flip_scores_the_mean_of_both_logits():
    images, labels = (
        torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
        torch.arange(40) % 3,
    )
    found = evaluate(
        {"m": LeftHalf()}, [(images[:30], labels[:30]), (images[30:], labels[30:])], CPU, flip=True
    )
    pixels, losses, hits = images.double().numpy(), [], 0
    for image, label in zip(pixels, labels.tolist(), strict=True):
        logits = (5 * image[:, :, :3].mean((1, 2)) + 5 * image[:, :, 3:].mean((1, 2))) / 2
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
        hits += logits.argmax() == label
    assert found["m"].loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["m"].top1 == pytest.approx(100 * hits / 40)
    assert found["m"].top1 != evaluate({"m": LeftHalf()}, [(images, labels)], CPU)["m"].top1


# --- data at its native size -------------------------------------------------------------------------


def stored(size: int) -> DatasetIndex:
    pixels = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), np.uint8)
    split = ArraySplit(pixels, [0, 1, 0, 1, 0, 1])
    return DatasetIndex("x", ("a", "b"), split, split, native_size=size)


def raw(loader) -> np.ndarray:
    """Return the uint8 images of a loader's first batch."""
    return loader.batches.dataset[next(iter(loader.order))][0].numpy()


@pytest.mark.parametrize("size", [32, 64])
def test_at_the_native_size_the_stored_pixels_are_scored(size):
    index = stored(size)
    assert np.array_equal(raw(eval_loader(index.val, index, image_size=size, batch_size=6)), index.val.images)
    cropped = raw(eval_loader(index.val, index, image_size=size, batch_size=6, crop=0.875))
    assert np.array_equal(cropped[0], EvalTransform(size, 0.875)(index.val.images[0]))
    other = raw(eval_loader(index.val, index, image_size=size + 8, batch_size=6))
    assert np.array_equal(other[0], EvalTransform(size + 8, 0.875)(index.val.images[0]))


def test_without_a_random_crop_training_sees_what_is_scored():
    index = stored(32)
    for crop in (None, 0.875):
        loader = train_loader(index, image_size=32, batch_size=6, augment=(), crop=crop)
        seen = {image.tobytes() for image in raw(loader)}
        assert seen == {EvalTransform(32, crop or 1.0)(image).tobytes() for image in index.train.images}


@pytest.mark.parametrize(("typed", "expected"), [
    ([], (24, 0.875)), (["--resize-schedule", "16,8", "--phase-batch-sizes", "8,8"], (8, 1.0)),
    (["--eval-size", "8"], (8, 1.0)), (["--eval-size", "8", "--eval-crop", "0.9"], (8, 0.9)),
    (["--eval-crop", "0.9"], (24, 0.9)),
])  # fmt: skip
def test_the_checkpoint_records_the_size_and_the_crop_that_is_used(tmp_path, typed, expected):
    """The digits are 8 px."""
    run = tiny_run(tmp_path, *typed, *(["--phase-epochs", "2,1"] if "16,8" in typed else []))
    recorded = run.metadata["eval"]
    assert (recorded["image_size"], recorded["crop"], recorded["flip"]) == (*expected, False)
    transform = loop.eval_batches(run, run.index.val, run.phases[-1]).batches.dataset.transform
    assert (transform.image_size, transform.crop) == expected
    trained = loop.start_phase(run, run.phases[-1])[0].batches.dataset.transform
    if trained.image_size == expected[0]:
        assert trained.crop == expected[1]


# --- earlier versions --------------------------------------------------------------------------------

DIGITS = ["--dataset", "digits", "--subset", "--subset-size", "40", "--arch", "resnet_tiny", "--epochs", "2",
          "--resize-schedule", "8", "--batch-size", "8", "--augment", "none", *PLAIN]  # fmt: skip


def test_a_run_of_an_earlier_version_keeps_its_crop(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train.main([*DIGITS, "--eval-crop", "0.875", "--save-dir", str(straight)]) == 0
    assert train.main([*DIGITS, "--eval-crop", "0.875", "--save-dir", str(resumed), "--stop-after", "7"]) == 0
    content, (path,) = payload(resumed), resumed.glob("last_*.pt")
    for name in ("eval_size", "eval_crop", "eval_flip"):  # as that version wrote it
        del content["config"][name]
    del content["eval"]["flip"], content["schema"]
    checkpoint.save(path, content)
    assert train.main(["--resume", "auto", "--save-dir", str(resumed)]) == 0
    assert digest(resumed) == digest(straight)
    assert payload(resumed)["config"] | {"save_dir": ""} == payload(straight)["config"] | {
        "save_dir": "",
        "resume": "auto",
    }
    assert payload(resumed)["eval"] == payload(straight)["eval"]


def test_a_new_run_at_the_native_size_differs_from_one_of_an_earlier_version(tmp_path):
    for name, typed in (("new", []), ("old", ["--eval-crop", "0.875"])):
        assert train.main([*DIGITS, *typed, "--save-dir", str(tmp_path / name)]) == 0
    assert digest(tmp_path / "new")["rows"] != digest(tmp_path / "old")["rows"]
    assert payload(tmp_path / "new")["eval"]["crop"] == 1.0


def test_checkpoints_of_schema_1_are_read_as_before():
    path = checkpoint.Path(__file__).parent / "fixtures" / "checkpoint_v1.pt"
    content = checkpoint.load(path)
    saved = rundir.parse_saved_flags(content["config"])
    assert (saved["eval_size"], saved["eval_crop"], saved["eval_flip"]) == (None, 0.875, False)
    classifier = predictions.load(path, "ema", CPU)
    assert (classifier.image_size, classifier.crop, classifier.flip) == (24, 0.875, False)


def test_a_resumed_run_is_scored_as_before_unless_a_change_is_allowed(run, last, tmp_path):
    again = ["--resume", str(last), "--save-dir", str(tmp_path)]
    with pytest.raises(CheckpointError, match="--eval-size was 40, now 48"):
        train.main([*again, "--eval-size", "48"])


# --- commands that read a checkpoint -----------------------------------------------------------------


def scores(last, out, *typed) -> list[dict]:
    assert validate.main([str(last), *PLAIN, "--out", str(out), *typed]) == 0
    return json.loads((out / "scores.json").read_text())["results"]


def test_validate_scores_as_training_did(run, last, tmp_path):
    row, lines = read_metrics(run)[-1], scores(last, tmp_path)
    assert [(line["weights"], line["tta"]) for line in lines] == [
        ("raw", "flip"), ("ema", "flip"), ("raw", "none"), ("ema", "none"),
    ]  # fmt: skip
    for line, column in zip(lines, ("val", "ema_val"), strict=False):
        assert (line["image_size"], line["crop"]) == (40, 0.95)
        for name in ("top1", "top5", "loss"):
            assert line[name] == pytest.approx(row[f"{column}_{name}"], rel=1e-5)
    assert json.loads((tmp_path / "scores.json").read_text())["details_of"] == lines[1]


def test_validate_takes_another_crop_and_leaves_the_mirror_images_out(last, photos, tmp_path):
    raw_line, ema_line = scores(last, tmp_path, "--crop", "0.8", "--tta", "none", "--image-sizes", "32")
    assert (raw_line["crop"], raw_line["image_size"], raw_line["tta"]) == (0.8, 32, "none")
    for weights, line in (("raw", raw_line), ("ema", ema_line)):
        logits, labels = reference(last, photos, weights, size=32, crop=0.8, flip=False)
        assert line["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=2e-4)


def test_predict_prepares_and_averages_as_training_did(last, photos, tmp_path):
    command = [str(last), str(photos / "val"), *PLAIN, "--json", str(tmp_path / "x.json")]
    assert predict.main(command) == 0
    logits, _ = reference(last, photos, "ema", size=40, crop=0.95, flip=True)
    found = json.loads((tmp_path / "x.json").read_text())["images"]
    for image, expected in zip(found, logits.softmax(1), strict=True):
        ours = [each["probability"] for each in image["predictions"]]
        assert ours == pytest.approx(expected.sort(descending=True).values.tolist(), rel=5e-3)
    index = layouts.open_dataset("imagenet", photos)
    classifier = predictions.replace(predictions.load(last, "ema", CPU), index=index)
    confidence = [image["predictions"][0]["probability"] for image in found]
    assert classifier.predict_val().confidence == pytest.approx(confidence, rel=1e-5)


def test_a_model_card_says_how_the_model_was_scored(run, last):
    card = export.model_card("safetensors", "x", predictions.load(last, "ema", CPU), 0.0)
    assert (
        f"at 40 px, averaged with the mirror image: top-1 {read_metrics(run)[-1]['ema_val_top1']:.2f} %"
        in card
    )
    assert "Resize the short side of an image to 42 px" in card  # 40 / .95


# --- what is refused, what is said -------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "message"), [
    ("--eval-crop 0", "--eval-crop: must be a number, from 0.01 to 1"), ("--eval-crop 1.1", "got 1.1"),
    ("--eval-crop nan", "got nan"), ("--eval-crop -0.5", "--eval-crop"), ("--eval-size 4", "--eval-size"),
    ("--eval-size 0", "--eval-size"), ("--eval-size 5000", "--eval-size"),
    ("--arch vit_b_16 --resize-schedule 32 --eval-size 48", "vit_b_16 works at one image size only: 32 px"),
])  # fmt: skip
def test_what_cannot_work_is_a_usage_error(typed, message):
    with pytest.raises(UsageError, match=message):
        flags.check_train(*flags.parse(train.build_parser(), typed.split()))


def test_vit_is_scored_at_its_own_size():
    typed = "--arch vit_b_16 --resize-schedule 32 --eval-size 32 --eval-crop 1"
    flags.check_train(*flags.parse(train.build_parser(), typed.split()))


def test_the_expected_time_follows_the_size_of_scoring():
    phase = Phase(first_epoch=1, last_epoch=2, image_size=8, batch_size=10, steps_per_epoch=5, first_step=0)
    for size, side in ((None, 8), (16, 16)):
        eta = Eta([phase], num_val=100, eval_size=size)
        eta.observe_training(phase, 10, 1.0)  # a second for a step
        eta.observe_validation(side, 3.0)  # three for a validation
        assert eta.remaining(0, 0) == pytest.approx(10 * 1.0 + 2 * 3.0)
        assert eta.remaining(5, 1) == pytest.approx(5 * 1.0 + 3.0)


def test_the_time_of_scoring_is_observed_at_its_own_size(tmp_path):
    run, observed = tiny_run(tmp_path, "--eval-size", 16), []
    run.eta.observe_validation = lambda image_size, seconds: observed.append(image_size)
    loop.score_epoch(run, run.phases[0], epoch=1)
    assert observed == [16] and run.eta.eval_size == 16


def test_scoring_is_tried_before_the_run_at_its_own_size(tmp_path, monkeypatch):
    run, tried = tiny_run(tmp_path, "--eval-size", 48, "--eval-flip"), []
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}

    def spy(models, batches, runtime, flip):
        tried.extend((tuple(images.shape), flip, runtime.world_size) for images, _ in batches)
        return evaluate(models, batches, runtime, flip=flip)

    monkeypatch.setattr(preflight, "evaluate", spy)
    preflight.check_eval_memory(run)
    assert tried == [((64, 3, 48, 48), True, 1)]
    assert all(torch.equal(value, before[name]) for name, value in run.state.model.state_dict().items())

    def full(models, batches, runtime, flip):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(preflight, "evaluate", full)
    with pytest.raises(ResourceError, match="scoring 64 images at once at 48 px") as caught:
        preflight.check_eval_memory(run)
    assert "raise --accumulate, or lower --eval-size" in caught.value.fix


def test_memory_that_runs_out_while_scoring_names_the_size(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = tiny_run(tmp_path, "--eval-size", 48)
    monkeypatch.setattr(loop, "evaluate", full)
    with pytest.raises(ResourceError, match="scoring at 48 px, batch 64") as caught:
        loop.score_epoch(run, run.phases[0], epoch=1)
    assert "--resume auto" in caught.value.fix and "--allow-change eval_size" in caught.value.fix


def test_it_is_said_how_the_run_is_scored(run, photos, tmp_path, capsys):
    where = ["--data-dir", str(photos), "--save-dir", str(tmp_path / "x"), "--num-workers", "0"]
    assert train.main([*TINY, *where, *SCORED, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "scored at 40 px, crop 0.95, with mirror images" in said
    assert train.main([*TINY, *where, *SCORED, "--stop-after", "1"]) == 0
    assert "scored at 40 px, crop 0.95, with mirror images" in capsys.readouterr().out
