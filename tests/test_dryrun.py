"""--dry-run and --summary describe the plan correctly and completely, and write no file."""

import re
import time

import pytest
import torch
from inprocess import TINY, tiny_run

import loop
import train
from base import flags
from base.device import Runtime
from harness import dryrun
from harness.dryrun import Rate, timed
from optim import Schedule
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
        assert re.search(rf"{size} px: +[\d,.]+ img/s training \([1-4] steps timed, loss \d", out), out
    assert re.search(r"checkpoint: \d+ MiB, written and read back bit for bit", out)
    assert re.search(r"[\d.]+ h for the whole run.*\n.*projection", out)


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


def test_the_warm_up_is_not_timed():
    rate, batch = Rate(), (None, torch.zeros(10))
    for k, _ in enumerate(timed([batch] * 100, rate, CPU, seconds=0.02)):
        time.sleep(0.2 if k == 0 else 0.01)
    assert 1 <= rate.batches < 10 and rate.images == 10 * rate.batches
    assert 0.02 <= rate.seconds < 0.2
    alone = Rate()
    for _ in timed([batch], alone, CPU, seconds=0.0):
        time.sleep(0.01)
    assert alone.images == 10 and alone.seconds >= 0.01


def test_the_estimate_counts_what_autograd_keeps(tmp_path):
    run = tiny_run(tmp_path)
    run.state.model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 1))
    _, options = loop.start_phase(run, run.phases[0])
    # each convolution keeps its input, the ReLU its output, which is the second convolution's input
    assert dryrun.saved_bytes(run, options, 4, 8) == 4 * 4 * 8 * 8 * (3 + 5)


def test_the_projection_is_steps_times_the_measured_rate(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, "--eval-every", "2")

    def known(batches, rate, runtime, seconds):
        for batch in batches:
            yield batch
            rate.images, rate.seconds, rate.batches = 3600, 2.0, 1
            return

    monkeypatch.setattr(dryrun, "timed", known)
    hours = [dryrun.try_phase(run, phase, 0.0) for phase in run.phases]
    assert [training for training, _ in hours] == [pytest.approx(40 / 1800 / 3600)] * 3
    per_validation = (4 + 4 / 2) / 1800 / 3600  # val with two models, the training sample with one
    assert [validation for _, validation in hours] == [
        0,
        pytest.approx(per_validation),
        pytest.approx(per_validation),
    ]


def test_a_full_plan_is_described_quickly():
    """The default run has 1,151,020 steps, which must not be gone through one by one."""
    phases = train_phases()
    started = time.perf_counter()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Schedule(optimizer, "onecycle", peak_lr=3e-4, total_steps=sum(p.steps for p in phases))
    low, high = dryrun.lr_range(schedule, phases[-1])
    assert high == pytest.approx(3e-4, rel=1e-3) and low == pytest.approx(3e-4 / 25e4)
    assert time.perf_counter() - started < 1


def train_phases() -> tuple[Phase, ...]:
    config, _ = flags.parse(train.build_parser(), [])
    return plan(config.epochs, config.resize_schedule, 1_281_167, config.batch_size)
