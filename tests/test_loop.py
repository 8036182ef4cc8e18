"""The training loop: what is saved when, what is scored, which epoch is the best, and when to stop."""

import dataclasses
import math
import multiprocessing
import shutil
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from inprocess import tiny_run
from runs import digest, payload

import loop
import train
from base import flags
from base.device import Runtime
from base.errors import DataError, DivergedError
from dataloader import Order
from harness import meter
from harness.log import MetricLogger, read_metrics

SMALL = (
    "--arch", "resnet_tiny", "--resize-schedule", "16", "--epochs", "2", "--batch-size", "24",
    "--num-workers", "0", "--device", "cpu", "--amp", "off",
)  # fmt: skip


def main(*arguments) -> int:
    return train.main([*map(str, arguments)])


def spoil(folder, count: int = 99) -> list[str]:
    bad = sorted(folder.iterdir())[:count]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    return [path.name for path in bad]


def test_skip_also_applies_where_training_images_are_scored(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "d")
    bad = spoil(tmp_path / "d" / "train" / "dog", 20)  # of 24: the sample has some of them
    assert (
        main(*SMALL, "--data-dir", tmp_path / "d", "--save-dir", tmp_path / "run", "--on-bad-image", "skip")
        == 0
    )
    rows, said = read_metrics(tmp_path / "run"), capsys.readouterr().out
    assert [row["epoch"] for row in rows] == [1, 2] and all(row["train_top1"] is not None for row in rows)
    assert all(
        row["bad_images"] > 20 for row in rows
    )  # those replaced in training, and those left out of the score
    assert said.count("note: train_top1 leaves out") == 1 and any(name in said for name in bad)


def test_a_bad_validation_image_is_an_error_and_loses_no_epoch(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "d")
    where = ("--data-dir", tmp_path / "d", "--save-dir", tmp_path / "run")
    assert main(*SMALL, "--data-dir", photos, "--save-dir", tmp_path / "straight") == 0
    (name,) = spoil(tmp_path / "d" / "val" / "owl", 1)
    with pytest.raises(DataError, match=name) as caught:
        main(*SMALL, *where, "--on-bad-image", "skip")
    assert "--on-bad-image" not in caught.value.fix  # it would not help
    saved = payload(tmp_path / "run")
    assert saved["step"] == 3 and saved["rows"] == []  # the steps of the first epoch, not yet scored
    shutil.copy(photos / "val" / "owl" / name, tmp_path / "d" / "val" / "owl" / name)
    assert (
        main(
            "--resume",
            "auto",
            "--save-dir",
            tmp_path / "run",
            "--on-bad-image",
            "fail",
            "--allow-change",
            "on_bad_image",
        )
        == 0
    )
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")


def test_a_phase_first_gives_back_the_pinned_memory_of_the_one_before(tmp_path, monkeypatch):
    """Which torch would keep for batches of the same size. Only the order: pinning needs a GPU."""
    run, loaders, seen = tiny_run(tmp_path, "--num-workers", "1"), [], []
    cpu, real_start, real_loader = run.runtime, loop.start_phase, loop.train_loader

    def start(run, phase):
        run.runtime = dataclasses.replace(cpu, device=torch.device("cuda"))
        started = real_start(run, phase)
        run.runtime = cpu
        return started

    def loader(*args, **options):
        made = real_loader(*args, **options | {"runtime": cpu})
        loaders.append(weakref.ref(made))
        return made

    def empty():
        seen.append(([made() for made in loaders], multiprocessing.active_children()))

    monkeypatch.setattr(loop, "start_phase", start)
    monkeypatch.setattr(loop, "train_loader", loader)
    monkeypatch.setattr(torch._C, "_host_emptyCache", empty, raising=False)
    loop.fit(run, MetricLogger(tmp_path))
    assert seen == [([], []), ([None], []), ([None, None], [])]


