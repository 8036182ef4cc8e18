"""steps.jsonl: what its rows say, that a resumed run writes the same ones, and what happens to the file."""

import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from inprocess import TINY, tiny_run
from runs import TIMING, finish, payload, spawn

import loop
import train
import train_utils
from base.errors import DataError
from harness.log import MetricLogger, StepLog, read_metrics, read_steps
from train_utils import StepResult

NAME = "resnet_tiny_digits.pt"


def run(*arguments) -> None:
    assert train.main([*map(str, arguments)]) == 0


def rows_of(directory) -> list[dict]:
    """Return the rows without what differs between any two runs."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_steps(directory)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 5 + 5 + 5 steps with a row every 4 steps."""
    torch.set_num_threads(1)
    save_dir = tmp_path_factory.mktemp("straight")
    run(*TINY, "--log-every", 4, "--save-dir", save_dir)
    return save_dir


# --- what a row says ---


def test_the_rows_are_means_over_the_steps_since_the_last_row(tmp_path, monkeypatch):
    """Against float64 sums over what every single step did."""
    built, losses, norms, rates = tiny_run(tmp_path), [], [], []
    step, clip = loop.train_step, train_utils.clip_gradients

    def recorded_step(state, *args, **vote):
        rates.append(state.optimizer.param_groups[0]["lr"])
        running = step(state, *args, **vote)
        losses.append(running.result().loss)
        return running

    def recorded_clip(params, *how):
        params = list(params)
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in params)))
        return clip(params, *how)

    monkeypatch.setattr(loop, "train_step", recorded_step)
    monkeypatch.setattr(train_utils, "clip_gradients", recorded_clip)
    loop.fit(built, MetricLogger(tmp_path, log_every=4))
    rows, begin = read_steps(tmp_path), 0
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12, 15]  # every fourth, and the last of a phase
    assert [(row["epoch"], row["image_size"], row["batch_size"]) for row in rows[::2]] == [
        (1, 8, 8), (2, 16, 8), (3, 24, 8)
    ]  # fmt: skip
    for row in rows:
        steps = slice(begin, row["step"])
        assert row["train_loss"] == pytest.approx(math.fsum(losses[steps]) / len(losses[steps]), rel=1e-12)
        assert row["grad_norm"] == pytest.approx(math.fsum(norms[steps]) / len(norms[steps]), rel=1e-6)
        assert row["grad_norm_max"] == pytest.approx(max(norms[steps]), rel=1e-6)
        assert row["lr"] == rates[row["step"] - 1]
        assert row["bad_steps"] == 0 and row["loss_scale"] is None
        begin = row["step"]


def test_the_rows_of_an_epoch_average_to_its_row(straight):
    for epoch in read_metrics(straight):
        first, last = 5 * epoch["epoch"] - 4, 5 * epoch["epoch"]
        loss = steps = seconds = 0
        for row in read_steps(straight):
            if first <= row["step"] <= last:
                count = row["step"] - (first - 1 + steps)
                loss, steps = loss + count * row["train_loss"], steps + count
                seconds += 8 * count / row["images_per_second"]
        assert steps == 5 and loss / steps == pytest.approx(epoch["train_loss"], rel=1e-12)
        assert 40 / seconds == pytest.approx(epoch["images_per_second"], rel=1e-9)


def test_skipped_steps_are_counted_and_leave_loss_and_norm_out(tmp_path):
    built = tiny_run(tmp_path)
    built.state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    built.state.model.fc.weight.register_hook(lambda g: g * (math.inf if built.state.step < 3 else 1))
    loop.fit(built, MetricLogger(tmp_path, log_every=2))
    first, second, third, *others = read_steps(tmp_path)
    epoch = read_metrics(tmp_path)[0]  # of five steps, three of them skipped, which took their time too
    spent = sum(n * 8 / row["images_per_second"] for n, row in ((2, first), (2, second), (1, third)))
    assert epoch["bad_steps"] == 3 and epoch["images_per_second"] == pytest.approx(5 * 8 / spent, rel=1e-6)
    assert (first["bad_steps"], second["bad_steps"], third["bad_steps"]) == (2, 1, 0)
    assert first["train_loss"] is first["grad_norm"] is first["grad_norm_max"] is None
    assert (first["loss_scale"], second["loss_scale"]) == (2.0**14, 2.0**13)
    assert all(row["bad_steps"] == 0 and row["grad_norm"] > 0 for row in (third, *others))


def test_zero_writes_nothing(tmp_path):
    run(*TINY, "--log-every", 0, "--save-dir", tmp_path, "--stop-after", 2)
    assert not (tmp_path / "steps.jsonl").exists() and read_steps(tmp_path) == []
    assert payload(tmp_path)["row_sums"] == {}


