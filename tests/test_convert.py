"""models.convert: weights convert between this project, torchvision and the earlier code."""

import pytest
import torch
import torchvision
from torch import nn

from base.errors import CheckpointError, UsageError
from models import build_model
from models.convert import adapt_state_dict, describe, find_weights, head_of, to_torchvision
from models.model import preact_resnet50, resnet18, resnet50


def equal(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A ResNet-18 in which every tensor differs from a new model's."""
    torch.manual_seed(0)
    model = resnet18(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) if tensor.is_floating_point() else 5)
    return model


def test_an_exported_resnet50_scores_the_same_in_torchvision():
    torch.manual_seed(0)
    model = resnet50(11).eval()
    reference = torchvision.models.resnet50(num_classes=11).eval()
    reference.load_state_dict(to_torchvision(model), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), model(images), rtol=0, atol=1e-5)
    back = resnet50(11)
    back.load_state_dict(adapt_state_dict(to_torchvision(model), back))
    assert equal(back.state_dict(), model.state_dict())


def test_an_export_is_plain(source):
    for tensor in to_torchvision(source.to(memory_format=torch.channels_last)).values():
        assert tensor.is_contiguous() and not tensor.requires_grad and tensor.device.type == "cpu"


def test_the_zoo_is_exported_as_it_is():
    model = build_model("mobilenet_v3_large", num_classes=3)
    torchvision.models.mobilenet_v3_large(num_classes=3).load_state_dict(to_torchvision(model), strict=True)


def test_a_model_that_torchvision_lacks_is_not_exported_to_it():
    for model in (
        preact_resnet50(2),
        resnet18(2, stem="small"),
        resnet18(2, stem="d"),
        resnet18(2, 0.0, True),
    ):
        with pytest.raises(UsageError, match="torchvision has no"):
            to_torchvision(model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", ["", "model_state_dict", "model", "state_dict"])
def test_prefixes_and_wrappers_are_handled(source, prefix, wrapper):
    state = {prefix + key: value for key, value in source.state_dict().items()}
    payload = {"epoch": 3, "optimizer_state_dict": {}, wrapper: state} if wrapper else state
    assert equal(adapt_state_dict(payload, resnet18(7)), source.state_dict())


@pytest.mark.parametrize("head", ["conv", "linear"])
def test_the_head_is_reshaped_both_ways(source, head):
    target = resnet18(7, head=head)
    target.load_state_dict(adapt_state_dict(to_torchvision(source), target), strict=True)
    target.load_state_dict(adapt_state_dict(source.state_dict(), target), strict=True)
    assert torch.equal(target.fc.weight.flatten(), source.fc.weight.flatten())


def test_the_earlier_codes_checkpoint_loads_with_its_blur_filters(source):
    # Its keys: plain torchvision ones, filters of blurs that follow pool, convolution or shortcut.
    state = dict(source.state_dict())
    for name in ("maxpool_or_blurpool.1", "maxpool.1", "layer2.0.blurpool", "layer2.0.downsample.2"):
        state[f"{name}.filt"] = torch.rand(64, 1, 4, 4)
    payload = {"epoch": 60, "model_state_dict": state, "optimizer_state_dict": {}, "best_acc": 71.2}
    assert equal(adapt_state_dict(payload, resnet18(7, use_blurpool=True)), source.state_dict())


def test_antialiased_cnns_own_weights_load_into_the_blurred_network():
    import antialiased_cnns

    theirs = antialiased_cnns.resnet50(num_classes=3)
    ours = resnet50(3, use_blurpool=True)
    ours.load_state_dict(adapt_state_dict(theirs.state_dict(), ours), strict=True)
    # Behind the stem (their pool is 2x2) only the padding differs, and only at the border.
    theirs.eval(), ours.eval()
    maps = torch.randn(1, 256, 16, 16)
    with torch.no_grad():
        found, expected = ours.layer2(maps), theirs.layer2(maps)
    torch.testing.assert_close(found[..., 5:-5, 5:-5], expected[..., 5:-5, 5:-5], rtol=1e-4, atol=1e-4)
    assert (found - expected).abs().max() > 0


def test_old_files_without_batch_counters_load(source):
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    adapted = adapt_state_dict(state, resnet18(7))
    assert all(torch.equal(adapted[k], v) for k, v in state.items())
    resnet18(7).load_state_dict(adapted, strict=True)


def test_another_number_of_classes_names_both_and_the_fix(source):
    model = resnet18(200)
    with pytest.raises(CheckpointError) as caught:
        adapt_state_dict(source.state_dict(), model)
    assert caught.value.what == "checkpoint: resnet18, 7 classes; now: resnet18, 200 classes"
    assert "--reset-head" in caught.value.fix


def test_reset_head_keeps_the_models_own_classifier(source):
    model = resnet18(200)
    adapted = adapt_state_dict(source.state_dict(), model, reset_head=True)
    assert torch.equal(adapted["fc.weight"], model.fc.weight) and torch.equal(
        adapted["fc.bias"], model.fc.bias
    )
    assert torch.equal(adapted["layer4.1.conv2.weight"], source.layer4[1].conv2.weight)
    model.load_state_dict(adapted, strict=True)
    headless = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    assert equal(adapt_state_dict(headless, model, reset_head=True), adapted)


def test_reset_head_works_for_the_zoo():
    source, model = (build_model("mobilenet_v3_large", num_classes=k) for k in (4, 6))
    adapted = adapt_state_dict(source.state_dict(), model, reset_head=True)
    model.load_state_dict(adapted, strict=True)
    assert torch.equal(adapted["classifier.0.weight"], source.classifier[0].weight)
    assert adapted["classifier.3.weight"].shape[0] == 6


@pytest.mark.parametrize("reset_head", [False, True])
def test_another_architecture_is_refused_by_name(source, reset_head):
    before = {k: v.clone() for k, v in source.state_dict().items()}
    other = resnet50(7)
    with pytest.raises(
        CheckpointError, match=r"checkpoint: resnet50, 7 classes; now: resnet18, 7 classes"
    ) as caught:
        adapt_state_dict(other.state_dict(), source, reset_head)
    assert "--arch" in caught.value.fix
    assert equal(before, source.state_dict())  # refused before anything was changed
    with pytest.raises(CheckpointError, match="now: resnet18, small stem, 7 classes"):
        adapt_state_dict(source.state_dict(), resnet18(7, stem="small"), reset_head)


def test_a_missing_or_extra_tensor_is_named(source):
    state = source.state_dict()
    with pytest.raises(CheckpointError, match=r"differ in layer4\.extra"):
        adapt_state_dict({**state, "layer4.extra": torch.ones(1)}, resnet18(7))
    state.pop("layer3.0.bn1.bias")
    with pytest.raises(CheckpointError, match=r"differ in layer3\.0\.bn1\.bias"):
        adapt_state_dict(state, resnet18(7))


@pytest.mark.parametrize(
    "payload", [{}, {"epoch": 3}, {"model": {"x": 1}}, {"model": {}}, [1, 2], "text", None]
)
def test_a_file_without_weights_is_refused(payload):
    with pytest.raises(CheckpointError, match="no model weights"):
        find_weights(payload)


def test_architectures_are_recognised_from_their_states():
    # One of each architecture is described in test_models.
    state = build_model("efficientnet_b0", num_classes=4).state_dict()
    assert head_of(state) == "classifier.1" and head_of({}) == ""
    assert describe(resnet18(4, stem="d").state_dict()) == "resnet18, d stem, 4 classes"
    assert describe({"weight": torch.ones(1)}) == "unknown architecture, no classifier"
