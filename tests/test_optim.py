"""Optimizers against loops written after their papers; schedules and clipping against torch's."""

import copy
import io
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import UsageError
from models import build_model
from optim import OPTIMIZERS, Lamb, Muon, build_optimizer, clip_gradients, muon_groups, param_groups
from optim.muon import orthogonalized
from optim.schedule import SCHEDULES, Schedule
from optim.undo import step_unless

F64 = torch.float64
RECIPE = {"lr": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}


def a_model(seed=0, dtype=F64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).to(dtype)


def a_deep_model(seed=0, dtype=F64):
    """A model with hidden weights: two convolutions and a linear layer; wide, tall, and of equal shapes."""
    torch.manual_seed(seed)
    convs = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 2), nn.Conv2d(5, 7, 1)
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(7, 5), nn.Linear(5, 2))
    return model.to(dtype)


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)


# --- the references: one parameter at a time, as the papers and torch's documentation write them ---


def sgd(w, g, s, t, *, lr, wd, momentum=0.9, nesterov=False):
    g = g + wd * w
    s["b"] = g.clone() if t == 1 else momentum * s["b"] + g
    return w - lr * (g + momentum * s["b"] if nesterov else s["b"])


def adam_direction(g, s, t, eps):
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
    return (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + eps)


def adamw(w, g, s, t, *, lr, wd):
    return w - lr * wd * w - lr * adam_direction(g, s, t, 1e-8)


def adam(w, g, s, t, *, lr, wd):
    return w - lr * adam_direction(g + wd * w, s, t, 1e-8)


def rmsprop(w, g, s, t, *, lr, wd):
    g = g + wd * w
    s["v"] = 0.99 * s.get("v", 0) + 0.01 * g * g
    s["b"] = 0.9 * s.get("b", 0) + g / (s["v"].sqrt() + 1e-8)
    return w - lr * s["b"]


def lamb(w, g, s, t, *, lr, wd):
    update = adam_direction(g, s, t, 1e-6) + wd * w
    length, update_length = math.sqrt((w * w).sum()), math.sqrt((update * update).sum())
    adapted = w.ndim > 1 and length > 0 and update_length > 0
    return w - lr * (length / update_length if adapted else 1.0) * update


def muon(w, g, s, t, *, lr, wd):
    """The hidden weights of `a_deep_model`; the rest is AdamW's."""
    if w.shape not in HIDDEN:
        return adamw(w, g, s, t, lr=lr, wd=wd)
    s["b"] = 0.95 * s.get("b", 0) + 0.05 * g
    x = (0.95 * s["b"] + 0.05 * g).flatten(1)
    x = x / (x * x).sum().sqrt()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return w - lr * wd * w - lr * 0.2 * math.sqrt(max(x.shape)) * x.view(w.shape)


REFERENCES = {"sgd": sgd, "adamw": adamw, "adam": adam, "rmsprop": rmsprop, "lamb": lamb, "muon": muon}
HIDDEN = {(5, 3, 2, 2), (7, 5, 1, 1), (5, 7)}


@pytest.mark.parametrize("name, options", [*((name, {}) for name in OPTIMIZERS), ("sgd", {"nesterov": True})])
def test_twenty_steps_equal_a_float64_loop(name, options):
    model = a_deep_model()
    optimizer = build_optimizer(name, model, **{**RECIPE, **options})
    weights = [p.detach().clone() for p in model.parameters()]
    states = [{} for _ in weights]
    for t in range(1, 21):
        set_gradients(model, t)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / t  # as a schedule does
        for i, p in enumerate(model.parameters()):
            wd = 0.1 if p.ndim > 1 else 0.0
            weights[i] = REFERENCES[name](weights[i], p.grad, states[i], t, lr=0.05 / t, wd=wd, **options)
        optimizer.step()
    for p, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_plain_and_resumes_bit_for_bit(name):
    model = a_deep_model(dtype=torch.float32).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(name, model, **RECIPE)
    for t in range(3):
        set_gradients(model, t)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(model)
    resumed = build_optimizer(name, resumed_model, **{**RECIPE, "lr": 9.0})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    fresh_model = copy.deepcopy(model)
    fresh = build_optimizer(name, fresh_model, **RECIPE)
    for m, o in ((model, optimizer), (resumed_model, resumed), (fresh_model, fresh)):
        for t in range(3, 6):
            set_gradients(m, t)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))
    # control: without the state, the weights differ
    assert not any(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh_model.parameters(), strict=True)
    )