@pytest.mark.parametrize(
    "every, eval_every, saves",
    [
        ("1", 1, [(5, 0), (5, 1), (10, 1), (10, 2), (15, 2), (15, 3)]),
        ("2", 1, [(10, 1), (10, 2), (15, 2), (15, 3)]),
        ("1", 2, [(5, 1), (10, 1), (10, 2), (15, 2), (15, 3)]),
    ],
)
def test_an_epoch_is_saved_before_it_is_scored_and_again_with_its_row(
    every, eval_every, saves, tmp_path, monkeypatch
):
    run, seen, real = tiny_run(tmp_path, "--save-every", every, "--eval-every", eval_every), [], loop.save

    def counted(run):
        seen.append((run.state.step, len(run.state.rows)))
        real(run)

    monkeypatch.setattr(loop, "save", counted)
    loop.fit(run, MetricLogger(tmp_path))
    assert seen == saves


def judged(run, scores: dict[int, float]) -> list[int]:
    """Return the epochs that were the best so far when they ended, until the run stops."""
    found = []
    for epoch, score in scores.items():
        if run.finished:
            break
        row = {"epoch": epoch, "ema_val_top1": score}
        found += [epoch] if loop.update_best(run, row) else []
        run.state.rows.append(row)
    return found


@pytest.mark.parametrize("more, compared", [
    ((), [True, True, False, True, False]),  # 16, 16, 24, 24, 32 px
    (("--eval-size", 32), [True] * 5),
    (("--eval-every", 2), [True, False, False]),
])  # fmt: skip
def test_the_plateau_rule_compares_losses_at_one_image_size(more, compared, tmp_path, monkeypatch):
    sizes = ("--epochs", 5, "--resize-schedule", "16,24,32", "--phase-epochs", "2,2,1")
    run, seen = tiny_run(tmp_path, *sizes, "--phase-batch-sizes", "8,8,8", *more), []
    monkeypatch.setattr(run.state.schedule, "observe", lambda loss, comparable: seen.append(comparable))
    loop.fit(run, MetricLogger(tmp_path))
    assert seen == compared


def test_epochs_that_train_the_classifier_alone_count_for_early_stopping(tmp_path):
    run = tiny_run(
        tmp_path, "--epochs", 9, "--resize-schedule", 16, "--phase-batch-sizes", 8, "--early-stop-patience", 3
    )
    first = run.phases[0]
    head = dataclasses.replace(first, last_epoch=4, head_only=True)
    run.phases = (head, dataclasses.replace(first, first_epoch=5, first_step=head.steps))
    assert judged(run, dict(enumerate([50, 60, 55, 54, 53, 99], 1))) == [1, 2]
    assert len(run.state.rows) == 5 and run.finished


@pytest.mark.parametrize(
    "scores, bests, end",
    [
        ([50, 60, 55, 54, 53, 99], [1, 2], 5),  # waits for three
        ([60, 10, 20, 30, 99], [1], 4),
        ([60, 50, 50, 61, 50, 50, 50, 99], [1, 4], 7),  # past two thirds: nothing is reset
        ([10, 20, 30, 40, 50, 60, 70, 80, 90], list(range(1, 10)), 9),
        ([math.nan] * 3 + [50], [], 3),
    ],
)
def test_early_stopping_keeps_the_best_epoch_and_waits_for_its_patience(scores, bests, end, tmp_path):
    run = tiny_run(
        tmp_path, "--epochs", 9, "--resize-schedule", 16, "--phase-batch-sizes", 8, "--early-stop-patience", 3
    )
    assert judged(run, dict(enumerate(scores, 1))) == bests
    assert len(run.state.rows) == end and run.finished
    assert run.state.best["epoch"] == (bests or [0])[-1]


def test_validations_before_the_last_size_do_not_count_for_patience(tmp_path):
    run = tiny_run(tmp_path, "--epochs", 9, "--phase-epochs", "2,2,5", "--early-stop-patience", 2)
    assert judged(run, {1: 90, 2: 80, 3: 70, 4: 60, 5: 20, 6: 10, 7: 15, 8: 99}) == [5]
    assert len(run.state.rows) == 7


def test_without_patience_the_best_is_past_two_thirds_and_nothing_stops(tmp_path):
    run = tiny_run(tmp_path, "--epochs", 9, "--resize-schedule", 16, "--phase-batch-sizes", 8)
    assert judged(run, dict(enumerate([90, 80, 70, 60, 50, 40, 30, 35, 20], 1))) == [7, 8]
    assert run.state.best == {"score": 35, "epoch": 8, "waited": 1}


