"""The range test against rates known from a grid, its edge cases, and that it restores everything."""

import copy
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data_utils
import ema
import lr_finder
import train
from analysis import figures, lr_range_test
from analysis.lr_suggestion import Divergence, longest_descent, smooth, suggest
from base import errors, flags, process
from base.device import Runtime
from base.errors import DivergedError, UsageError, UserError
from optim import build_optimizer
from optim.schedule import Schedule
from optim.undo import BatchNormBuffers
from sources.generated import digits
from train_utils import Phase, StepOptions, TrainState, plan, train_step

CPU = torch.device("cpu")
DIGITS = [
    *("--dataset", "digits", "--subset", "--subset-size", "160", "--arch", "resnet_tiny"),
    *("--epochs", "3", "--resize-schedule", "8,16,24", "--phase-batch-sizes", "8,8,16"),
    *("--num-workers", "0", "--device", "cpu"),
]
EASY = ["--stem", "small", "--augment", "none", "--mixup-alpha", "0", "--cutmix-alpha", "0"]  # learns at once


def pixels(split):
    images = torch.from_numpy(np.stack(split.images)).permute(0, 3, 1, 2).float()
    return (images / 255 - 0.3053) / 0.3759, torch.from_numpy(split.labels)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))


def convnet():
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class Batches:
    """An endless stream of shuffled training digits."""

    def __init__(self, size=64, poison=None):
        (self.images, self.labels), self.size, self.poison = pixels(digits().train), size, poison

    def __iter__(self):
        generator, count = torch.Generator().manual_seed(0), 0
        while True:
            for ids in torch.randperm(len(self.images), generator=generator).split(self.size)[:-1]:
                images = self.images[ids]
                yield (images * math.nan if count == self.poison else images), self.labels[ids]
                count += 1


def prepared(net, optimizer, lr=1e-3, steps=1000, amp=None, mix=True):
    torch.manual_seed(0)
    model = net()
    made = build_optimizer(optimizer, model, lr=lr, momentum=0.9, nesterov=False, weight_decay=1e-4)
    schedule = Schedule(made, "onecycle", peak_lr=lr, total_steps=steps)
    state = TrainState(model, made, schedule, torch.amp.GradScaler("cpu", enabled=False), ema.NoEMA())
    mixer = data_utils.BatchMixer(10, 0.2 * mix, 1.0 * mix, 0.1 * mix)
    return state, StepOptions(
        model, mixer, data_utils.LOSSES["ce"], Runtime(CPU, amp), BatchNormBuffers(model), seed=0
    )


