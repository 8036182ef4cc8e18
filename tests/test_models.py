"""models: the registry, and torchvision's architectures behind it."""

import re
from pathlib import Path

import pytest
import torch
from inprocess import config_of, tiny_run

import models
from base import flags, idle
from base.errors import UsageError
from harness import session
from models import torchvision_zoo
from models.convert import describe, to_torchvision


@pytest.mark.parametrize("arch", flags.ARCHS)
def test_every_architecture_gives_logits_and_learns(arch):
    torch.manual_seed(0)
    model = models.build_model(arch, num_classes=3, drop_path_rate=0.1, image_sizes=(32,))
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert describe(model.state_dict()) == f"{arch}, 3 classes"
    droppable = any(type(m).__name__ in ("DropPath", "StochasticDepth") for m in model.modules())
    assert droppable != (arch in idle.NO_DROP_PATH)
    assert any("BatchNorm" in type(m).__name__ for m in model.modules()) != (arch in idle.NO_BATCH_NORM)


@pytest.mark.parametrize(("arch", "branches"), [("efficientnet_b0", 16), ("swin_t", 12)])
def test_the_zoo_follows_the_linear_rule(arch, branches):
    model = models.build_model(arch, num_classes=3, drop_path_rate=0.3)
    rates = [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.3 * i / (branches - 1) for i in range(branches)])
    models.set_drop_path_rate(model, 0.0)
    assert not any(m.p for m in model.modules() if type(m).__name__ == "StochasticDepth")


def test_blurpools_licence_is_shown_to_the_user(tmp_path):
    run = tiny_run(tmp_path)
    for blur in (True, False):
        said = session.introduction(run, config_of(*["--use-blurpool"] * blur))
        assert ("CC BY-NC-SA" in said) == blur


def test_vit_works_at_one_size_only():
    build = models.build_model
    with pytest.raises(UsageError, match="one image size only, this run has 64, 128, 224"):
        build("vit_b_16", num_classes=3, image_sizes=(64, 128, 224))
    with pytest.raises(UsageError, match="100 px is not a multiple") as caught:
        build("vit_b_16", num_classes=3, image_sizes=(100,))
    assert caught.value.fix == "give --resize-schedule 96"
    assert torchvision_zoo.vit_size(()) == 224 and torchvision_zoo.vit_size((64, 64)) == 64


def test_options_without_a_place_are_refused():
    with pytest.raises(UsageError, match="no architecture 'resnet9000'"):
        models.build_model("resnet9000", num_classes=3)
    with pytest.raises(UsageError, match="--use-blurpool works with the ResNets only"):
        models.build_model("swin_t", num_classes=3, use_blurpool=True)
    with pytest.raises(UsageError, match="--stem works with the ResNets only"):
        models.build_model("swin_t", num_classes=3, stem="small")


def test_the_width_scales_every_channel():
    full, slim = (
        models.build_model("resnet18", num_classes=64, stem="small", width=width) for width in (None, 8)
    )
    shapes = zip(full.state_dict().values(), slim.state_dict().values(), strict=True)
    for ours, theirs in shapes:
        assert all(b in (a, a // 8) for a, b in zip(ours.shape, theirs.shape, strict=True))
    parameters = [sum(p.numel() for p in model.parameters()) for model in (full, slim)]
    assert parameters[1] == pytest.approx(parameters[0] / 64, rel=0.05)
    with pytest.raises(UsageError, match="--width works with the ResNets only"):
        models.build_model("swin_t", num_classes=3, width=8)
    with pytest.raises(UsageError, match="torchvision has no such model"):
        to_torchvision(models.build_model("resnet18", num_classes=3, width=8))


def test_nothing_slow_or_restricted_is_imported_before_it_is_used():
    # torchvision takes 5 s, antialiased-cnns has a licence of its own.
    for path in Path(models.__file__).parent.glob("*.py"):
        found = re.findall(
            r"^(?:import|from) (?:torchvision|antialiased_cnns)\b", path.read_text(), re.MULTILINE
        )
        assert not found, path.name
    path = Path(torchvision_zoo.__file__)
    assert "    import torchvision.models" in path.read_text().splitlines()


@pytest.mark.slow
def test_compiled_resnets_compute_what_eager_ones_do():
    for blur in (False, True):
        torch.manual_seed(0)
        model = models.build_model("resnet18", num_classes=3, use_blurpool=blur)
        images = torch.randn(2, 3, 64, 64)
        expected = model(images)
        found = torch.compile(model, fullgraph=True, dynamic=False)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