def test_ranks_mend_a_lost_best_together(tmp_path, monkeypatch):
    """Rank 1 looks at the files when rank 0 has mended them already, and must still take part."""
    run, did = tiny_run(tmp_path), []
    run.runtime = Runtime(torch.device("cpu"), None, rank=1, world_size=2)
    run.state.rows = [{"best": True}] * run.epochs
    monkeypatch.setattr(loop, "best_is_lost", lambda run: False)
    monkeypatch.setattr(Runtime, "max_over_ranks", lambda self, value: max(value, len(did) == 0))
    monkeypatch.setattr(loop, "save", lambda run: did.append("save"))
    monkeypatch.setattr(loop, "name_best", lambda run: did.append("name_best"))
    loop.fit(run, None)
    assert did == ["save", "name_best"]


@pytest.mark.parametrize("signal_before", [0, 1, 3])
def test_on_many_ranks_a_signal_between_two_steps_drops_and_repeats_no_batch(signal_before, tmp_path):
    """The ranks agree to stop after a step: until then each must take the step that the others take."""
    run, taken = tiny_run(tmp_path), []
    run.runtime = Runtime(torch.device("cpu"), None, rank=0, world_size=2)
    run.stop.received = 15 * (signal_before == 0)
    for batch in loop.interruptible(run, [1, 2, 3]):
        taken.append(batch)
        run.stop.received = 15 * (len(taken) >= signal_before)
    assert taken == [1, 2, 3]


def overflowing(tmp_path, until: float, *arguments: object):
    run = tiny_run(tmp_path, *arguments)
    run.state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    run.state.model.fc.weight.register_hook(lambda g: g * (math.inf if run.state.step < until else 1))
    return run


def test_overflows_are_counted_per_epoch_and_reported_once(tmp_path, capsys):
    run = overflowing(tmp_path, 3)
    loop.fit(run, MetricLogger(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert [row["bad_steps"] for row in run.state.rows] == [3, 0, 0]
    assert [line for line in said if "fp16" in line] == [
        "note: 3 steps of epoch 1 overflowed in fp16 and were skipped; the scale is now 8192"
    ]
    assert not any("WARNING" in line for line in said)  # not caused by the images


def test_endless_overflows_end_the_run_with_a_finite_checkpoint(tmp_path, capsys):
    run = overflowing(tmp_path, math.inf, "--epochs", 9, "--resize-schedule", 16, "--phase-batch-sizes", 8)
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"up to step 26 .*fp16 scale 1\)\n"):
        loop.fit(run, MetricLogger(tmp_path))
    saved = payload(tmp_path)
    assert saved["step"] == 25
    assert not any(v.any() for state in saved["optimizer"]["state"].values() for v in state.values())
    moving = {name: value for name, value in saved["model"].items() if value.is_floating_point()}
    assert all(torch.equal(before[name], value) for name, value in moving.items())
    assert capsys.readouterr().out.count("WARNING: step") == 10


def test_the_images_of_a_bad_step_are_named(tmp_path, capsys, monkeypatch):
    run, real = tiny_run(tmp_path), loop.train_step

    def poisoned(state, how, images, labels, **vote):
        return real(state, how, images * (math.nan if state.step == 7 else 1), labels, **vote)

    monkeypatch.setattr(loop, "train_step", poisoned)
    loop.fit(run, MetricLogger(tmp_path))
    order = Order(len(run.index.train), 8, seed=flags.defaults()["seed"])
    order.seek(2)  # of five steps an epoch
    names = ", ".join(run.index.train.name(int(i)) for i in [*order][2].ids)
    assert f"WARNING: step 8 was not finite and was skipped; its 8 images: {names}" in capsys.readouterr().out


def test_a_timed_save_comes_when_its_time_has_passed(tmp_path, monkeypatch):
    run, clock, seen = tiny_run(tmp_path, "--save-every", "10s"), [0.0], []
    step, save, run.last_save = loop.train_step, loop.save, 0.0

    def slow(*args, **vote):
        clock[0] += 4
        return step(*args, **vote)

    now = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", now)
    monkeypatch.setattr(meter, "time", now)
    monkeypatch.setattr(loop, "train_step", slow)
    monkeypatch.setattr(loop, "save", lambda run: (seen.append(run.state.step), save(run)))
    loop.fit(run, MetricLogger(tmp_path))
    assert seen == [3, 5, 5, 8, 10, 10, 13, 15, 15]  # timed; at the end of an epoch; with its row


@pytest.mark.parametrize(("seconds", "waited", "said"), [(8, 3, 1), (8, 1.2, 0), (80, 3, 0)])
def test_waiting_for_data_is_noted_once_and_judged_by_training_alone(
    seconds, waited, said, tmp_path, capsys, monkeypatch
):
    """Epochs of five steps; scoring takes a minute. The wait must be ten seconds and a tenth of the steps."""
    run, clock, loaders = tiny_run(tmp_path), [0.0], []
    start, step, score, run.data_hint = loop.start_phase, loop.train_step, loop.score, "Pack them."

    def started(*args):
        loader, options = start(*args)
        loaders.append(loader)
        return loader, options

    def slow_step(*args, **vote):
        clock[0] += seconds
        loaders[-1].waited += waited
        return step(*args, **vote)

    def slow_score(*args):
        clock[0] += 60
        return score(*args)

    now = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0])
    for name, fake in dict(time=now, start_phase=started, train_step=slow_step, score=slow_score).items():
        monkeypatch.setattr(loop, name, fake)
    monkeypatch.setattr(meter, "time", now)
    loop.fit(run, MetricLogger(tmp_path))
    assert capsys.readouterr().out.count("was spent waiting for data. Pack them.") == said