def test_only_weights_decay_and_frozen_parameters_are_left_out():
    model = a_model()
    model[0].bias.requires_grad_(False)
    decayed, rest = param_groups(model, 0.3)
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape, model[3].weight.shape]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in rest["params"]] == [id(p) for p in (model[1].weight, model[1].bias, model[3].bias)]


@pytest.mark.parametrize("arch, embeddings", [
    ("vit_b_16", {"class_token", "encoder.pos_embedding"}), ("swin_t", {"relative_position_bias_table"}),
    ("resnet18", set()), ("preact_resnet50", set()), ("mobilenet_v3_large", set()),
])  # fmt: skip
def test_all_matrices_decay_but_the_embeddings_of_transformers(arch, embeddings):
    with torch.device("meta"):
        model = build_model(arch, num_classes=5, image_sizes=(32,))
    names = {id(p): name for name, p in model.named_parameters()}
    _, rest = param_groups(model, 0.1)
    matrices = {names[id(p)] for p in rest["params"] if p.ndim > 1}
    assert {name if name in embeddings else name.rpartition(".")[2] for name in matrices} == embeddings


def test_lamb_moves_weights_that_start_at_zero_and_skips_missing_gradients():
    zero, unused = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([zero, unused], lr=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(unused.detach(), torch.ones(2, 2)) and unused not in optimizer.state


def test_lamb_step_length_is_a_share_of_the_weight_whatever_the_gradient():
    for scale in (1e-3, 1e3):
        weight = nn.Parameter(torch.randn(5, 5, dtype=F64))
        before = weight.detach().clone()
        weight.grad = scale * torch.randn(5, 5, dtype=F64)
        Lamb([weight], lr=0.01).step()
        assert (weight - before).norm().item() == pytest.approx(0.01 * before.norm().item())


def test_muon_equals_torchs_on_matrices():
    torch.manual_seed(0)
    ours, theirs = (
        nn.ParameterList(torch.randn(3, 7, dtype=torch.float32) for _ in range(2)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "weight_decay": 0.1}
    steppers = (
        Muon([{"params": list(ours), "hidden": True}], **options),
        torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
    )
    before = [p.detach().clone() for p in ours]
    for t in range(5):
        for model, optimizer in zip((ours, theirs), steppers, strict=True):
            set_gradients(model, t)
            optimizer.step()
    for p, q, start in zip(ours, theirs, before, strict=True):  # torch's orthogonalizes in bfloat16
        assert (p - q).norm() < 0.03 * (p - start).norm()


@pytest.mark.parametrize("shape", [(6, 6), (4, 50), (50, 4), (1, 9)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = [
        torch.randn(shape, dtype=F64),
        torch.randn(3, 5, dtype=F64),
        torch.randn(shape[::-1], dtype=F64),
    ]
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ result @ v.T  # diagonal: the singular vectors stay
        torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-10)
        assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.25
    assert orthogonalized([torch.zeros(2, 3)])[0].eq(0).all()


@pytest.mark.parametrize("arch", ["resnet18", "preact_resnet50", "mobilenet_v3_large", "vit_b_16", "swin_t"])
def test_muon_takes_the_hidden_weights(arch):
    with torch.device("meta"):
        model = build_model(arch, num_classes=10, drop_path_rate=0.0, use_blurpool=False, head="conv",
                            stem="imagenet", image_sizes=[224])  # fmt: skip
    decayed, rest, hidden = muon_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)].split(".")[-1] for p in decayed["params"]} - {"weight"}
    assert kept <= {"class_token", "pos_embedding", "relative_position_bias_table"}
    weights = [names[id(p)] for p in decayed["params"] if names[id(p)].endswith("weight")]
    assert weights == FIRST_AND_LAST[arch]
    assert len(hidden["params"]) > 15 and all(p.ndim > 1 for p in hidden["params"])
    assert sum(len(group["params"]) for group in (decayed, rest, hidden)) == len(names)


