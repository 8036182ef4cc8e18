"""The EMA against its closed form, and the swap, which must restore everything."""

import copy
import io

import pytest
import torch
from torch import nn

from base.errors import CheckpointError
from ema import EMA, NoEMA


def a_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).to(dtype)


def train_a_little(model):
    """One forward in train mode and random moves: parameters, statistics and counter all change."""
    model.train()
    like = next(model.parameters())
    model(torch.randn(2, 3, 4, 4, dtype=like.dtype, device=like.device))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ramp", [True, False])
def test_the_average_is_the_closed_form_for_weights_and_buffers(ramp):
    model, steps = a_model(), 30
    ema, history = EMA(model, decay=0.6, ramp=ramp), [snapshot(model)]
    for _ in range(steps):
        train_a_little(model)
        ema.update()
        history.append(snapshot(model))
    # shadow = sum of share_n * w_n with share_n = (1 - d_n) * d_(n+1) * ... * d_steps; d_0 = 0 (initial)
    decays = [0.0] + [min(0.6, (1 + n) / (10 + n)) if ramp else 0.6 for n in range(1, steps + 1)]
    shares, left = [], 1.0
    for decay in reversed(decays):
        shares.insert(0, (1 - decay) * left)
        left *= decay
    assert sum(shares) == pytest.approx(1)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            expected = sum(share * state[name] for share, state in zip(shares, history, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(value, history[-1][name]) and value.item() == steps


def test_the_first_update_of_a_ramp_and_its_end():
    ema = EMA(a_model(), decay=0.9999)
    assert ema.decay_at(1) == 2 / 11
    assert ema.decay_at(100_000) == 0.9999
    assert EMA(a_model(), decay=0.9999, ramp=False).decay_at(1) == 0.9999


def test_the_copy_is_its_own_in_eval_mode_and_keeps_channels_last():
    model = a_model().to(memory_format=torch.channels_last).train()
    ema = EMA(model)
    assert not any(m.training for m in ema.module.modules()) and model.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert ema.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    ours = {t.data_ptr() for t in ema.module.state_dict().values()}
    assert ours.isdisjoint(t.data_ptr() for t in model.state_dict().values())
    before = snapshot(ema.module)
    train_a_little(model)
    assert same(ema.module.state_dict(), before)  # only update() moves it
    ema.update()
    assert not torch.equal(ema.module[0].weight, before["0.weight"])


def test_it_follows_replaced_buffers_and_loaded_weights():
    """`model.to()` and loading with assign=True replace the tensors."""
    model, other = a_model(), a_model(1)
    ema = EMA(model, decay=0.0)
    train_a_little(other)
    model.load_state_dict(other.state_dict(), assign=True)
    model[1].running_mean = torch.full((4,), 5.0, dtype=torch.float64)
    ema.update()
    assert same(ema.module.state_dict(), model.state_dict())
    assert ema.module[1].running_mean.tolist() == [5.0] * 4


def test_swapping_in_and_out_is_bit_exact():
    model = a_model(dtype=torch.float32)
    ema = EMA(model)
    for _ in range(3):
        train_a_little(model)
        ema.update()
    live, shadow = snapshot(model), snapshot(ema.module)
    parameters = list(model.parameters())
    ema.apply_shadow()
    assert same(model.state_dict(), shadow)
    ema.restore()
    assert same(model.state_dict(), live) and same(ema.module.state_dict(), shadow)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # the optimizer's


def test_calls_out_of_order_are_refused():
    ema = EMA(a_model())
    with pytest.raises(RuntimeError, match="apply_shadow"):
        ema.restore()
    ema.apply_shadow()
    with pytest.raises(RuntimeError, match="restore"):
        ema.apply_shadow()
    with pytest.raises(RuntimeError, match="restore"):
        ema.update()  # it would average the average
    ema.restore()
    ema.update()


def test_state_survives_a_file_and_resumes_bit_for_bit():
    torch.manual_seed(3)
    model = a_model()
    ema = EMA(model, decay=0.99)
    for _ in range(4):
        train_a_little(model)
        ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["shadow"].keys() == model.state_dict().keys()

    twin = copy.deepcopy(model)
    resumed = EMA(twin, decay=0.99)
    resumed.load_state_dict(saved)
    train_a_little(model)
    twin.load_state_dict(model.state_dict())
    at_checkpoint = snapshot(resumed.module)
    ema.update()
    resumed.update()
    assert same(ema.module.state_dict(), resumed.module.state_dict()) and resumed.num_updates == 5
    assert not same(resumed.module.state_dict(), at_checkpoint)


@pytest.mark.parametrize("change", ["copied", "moved"])
def test_an_average_that_was_copied_or_moved_still_follows_its_model(change):
    model = a_model()
    ema = EMA(model, decay=0.5, ramp=False)
    train_a_little(model)
    ema.update()
    if change == "copied":
        model, ema = copy.deepcopy((model, ema))
    else:
        model.float()
        ema.module.float()
    before = snapshot(ema.module)
    train_a_little(model)
    ema.update()
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[name] + model.state_dict()[name]) / 2)


def test_a_checkpoint_without_an_average_is_refused():
    with pytest.raises(CheckpointError, match="--no-ema"):
        EMA(a_model()).load_state_dict(NoEMA().state_dict())


def test_a_model_without_counters_and_tied_weights():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    ema = EMA(model, decay=0.5, ramp=False)
    before = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.zero_()
    ema.update()
    torch.testing.assert_close(ema.module[0].weight, before / 2)  # moved once, not twice
    assert ema.module[1].weight is ema.module[0].weight


def test_no_ema_does_nothing():
    ema = NoEMA()
    ema.update()
    ema.load_state_dict({"shadow": {}, "num_updates": 3})
    assert ema.state_dict() == {} and ema.module is None


def test_an_impossible_decay_is_refused():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError):
            EMA(a_model(), decay=decay)


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_for_it():
    model = a_model(dtype=torch.float32).to("cuda", memory_format=torch.channels_last)
    ema = EMA(model, decay=0.5, ramp=False)
    before = snapshot(ema.module)
    train_a_little(model)
    live = snapshot(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(ema.module[0].weight, (before["0.weight"] + live["0.weight"]) / 2)