def test_a_half_life_is_in_epochs(tmp_path):
    run = tiny_run(tmp_path, "--ema-half-life", "2")  # of 3 epochs with 5 steps each
    assert run.state.ema.decay**10 == pytest.approx(0.5)


def test_the_remaining_time_leaves_out_a_slow_first_step(tmp_path, monkeypatch):
    """With --compile, the first step at a new size takes most of a minute."""
    run, clock, left = tiny_run(tmp_path), [0.0], []
    step, row = loop.train_step, run.table.row

    def compiles_first(state, *args, **vote):
        clock[0] += 1 if state.step % 5 else 100
        return step(state, *args, **vote)

    now = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0])
    monkeypatch.setattr(loop, "time", now)
    monkeypatch.setattr(meter, "time", now)
    monkeypatch.setattr(loop, "train_step", compiles_first)
    monkeypatch.setattr(run.table, "row", lambda values, after: left.append(after) or row(values, after))
    loop.fit(run, MetricLogger(tmp_path))
    # A step of 8 px takes a second; larger images cost in proportion.
    assert 40 < left[0] < 60 and 5 < left[1] < 15 and left[2] == 0


def test_a_run_says_that_it_compiles_for_a_new_size(tmp_path, capsys):
    run = tiny_run(tmp_path)
    run.metadata["config"]["compile"] = True  # which would have wrapped `options.forward`
    loop.fit(run, MetricLogger(tmp_path))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "compiling" in line] == [
        f"compiling for {size} px" for size in (16, 24)
    ]


@pytest.mark.parametrize("what", ["weight", "statistic", "average", "optimizer"])
def test_a_non_finite_state_is_never_saved_over_a_finite_one(tmp_path, what):
    built = tiny_run(tmp_path)
    loop.save(built)
    before = built.path("last").read_bytes()
    state, model = built.state, built.state.model
    first = next(model.parameters())
    ruined = {
        "weight": lambda: first.data[0].fill_(math.nan),
        "statistic": lambda: next(model.buffers())[0].fill_(math.inf),
        "average": lambda: next(state.ema.module.parameters()).data[0].fill_(-math.inf),
        "optimizer": lambda: state.optimizer.state[first].update(exp_avg=torch.full_like(first, math.nan)),
    }
    ruined[what]()
    with pytest.raises(DivergedError, match=r"not finite .*nothing was saved") as caught:
        loop.save(built)
    assert built.path("last").read_bytes() == before and caught.value.exit_code == 5


def test_a_counter_on_another_device_is_not_read(tmp_path):
    """RMSprop keeps its step count on the CPU beside weights on a GPU; here on meta beside the CPU."""
    state = tiny_run(tmp_path, "--optimizer", "rmsprop").state
    first = next(state.model.parameters())
    state.optimizer.state[first] = {
        "step": torch.zeros((), device="meta"),
        "square_avg": torch.zeros_like(first),
    }
    state.check_finite()
