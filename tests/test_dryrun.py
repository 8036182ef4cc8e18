"""--dry-run and --summary describe the plan correctly and completely, and write no file."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from inprocess import TINY, tiny_run

import train
from base import flags
from base.device import Runtime
from base.progress import Eta
from harness import dryrun
from harness.dryrun import Cost, Rate, timed
from optim.schedule import Schedule
from train_utils import Phase, plan

CPU = Runtime(torch.device("cpu"))


def test_the_dry_run_tries_every_phase_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dryrun, "SECONDS", 0.0)
    save_dir = tmp_path / "run"
    assert train.main([*TINY, "--save-dir", str(save_dir), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not save_dir.exists()
    assert "15 steps of adamw, onecycle schedule" in out
    for number, size in ((1, 8), (2, 16), (3, 24)):
        assert re.search(rf"{number}-{number} +{size} +8 +5 +5 ", out), out
        assert re.search(
            rf"\n +{size} +[\d,.]+ \([1-4]\) +[\d,.]+ \(\d+\) +[\d,.]+ \(1\) +- +2\.\d+ ", out
        ), out
    assert re.search(r"checkpoint: \d+ MiB, written and read back in ", out)
    assert re.search(r"projected minutes +training +waiting +scoring +waiting +total\n1 epochs at 8 px", out)
    assert max(map(len, out.replace(str(save_dir), "").splitlines())) <= 80


def test_the_summary_has_a_table_for_each_size(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--epochs", "3", "--resize-schedule", "8,16,24"]
    assert train.main(["--dataset", "digits", "--arch", "resnet_tiny", *sizes, "--summary"]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert [f"total at {size} px" in out for size in (8, 16, 24, 32)] == [True, True, True, False]


def test_the_learning_rates_of_a_phase_are_the_schedules(tmp_path):
    run = tiny_run(tmp_path)
    for phase in run.phases:
        rates = [run.state.schedule.lr_at(phase.first_step + k) for k in range(phase.steps)]
        assert dryrun.lr_range(run.state.schedule, phase) == (min(rates), max(rates))
        assert dryrun.lr_range(run.state.schedule, phase, points=1)[1] <= max(rates)


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(dryrun.time, "perf_counter", lambda: self.now)

    def batches(self, seconds: list[float], images: int = 10):
        """Yield batches, each of which takes `seconds` to arrive."""
        for wait in seconds:
            self.now += wait
            yield None, torch.zeros(images)


def test_work_and_waiting_are_timed_apart_and_the_warm_up_is_not_timed(monkeypatch):
    clock, rate = Clock(monkeypatch), Rate()
    for k, _ in enumerate(timed(clock.batches([50.0] + [0.25] * 100), rate, CPU, seconds=10.0)):
        clock.now += {0: 200.0, 1: 5.0}.get(k, 2.0)  # compiling, and recording a CUDA graph
    assert (rate.batches, rate.images, rate.seconds, rate.waited) == (5, 50, 10.0, 1.25)
    assert str(rate) == "5.0 (5)"


@pytest.mark.parametrize("device, flag, launching, advised", [
    ("cuda", "", 0.98, True), ("cuda", "--compile", 0.98, True), ("cuda", "", 0.5, False),
    ("cpu", "", 0.98, False), ("cuda", "--cuda-graphs", 0.98, False), ("cuda", "--accumulate 2", 0.98, False),
])  # fmt: skip
def test_cuda_graphs_are_advised_where_the_gpu_waits_for_the_host(
    device, flag, launching, advised, monkeypatch
):
    """Steps of a second, of which the host needs `launching` to launch them."""
    clock, rate, runtime = Clock(monkeypatch), Rate(), Runtime(torch.device(device))

    def wait(device):
        clock.now += 1.05 - launching

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    for _ in timed(clock.batches([0.0] * 100), rate, runtime, seconds=10.0):
        clock.now += launching
    run = SimpleNamespace(runtime=runtime, phases=(Phase(1, 1, 64, 8, 5, 0), Phase(2, 2, 128, 8, 5, 5)))
    slower = Cost(Rate(1, 10, seconds=1.0, behind=0.6), Rate())
    config, _ = flags.parse(flags.train_parser(), ["--dataset", "digits", *flag.split()])
    hint = dryrun.graphs_hint(config, run, [Cost(rate, Rate()), slower])
    assert hint.startswith("note: at 64 px the GPU waits") if advised else hint == ""


def test_a_resumed_run_is_tried_without_the_weights_it_started_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dryrun, "SECONDS", 0.0)
    first, second = (["--save-dir", str(tmp_path / name)] for name in ("first", "second"))
    assert train.main([*TINY, *first]) == 0
    weights = next((tmp_path / "first").glob("best_*.pt"))
    assert train.main([*TINY, *second, "--init-from", str(weights), "--stop-after", "7"]) == 0
    weights.unlink()
    capsys.readouterr()
    assert train.main([*second, "--resume", "auto", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "whole run" in out and "starting from" not in out


def test_the_only_batch_is_timed_and_another_follows_a_slow_warm_up(monkeypatch):
    clock, alone, second = Clock(monkeypatch), Rate(), Rate()
    for _ in timed(clock.batches([1.0]), alone, CPU, seconds=0.0):
        clock.now += 4.0
    assert (alone.batches, alone.seconds, alone.waited) == (1, 4.0, 1.0)
    for _ in timed(clock.batches([1.0, 2.0, 3.0]), second, CPU, seconds=0.0):
        clock.now += 4.0
    assert (second.batches, second.waited) == (1, 2.0)


def test_loading_is_timed_once_the_queue_is_empty(monkeypatch):
    clock = Clock(monkeypatch)
    rate = dryrun.time_loading(clock.batches([0.0] * 8 + [3.0] * 100), 8, CPU, seconds=10.0)
    assert (rate.batches, rate.images, rate.seconds, rate.waited) == (4, 40, 12.0, 0.0)
    assert dryrun.time_loading(clock.batches([1.0] * 8), 8, CPU, 10.0) == Rate() and str(Rate()) == "-"


@pytest.mark.parametrize(
    ("work", "waited", "loading", "expected"),
    [
        (2.0, 0.0, 1.0, (200, 0)),  # loading hides behind the work
        (2.0, 0.0, 5.0, (200, 300)),  # the workers had batches ready, but cannot keep up
        (2.0, 4.0, 5.0, (200, 400)),  # nor could they while the work went on
        (2.0, 0.5, 0.0, (200, 50)),  # loading was not measured
    ],
)
def test_only_what_loading_takes_longer_than_the_work_is_waited_for(work, waited, loading, expected):
    cost = Cost(Rate(1, 10, 10 * work, 10 * waited), Rate(bool(loading), 10 * bool(loading), 10 * loading))
    assert cost.seconds(100) == expected


def test_loading_that_hid_behind_two_models_does_not_behind_one():
    cost = Cost(Rate(1, 1, 2.0), Rate(1, 1, 1.5))
    assert cost.seconds(100) == (200, 0) and cost.seconds(100, share=0.5) == (100, 50)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_the_memory_on_a_cpu_is_the_peak_of_the_process():
    shown = float(dryrun.memory_used(CPU).removesuffix(" MiB").replace(",", ""))
    with open("/proc/self/status") as file:
        (peak,) = (int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    assert shown == pytest.approx(peak, rel=0.02)


def test_the_projection_follows_the_plan_and_what_is_scored(tmp_path):
    run = tiny_run(tmp_path, "--eval-every", "2")  # 3 epochs of 5 steps of 8 images; 4 + 4 images scored
    training = Cost(Rate(1, 10, 20.0), Rate(1, 10, 30.0))  # 2 s an image, and 1 s of waiting
    scoring = Cost(Rate(1, 10, 10.0), Rate(1, 10, 8.0))  # 1 s with two models
    parts = [dryrun.project(run, phase, training, scoring) for phase in run.phases]
    scored = [4 * 1.0 + 4 * 0.5, 4 * 0.0 + 4 * 0.3]  # val, then the training sample with one model
    assert parts[0] == pytest.approx([80, 40, 0, 0])
    assert parts[1] == parts[2] == pytest.approx([80, 40, *scored])

    run.crop_root = "somewhere"
    phase = replace(run.phases[1], last_epoch=4)  # all three of its epochs are scored
    cached = dryrun.project(run, phase, training, scoring)
    assert cached[2:] == pytest.approx([3 * scored[0], scored[1]])

    text = dryrun.projection_table(run.phases, parts).splitlines()
    minutes = [float(cell) for cell in text[4].removeprefix("whole run").split()]
    assert minutes == pytest.approx([4, 2, 0.2, 0.04, 6.24], abs=0.006)
    assert "minutes" in text[0] and "hours" in dryrun.projection_table(run.phases, [[3600.0, 0, 0, 0]] * 3)


def test_scoring_is_measured_at_the_size_and_with_the_models_of_the_run(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "--eval-size", "20", "--eval-flip", "--no-ema")
    seen = []

    def evaluate(models, batches, runtime, flip):
        seen.append((list(models), {tuple(images.shape[2:]) for images, _ in batches}, flip))

    monkeypatch.setattr(dryrun, "evaluate", evaluate)
    dryrun.try_phase(run, run.phases[0], 0.0)
    assert seen == [(["val"], {(20, 20)}, True)]


@pytest.mark.parametrize("eval_every", [1, 2, 4])
@pytest.mark.parametrize("eval_size", [None, 40])
def test_the_eta_is_what_is_left_of_the_plan(eval_size, eval_every):
    phases = plan(7, (10, 20), 100, 10, phase_batch_sizes=(10, 5), phase_epochs=(3, 4))
    eta = Eta(phases, 50, eval_size, eval_every)
    eta.observe_training(phases[0], images=20, seconds=40.0)  # 2 s an image of 10 px, 8 s of 20 px
    eta.observe_validation(40, seconds=800.0)  # 16 s an image of 40 px, 4 s of 20 px, 1 s of 10 px
    for finished in range(8):
        expected = 0
        for epoch in range(finished + 1, 8):
            phase = phases[0 if epoch <= 3 else 1]
            expected += 100 * (2 if epoch <= 3 else 8)
            if epoch % eval_every == 0 or epoch == 7:
                expected += 50 * ((eval_size or phase.image_size) / 10) ** 2
        steps = sum(phases[0 if epoch <= 3 else 1].steps_per_epoch for epoch in range(1, finished + 1))
        assert eta.remaining(steps, finished) == pytest.approx(expected)


def test_a_full_plan_is_described_without_going_through_its_steps(monkeypatch):
    phases, asked = train_phases(), []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Schedule(optimizer, "onecycle", peak_lr=3e-4, total_steps=sum(p.steps for p in phases))
    at = schedule.lr_at
    monkeypatch.setattr(schedule, "lr_at", lambda step: (asked.append(step), at(step))[1])
    low, high = dryrun.lr_range(schedule, phases[-1])
    assert high == pytest.approx(3e-4, rel=1e-3) and low == pytest.approx(3e-4 / 25e4)
    assert 2 <= len(asked) < 10_000  # of 1,151,020 steps


def train_phases() -> tuple[Phase, ...]:
    config, _ = flags.parse(train.build_parser(), [])
    return plan(config.epochs, config.resize_schedule, 1_281_167, config.batch_size)
