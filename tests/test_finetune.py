"""--freeze-epochs and --backbone-lr: what is trained and how fast, on any number of ranks, after any stop."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import TINY, built, config_of, tiny_run
from runs import digest, payload
from test_distributed import run as run_ranks
from test_optim import RECIPE, REFERENCES, a_deep_model, set_gradients
from torch import nn

import loop
import train
from base import flags
from base.errors import UsageError
from base.progress import Eta
from data_utils import BatchMixer
from models import build_model, classifier_of, train_mode
from optim import OPTIMIZERS, build_optimizer
from optim.schedule import SCHEDULES, Schedule
from train_utils import plan, train_step


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of TINY's network, with statistics that differ from those of any batch."""
    torch.manual_seed(5)
    model = build_model("resnet_tiny", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- which epochs, which layers ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=4), st.data())
def test_freezing_cuts_phases_and_changes_nothing_else_in_the_plan(epochs, sizes, data):
    frozen = data.draw(st.integers(0, epochs))

    def by_epoch(phases):
        return [
            (epoch, p.image_size, p.batch_size, p.step_before(epoch), p.steps_per_epoch)
            for p in phases
            for epoch in range(p.first_epoch, p.last_epoch + 1)
        ]

    phases = plan(epochs, sizes, 40, 8, freeze_epochs=frozen)
    assert by_epoch(phases) == by_epoch(plan(epochs, sizes, 40, 8))
    trained = [p.head_only for p in phases for _ in range(p.epochs)]
    assert trained == [True] * frozen + [False] * (epochs - frozen)


def test_only_the_classifier_moves_and_then_everything(weights, tmp_path):
    start, states = torch.load(weights), []
    arguments = [*TINY, "--init-from", weights, "--freeze-epochs", "1", "--save-dir", tmp_path]
    for stop in (5, 6):  # the last step of the first epoch, and the next one
        train.main([*map(str, arguments), "--resume", "auto", "--stop-after", str(stop)])
        states.append(payload(tmp_path))
    after_frozen, after_switch = states
    assert changed(start, after_frozen["model"]) == {"fc.weight", "fc.bias"}
    assert changed(start, after_frozen["ema"]["shadow"]) == {"fc.weight", "fc.bias"}
    assert changed(start, after_switch["model"]) == set(start)
    assert len(after_frozen["optimizer"]["state"]) == 2
    assert len(after_switch["optimizer"]["state"]) == len(
        list(build_model("resnet_tiny", num_classes=2).parameters())
    )


