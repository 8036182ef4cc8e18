"""Exported files compute what the model computes, or do not exist; model cards are correct."""

import json

import pytest
import torch

import predict
from analysis import export, predictions
from base import flags
from base.device import Runtime
from base.errors import ResourceError, UsageError, UserError
from harness import checkpoint
from models import build_model

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def classifier(photo_run):
    return predictions.load(str(photo_run), "ema", CPU)


def untrained(arch, **more):
    """A model with non-trivial BatchNorm statistics, and the checkpoint that a run would have saved."""
    torch.manual_seed(0)
    args = {"arch": arch, "num_classes": 5, "drop_path_rate": 0.2, "image_sizes": [32], **more}
    model = build_model(**args)
    model.train()(torch.randn(8, 3, 32, 32))
    names = ["a", "b|c", "<script>", "d\x1b", "e"]
    facts = {"dataset": "x", "classes": names, "class_names": names, "image_size": 32, "crop": 0.875}
    facts |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    config = {"lr": 0.1, "seed": 0}
    payload = {"model_args": args, "eval": facts, "rows": [], "config": config, "commit": "abc"}
    return predictions.Classifier({"raw": model.eval()}, payload, CPU, 32, 0.875)


def test_safetensors_is_bit_for_bit_and_describes_itself(classifier, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    model, payload = classifier.model, classifier.payload
    path, card = export.export("safetensors", classifier, tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        facts = {key: json.loads(text) for key, text in file.metadata().items() if key != "weights"}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())
    assert facts == {"model_args": payload["model_args"], "eval": payload["eval"]}
    assert path.stat().st_mode & 0o444 == 0o444
    row, text = payload["rows"][-1], card.read_text()
    assert (
        f"top-1 {row['ema_val_top1']:.2f} %" in text
        and "average of its weights" in text
        and "| 1 | dog | dog |" in text
    )


def test_onnx_computes_the_same_for_any_batch(classifier, tmp_path, capfd):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        runtime = pytest.importorskip(package)
    path, card = export.export("onnx", classifier, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, card.name}  # no weights in a file beside it
    session = runtime.InferenceSession(str(path))
    for count in (1, 7):
        images = torch.randn(count, 3, 24, 24)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(logits), classifier.model(images), atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["eval"]) == classifier.payload["eval"]
    assert capfd.readouterr() == ("", "")


def test_torchvision_loads_a_resnet18(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    classifier = untrained("resnet18")
    path, card = export.export("torchvision", classifier, tmp_path)
    again = torchvision.models.resnet18(num_classes=5)
    again.load_state_dict(torch.load(path, weights_only=True))
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(again.eval()(images), classifier.model(images), atol=1e-5)
    text = card.read_text()
    assert "b\\|c" in text and "<script" not in text and "\x1b" not in text and "Not validated" in text
    assert checkpoint.find_damage(path) == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [({"arch": "resnet_tiny"}, "no resnet_tiny"), ({"arch": "resnet18", "stem": "small"}, "small")],
)
def test_torchvision_has_no_such_model(more, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export.export("torchvision", untrained(**more), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_from_the_model_is_deleted(classifier, tmp_path, monkeypatch):
    def wrong(classifier, path, images):
        path.touch()
        return classifier.model(images) + 1e-3

    monkeypatch.setitem(export.EXPORTS, "onnx", (".onnx", wrong))
    with pytest.raises(UserError, match="differ from the model"):
        export.export("onnx", classifier, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_install_command(classifier, tmp_path, monkeypatch):
    def missing(name, why):
        raise UsageError(f"{why} needs {name}", f"pip install {name}")

    monkeypatch.setattr(export, "optional", missing)
    with pytest.raises(UsageError) as caught:
        export.export("safetensors", classifier, tmp_path)
    assert caught.value.fix.startswith("pip install safetensors")


def test_an_output_that_cannot_be_written_is_refused(classifier, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        export.export("safetensors", classifier, tmp_path / "file")


def test_the_export_command(photo_run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    arguments = [str(photo_run), "--export", "safetensors", "--out", str(tmp_path), "--device", "cpu"]
    assert predict.main([*arguments, "--weights", "raw"]) == 0
    assert "written and checked" in capsys.readouterr().out
    (card,) = tmp_path.glob("*.md")
    assert "weights of its last step" in card.read_text()


def test_the_card_names_the_flags_that_had_an_effect(classifier):
    changed = {
        "phase_batch_sizes": [8],
        "phase_augment": ["basic"],
        "ema_half_life": 0.5,
        "resize_schedule": [32],
    }
    changed |= {"init_from": "a.pt", "freeze_epochs": 1, "backbone_lr": 0.1, "batch_size": 256, "epochs": 2}
    words = flags.to_argv(export.settings(classifier.payload["config"] | changed))
    assert {"--init-from=a.pt", "--phase-batch-sizes=8", "--phase-augment=basic", "--ema-half-life=0.5"} <= {
        *words
    }
    assert {"--freeze-epochs=1", "--backbone-lr=0.1", "--epochs=2", "--ema"} <= {*words}
    assert not {word.partition("=")[0] for word in words} & {"--batch-size", "--augment", "--ema-decay"}
    words = flags.to_argv(export.settings(classifier.payload["config"] | {"ema": False}))
    assert "--no-ema" in words and not any(word.startswith("--ema-decay") for word in words)