# (net, optimizer, mixing) and the range of peak rates whose 150 OneCycle steps end within a point of
# the best accuracy; the slow test below measures it again.
PROBLEMS = {
    "mlp, sgd": (mlp, "sgd", False, (2e-2, 0.5)),
    "convnet, adamw": (convnet, "adamw", False, (3e-3, 0.1)),
    "convnet, lamb, mixed": (convnet, "lamb", True, (1e-2, 3e-2)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_suggestions_are_within_a_factor_of_three_of_the_grid(name):
    net, optimizer, mix, (low, high) = PROBLEMS[name]
    rates, losses, _ = lr_range_test.range_test(*prepared(net, optimizer, mix=mix), Batches(), 1e-7, 10, 120)
    for lr in suggest(rates, losses).values():
        assert low / 3 <= lr <= high * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_grid_is_what_the_fast_test_assumes(name):
    net, optimizer, mix, (low, high) = PROBLEMS[name]
    images, labels = pixels(digits().val)

    def accuracy(lr):
        state, how = prepared(net, optimizer, lr, 150, mix=mix)
        state.model.train()
        for _, batch in zip(range(150), Batches(), strict=False):
            train_step(state, how, *batch)
        return 100 * (state.model.eval()(images).argmax(1) == labels).float().mean().item()

    inside = [accuracy(lr) for lr in np.geomspace(low, high, 3)]
    assert min(inside) > max(accuracy(low / 10), accuracy(high * 10)) + 1
    assert max(inside) - min(inside) <= 1.5


def test_the_range_test_leaves_model_and_optimizer_as_they_were():
    state, how = prepared(convnet, "adamw")
    state.model.train()
    for _, batch in zip(range(3), Batches(), strict=False):
        train_step(state, how, *batch)
    before = copy.deepcopy(
        [state.model.state_dict(), state.optimizer.state_dict(), state.schedule.state_dict(), state.step]
    )
    lr_range_test.range_test(state, how, Batches(), 1e-6, 1, 20)
    after = [state.model.state_dict(), state.optimizer.state_dict(), state.schedule.state_dict(), state.step]
    assert flat(before) == flat(after)


def flat(value):
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, list | tuple) else value


def test_a_diverging_test_stops_early_and_still_suggests(capfd):
    rates, losses, ended = lr_range_test.range_test(
        *prepared(mlp, "sgd", mix=False), Batches(), 1e-5, 1e5, 100
    )
    assert ended == "the loss diverged" and len(rates) == len(losses) < 100
    assert all(math.isfinite(loss) for loss in losses)
    assert suggest(rates, losses)["valley"] < 1
    assert capfd.readouterr() == ("", "")  # neither the library's bar nor its messages


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_lr_finder.lr_finder", None)
    with pytest.raises(UsageError, match="needs the torch_lr_finder package"):
        lr_range_test.range_test(None, None, [], 1e-5, 1, 10)


def test_nan_ends_the_test_at_once_and_is_not_part_of_the_curve():
    state, how = prepared(convnet, "adamw")
    before = copy.deepcopy(state.model.state_dict())
    rates, losses, ended = lr_range_test.range_test(state, how, Batches(poison=12), 1e-6, 1, 40)
    assert "finite" in ended and len(rates) == len(losses) == 12
    assert flat(before) == flat(state.model.state_dict())  # BatchNorm has not seen the NaN


def test_bf16_finds_what_fp32_finds():
    found = []
    for amp in (None, torch.bfloat16):
        run = prepared(convnet, "adamw", amp=amp, mix=False)
        rates, losses, _ = lr_range_test.range_test(*run, Batches(), 1e-6, 10, 60)
        found.append(suggest(rates, losses)["valley"])
    assert 1 / 2 < found[0] / found[1] < 2


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_on_a_gpu(tmp_path, amp):
    pytest.importorskip("torch_lr_finder")
    arguments = ["--device", "cuda", "--amp", amp, "--phase", "3", "--num-iter", "80", "--out", str(tmp_path)]
    assert lr_finder.main([*DIGITS, *EASY, *arguments]) == 0
    assert json.loads((tmp_path / "lr_finder.json").read_text())["suggestion"]


def test_the_rates_rise_geometrically_and_each_is_the_one_its_step_used():
    state, how = prepared(mlp, "sgd", mix=False)
    used = []
    how.forward = lambda images: used.append(state.optimizer.param_groups[1]["lr"]) or state.model(images)
    rates, *_ = lr_range_test.range_test(state, how, Batches(), 1e-6, 1e-2, 30)
    assert rates == pytest.approx(lr_range_test.geometric(1e-6, 1e-2, 30))
    assert rates == used


# --- the curve ---


def test_smoothing_is_the_weighted_mean_of_its_definition():
    losses, scale = [3.0, 1.0, 4.0, 1.0, 5.0], 1.7
    for i, value in enumerate(smooth(losses, scale)):
        weights = [math.exp(-abs(i - j) / scale) for j in range(5)]
        assert value == pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
    assert smooth([2.0] * 30) == pytest.approx([2.0] * 30)  # no bias at the ends


def test_divergence_at_the_end_does_not_affect_the_suggestion():
    calm = [2.0 - 0.01 * k for k in range(100)]
    assert smooth([*calm, 1e9])[:80] == pytest.approx(smooth(calm)[:80], abs=0.02)


def test_a_known_curve():
    """A loss that falls only between 1e-3 and 1e-1, and rises from 1 on."""
    lrs = np.geomspace(1e-6, 10, 211)
    losses = 2 - np.clip((np.log10(lrs) + 3) / 2, 0, 1) + 10 * np.clip(np.log10(lrs), 0, 1)
    found = suggest(lrs, losses)
    assert 3e-3 < found["steepest"] < 3e-2
    assert found["valley"] == pytest.approx(10 ** (-3 + 2 * 2 / 3), rel=0.3)
    assert 1e-2 < found["minimum / 10"] < 1e-1


@pytest.mark.parametrize(
    "losses", [np.linspace(1, 5, 40), np.full(40, 2.0), 2 + np.random.default_rng(0).normal(0, 0.1, 40)]
)
def test_a_curve_that_does_not_fall_suggests_nothing(losses):
    assert set(suggest(np.geomspace(1e-6, 1, 40), losses).values()) == {None}


def test_the_longest_descent_steps_over_bumps():
    assert longest_descent([5, 6, 4, 4.5, 3, 2, 9, 1, 1]) in ((0, 7), (1, 7))
    assert longest_descent([1, 2, 3])[0] == longest_descent([1, 2, 3])[1]


def test_noise_around_a_tiny_loss_is_not_divergence():
    diverged = Divergence()
    assert not any(diverged(loss) for loss in [2.3] + [0.001] * 60 + [0.05] * 5)
    assert any(diverged(loss) for loss in [30.0] * 5)


# --- the command ---


def test_the_command_writes_curve_numbers_and_command_lines(tmp_path, capsys):
    arguments = [
        *(*DIGITS, *EASY),
        *("--lr-scale", "sqrt", "--save-dir", str(tmp_path / "a run"), "--plot", "--log-every", "5"),
    ]
    more = ["--phase", "3", "--num-iter", "80", "--out", str(tmp_path / "out")]
    assert lr_finder.main([*arguments, *more]) == 0
    found = json.loads((tmp_path / "out" / "lr_finder.json").read_text())
    assert (found["phase"], found["image_size"], found["batch_size"]) == (3, 24, 16)
    assert len(found["lrs"]) == len(found["losses"]) > 30 and found["flags"]["arch"] == "resnet_tiny"
    assert found["suggestion"] == found["suggestions"]["valley"]
    assert (tmp_path / "out" / "lr_finder.png").stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # --save-dir is not touched
    printed = capsys.readouterr().out
    assert "--log-every, --plot: passed to train.py" in printed
    assert "--plot" not in lr_finder.build_parser().format_help()  # which shows what it uses
    assert found["commands"].keys() == {"steepest", "minimum / 10", "valley"}
    for name, line in found["commands"].items():
        words = shlex.split(line)
        assert line in printed
        assert words[:2] == ["python", "train.py"] and words[2:-2] == arguments
        # --lr belongs to the first phase, with half the batch
        assert float(words[-1]) == pytest.approx(found["suggestions"][name] / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("arguments, phase", [
    ([], 3),  # OneCycleLR's peak is the end of phase 2; phase 3 begins just below it
    (["--schedule", "cosine"], 2), (["--schedule", "constant"], 3),
    (["--lr-scale", "linear"], 2), (["--schedule", "constant", "--lr-scale", "sqrt"], 1),
    (["--phase", "1"], 1),
])  # fmt: skip
def test_the_phase_with_the_highest_rate_is_tested(arguments, phase):
    config, _ = flags.parse(lr_finder.build_parser(), arguments)
    config = flags.make_config(flags.defaults() | flags.plain(config))
    sizes = config.resize_schedule
    phases = plan(config.epochs, sizes, 1_281_167, 256, phase_augment=["full"] * len(sizes))
    assert lr_finder.choose_phase(config, phases) is phases[phase - 1]


def test_accuracy_mode_trains_through_the_command_line(tmp_path, monkeypatch):
    # In this process: starting two others takes seconds and shows nothing more.
    here = SimpleNamespace(run=lambda command, **_: SimpleNamespace(returncode=train.main(command[2:])))
    monkeypatch.setattr(lr_range_test, "subprocess", here)
    arguments = ["--mode", "accuracy", "--trials", "2", "--trial-epochs", "1", "--start-lr", "1e-3"]
    arguments += ["--end-lr", "1e-2", "--phase", "2", "--phase-mix", "on,off,on", "--out", str(tmp_path)]
    arguments += ["--eval-every", "5", "--tensorboard"]  # the trials must score all the same, and log nothing
    assert lr_finder.main([*DIGITS, *arguments]) == 0
    found = json.loads((tmp_path / "lr_finder.json").read_text())
    assert found["lrs"] == pytest.approx([1e-3, 1e-2]) and found["suggestion"] in found["lrs"]
    assert all(0 <= accuracy <= 100 for accuracy in found["accuracies"])
    assert found["accuracies"][found["lrs"].index(found["suggestion"])] == max(found["accuracies"])
    assert {path.name for path in tmp_path.iterdir()} == {"lr_finder.json", "lr_finder.png"}


@pytest.mark.parametrize("more", ["", "--schedule cosine --warmup-epochs 1"])
def test_a_trial_is_one_phase_of_the_run_under_the_runs_own_flags(more):
    arguments = ["--phase-mix", "on,off,on", "--phase-epochs", "1,1,1", "--lr-scale", "sqrt", "--no-ema"]
    parser = flags.build_parser("train.py", "", groups=flags.TRAIN_GROUPS)
    run, _ = flags.parse(parser, [*DIGITS, *arguments, *more.split()])
    config = flags.make_config({**flags.plain(run), "trial_epochs": 2})
    phase = Phase(1, 1, 16, 8, 5, 0, mix=False)
    trial, given = flags.parse(parser, flags.to_argv(lr_finder.trial_flags(config, phase)))
    flags.check_train(trial, given)
    was, now = flags.plain(run), flags.plain(trial)
    differ = {name for name, value in now.items() if value != was[name]}
    wanted = {"epochs", "resize_schedule", "batch_size", "lr_scale", *(["warmup_epochs"] if more else [])}
    assert differ == wanted | {"phase_batch_sizes", "phase_epochs", "phase_mix"}
    assert (trial.epochs, trial.resize_schedule, trial.batch_size) == (2, (16,), 8)
    assert (trial.phase_mix, trial.ema, trial.warmup_epochs) == ((False,), False, 0.4 if more else 5.0)


@pytest.mark.parametrize("head_only", [True, False])
def test_a_trial_beside_pretrained_has_no_other_values_than_the_run(head_only):
    parser = flags.build_parser("train.py", "", groups=flags.TRAIN_GROUPS)
    arguments = ["--dataset", "digits", "--pretrained", "--mixup-alpha", "0.2", "--schedule", "onecycle"]
    run, _ = flags.parse(parser, arguments)
    phase = Phase(1, 5, 224, 16, 5, 0, augment="basic", head_only=head_only)
    config = flags.make_config({**flags.plain(run), "trial_epochs": 8})
    trial, given = flags.parse(parser, flags.to_argv(lr_finder.trial_flags(config, phase)))
    flags.check_train(trial, given)
    was, now = flags.plain(run), flags.plain(trial)
    differ = {name: value for name, value in now.items() if value != was[name]}
    assert differ == {"epochs": 8, "freeze_epochs": 8 if head_only else 0, "phase_mix": [True]}


def test_divergence_is_part_of_the_curve_and_another_failure_is_not(tmp_path, monkeypatch):
    codes = iter([0, 5])
    here = SimpleNamespace(run=lambda command, **_: Done(next(codes), command))
    monkeypatch.setattr(lr_range_test, "subprocess", here)
    arguments = [*DIGITS, "--mode", "accuracy", "--trials", "2", "--out", str(tmp_path)]
    assert lr_finder.main(arguments) == 0
    found = json.loads((tmp_path / "lr_finder.json").read_text())
    assert found["accuracies"] == [40.0, None] and found["suggestion"] == found["lrs"][0]
    codes = iter([6])
    with pytest.raises(UserError, match="no memory") as failed:
        lr_finder.main(arguments)
    assert failed.value.exit_code == 6 and failed.value.fix == "buy some"


TRAIN = """import os, pathlib, sys, time
folder = pathlib.Path(*(word.partition("=")[2] for word in sys.argv if word.startswith("--save-dir=")))
folder.mkdir()
pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
time.sleep(100)"""


def test_a_stop_signal_ends_the_training_and_leaves_no_files(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(process, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(errors, "exit_at_once", lambda *_: pytest.fail("it ended at once"))
    signal.signal(signal.SIGTERM, errors.exit_at_once)  # as errors.run does

    def stop():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(errors.Stopped):
        lr_range_test.compare_trainings({}, [0.1, 0.2], 1)
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


class Done:
    stderr = "noise\nerror: no memory\nfix: buy some\n"

    def __init__(self, returncode, command):
        (run_dir,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--save-dir="))
        self.returncode = returncode
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text('{"epoch": 1, "val_top1": 40.0, "val_loss": 1.0}\n')


@pytest.mark.parametrize(("arguments", "message"), [
    (["--phase", "4"], "has 3"), (["--start-lr", "1", "--end-lr", "0.1"], "not below"),
    (["--num-iter", "2"], "num-iter"),
    (["--lr", "1"], "--lr would do nothing"), (["--trials", "3"], "--trials would do nothing"),
    (["--mode", "accuracy", "--num-iter", "20"], "--num-iter would do nothing"),
    (["--cycles", "3"], "--cycles would do nothing"),
    (["--resume", "auto"], "--resume"), (["--phas", "1"], "--phas"),
])  # fmt: skip
def test_wrong_usage(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        lr_finder.main([*DIGITS, *arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_never_finite_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(data_utils.LOSSES, "ce", lambda logits, targets: logits.sum() * math.nan)
    with pytest.raises(DivergedError, match="too few for a curve"):
        lr_finder.main([*DIGITS, "--num-iter", "10", "--out", str(tmp_path)])


def test_a_recipe_of_train_py_serves_here_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plot: true\nbatch-size: 8\n")
    config, _ = flags.parse(lr_finder.build_parser(), ["--config", str(recipe)])
    assert config.batch_size == 8


def test_the_picture_says_that_there_is_no_suggestion():
    found = {"mode": "loss", "lrs": [1e-3, 1e-2, 1e-1], "losses": [2.0, 2.1, 2.2], "suggestions": {}}
    found |= {"commands": {}, "flags": {"arch": "resnet18"}, "phase": 1, "image_size": 64, "batch_size": 32}
    assert "no suggestion" in lr_range_test.draw(found).axes[0].get_title()
    found |= {"commands": {"valley": "train.py"}, "suggestions": {"valley": 1e-2}}
    assert "no suggestion" not in lr_range_test.draw(found).axes[0].get_title()


def test_a_loss_of_zero_throughout_is_drawn_without_a_warning():
    axis = figures.figure(2, 2).subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr_range_test.draw_losses(axis, [1e-3, 1e-2, 1e-1], [0.0, 0.0, 0.0])
    assert axis.get_ylim() == (0, 0.1)


@pytest.mark.parametrize("mode, advice", [("loss", "raise --num-iter"), ("accuracy", "and --end-lr")])
def test_advice_without_a_suggestion_names_flags_of_the_mode(mode, advice, tmp_path, capsys):
    found = {"mode": mode, "lrs": [1e-3, 1e-1], "losses": [2.0, 2.1], "accuracies": [None, None]}
    found |= {"suggestions": {}, "commands": {}, "flags": {"arch": "resnet18"}, "ended": "x"}
    lr_range_test.write_results(found | {"phase": 1, "image_size": 64, "batch_size": 32}, tmp_path)
    assert advice in capsys.readouterr().out