@pytest.mark.parametrize("arch, head", [
    ("resnet18", "fc"), ("preact_resnet50", "fc"), ("mobilenet_v3_large", "classifier.3"),
    ("efficientnet_b0", "classifier.1"), ("swin_t", "head"), ("vit_b_16", "heads.head"),
])  # fmt: skip
def test_the_classifier_is_the_last_layer_and_the_rest_is_in_eval_mode(arch, head):
    with torch.device("meta"):
        model = build_model(arch, num_classes=7, image_sizes=[32])
    train_mode(model, head_only=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{head}.weight", f"{head}.bias"} and classifier_of(model) is model.get_submodule(head)
    assert {name for name, module in model.named_modules() if module.training} == {head}
    train_mode(model)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


def test_training_the_classifier_is_softmax_regression_on_the_features_that_are_scored(weights, tmp_path):
    """Five steps of SGD, against the gradient written out in float64."""
    arguments = [
        "--init-from",
        weights,
        "--freeze-epochs",
        1,
        "--optimizer",
        "sgd",
        "--lr",
        0.5,
        "--clip-norm",
        0,
    ]
    arguments += [
        "--momentum",
        0,
        "--weight-decay",
        0,
        "--schedule",
        "constant",
        "--no-ema",
        "--label-smoothing",
        0,
    ]
    run = tiny_run(tmp_path, *arguments)
    run.state.model.load_state_dict(torch.load(weights))
    run.mixers[True] = BatchMixer(10, 0.0, 0.0, 0.0)
    loader, options = loop.start_phase(run, run.phases[0])
    reference = copy.deepcopy(run.state.model).double().eval()
    weight, bias = (p.detach().flatten(1) if p.ndim > 1 else p.detach() for p in reference.fc.parameters())
    for images, labels in loader:
        features = reference.features(images.double()).mean((2, 3))
        error = (features @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, 10)
        weight = weight - 0.5 * error.T @ features / len(labels)
        bias = bias - 0.5 * error.mean(0)
        train_step(run.state, options, images, labels)
    torch.testing.assert_close(
        run.state.model.fc.weight.detach().flatten(1).double(), weight, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(run.state.model.fc.bias.detach().double(), bias, rtol=0, atol=1e-5)


# --- the learning rate below the classifier ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_with_a_slower_backbone_equal_a_float64_loop(name):
    model = a_deep_model()
    head = list(model[-1].parameters())
    optimizer = build_optimizer(name, model, **RECIPE, backbone_lr=0.1, head=head)
    schedule = Schedule(optimizer, "step", peak_lr=0.05, total_steps=20)
    weights, states = [p.detach().clone() for p in model.parameters()], [{} for _ in model.parameters()]
    for t in range(1, 21):
        set_gradients(model, t)
        lr = schedule.lr_at(t - 1)
        for i, p in enumerate(model.parameters()):
            own = lr if any(p is q for q in head) else 0.1 * lr
            wd = 0.1 if p.ndim > 1 else 0.0
            weights[i] = REFERENCES[name](weights[i], p.grad, states[i], t, lr=own, wd=wd)
        optimizer.step()
        schedule.step()
    for p, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_reports_the_rate_of_the_classifier(name):
    def schedule(**slower):
        optimizer = build_optimizer("adamw", a_deep_model(), **RECIPE, **slower)
        return Schedule(optimizer, name, peak_lr=0.3, total_steps=30, patience=0)

    head = list(a_deep_model()[-1].parameters())
    plain, slow = schedule(), schedule(backbone_lr=0.25, head=head)
    for step in range(30):
        for one in (plain, slow):
            one.step()
            if step % 10 == 9:
                one.observe(1.0)
        assert slow.last_lr == plain.last_lr and slow.lr == plain.lr
        rates = [group["lr"] / slow.lr for group in slow.optimizer.param_groups if slow.lr]
        assert set(rates) <= {1.0, 0.25}
    assert schedule(backbone_lr=0.25, head=head).state_dict() == schedule().state_dict()


def test_without_the_flag_the_groups_are_those_of_before():
    model = a_deep_model()
    groups = build_optimizer("adamw", model, **RECIPE, head=model[-1].parameters()).param_groups
    assert len(groups) == 2 and not any("backbone_lr" in group for group in groups)


# --- whole runs ---

FROZEN = ["--freeze-epochs", "1", "--backbone-lr", "0.3", "--lr", "3e-3"]


@pytest.mark.parametrize("stops, options", [
    ((3, 5, 6), "--accumulate 2"),
    ((2, 5, 9), "--optimizer sgd --lr 0.05 --freeze-epochs 2"),
    ((5, 6), "--optimizer muon"),
    ((4, 7), "--optimizer lamb --schedule plateau --eval-every 2 --no-ema"),
    ((5, 11), "--optimizer rmsprop --lr 1e-4 --freeze-epochs 3 --ema-half-life 1"),
])  # fmt: skip
def test_a_run_stopped_around_the_switch_ends_with_the_same_bits(stops, options, weights, tmp_path):
    arguments = [*TINY, "--init-from", str(weights), *FROZEN, *options.split()]
    train.main([*arguments, "--save-dir", str(tmp_path / "straight")])
    for stop in stops:
        train.main(
            [*arguments, "--save-dir", str(tmp_path / "run"), "--resume", "auto", "--stop-after", str(stop)]
        )
    train.main([*arguments, "--save-dir", str(tmp_path / "run"), "--resume", "auto"])
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")


def test_two_ranks_freeze_alike_and_exchange_all_gradients_after_the_switch(weights, tmp_path):
    arguments = [*TINY, "--init-from", weights, *FROZEN, "--accumulate", "2"]
    log, start = tmp_path / "log", torch.load(weights)
    straight = [*arguments, "--save-dir", tmp_path / "straight"]
    assert run_ranks(2, log, *straight) == [0, 0], log.read_text()
    for stop in (5, 7):
        part = [*arguments, "--save-dir", tmp_path / "run", "--resume", "auto", "--stop-after", stop]
        assert run_ranks(2, log, *part) == [0, 0], log.read_text()
        if stop == 5:
            assert changed(start, payload(tmp_path / "run")["model"]) == {"fc.weight", "fc.bias"}
    assert run_ranks(2, log, *arguments, "--save-dir", tmp_path / "run", "--resume", "auto") == [0, 0]
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")
    assert changed(start, payload(tmp_path / "run")["model"]) == set(start)


def test_the_wrapper_is_made_anew_at_the_switch_only(weights, tmp_path):
    run = tiny_run(tmp_path, "--init-from", weights, "--freeze-epochs", 2)
    made = []
    run.wrap = lambda model: made.append(model) or model
    for phase in run.phases:
        loop.start_phase(run, phase)
    assert [p.head_only for p in run.phases] == [True, True, False] and len(made) == 2


@pytest.mark.slow
def test_compiled_steps_follow_the_eager_ones_across_the_switch(weights, tmp_path):
    found = []
    for compiled in ([], ["--compile"]):
        options = ["--init-from", weights, *FROZEN, "--drop-path-rate", 0, *compiled]
        config, losses = config_of(*options), []
        run = built(config, tmp_path)
        run.state.model.load_state_dict(torch.load(weights))
        for phase in run.phases:
            loader, how = loop.start_phase(run, phase)
            for _, (images, labels) in zip(range(2), loader, strict=False):
                losses.append(train_step(run.state, how, images, labels).result().loss)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_expected_time_counts_a_third_for_steps_of_the_classifier():
    phases = plan(4, [10], 100, 10, freeze_epochs=1)
    eta = Eta(phases, num_val=0)
    eta.observe_training(phases[0], 20, 20.0)  # a second an image, so three of the whole network
    assert eta.remaining(0, 0) == pytest.approx(100 + 3 * 300)


@pytest.mark.parametrize("typed, words", [
    ("--freeze-epochs 1", "would train a classifier on random layers"),
    ("--freeze-epochs 4 --epochs 3 --pretrained", "--freeze-epochs 4 is more than the 3 epochs"),
    ("--backbone-lr 0", "must be a number, above 0"),
])  # fmt: skip
def test_what_cannot_work_is_refused(typed, words):
    with pytest.raises(UsageError, match=words):
        flags.check_train(*flags.parse(train.build_parser(), typed.split()))


def test_the_log_has_the_rate_of_the_classifier(weights, tmp_path):
    arguments = [*TINY, "--init-from", str(weights), *FROZEN, "--schedule", "constant", "--log-every", "1"]
    train.main([*arguments, "--save-dir", str(tmp_path)])
    for name in ("metrics", "steps"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {row["lr"] for row in rows} == {3e-3}
    groups = payload(tmp_path)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([3e-3, 3e-3, 9e-4, 9e-4])
