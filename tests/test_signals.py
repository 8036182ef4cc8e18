"""After a stop signal anywhere, the step is finished and saved, and the run resumes to the same bits."""

import concurrent.futures
import fcntl
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from inprocess import TINY
from runs import command, digest, environment, finish, payload, spawn

import train
from base import errors
from dataloader import eval_loader
from harness import checkpoint, interrupts, session
from harness.pool import in_processes
from sources.layouts import open_dataset

INT, TERM, HUP, USR1 = (int(getattr(signal, f"SIG{name}")) for name in ("INT", "TERM", "HUP", "USR1"))
# The call before which the signal arrives -> the step that is then saved.
STATES = {
    "train_utils.seed_everything:9": 9,
    "loop.train_step:1": 1,
    "loop.train_step:5": 5,  # the last of its epoch
    "loop.train_step:8": 8,
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__:1": 0,  # workers start
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__:2": 5,  # those of the next size
    "loop.evaluate:1": 5,
    "train_utils.hits:1": 5,  # between raw and averaged weights
    "loop.evaluate:4": 10,  # of the training sample
    "harness.checkpoint._write_and_prove:1": 5,
    "harness.checkpoint._move_into_place:2": 5,  # with its row
    "harness.checkpoint._move_into_place:4": 10,
    "loop.start_phase:2": 5,  # at the change of size
    "harness.log.MetricLogger.log:2": 10,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, str]:
    torch.set_num_threads(1)
    save_dir = tmp_path_factory.mktemp("straight")
    assert train.main([*TINY, "--save-dir", str(save_dir)]) == 0
    return digest(save_dir)