# --- resuming ---


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7, 12, 14])
def test_a_resumed_run_writes_the_rows_of_one_that_was_never_stopped(stop, straight, tmp_path):
    run(*TINY, "--log-every", 4, "--save-dir", tmp_path, "--stop-after", stop)
    assert rows_of(tmp_path) == [row for row in rows_of(straight) if row["step"] <= stop]
    lost = {
        **rows_of(straight)[-1],
        "step": stop + 1,
        "epoch": 9,
    }  # written after the checkpoint, then killed
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write(json.dumps(lost) + "\n" + json.dumps(lost)[:20])
    run("--save-dir", tmp_path, "--resume", "auto")
    assert rows_of(tmp_path) == rows_of(straight)


def test_damaged_rows_do_not_stop_a_resumed_run(straight, tmp_path):
    run(*TINY, "--log-every", 4, "--save-dir", tmp_path, "--stop-after", 7)
    damaged = [
        b'{"step": Infinity}',
        b'{"step": 1%s}' % (b"0" * 400),
        b'{"step": null}',
        b"[]",
        b"\xff",
        b"[" * 9999,
    ]
    with open(tmp_path / "steps.jsonl", "ab") as file:
        file.write(b"\n".join(damaged) + b"\n")
    run("--save-dir", tmp_path, "--resume", "auto")
    assert rows_of(tmp_path) == rows_of(straight)