FIRST_AND_LAST = {
    "resnet18": ["conv1.weight", "fc.weight"],
    "preact_resnet50": ["conv1.weight", "fc.weight"],
    "mobilenet_v3_large": ["features.0.0.weight", "classifier.3.weight"],
    "vit_b_16": ["conv_proj.weight", "heads.head.weight"],
    "swin_t": ["features.0.0.weight", "head.weight"],
}


@pytest.mark.parametrize("name, momentum", [("adamw", 0.9), ("rmsprop", 0.9), ("sgd", 0.0)])
def test_nesterov_without_effect_is_refused(name, momentum):
    with pytest.raises(UsageError, match="--nesterov"):
        build_optimizer(name, a_model(), **{**RECIPE, "momentum": momentum, "nesterov": True})


def test_momentum_reaches_those_that_have_one():
    for name in OPTIMIZERS:
        group = build_optimizer(name, a_model(), **{**RECIPE, "momentum": 0.7}).param_groups[0]
        assert group.get("momentum") == (0.7 if name in ("sgd", "rmsprop") else None)


# --- clipping ---


def gradients(scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(shape, dtype=F64)) for shape in ((3, 2), (4,), (1, 2, 2), (2,))]
    for p in params[:-1]:  # the last has no gradient
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=F64)
    return params


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-4, 0.1, 1.0, 30.0]), st.sampled_from([0.01, 1.0, 5.0]))
def test_clipping_equals_torchs(seed, scale, limit):
    for mode, reference in (("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)):
        ours, theirs = gradients(scale, seed), gradients(scale, seed)
        norm = clip_gradients(iter(ours), mode, limit)
        reference(theirs, limit)
        flat = torch.cat([p.grad.flatten() for p in gradients(scale, seed)[:-1]])
        torch.testing.assert_close(norm, flat.norm())
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:-1], theirs[:-1], strict=True))


@pytest.mark.parametrize("mode", ["norm", "value"])
@pytest.mark.parametrize("limit", [0, 0.0, math.inf])
def test_a_clip_norm_of_zero_only_measures(mode, limit):
    params, before = gradients(10.0), gradients(10.0)
    assert clip_gradients(params, mode, limit) > 10
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params[:-1], before[:-1], strict=True))


def test_a_norm_that_is_not_finite_is_reported_not_raised():
    params = gradients(1.0)
    params[0].grad[0, 0] = math.nan
    assert clip_gradients(params, "norm", 1.0).isnan()


def test_an_unknown_clip_mode_is_refused():
    with pytest.raises(ValueError):
        clip_gradients(gradients(1.0), "both", 1.0)


# --- schedules ---


def an_optimizer(lr=1.0):
    # Two groups with momentum: all groups are scheduled, and the momentum must stay as it is.
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=lr, momentum=0.9
    )


def walk(schedule, steps):
    """Return the rates that `steps` optimizer steps use, and the last one according to the schedule."""
    used = []
    for _ in range(steps):
        rates = {group["lr"] for group in schedule.optimizer.param_groups}
        used.append(rates.pop())
        assert not rates
        schedule.step()
        assert schedule.last_lr == used[-1]
    return used


def torchs(make, steps, lr=0.3):
    optimizer = an_optimizer(lr)
    scheduler, used = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer.step() here
        for _ in range(steps):
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return used


def warm_cosine(optimizer, warmup, total):
    up = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    down = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    return lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])