def members(group: int) -> list[int]:
    """Return the running processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(stat.parent.name))
    return found


def nothing_is_left(group: int) -> bool:
    deadline = time.monotonic() + 10
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not members(group)


def stop_at(state: str, signals: str, save_dir: Path, log: Path, workers: int) -> int:
    process = spawn(
        *TINY, "--num-workers", workers, "--save-dir", save_dir, output=log, AT=state, SIGNALS=signals
    )
    code = finish(process)
    assert nothing_is_left(process.pid)
    return code


def resumed(save_dir: Path) -> dict[str, str]:
    assert train.main(["--save-dir", str(save_dir), "--resume", "auto", "--num-workers", "0"]) == 0
    return digest(save_dir)


@pytest.mark.torture
@pytest.mark.parametrize("state", ["harness.log.MetricLogger.log:3", "harness.checkpoint.link:1"])
def test_a_signal_after_the_last_save_leaves_the_run_finished(state, straight, tmp_path):
    assert stop_at(state, str(TERM), tmp_path / "run", tmp_path / "log", 0) == 0
    assert "done: best EMA top-1" in (tmp_path / "log").read_text()
    assert digest(tmp_path / "run") == straight


@pytest.mark.torture
def test_the_same_signal_from_two_senders_counts_once(straight, tmp_path):
    """torchrun passes TERM on to ranks that may also have got it from the scheduler."""
    assert stop_at("loop.train_step:8", f"{TERM} {TERM}", tmp_path / "run", tmp_path / "log", 1) == 143
    assert "To continue" in (tmp_path / "log").read_text()
    assert resumed(tmp_path / "run") == straight


FAST = [
    ("loop.train_step:8", INT),
    ("train_utils.hits:1", TERM),
    ("harness.checkpoint._write_and_prove:1", TERM),
    ("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__:1", HUP),
]
REST = (
    [(state, TERM) for state in STATES]
    + [(state, INT) for state in list(STATES)[::3]]
    + [("loop.evaluate:1", USR1)]
)


@pytest.mark.parametrize(
    "state, number", [*FAST, *(pytest.param(*case, marks=pytest.mark.torture) for case in REST)]
)
def test_a_stopped_run_is_saved_at_this_step_and_resumes_to_the_same_bits(state, number, straight, tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "run"
    workers = 1 + (number == TERM) if "dataloader" in state or number == INT else 0
    code = stop_at(state, str(number), save_dir, log, workers)
    said = log.read_text()
    assert code == (130 if number == INT else 143), said
    assert "Traceback" not in said
    assert said.count("Finishing this step") == 1, said
    assert f"To continue: python train.py --save-dir {save_dir} --resume auto" in said
    assert payload(save_dir)["step"] == STATES[state]
    assert resumed(save_dir) == straight


@pytest.mark.parametrize(
    "state",
    ["harness.checkpoint._write_and_prove:2", pytest.param("loop.train_step:8", marks=pytest.mark.torture)],
)
def test_a_second_signal_ends_the_run_at_once_and_the_older_checkpoint_is_intact(state, straight, tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "run"
    assert stop_at(state, f"{TERM} . {INT}", save_dir, log, 1) == 130
    assert "To continue" not in log.read_text() and "Traceback" not in log.read_text()
    assert payload(save_dir)["step"] == 5
    assert resumed(save_dir) == straight


@pytest.mark.parametrize("place", [
    "dataloader.BatchDataset.__getitem__:3",
    pytest.param("dataloader.BatchDataset.__getitem__:8", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_loader_that_hangs_does_not_keep_a_stop_waiting(place, straight, tmp_path):
    """As if a disk did not answer, in training and in validation, with and without a worker."""
    log, save_dir, workers = tmp_path / "log", tmp_path / "run", int(place.endswith("3"))
    hang = f"{place}>{tmp_path / 'hangs'}"
    process = spawn(*TINY, "--num-workers", workers, "--save-dir", save_dir, output=log, HANG=hang)
    while not (tmp_path / "hangs").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.1)
    os.kill(process.pid, TERM)
    assert finish(process) == 143, log.read_text()  # which gives up long before the disk would answer
    assert nothing_is_left(process.pid) and "Traceback" not in log.read_text()
    assert resumed(save_dir) == straight


def catches(process: subprocess.Popen, number: int) -> bool:
    """Return whether the process has a handler for a signal (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    "number, code, delay",
    [(TERM, 143, 0.0), (INT, 130, 0.4), pytest.param(HUP, 143, 0.8, marks=pytest.mark.slow)],
)
def test_a_signal_before_training_ends_the_run_quickly_with_nothing_written(number, code, delay, tmp_path):
    process = subprocess.Popen(
        command(*TINY, "--save-dir", tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    while process.poll() is None and not catches(process, TERM):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code and out in ("", "loading the data and torch ...\n")
    assert not (tmp_path / "run").exists()


ORPHAN = """
import multiprocessing, os, sys, time
from harness.interrupts import die_with_parent

def work(ready):
    print(os.getpid(), flush=True)
    if "late" in sys.argv:  # its parent dies before it has asked for a signal
        ready.set()
        time.sleep(1)
    die_with_parent()
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    sys.platform = sys.argv[1]
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=work, args=(ready,))
    child.start()
    ready.wait()
    os._exit(9)
"""


@pytest.mark.parametrize("platform, when", [("linux", ""), ("linux", "late"), ("darwin", "")])
def test_no_worker_outlives_its_parent(platform, when):
    words = [sys.executable, "-c", ORPHAN, platform, when]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=30)
    assert ended.returncode == 9  # run() returns once the worker, too, has closed its output
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(ended.stdout), 0)
            time.sleep(0.1)


BORN = """
import multiprocessing, os, signal, sys, time
from harness.interrupts import held_back

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.platform = "darwin"
spawn = multiprocessing.get_context("spawn")
with held_back([signal.SIGINT]):
    spawn.Queue()  # starts Python's resource tracker
    child = spawn.Process(target=time.sleep, args=(0,))
    child.start()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    print(child.exitcode, flush=True)
"""


def test_a_process_that_is_being_spawned_does_not_get_ctrl_c_and_its_parent_gets_it_later():
    ended = subprocess.run(
        [sys.executable, "-c", BORN], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=30
    )
    assert ended.stdout == "0\n" and ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr


def test_spawned_workers_outlive_a_ctrl_c_at_their_start(photos, monkeypatch):
    """As on macOS: they import torch for seconds before they can ignore it."""

    def ctrl_c():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)

    monkeypatch.setattr(sys, "platform", "darwin")
    data = open_dataset("imagenet", photos)
    loader = eval_loader(data.val, data, image_size=16, batch_size=11, num_workers=1)
    loader.batches.multiprocessing_context = "spawn"
    batches = iter(loader)
    ctrl_c()
    assert sum(len(labels) for _, labels in batches) == 21
    as_completed = concurrent.futures.as_completed
    monkeypatch.setattr(concurrent.futures, "as_completed", lambda futures: ctrl_c() or as_completed(futures))
    assert sorted(in_processes(abs, [-1, -2], workers=1)) == [(-2, 2), (-1, 1)]


KILLS_A_WORKER = """
import multiprocessing, os, signal, sys, time
import loop, train
from base import errors

step, steps = loop.train_step, iter(range(9))

def killing(*args, **options):
    if next(steps) == 6:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(20)  # torch's handler of SIGCHLD raises in here
    return step(*args, **options)

loop.train_step = killing
sys.exit(errors.run(train.main))
"""


def test_a_killed_loader_worker_is_explained_and_the_run_resumes(straight, tmp_path):
    """The kernel kills one when memory runs out; torch raises where the main process happens to be."""
    words = [*TINY, "--num-workers", "1", "--save-dir", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", KILLS_A_WORKER, *words],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == errors.ResourceError.exit_code, ended.stderr
    assert "a loader worker died: DataLoader worker" in ended.stderr and "Traceback" not in ended.stderr
    assert "lower --num-workers" in ended.stderr
    assert resumed(tmp_path) == straight


@pytest.mark.slow
def test_a_lost_terminal_stops_the_run_saved(straight, tmp_path):
    """If ssh is cut, SIGHUP arrives, and from then on every write to the terminal fails."""
    master, slave = os.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command(*TINY, "--save-dir", tmp_path),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(),
        preexec_fn=own_terminal,
    )
    os.close(slave)
    seen = b""
    while not re.search(rb"s +1/\d+ +8 ", seen):  # the row of the first epoch
        seen += os.read(master, 1000)
    os.close(master)
    assert process.wait(60) == 143
    assert payload(tmp_path)["step"] > 4
    assert resumed(tmp_path) == straight


@pytest.mark.slow
def test_a_closed_pipe_stops_the_run_saved(straight, tmp_path):
    """train.py | head"""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    process = subprocess.Popen(command(*TINY, "--save-dir", tmp_path), **streams)
    next(line for line in process.stdout if "1/3" in line)  # the row of the first epoch
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 143 and "Traceback" not in err and "Exception ignored" not in err, err
    assert payload(tmp_path)["step"] < 15 and resumed(tmp_path) == straight


def test_a_pipe_closed_before_training_begins_is_no_success(tmp_path, monkeypatch):
    def closed(*args):
        raise BrokenPipeError

    monkeypatch.setattr(session, "introduction", closed)
    with pytest.raises(errors.Stopped, match="before training began") as stopped:
        train.main([*TINY, "--save-dir", str(tmp_path)])
    assert stopped.value.exit_code == 143


def test_help_into_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("--help"), stdout=writer, stderr=subprocess.PIPE, env=environment(), text=True
    )
    assert done.stderr == "" and done.returncode == 0


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = interrupts.StopSignals()
        with stop.installed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
        errors.run(lambda argv: 0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_former_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in interrupts.STOP_SIGNALS]
    train.main([*TINY, "--save-dir", str(tmp_path), "--stop-after", "1"])
    assert [signal.getsignal(number) for number in interrupts.STOP_SIGNALS] == before
    assert checkpoint.newest(tmp_path)[0]
