"""The commands that look inside a model: Grad-CAM, feature maps, filters, loss landscape, batches."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train
from analysis import (
    batch,
    batch_figures,
    feature_maps,
    filter_figures,
    filters,
    gradcam,
    gradcam_figures,
    landscape_figures,
    loss_landscape,
    misclassified,
    predictions,
)
from base.device import Runtime
from base.errors import CheckpointError, DataError, ResourceError, UsageError
from models import build_model

DIGITS = ["--dataset", "digits", "--subset", "--subset-size", "100", "--device", "cpu"]
TINY = [
    *DIGITS,
    "--arch",
    "resnet_tiny",
    "--resize-schedule",
    "16",
    "--batch-size",
    "20",
    "--num-workers",
    "0",
]
TINY += ["--amp", "off"]
CPU = Runtime(torch.device("cpu"))
PLAIN = ["--augment", "none", "--drop-path-rate", "0", "--mixup-alpha", "0", "--cutmix-alpha", "0"]
TRAIN = [*TINY, *PLAIN, "--stem", "small", "--epochs", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train.main([*TRAIN, "--save-dir", str(folder)]) == 0
    (path,) = folder.glob("best_*.pt")
    return path


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


class TwoMaps(nn.Module):
    """Channels are brightness and darkness; class k is the mean of channel k, twice."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([[1.0, 1, 1], [-1.0, -1, -1]]).view(2, 3, 1, 1))

    def forward(self, images):
        return 2 * F.relu(self.maps(images)).mean((2, 3))


def test_gradcam_equals_the_formula_by_hand():
    torch.manual_seed(0)
    model, images = TwoMaps(), torch.rand(2, 3, 4, 4)
    maps = gradcam_figures.grad_cam(model, model.maps, images, torch.tensor([0, 1]))
    # d logit_0 / d map_0 is 2 / 16 everywhere (all positive) and 0 for map_1: the map is channel 0 itself.
    brightness = images[0].sum(0)
    torch.testing.assert_close(maps[0], brightness / brightness.max())
    assert (maps[1] == 0).all()  # the network's ReLU removes the darkness of a bright image: no evidence
    assert all(p.grad is None for p in model.parameters())


class Weighted(nn.Module):
    """Logit k is the sum of maps times weights (K, C, h, w), so those weights are the gradients."""

    def __init__(self, weights):
        super().__init__()
        self.maps, self.weights = nn.Conv2d(3, weights.shape[1], 1), weights

    def forward(self, images):
        return torch.einsum("nchw,kchw->nk", self.maps(images), self.weights)


def test_gradcam_weighs_channels_by_their_mean_gradient_and_drops_negative_evidence():
    torch.manual_seed(0)
    model, images = Weighted(torch.randn(3, 4, 5, 5)), torch.randn(1, 3, 5, 5)
    (found,) = gradcam_figures.grad_cam(model, model.maps, images, torch.tensor([2]))
    maps, wanted = model.maps(images)[0].tolist(), [[0.0] * 5 for _ in range(5)]
    for c in range(4):
        mean = sum(float(g) for g in model.weights[2, c].flatten()) / 25
        for i in range(5):
            for j in range(5):
                wanted[i][j] += mean * maps[c][i][j]
    peak = max(map(max, wanted))
    assert peak > 0 > min(map(min, wanted))
    torch.testing.assert_close(found, torch.tensor([[max(v, 0) / peak for v in line] for line in wanted]))


def test_gradcam_points_at_the_object_of_a_synthetic_picture():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 20:28, 4:12] = 1
    model = TwoMaps()
    model.maps.stride = (4, 4)  # an 8 x 8 map, interpolated up
    (found,) = gradcam_figures.grad_cam(model, model.maps, images, torch.tensor([0]))
    row, column = divmod(int(found.argmax()), 32)
    assert 20 <= row < 28 and 4 <= column < 12
    assert found[20:28, 4:12].mean() > 0.6 > 10 * found[:14, 16:].mean()


def test_gradcam_leaves_no_hook_behind_even_after_an_error():
    model = TwoMaps()
    gradcam_figures.grad_cam(model, model.maps, torch.rand(1, 3, 4, 4), torch.tensor([0]))
    with pytest.raises(RuntimeError):
        gradcam_figures.grad_cam(model, model.maps, torch.rand(1, 5, 4, 4), torch.tensor([0]))
    assert hooks(model) == 0