TORCHS = {
    "onecycle": ({}, lambda o, n: lr_scheduler.OneCycleLR(o, 0.3, total_steps=n, cycle_momentum=False)),
    "cosine": ({}, lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n)),
    "cosine, warm": ({"warmup_steps": 7}, lambda o, n: warm_cosine(o, 7, n)),
    "restarts": ({"cycles": 3}, lambda o, n: lr_scheduler.CosineAnnealingWarmRestarts(o, math.ceil(n / 3))),
    "step": (
        {},
        lambda o, n: lr_scheduler.MultiStepLR(o, [round(n / 3), round(2 * n / 3), round(8 * n / 9)]),
    ),
    "triangular2": (
        {"cycles": 5},
        lambda o, n: lr_scheduler.CyclicLR(
            o, 0.3 / 25, 0.3, n / 10, mode="triangular2", cycle_momentum=False
        ),
    ),
    "constant": ({}, lambda o, n: lr_scheduler.ConstantLR(o, factor=1.0)),
}


@pytest.mark.parametrize("total", [9, 90, 101])
@pytest.mark.parametrize("case", TORCHS)
def test_every_step_equals_torchs_own_scheduler(case, total):
    options, make = TORCHS[case]
    optimizer = an_optimizer()
    schedule = Schedule(optimizer, case.split(",")[0], peak_lr=0.3, total_steps=total, **options)
    ours = walk(schedule, total)
    assert ours == pytest.approx(torchs(lambda o: make(o, total), total), rel=1e-12, abs=1e-15)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_a_one_cycle_of_a_few_steps_is_torchs_too(total):
    schedule = Schedule(an_optimizer(), "onecycle", peak_lr=0.3, total_steps=total)
    assert walk(schedule, total) == pytest.approx(torchs(lambda o: TORCHS["onecycle"][1](o, total), total))


def test_the_last_step_of_a_one_cycle_uses_its_minimum():
    used = walk(Schedule(an_optimizer(), "onecycle", peak_lr=1.0, total_steps=200), 200)
    assert used[0] == pytest.approx(1 / 25)
    assert max(used) == used[59] == 1.0
    assert used[-1] == min(used) == pytest.approx(1 / 25e4)


