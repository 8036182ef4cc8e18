"""models.model: the ResNets compute what torchvision's compute."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from base.errors import UsageError
from models.convert import adapt_state_dict
from models.layers import DropPath
from models.model import preact_resnet50, resnet18, resnet34, resnet50

OURS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}


def twins(arch: str, num_classes: int = 1000, **options) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's network and ours with the same weights, in float64, none of them trivial."""
    torch.manual_seed(0)
    reference = getattr(torchvision.models, arch)(num_classes=num_classes).double()
    for name, tensor in reference.state_dict().items():
        if "bn" in name or "downsample.1" in name:  # new norms are all 0 and 1 and would hide mistakes
            tensor.copy_(torch.rand_like(tensor.double()).add(0.5) if tensor.is_floating_point() else 3)
    model = OURS[arch](num_classes, drop_path_rate=0.0, **options).double()
    model.load_state_dict(adapt_state_dict(reference.state_dict(), model))
    return reference, model


@pytest.fixture(scope="module")
def pair():
    return twins("resnet50")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_same_forward(reference: nn.Module, model: nn.Module, images: torch.Tensor) -> None:
    reference, model = copy.deepcopy(reference), copy.deepcopy(model)
    with torch.no_grad():
        for mode in (False, True):
            assert relative_error(model.train(mode)(images), reference.train(mode)(images)) <= 1e-12
    found = model.state_dict()
    for name, value in reference.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert relative_error(found[name].double(), value.double()) <= 1e-12, name


@pytest.mark.parametrize(("size", "batch"), [(64, 2), (128, 2), (224, 1)])
def test_resnet50_computes_what_torchvisions_does(pair, size, batch):
    assert_same_forward(*pair, torch.randn(batch, 3, size, size, dtype=torch.float64))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_the_small_resnets_compute_what_torchvisions_do(arch):
    assert_same_forward(*twins(arch, 10, head="linear"), torch.randn(2, 3, 64, 64, dtype=torch.float64))


def test_gradients_are_torchvisions(pair):
    reference, model = (copy.deepcopy(net).train() for net in pair)
    images, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 7])
    for net in (reference, model):
        nn.functional.cross_entropy(net(images), labels).backward()
    grads = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert relative_error(grads[name].grad.view_as(parameter), parameter.grad) <= 1e-10, name


def test_keys_are_torchvisions_with_and_without_blurpool(pair):
    keys = list(pair[0].state_dict())
    for blur in (False, True):
        state = resnet50(use_blurpool=blur).state_dict()
        assert list(state) == keys
        assert state["fc.weight"].shape == (1000, 2048, 1, 1)
    for arch in ("resnet18", "resnet34"):
        expected = list(getattr(torchvision.models, arch)().state_dict())
        assert list(OURS[arch](use_blurpool=True).state_dict()) == expected


def test_resnet50_has_25557032_parameters():
    assert sum(p.numel() for p in resnet50().parameters()) == 25_557_032


def test_blocks_start_as_the_identity_and_convolutions_at_fan_out():
    torch.manual_seed(0)
    model = resnet50()
    assert all(block.bn3.weight.abs().max() == 0 for stage in stages(model) for block in stage)
    for layer, fan_out in ((model.layer3[1].conv1, 256), (model.layer3[1].conv3, 1024)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
    assert model.fc.weight.abs().max().item() <= 2048**-0.5  # torch's own: linear and conv heads start alike
    pre = preact_resnet50()
    block, x = pre.layer1[1], torch.randn(2, 256, 4, 4)
    assert torch.equal(block(x), x)


def test_drop_path_grows_linearly_over_all_blocks():
    rates = [block.drop_path.p for stage in stages(resnet50()) for block in stage]
    assert rates == pytest.approx([0.2 * i / 15 for i in range(16)])
    assert sum(isinstance(m, DropPath) for m in resnet34().modules()) == 16


def test_preact_leaves_the_skip_linear():
    # With every branch silent, what is left between stem and last norm must be linear: no ReLU on it.
    model = preact_resnet50(5).double().eval()
    maps = torch.randn(2, 64, 8, 8, dtype=torch.float64)

    def skip(x):
        return model.layer4(model.layer3(model.layer2(model.layer1(x))))

    torch.testing.assert_close(skip(-2 * maps), -2 * skip(maps), rtol=1e-12, atol=1e-12)
    assert skip(maps).min() < 0


@pytest.mark.parametrize("stem", ["imagenet", "small", "d"])
@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("factory", [resnet18, preact_resnet50])
def test_any_image_size_works_and_blur_never_changes_a_shape(factory, stem, blur):
    model = factory(3, 0.1, blur, stem=stem).eval()
    stride = 8 if stem == "small" else 32
    for size in (33, 47, 100) if stem != "small" else (8, 33):
        with torch.no_grad():
            maps = model.features(torch.randn(1, 3, size, size))
        assert maps.shape[2:] == (-(-size // stride), -(-size // stride))
        assert model.fc(maps.mean((2, 3), keepdim=True)).flatten(1).shape == (1, 3)


@pytest.mark.parametrize("blur", [False, True])
def test_resnet50_runs_at_sizes_that_are_no_multiple_of_32(blur):
    model = resnet50(3, use_blurpool=blur).eval()
    with torch.no_grad():
        for size in (32, 33, 160, 225):
            assert model(torch.randn(1, 3, size, size)).shape == (1, 3)


@pytest.mark.parametrize("blur", [False, True])
def test_it_trains_in_bf16_and_channels_last(blur):
    torch.manual_seed(0)
    model = resnet50(4, drop_path_rate=0.2, use_blurpool=blur).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    formats = []
    model.layer3.register_forward_hook(lambda _, __, out: formats.append((out.dtype, out.stride()[1])))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert formats == [(torch.bfloat16, 1)]  # still half precision, channels innermost
    # Zero gammas hold back what lies behind them at first; everything else must have learned something.
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.conv1.weight.grad.abs().max() > 0 and model.fc.weight.grad.abs().max() > 0


def test_stem_d_is_resnet_d():
    """timm's resnet50d has as many parameters, and https://arxiv.org/abs/1812.01187 the same shortcuts."""
    model = resnet50(1000, head="linear", stem="d")
    assert sum(p.numel() for p in model.parameters()) == 25_576_264
    assert resnet50(1000, stem="d").state_dict().keys() - resnet50(1000).state_dict().keys() == {
        f"conv1.{key}" for key in model.conv1.state_dict()
    }
    shortcut, maps = model.layer2[0].downsample.eval().double(), torch.randn(2, 256, 6, 7).double()
    pooled = torch.empty(2, 256, 3, 4).double()
    for i in range(3):
        for j in range(4):  # the last column has one pixel of two
            pooled[:, :, i, j] = maps[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    projected = torch.einsum("ok,nkij->noij", shortcut[1].weight[:, :, 0, 0], pooled)
    norm = shortcut[2]
    torch.testing.assert_close(shortcut(maps), projected / (1 + norm.eps) ** 0.5, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, nn.AvgPool2d) for m in resnet50(1000).modules())
    assert not any(isinstance(m, nn.AvgPool2d) for m in resnet50(2, 0.0, True, stem="d").modules())


def test_heads_and_stems_that_do_not_exist_are_named():
    with pytest.raises(UsageError, match="no head 'mlp'"):
        resnet18(3, head="mlp")
    with pytest.raises(UsageError, match="no stem 'big'"):
        resnet18(3, stem="big")


def stages(model: nn.Module):
    return model.layer1, model.layer2, model.layer3, model.layer4
