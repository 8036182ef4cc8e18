"""--pretrained: torchvision's weights by name, from the cache, a file or a server; and the other flags."""

import functools
import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inprocess import built
from runs import TINY, payload

import lr_finder
import train
from base import flags
from base.errors import CheckpointError, UsageError
from harness import build
from sources.archives import pretrained
from sources.imagenet import ilsvrc_names
from sources.index import IMAGENET_MEAN, IMAGENET_STD, ArraySplit, DatasetIndex

ARCH = ["--arch", "resnet18", "--resize-schedule", "16", "--batch-size", "8", "--epochs", "2"]
RUN = [*ARCH, "--dataset", "synthetic:classes=3,train=16,val=4,size=16", "--device", "cpu"]
RUN += ["--amp", "off", "--num-workers", "0"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch.hub; its server is this machine, where nothing answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(pretrained, "URL", "http://127.0.0.1:9/")
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """Random weights of torchvision's own ResNet-18, named as torchvision names a file."""
    import torchvision

    torch.manual_seed(1)
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(pretrained.FILES["resnet18"], "IMAGENET1K_V1", f"resnet18-{digits}.pth")
    return path.rename(tmp_path / f"resnet18-{digits}.pth")


def prepare(index, arch, name, sizes):
    return pretrained.prepare(index, arch=arch, pretrained=name, init_from="", sizes=sizes)


def said_by(capsys) -> str:
    return capsys.readouterr().out


def test_the_table_is_torchvisions():
    from torchvision.models import get_model_weights

    for arch, files in pretrained.FILES.items():
        theirs = get_model_weights(arch)
        assert next(iter(files)) == theirs.DEFAULT.name
        assert {name: pretrained.URL + file for name, file in files.items()} == {
            w.name: w.url for w in theirs
        }
        for weights in theirs:  # the preprocessing that `prepare` and docs/finetuning.md promise
            preprocessing = weights.transforms()
            assert (tuple(preprocessing.mean), tuple(preprocessing.std)) == (IMAGENET_MEAN, IMAGENET_STD)
            size = pretrained.VIT_SIZES.get(files[weights.name])
            assert size is None or [size] == preprocessing.crop_size
    assert {arch for arch in flags.ARCHS if "vit" in arch or "resnet_tiny" not in arch} - {
        "preact_resnet50"
    } == pretrained.FILES.keys()


@pytest.mark.parametrize("variables", [{"TORCH_HOME": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}])
def test_the_cache_is_that_of_torch_hub(variables, monkeypatch):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pretrained.find_path("swin_t", "DEFAULT").parent == Path(torch.hub.get_dir()) / "checkpoints"


@pytest.mark.parametrize("name", [
    "DEFAULT", "IMAGENET1K_V2", "imagenet1k_v2", "ResNet50_Weights.IMAGENET1K_V2", "ResNet50_Weights.DEFAULT",
])  # fmt: skip
def test_names_are_spelled_as_torchvision_does(name):
    assert pretrained.find_path("resnet50", name).name == "resnet50-11ad3fa6.pth"


@pytest.mark.parametrize(("arch", "name", "what", "fix"), [
    ("resnet50", "V3", "no such weights for resnet50", "IMAGENET1K_V2, IMAGENET1K_V1"),
    ("resnet50", "ResNet18_Weights.IMAGENET1K_V1", "no such weights for resnet50", "IMAGENET1K_V2"),
    ("resnet50", "resnet50.a1_in1k", "no such weights for resnet50", "IMAGENET1K_V2"),
    ("preact_resnet50", "DEFAULT", "no weights for --arch preact_resnet50", "resnet50, resnet34"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_those_there_are(arch, name, what, fix):
    with pytest.raises(UsageError, match=what) as caught:
        pretrained.find_path(arch, name)
    assert fix in caught.value.fix


def test_a_vit_has_weights_for_one_size(hub):
    index = DatasetIndex("x", ("a",), ArraySplit([], []), ArraySplit([], []))
    for name, size in (("DEFAULT", 224), ("IMAGENET1K_SWAG_E2E_V1", 384)):
        with pytest.raises(UsageError, match=f"are for images of {size} px, not 160") as caught:
            prepare(index, "vit_b_16", name, [160])
        assert caught.value.fix == f"give --resize-schedule {size}"
        with pytest.raises(CheckpointError, match="cannot be downloaded"):
            prepare(index, "vit_b_16", name, [size])


# --- whole runs ---


@pytest.mark.parametrize("where", ["cache", "file"])
def test_a_run_starts_from_the_weights_with_a_head_for_its_classes(where, published, hub, tmp_path, capsys):
    typed = ["--pretrained", str(published)] if where == "file" else ["--pretrained"]
    if where == "cache":
        published.rename(hub / published.name)
    path = published if where == "file" else hub / published.name
    save_dir = tmp_path / "run"
    freeze = ["--freeze-epochs", "2"]
    assert train.main([*RUN, *typed, *freeze, "--save-dir", str(save_dir)]) == 0
    theirs, saved = torch.load(path), payload(save_dir)
    assert saved["model"]["fc.weight"].shape == (3, 512, 1, 1)
    assert all(torch.equal(saved["model"][key], theirs[key]) for key in theirs if not key.startswith("fc."))
    assert (saved["eval"]["mean"], saved["eval"]["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert f"torchvision's weights, {path}, with a new head for 3 classes" in said_by(capsys)

    path.unlink()  # a resumed run has the weights in its checkpoint
    assert train.main(["--resume", "auto", "--save-dir", str(save_dir)]) == 0
    assert train.main([*RUN, *typed, *freeze, "--resume", "auto", "--save-dir", str(save_dir)]) == 0
    with pytest.raises(CheckpointError, match=r"\.pth"):
        train.main([*RUN, *typed, *freeze, "--save-dir", str(tmp_path / "new")])


def test_the_data_of_another_normalization_is_normalized_as_imagenet(published, tmp_path):
    config = parsed(*RUN, "--pretrained", published, "--dataset", "digits")[0]
    plain = built(config, tmp_path).index
    assert plain.mean != IMAGENET_MEAN
    index = pretrained.prepare(plain, **flags.weights_args(config))
    assert (index.mean, index.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert index.fingerprint() == plain.fingerprint()


def test_imagenets_classes_keep_their_head_and_compute_torchvisions_logits(published, tmp_path):
    import torchvision

    config = parsed(*RUN, "--pretrained", published, "--dataset", "digits")[0]
    images, labels = torch.zeros(16, 8, 8, 3, dtype=torch.uint8).numpy(), [0] * 16
    split = ArraySplit(images, labels)
    index = DatasetIndex("imagenet_1k", tuple(ilsvrc_names()), split, split)
    runtime = build.open_runtime(config)

    def logits(index):
        phases = build.make_plan(config, index, 1)
        run = build.build(config, index, runtime, phases, tmp_path)
        said = build.load_weights(run, config)
        assert run.state.ema.module is not None
        for model in (run.state.model, run.state.ema.module):
            yield said, model.eval()(torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64) / 1e4)

    reference = torchvision.models.resnet18()
    reference.load_state_dict(torch.load(published))
    expected = reference.eval()(torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64) / 1e4)
    for said, found in logits(index):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert said.endswith("with their head")
    swapped = replace(index, classes=(index.classes[1], index.classes[0], *index.classes[2:]))
    for said, found in logits(swapped):  # as many classes, but others
        assert said.endswith("with a new head for 1000 classes") and not torch.allclose(
            found, expected, atol=0.1
        )


def test_damaged_and_missing_weights_are_refused_before_torch_reads_them(published, hub, tmp_path):
    damaged = bytearray(published.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (hub / published.name).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 starts with"):
        train.main([*RUN, "--pretrained", "--save-dir", str(tmp_path / "run")])
    (hub / published.name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: .*Connection refused") as caught:
        train.main([*RUN, "--pretrained", "--save-dir", str(tmp_path / "run")])
    assert f"{pretrained.URL}{published.name}" in caught.value.fix and "--pretrained FILE" in caught.value.fix
    with pytest.raises(CheckpointError, match=r"no weights at there\.pth"):
        train.main([*RUN, "--pretrained", "there.pth", "--save-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_weights_are_downloaded_once_and_checked(published, hub, tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    published.rename(served / published.name)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.command)

    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pretrained, "URL", f"http://127.0.0.1:{server.server_port}/")
        index = DatasetIndex("x", ("a",), ArraySplit([], []), ArraySplit([], []))
        for _ in range(2):
            prepare(index, "resnet18", "DEFAULT", [224])
        assert requests == ["HEAD", "GET"] and [p.name for p in hub.iterdir()] == [published.name]
        assert (hub / published.name).read_bytes() == (served / published.name).read_bytes()

        (hub / published.name).unlink()
        (served / published.name).write_bytes(bytes(1000))  # of another content
        with pytest.raises(CheckpointError, match="has the checksum"):
            prepare(index, "resnet18", "DEFAULT", [224])
        monkeypatch.setitem(pretrained.FILES["resnet34"], "IMAGENET1K_V1", "resnet34-00000000.pth")
        with pytest.raises(CheckpointError, match="answered 404"):
            prepare(index, "resnet34", "DEFAULT", [224])
        server.shutdown()


def test_a_checkpoint_of_train_py_is_for_init_from(tmp_path):
    train.main([*TINY, "--dataset", "digits", "--stop-after", "1", "--save-dir", str(tmp_path / "run")])
    path = next((tmp_path / "run").glob("last_*.pt"))
    with pytest.raises(CheckpointError, match=r"is a checkpoint of train\.py") as caught:
        train.main([*RUN, "--pretrained", str(path), "--save-dir", str(tmp_path / "new")])
    assert caught.value.fix == f"start from it with --init-from {path} --reset-head"


# --- other flags ---


def parsed(*words):
    return flags.parse(train.build_parser(), [str(word) for word in words])


@pytest.mark.parametrize(("typed", "words"), [
    ("--pretrained --stem small --width 8", "no resnet50 with --width and --stem"),
    ("--pretrained --use-blurpool", "no resnet50 with --use-blurpool"),
    ("--pretrained --init-from x.pt", "both load weights"),
])  # fmt: skip
def test_combinations_that_cannot_work_are_refused(typed, words):
    with pytest.raises(UsageError, match=words) as caught:
        flags.check_train(*parsed(*typed.split()))
    assert "leave" in caught.value.fix


def test_a_missing_file_is_an_error_that_names_torchvisions_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at imagenet") as caught:
        train.main(
            [*TINY, "--dataset", "digits", "--init-from", "imagenet", "--save-dir", str(tmp_path / "a")]
        )
    assert "--pretrained" in caught.value.fix and not (tmp_path / "a").exists()


def test_other_flags_get_their_defaults_from_the_recipe():
    recipe, _ = parsed("--config", flags.FINETUNE)
    config, given = parsed("--pretrained")
    differ = {name for name, value in flags.plain(config).items() if flags.plain(recipe)[name] != value}
    assert differ == {"config"} and given == {"pretrained"}
    assert "recipes/finetune.yaml" in flags.fit_to_data(config, given, 1000)[1]  # also beside --resume auto
    typed, _ = parsed("--pretrained", "--lr", "0.5", "--mixup-alpha", "1", "--epochs", "3")
    assert (typed.lr, typed.mixup_alpha, typed.epochs, typed.freeze_epochs) == (0.5, 1, 3, 0)
    assert typed.backbone_lr == recipe.backbone_lr
    flags.check_train(*parsed("--pretrained", "--epochs", "1", "--schedule", "onecycle", "--no-ema"))
    other, _ = parsed("--pretrained", "--config", flags.FINETUNE.with_name("cifar100_resnet34.yaml"))
    assert (other.freeze_epochs, other.optimizer) == (0, "adam")
    found, _ = flags.parse(lr_finder.build_parser(), ["--pretrained", "IMAGENET1K_V1"])
    assert (found.pretrained, found.epochs, found.optimizer) == ("IMAGENET1K_V1", 20, "adamw")


def test_the_recipe_can_start_from_other_weights(tmp_path):
    (tmp_path / "own.pt").write_bytes(b"")
    config, given = parsed("--config", flags.FINETUNE, "--init-from", tmp_path / "own.pt", "--reset-head")
    assert config.pretrained == "" and config.freeze_epochs == 5
    flags.check_train(config, given)