def test_step_drops_at_epochs_30_60_and_80_of_90():
    per_epoch = 7
    used = walk(Schedule(an_optimizer(), "step", peak_lr=1.0, total_steps=90 * per_epoch), 90 * per_epoch)
    drops = [k / per_epoch for k in range(1, len(used)) if used[k] < used[k - 1]]
    assert drops == [30, 60, 80]
    assert used[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_phases_scale_the_rate_and_a_resume_changes_nothing(name):
    phases, total = ((12, 1.0), (5, 0.5), (13, 0.25)), 30
    plain = walk(Schedule(an_optimizer(), name, peak_lr=0.3, total_steps=total), total)
    factors = [factor for steps, factor in phases for _ in range(steps)]

    def scaled():
        return Schedule(an_optimizer(), name, peak_lr=0.3, total_steps=total, phases=phases)

    straight = walk(scaled(), total)
    assert straight == pytest.approx([lr * f for lr, f in zip(plain, factors, strict=True)], rel=1e-15)
    assert straight == [scaled().lr_at(k) for k in range(total)]
    for stop in (0, 1, 11, 12, 13, 29, 30):
        first, second = scaled(), scaled()
        used = walk(first, stop)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.last_lr == first.last_lr
        assert used + walk(second, total - stop) == straight  # bit for bit


def test_plateau_equals_torchs_and_survives_a_resume_between_any_two_evaluations():
    torch.manual_seed(0)
    losses = [1 / (1 + k) for k in range(6)] + (0.17 + 0.1 * torch.rand(30)).tolist() + [math.nan] * 12
    optimizer = an_optimizer(0.3)
    reference, expected = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=4), []
    for loss in losses:
        expected.append(optimizer.param_groups[0]["lr"])
        reference.step(loss)

    def plateau():
        return Schedule(an_optimizer(), "plateau", peak_lr=0.3, total_steps=3 * len(losses))

    schedule, seen = plateau(), []
    for loss in losses:  # epochs of three steps
        used = walk(schedule, 3)
        assert len(set(used)) == 1
        seen += used[:1]
        schedule.observe(loss)
        resumed = plateau()
        resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
        schedule = resumed
    significant = [lr > 1e-6 for lr in expected]  # torch ignores drops below 1e-8
    assert sum(significant) > 20 and len(set(expected)) > 3
    assert [a for a, k in zip(seen, significant, strict=True) if k] == pytest.approx(
        [b for b, k in zip(expected, significant, strict=True) if k], rel=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_patience_drops_the_rate_of_any_schedule(name):
    losses = [1.0, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.7]

    def schedule(**options):
        return Schedule(an_optimizer(), name, peak_lr=0.3, total_steps=3 * len(losses), **options)

    optimizer = an_optimizer(1.0)
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    plain, dropping = schedule(patience=10**9), schedule(patience=1)
    for loss in losses:
        factor = optimizer.param_groups[0]["lr"]
        expected = [lr * factor for lr in walk(plain, 3)]
        assert walk(dropping, 3) == pytest.approx(expected, rel=1e-12)
        plain.observe(loss), dropping.observe(loss), reference.step(loss)
    assert factor == pytest.approx(1e-4)


def test_plateau_drops_after_five_evaluations_without_progress():
    schedule = Schedule(an_optimizer(), "plateau", peak_lr=1.0, total_steps=100)
    rates = []
    for loss in (1.0, 0.9, 0.9, 0.89995, 0.9, 0.9, 0.9, 0.9):  # 0.006 % better is not better
        schedule.observe(loss)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 2)
    assert schedule.last_lr == 1.0  # no step has used the new rate


def test_a_loss_at_another_image_size_is_no_plateau():
    schedule = Schedule(an_optimizer(), "plateau", peak_lr=1.0, total_steps=100, patience=0)
    schedule.observe(0.15)
    schedule.observe(0.17, comparable=False)
    assert schedule.lr == 1.0 and schedule.best == 0.17
    schedule.observe(0.17)
    assert schedule.lr == pytest.approx(0.1)


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"plateau"}))
def test_only_plateau_listens_to_the_loss(name):
    schedule = Schedule(an_optimizer(), name, peak_lr=1.0, total_steps=100)
    before = schedule.state_dict()
    for _ in range(20):
        schedule.observe(5.0)
    assert schedule.state_dict() == before


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_past_the_end_is_an_error_that_says_so(name):
    schedule = Schedule(an_optimizer(), name, peak_lr=1.0, total_steps=6)
    last = walk(schedule, 6)[-1]
    assert schedule.optimizer.param_groups[0]["lr"] == last  # nothing after the end
    with pytest.raises(RuntimeError, match="step 7 of a schedule planned for 6"):
        schedule.step()
    for step in (-1, 6):
        with pytest.raises(ValueError):
            schedule.lr_at(step)


def test_schedule_state_is_plain():
    schedule = Schedule(an_optimizer(), "plateau", peak_lr=1.0, total_steps=6)
    schedule.observe(torch.tensor(0.5))
    assert all(type(value) in (int, float) for value in schedule.state_dict().values())


@pytest.mark.parametrize(("steps", "cycles"), [(50, 7), (10, 4), (20, 6), (1120, 3)])
def test_restarts_end_low_with_as_many_cycles_as_asked_for(steps, cycles):
    schedule = Schedule(an_optimizer(), "restarts", peak_lr=1.0, total_steps=steps, cycles=cycles)
    rates = [schedule.lr_at(step) for step in range(steps)]
    ups = sum(after > before for before, after in pairwise(rates))
    assert ups == cycles - 1 and rates[-1] < 0.51