def test_gradcam_refuses_a_layer_the_logits_do_not_depend_on():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(UsageError, match="no spatial map"):
        gradcam_figures.grad_cam(model, model[2], torch.rand(1, 3, 4, 4), torch.tensor([0]))
    with pytest.raises(UsageError, match="no such module"):
        feature_maps.module_named(model, "nose")


class Tokens(nn.Module):
    """Like ViT: a class token before the patches; the last block returns that token alone."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.attention, self.last, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        mixed = self.attention(tokens).mean(1, keepdim=True) + tokens
        return self.head(self.last(mixed)[:, 0])


def test_the_last_map_is_found_in_every_kind_of_network():
    images = torch.randn(1, 3, 32, 32)
    model = build_model("resnet_tiny", num_classes=5, stem="small").eval()
    assert feature_maps.last_map(model, images) == "layer4" and hooks(model) == 0
    assert (
        feature_maps.last_map(Tokens().eval(), images) == "attention"
    )  # not `last`: its patches do not reach the logits
    maps = gradcam_figures.grad_cam(tokens := Tokens(), tokens.attention, images, torch.tensor([1]))
    assert maps.shape == (1, 32, 32)


@pytest.mark.parametrize(
    "shape, wanted",
    [
        ((2, 8, 4, 6), (2, 8, 4, 6)),
        ((2, 4, 4, 8), (2, 8, 4, 4)),
        ((2, 17, 8), (2, 8, 4, 4)),
        ((2, 16, 8), (2, 8, 4, 4)),
        ((2, 8, 1, 1), None),
        ((2, 15, 8), None),
        ((2, 8), None),
    ],
)
def test_outputs_read_as_maps(shape, wanted):
    found = feature_maps.as_map(torch.zeros(shape))
    assert (None if found is None else tuple(found.shape)) == wanted


def test_tokens_become_a_map_in_reading_order():
    tokens = torch.arange(5.0).view(1, 5, 1)  # class token 0, patches 1 2 / 3 4
    assert feature_maps.as_map(tokens)[0, 0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["efficientnet_b0", "mobilenet_v3_large", "vit_b_16", "swin_t", "preact_resnet50"]
)
def test_gradcam_on_every_architecture(arch):
    model = build_model(arch, num_classes=4, image_sizes=(64,)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.05)  # torchvision's ViT starts with a head of zeros: its maps would be empty
    images = torch.randn(1, 3, 64, 64)
    layer = feature_maps.module_named(model, feature_maps.last_map(model, images))
    assert gradcam_figures.grad_cam(model, layer, images, torch.tensor([1])).shape == (1, 64, 64)
    assert hooks(model) == 0


def test_gradcam_and_misclassified_commands(trained, tmp_path):
    out = ["--out", str(tmp_path), "--device", "cpu"]
    assert gradcam.main([str(trained), *out, "--count", "3"]) == 0
    assert gradcam.main([str(trained), *out, "--misclassified", "--count", "2"]) == 0
    assert misclassified.main([str(trained), *out, "--count", "4"]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "gradcam.png",
        "gradcam_misclassified.png",
        "misclassified.png",
    }
    found = json.loads((tmp_path / "misclassified.json").read_text())
    confidences = [m["confidence"] for m in found["mistakes"]]
    assert found["images"] == 10 and confidences == sorted(confidences, reverse=True)
    assert all(m["truth"] != m["prediction"] for m in found["mistakes"])
    kept = (tmp_path / "misclassified.png").read_bytes()
    assert misclassified.main([str(trained), *out, "--only", found["mistakes"][0]["truth"]]) == 0
    (own,) = tmp_path.glob("misclassified_*.json")
    assert (
        json.loads(own.read_text())["images"] < 10 and (tmp_path / "misclassified.png").read_bytes() == kept
    )


def test_dollars_in_a_class_name_are_no_mathematics(trained, tmp_path, monkeypatch):
    names = [f"$5_to_$1{k}" for k in range(10)]
    monkeypatch.setattr(predictions.Classifier, "names", property(lambda self: names))
    out = ["--out", str(tmp_path), "--device", "cpu"]
    assert misclassified.main([str(trained), *out]) == 0
    for mistake in json.loads((tmp_path / "misclassified.json").read_text())["mistakes"]:
        assert misclassified.main([str(trained), *out, "--only", mistake["truth"]]) == 0


def test_commands_refuse_unsuitable_arguments(trained, tmp_path, photos):
    out = ["--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(DataError, match="data's 3 classes are not the model's 10"):
        gradcam.main(
            [str(trained), *out, "--dataset", "imagenet", "--data-dir", str(photos), "--subset-size", "3"]
        )
    with pytest.raises(CheckpointError, match="no checkpoint"):
        gradcam.main([str(tmp_path / "nothing.pt")])
    with pytest.raises(UsageError, match="there are 10 images"):
        gradcam.main([str(trained), *out, "--ids", "10"])
    with pytest.raises(UsageError, match="not allowed with"):
        gradcam.main([str(trained), *out, "--ids", "1", "--misclassified"])
    with pytest.raises(UsageError, match="no effect"):
        gradcam.main([str(trained), *out, "--ids", "1", "--count", "4"])
    with pytest.raises(UsageError, match="from 1 to 200"):
        gradcam.main([str(trained), *out, "--count", "201"])
    with pytest.raises(UsageError, match="201 images do not fit"):
        gradcam.main([str(trained), *out, "--ids", ",".join(map(str, range(201)))])
    with pytest.raises(UsageError, match="no such class"):
        misclassified.main([str(trained), *out, "--only", "unicorn"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [misclassified, gradcam, loss_landscape, filters])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, trained, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(predictions.Classifier, "val_pixels", lambda *_: pytest.fail("images were read"))
    monkeypatch.setattr(predictions.Classifier, "predict_val", lambda _: pytest.fail("images were predicted"))
    with pytest.raises(ResourceError, match="cannot write to"):
        command.main([str(trained), "--device", "cpu", "--out", str(tmp_path / "file" / "out")])


def test_many_images_are_explained_in_parts_and_drawn_in_rows(trained, tmp_path, monkeypatch):
    classifier = predictions.load(str(trained), "ema", CPU)
    images = classifier.batch(np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8))
    layer = feature_maps.module_named(classifier.model, feature_maps.last_map(classifier.model, images[:1]))
    classes = torch.arange(10)
    whole = gradcam_figures.grad_cam(classifier.model, layer, images, classes)
    monkeypatch.setattr(gradcam_figures, "BATCH", 3)
    explain = functools.partial(gradcam_figures.grad_cam, classifier.model, layer)
    torch.testing.assert_close(gradcam_figures.in_batches(explain, images, classes), whole)
    pixels = np.zeros((10, 64, 64, 3), np.uint8)
    fig = gradcam_figures.draw(classifier, pixels, None)
    assert len(fig.axes) == 2 * 2 * gradcam_figures.COLUMNS  # images and maps of eight, then of two


def test_gradcam_of_files_needs_no_dataset(trained, tmp_path, photos):
    file = next((photos / "val" / "cat").iterdir())
    assert gradcam.main([str(trained), "--files", str(file), "--out", str(tmp_path), "--device", "cpu"]) == 0
    with pytest.raises(DataError, match="No such file"):
        gradcam.main([str(trained), "--files", "nothing.jpg", "--out", str(tmp_path), "--device", "cpu"])


def test_a_file_whose_name_has_a_comma_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jpg").touch()
    assert gradcam.file_names("a,b.jpg") == ("a,b.jpg",) and gradcam.file_names("a, b") == ("a", "b")
    assert len(gradcam.file_names(",".join(["photo.jpg"] * 200))) == 200


def test_filters_command_and_the_sizes_stride_and_padding_make(trained, tmp_path):
    assert filters.main([str(trained), "--out", str(tmp_path), "--device", "cpu"]) == 0
    names = {"kernels.png", "filtered.png", "feature_maps.png", "stride_padding.png"}
    assert {p.name for p in tmp_path.iterdir()} == names and all(is_png(p) for p in tmp_path.iterdir())


def test_a_kernel_as_a_picture_has_grey_for_zero():
    kernel = torch.zeros(3, 2, 2)
    kernel[0, 0, 0], kernel[2, 1, 1] = 2.0, -1.0
    shown = filter_figures.as_picture(kernel)
    assert shown[0, 0].tolist() == [255, 128, 128] and shown[1, 1].tolist() == [128, 128, 64]


def test_stage_maps_go_from_large_to_small_and_leave_no_hook():
    model = build_model("resnet_tiny", num_classes=5, stem="small").eval()
    maps = feature_maps.stage_maps(model, torch.randn(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps.values()] == [32, 16, 8, 4] and hooks(model) == 0


def tiny_problem():
    torch.manual_seed(1)
    model = build_model("resnet_tiny", num_classes=5, stem="small").eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model, torch.randn(6, 3, 16, 16), np.array([0, 1, 2, 3, 4, 0])


def test_the_landscapes_centre_is_the_plain_loss_and_the_model_stays():
    model, images, labels = tiny_problem()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = F.cross_entropy(model(images), torch.as_tensor(labels)).item()
    steps = np.linspace(-1, 1, 3)
    for of_batch in (False, True):
        options = {"batch_statistics": of_batch, "seed": 0, "title": "test"}
        losses = landscape_figures.landscape(model, images, labels, steps, **options)
        assert (losses[1, 1] == pytest.approx(plain, rel=1e-6)) != of_batch
        assert losses[0, 1] != losses[1, 0] and losses[0, 2] != losses[1, 1]  # a plane, not a line
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training


def test_directions_have_the_norm_of_every_filter_and_spare_biases():
    model, _, _ = tiny_problem()
    generator = torch.Generator().manual_seed(0)
    first, second = (landscape_figures.direction(model, generator) for _ in range(2))
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        if p.ndim == 1:
            assert not a.any()
        else:
            torch.testing.assert_close(a.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
            cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            assert abs(cosine) < 5 / p.numel() ** 0.5


def test_loss_landscape_command(trained, tmp_path):
    few = ["--points", "3", "--samples", "5", "--out", str(tmp_path), "--device", "cpu"]
    assert loss_landscape.main([str(trained), *few]) == 0
    written = json.loads((tmp_path / "loss_landscape.json").read_text())
    before, after = written["losses"]
    assert (before, after) == ("before training, statistics of each batch", "after training")
    assert loss_landscape.main([str(trained), *few, "--batch-norm", "batch"]) == 0
    by_batch = json.loads((tmp_path / "loss_landscape.json").read_text())["losses"]
    assert written["losses"][before] == by_batch["before training"]  # not with BatchNorm's first statistics
    assert written["losses"][after] != by_batch[after]
    assert is_png(tmp_path / "loss_landscape.png")


def test_the_initial_model_is_the_one_the_run_started_with(tmp_path):
    from harness import checkpoint

    frozen = ["--stop-after", "1", "--lr", "1e-30", "--weight-decay", "0", "--no-ema", "--seed", "5"]
    train.main([*TRAIN, *frozen, "--save-dir", str(tmp_path)])
    (path,) = tmp_path.glob("last_*.pt")
    model, payload = checkpoint.load_model(path, "raw")
    begun = landscape_figures.initial_model(payload)
    for wanted, found in zip(begun.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(wanted, found)


def test_batch_shows_the_batch_that_is_trained_on(tmp_path, monkeypatch):
    """The picture is drawn from the pixels and targets that the training step computes its loss on."""
    import data_utils

    flags_of_both = [*TINY, "--epochs", "1", "--augment", "basic"]
    trained_on, shown = [], []
    mixed = data_utils.BatchMixer.__call__

    def watch(into):
        def call(self, images, labels):
            into.append(mixed(self, images, labels))
            return into[-1]

        return call

    monkeypatch.setattr(data_utils.BatchMixer, "__call__", watch(trained_on))
    train.main([*flags_of_both, "--save-dir", str(tmp_path / "run"), "--stop-after", "2"])
    monkeypatch.setattr(data_utils.BatchMixer, "__call__", watch(shown))
    batch.main([*flags_of_both, "--show-steps", "2", "--show-images", "2", "--out", str(tmp_path)])
    assert is_png(tmp_path / "batch.png") and len(shown) == len(trained_on) == 2
    for (images, targets), (wanted_images, wanted_targets) in zip(shown, trained_on, strict=True):
        assert torch.equal(images, wanted_images) and torch.equal(targets, wanted_targets)


@pytest.mark.parametrize("flag", ["--resume auto", "--dry-run", "--summary"])
def test_a_batch_takes_no_flag_about_a_start_of_training(flag, tmp_path):
    with pytest.raises(UsageError, match=f"{flag.split()[0]} would do nothing"):
        batch.main(["--dataset", "digits", *flag.split(), "--out", str(tmp_path)])


def test_a_soft_label_is_written_without_what_smoothing_spreads():
    names = ["cat", "dog", "owl", "fox"]
    assert batch_figures.label(torch.tensor([0.925, 0.025, 0.025, 0.025]), names) == "0.93 cat"
    assert batch_figures.label(torch.tensor([0.3, 0.66, 0.02, 0.02]), names) == "0.66 dog\n0.30 cat"
    assert batch_figures.label(torch.full((4,), 0.25), names).startswith("0.25 ")