def test_a_stop_signal_between_two_rows_changes_none(straight, tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "run"
    stop = {"AT": "loop.train_step:7", "SIGNALS": "15"}
    assert finish(spawn(*TINY, "--log-every", 4, "--save-dir", save_dir, output=log, **stop)) == 143
    assert payload(save_dir)["step"] == 7 and payload(save_dir)["row_sums"]["steps"] == 2
    assert [row["step"] for row in read_steps(save_dir)] == [4, 5]
    run("--save-dir", save_dir, "--resume", "auto")
    assert rows_of(save_dir) == rows_of(straight)


def test_a_killed_process_has_written_its_rows(tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "run"
    kill = {"AT": "loop.train_step:4", "SIGNALS": "9"}
    assert finish(spawn(*TINY, "--log-every", 1, "--save-dir", save_dir, output=log, **kill)) == -9
    assert [row["step"] for row in read_steps(save_dir)] == [1, 2]  # the third is counted during the fourth
    run(*TINY, "--log-every", 4, "--save-dir", save_dir, "--resume", "auto", "--stop-after", 4)
    assert [row["step"] for row in read_steps(save_dir)] == [4]  # it began again: there was no checkpoint


def test_the_interval_may_change_on_resume_and_logging_may_stop(straight, tmp_path):
    run(*TINY, "--log-every", 4, "--save-dir", tmp_path, "--stop-after", 6)
    run("--save-dir", tmp_path, "--resume", "auto", "--log-every", 3, "--stop-after", 11)
    assert [row["step"] for row in read_steps(tmp_path)] == [4, 5, 9, 10]
    run("--save-dir", tmp_path, "--resume", "auto", "--log-every", 0)
    assert [row["step"] for row in read_steps(tmp_path)] == [4, 5, 9, 10]


def test_a_checkpoint_from_before_steps_were_logged_resumes(straight, tmp_path):
    from harness import checkpoint

    run(*TINY, "--log-every", 4, "--save-dir", tmp_path, "--stop-after", 7)
    saved = checkpoint.load(tmp_path / f"last_{NAME}")
    del saved["row_sums"], saved["config"]["log_every"]
    (tmp_path / f"last_{NAME}").unlink()
    checkpoint.save(tmp_path / f"last_{NAME}", saved)
    (tmp_path / "steps.jsonl").unlink()
    run("--save-dir", tmp_path, "--resume", "auto")
    assert [row["step"] for row in read_steps(tmp_path)] == [10, 15]  # at the ends of phases


def test_a_fork_takes_the_rows_along(straight, tmp_path):
    run(*TINY, "--log-every", 4, "--save-dir", tmp_path / "a", "--stop-after", 7)
    shutil.copytree(tmp_path / "a", tmp_path / "foreign")
    (tmp_path / "foreign" / "env.json").write_text('{"run": "abcd", "torch": "", "command": ""}')
    run("--save-dir", tmp_path / "b", "--resume", tmp_path / "a" / f"last_{NAME}")
    run("--save-dir", tmp_path / "c", "--resume", tmp_path / "foreign" / f"last_{NAME}")
    assert rows_of(tmp_path / "b") == rows_of(straight)
    assert rows_of(tmp_path / "c") == [row for row in rows_of(straight) if row["step"] > 7]


# --- the file ---


@pytest.mark.parametrize("line, words", [
    (b"5", "dictionary"), (b'{"epo', "unreadable"), (b"\xff", "unreadable"), (b'{"epoch": 1}', "lacks step"),
    (b'{"step": 0, "epoch": 1}', "step"), (b'{"step": true, "epoch": 1}', "step"),
    (b'{"step": 2, "epoch": 1, "grad_norm": -1}', "grad_norm"),
    (b'{"step": 2, "epoch": 1, "lr": "x"}', "lr"), (b'{"step": 2, "epoch": 1, "new": {"deep": []}}', "plain"),
])  # fmt: skip
def test_an_invalid_row_is_named_and_a_cut_one_at_the_end_is_skipped(tmp_path, line, words):
    good = b'{"step": 1, "epoch": 1, "grad_norm": 1e30, "new": 1}\n'
    (tmp_path / "steps.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(DataError, match=words) as caught:
        read_steps(tmp_path)
    assert f"{tmp_path / 'steps.jsonl'} line 2" in caught.value.what
    (tmp_path / "steps.jsonl").write_bytes(good + line)
    (row,) = read_steps(tmp_path)
    assert row["grad_norm"] == 1e30 and row["train_loss"] is None and row["new"] == 1


def step(log: StepLog, sums: dict, number: int) -> None:
    row = {"step": number, "epoch": 1, "image_size": 8, "batch_size": 4, "lr": 0.1, "loss_scale": None}
    result = StepResult(number - 1, loss=2.0, norm=1.0)
    log.add(sums, row, result, images=4, seconds=0.5, waited=0.25, last=number == 5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_epochs_row_on_a_full_disk_names_the_file(tmp_path):
    logger = MetricLogger.__new__(MetricLogger)
    logger.enabled, logger.path = True, tmp_path / "metrics.jsonl"
    logger.path.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        logger.log({"epoch": 1}, 1)
    assert caught.value.filename == str(logger.path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_rows_and_not_the_run(tmp_path, capsys):
    log, sums = StepLog(tmp_path / "steps.jsonl", 1), {}
    log.open(0)
    step(log, sums, 1)
    log.file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    for number in (2, 3):
        step(log, sums, number)
    log.close()
    assert capsys.readouterr().err.count("no more steps: [Errno 28] No space left on device") == 1
    assert [row["step"] for row in read_steps(tmp_path)] == [1] and sums == {}


def test_a_row_is_one_write_to_a_file_that_stays_open(tmp_path, monkeypatch):
    log, sums = StepLog(tmp_path / "steps.jsonl", 2), {}
    log.open(0)
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("pathlib.Path.open", None)
    monkeypatch.setattr("os.fsync", None)
    for number in range(1, 6):
        step(log, sums, number)
    monkeypatch.undo()
    first, second, last = read_steps(tmp_path)
    assert (first["images_per_second"], first["data_wait_percent"]) == (8.0, 50.0)
    assert (second["step"], last["step"]) == (4, 5)


# --- trackers ---


def test_tensorboard_has_the_steps_and_hides_those_after_the_checkpoint(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):  # the second one is a resumed run
        log = MetricLogger(tmp_path, [{"epoch": 1}] * bool(start), start, log_every=1, tensorboard=True)
        for number in steps:
            step(log.steps, {}, number)
        log.log({"epoch": 1 + bool(start), "lr": 0.5}, steps[-1])
        log.close()
        time.sleep(1.0)  # TensorBoard reads the files in the order of the second that is in their names
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "steps")).Reload()
    assert [point.step for point in events.Scalars("steps/grad_norm")] == [1, 2, 3, 4, 5]
    names = {"train_loss", "lr", "grad_norm_max", "images_per_second", "data_wait_percent", "bad_steps"}
    assert {f"steps/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert "steps/step" not in events.Tags()["scalars"] and "steps/loss_scale" not in events.Tags()["scalars"]
    epochs = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in epochs.Scalars("lr")] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_closing_after_the_directory_is_gone_hides_no_other_error(tmp_path):
    (tmp_path / "run").mkdir()
    log = MetricLogger(tmp_path / "run", log_every=1, tensorboard=True)
    step(log.steps, {}, 1)
    while (tmp_path / "run").exists():  # TensorBoard's thread may be writing into it
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    step(log.steps, {}, 2)
    log.close()
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard"):
            thread.join(10)  # its error belongs to this test


def test_a_tracker_gets_steps_and_epochs_at_the_step_of_the_run(tmp_path):
    class Tracker:
        def log(self, numbers, step):
            calls.append((step, set(numbers)))

    calls, sums, log = [], {}, MetricLogger(tmp_path, log_every=4)
    log.trackers.append(Tracker())
    for number in range(1, 6):
        step(log.steps, sums, number)
    log.log({"epoch": 1, "val_top1": 50.0}, 5)
    assert [at for at, _ in calls] == [4, 5, 5] and calls[2][1] == {"epoch", "val_top1"}
    assert {"steps/train_loss", "steps/lr", "steps/epoch"} <= calls[0][1]