def test_a_restart_that_falls_on_a_step_is_at_the_peak():
    """Also where a cycle is no whole number of steps: 10 steps in 6 cycles restart exactly at step 5."""
    for cycles in range(2, 24):
        for steps in range(cycles, 160):
            schedule = Schedule(an_optimizer(), "restarts", peak_lr=1.0, total_steps=steps, cycles=cycles)
            length = math.ceil(steps / cycles)
            if steps < (cycles - 0.5) * length:
                starts = [step for step in range(steps) if step * cycles % steps == 0]
                assert starts and all(schedule.lr_at(step) == 1.0 for step in starts), (steps, cycles)


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("cosine", {"warmup_steps": 10}, UsageError),
        ("restarts", {"cycles": 11}, UsageError),
        ("triangular2", {"cycles": 0}, UsageError),
        ("constant", {"phases": ((4, 1.0), (5, 1.0))}, ValueError),
        ("constant", {"total_steps": 0}, ValueError),
    ],
)
def test_impossible_schedules_are_refused(name, options, error):
    with pytest.raises(error):
        Schedule(an_optimizer(), name, **{"peak_lr": 1.0, "total_steps": 10, **options})


class Operations(TorchDispatchMode):
    """Counts what is dispatched, without views."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **options or {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_to_skip_steps_takes_few_operations_however_many_weights_there_are(name):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)])
    optimizer, counts = build_optimizer(name, model, **RECIPE), []
    for step in (lambda: step_unless(torch.zeros(()), optimizer), optimizer.step):
        for _ in range(3):  # the first one makes the state, the second one the copies
            set_gradients(model, 0)
            with Operations() as operations:
                step()
        counts.append(operations.count)
    assert counts[0] - counts[1] < 20


def test_a_bad_step_moves_nothing_after_a_checkpoint_was_loaded_or_when_more_weights_begin_to_move():
    model = a_deep_model()
    optimizer, head = build_optimizer("lamb", model, **RECIPE), list(model[-1].parameters())

    def take(k, bad, frozen=False):
        set_gradients(model, k)
        for p in model.parameters():
            p.grad = None if frozen and not any(p is q for q in head) else p.grad
        before = [p.detach().clone() for p in model.parameters()]
        means = {p: optimizer.state[p]["exp_avg"].clone() for p in optimizer.state if optimizer.state[p]}
        step_unless(torch.tensor(bad, dtype=F64), optimizer)
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        begun = [s["exp_avg"] for p, s in optimizer.state.items() if s and p not in means]
        grown = any(not torch.equal(optimizer.state[p]["exp_avg"], mean) for p, mean in means.items())
        return moved, grown, any(mean.any().item() for mean in begun)

    assert take(0, 0.0, frozen=True) == (True, False, True)
    assert take(1, 1.0, frozen=True) == (False, False, False)
    assert take(2, 1.0) == (False, False, False)  # --freeze-epochs has ended
    assert take(3, 0.0) == (True, True, False)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert take(4, 1.0) == (False, False, False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_agrees_without_synchronization(name):
    cpu, gpu = a_model(), a_model().to("cuda")
    steppers = [build_optimizer(name, model, **RECIPE) for model in (cpu, gpu)]
    finite = [torch.tensor(True), torch.tensor(True, device="cuda")]
    assert all(bool(o.defaults.get("fused")) == (name not in ("rmsprop", "lamb", "muon")) for o in steppers)
    for t in range(20):
        for model, optimizer in zip((cpu, gpu), steppers, strict=True):
            set_gradients(cpu, t)
            for p, q in zip(model.parameters(), cpu.parameters(), strict=True):
                p.grad = q.grad.to(p.device)
            if t == 10 and model is gpu:
                torch.cuda.set_sync_debug_mode("error")
            try:
                clip_gradients(model.parameters(), "norm", 1.0)
                step_unless(1.0 - finite[model is gpu].float(), optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(cpu.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=0, atol=1e-10)
