"""models.summary against published counts and its own sums."""

import pytest
import torch

from models import build_model
from models.model import resnet18, resnet50
from models.summary import count_macs, count_params, format_table, rows


def test_resnet50_costs_what_is_published_and_blur_a_quarter_more():
    plain = count_macs(resnet50(), 224)
    assert plain == 4_089_184_256
    assert count_macs(resnet50(use_blurpool=True), 224) / plain == pytest.approx(1.26, abs=0.005)


@pytest.mark.parametrize("arch", ["preact_resnet50", "vit_b_16", "swin_t"])
def test_rows_add_up_to_the_model(arch):
    model = build_model(arch, num_classes=10, image_sizes=(64,))
    found = rows(model, 64)
    assert sum(row.params for row in found) == count_params(model)
    assert sum(row.macs for row in found) == count_macs(model, 64)
    assert all(row.shape or not row.macs for row in found)
    assert sum(row.params for row in rows(model, 64, depth=9)) == count_params(model)


def test_a_row_is_the_hand_count():
    row = rows(resnet18(10), 64)[0]
    assert (row.layer, row.shape, row.params) == ("conv1", (64, 32, 32), 64 * 3 * 7 * 7)
    assert row.macs == 64 * 32 * 32 * 3 * 7 * 7


def test_counting_leaves_the_model_as_it_was():
    model = resnet18(10).train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    format_table(model, 64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and not model.layer1[0].bn1.training and model.layer2[0].bn1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_table_is_aligned_and_ends_with_the_totals():
    lines = format_table(resnet18(1000, head="linear"), 224).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["layer", "output", "shape", "parameters", "multiply-adds"]
    assert lines[-1].split() == ["total", "at", "224", "px", "11,689,512", "1,814,073,344"]
