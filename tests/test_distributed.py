"""Several ranks act as one run: the same samples and scores, one stop, one checkpoint, one end."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import TINY, built, config_of
from runs import ROOT, SERVER, TIMING, digest, environment, finish, payload, spawn
from torch import nn

import loop
import train
from base import errors
from base.device import Runtime, explain_lost_ranks, init_runtime
from base.errors import CheckpointError, DataError, ResourceError, UserError
from dataloader import Order
from harness import rundir
from harness.log import MetricLogger, read_steps
from train_utils import StepResult, evaluate

TERM = 15
SMALL = (
    "--arch resnet_tiny --resize-schedule 16 --epochs 2 --batch-size 8 --num-workers 0 --device cpu --amp off"
)
SMALL = SMALL.split()


def free_port() -> str:
    """Return a port below those of outgoing connections, of which one could take it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return str(port)


def ranks(world: int, port: str) -> list[dict[str, str]]:
    """Return the environment variables that torchrun sets for each rank."""
    return [
        {
            "RANK": str(k),
            "LOCAL_RANK": str(k),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for k in range(world)
    ]


def run(world: int, log: Path, *arguments, only: dict[int, dict[str, str]] | None = None) -> list[int]:
    """Run train.py on `world` ranks, with the variables in `only` for some; return the exit codes.

    Of a rank that hangs, it is -9, and the log says where it was.
    """
    started = [
        spawn(*arguments, output=log, **variables, **(only or {}).get(k, {}))
        for k, variables in enumerate(ranks(world, free_port()))
    ]
    for process in started:
        with suppress(TimeoutError):
            finish(process)
    for process in started:
        process.join()
    return [process.exitcode for process in started]


# --- without processes ---


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_take_the_samples_that_one_rank_would_in_the_same_order(world):
    for shuffle in (True, False):
        alone = [batch.ids for batch in Order(53, 12, seed=5, shuffle=shuffle)]
        shared = zip(
            *(Order(53, 12, seed=5, shuffle=shuffle, rank=k, world_size=world) for k in range(world)),
            strict=True,
        )
        joined = [np.concatenate([batch.ids for batch in parts]) for parts in shared]
        assert len(joined) == len(alone) and all(map(np.array_equal, joined, alone))


class OneOfMany(Runtime):
    """A rank that records what it would send to the others."""

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        self.sent.append(values.clone())
        return values


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_validation_sample_counts_once_however_ragged(world):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), torch.randn(17, 3, 2, 2)
    labels = torch.randint(0, 7, (17,))
    for n in range(1, 18):
        sums, lengths = [], set()
        for rank in range(world):
            runtime = OneOfMany(torch.device("cpu"), None, rank, world)
            object.__setattr__(runtime, "sent", [])
            order = Order(n, 4, shuffle=False, rank=rank, world_size=world)
            evaluate({"val": model}, ((images[b.ids], labels[b.ids]) for b in order), runtime)
            sums += runtime.sent
            lengths.add(len([*order]))
        assert len(lengths) == 1 and not model.training  # or a rank would wait for ever
        loss, top1, top5, count = torch.cat(sums).sum(0).tolist()
        logits = model.double()(images[:n].double())
        model.float()
        top = logits.topk(5, 1).indices
        assert (top1, top5, count) == (
            int((top[:, 0] == labels[:n]).sum()),
            int((top == labels[:n, None]).sum()),
            n,
        )
        assert loss == pytest.approx(
            nn.functional.cross_entropy(logits, labels[:n], reduction="sum").item(), rel=1e-6
        )


@pytest.mark.parametrize("rank, marked", [(0, None), (1, 1)])
def test_an_error_that_one_rank_alone_knows_of_is_printed_there(rank, marked):
    with pytest.raises(UserError) as caught, explain_lost_ranks(Runtime(torch.device("cpu"), None, rank, 2)):
        raise ResourceError("no memory", "get some")
    assert caught.value.rank == marked


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 6),
    (OSError(5, "Input/output error", "/data/x"), 6), (DataError("no data", "get some"), 3),
])  # fmt: skip
@pytest.mark.parametrize(("rank", "local_rank"), [(1, 1), (1, 0), (0, 0)])
def test_an_error_is_printed_by_the_rank_that_may_be_alone_with_it(
    error, code, rank, local_rank, monkeypatch, capsys
):
    """An error of the machine always; another one once on each node, which may lack the data."""
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    error = type(error)(*error.args) if not isinstance(error, DataError) else DataError("no data", "get some")

    def main(argv):
        raise error

    assert errors.run(main) == code
    said = capsys.readouterr().err
    assert bool(said) == (code == 6 or local_rank == 0)
    assert not said or said.startswith("error on rank 1: " if rank else "error: ")


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="GPU 1 does not exist: this machine has 1") as caught:
        init_runtime("cuda")
    assert caught.value.rank == 1
    with pytest.raises(ResourceError, match="the ranks of a machine would share one GPU"):
        init_runtime("cuda:0")


@pytest.mark.parametrize(
    "own, other, agree",
    [(5, 5, True), (5, 3, False), (3, 5, False), (5, None, False), (None, 5, False), (None, None, True)],
)
def test_each_rank_notices_that_the_ranks_found_different_checkpoints(own, other, agree, monkeypatch):
    there = -1 if other is None else other
    others = {False: there, True: -there}  # what the other rank sends: its step, then its negative
    asked = iter((False, True))
    monkeypatch.setattr(Runtime, "max_over_ranks", lambda self, flag: max(flag, others[next(asked)]))
    with nullcontext() if agree else pytest.raises(CheckpointError, match="different checkpoints"):
        rundir.check_ranks(
            Runtime(torch.device("cpu"), rank=1, world_size=2), None if own is None else {"step": own}
        )


def test_only_a_lost_rank_is_reported_as_one():
    words = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5001"
    with (
        pytest.raises(ResourceError, match="another rank ended"),
        explain_lost_ranks(Runtime(torch.device("cpu"), None, 1, 2)),
    ):
        raise RuntimeError(words)
    with (
        pytest.raises(RuntimeError, match="shape"),
        explain_lost_ranks(Runtime(torch.device("cpu"), None, 1, 2)),
    ):
        raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="gloo"), explain_lost_ranks(Runtime(torch.device("cpu"))):
        raise RuntimeError(words)


# --- two ranks of train.py with gloo ---


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_one_rank_can_resume(tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "run"
    codes = run(
        2, log, *TINY, "--save-dir", save_dir, only={1: {"AT": "loop.train_step:7", "SIGNALS": str(TERM)}}
    )
    said = log.read_text()
    assert codes == [143, 143] and "Traceback" not in said, said
    assert said.count("To continue") == 1
    assert payload(save_dir)["step"] == 9  # rank 1 votes with step 8, whose votes are read during step 9
    assert train.main(["--resume", "auto", "--save-dir", str(save_dir)]) == 0
    assert len(payload(save_dir)["rows"]) == 3


@pytest.mark.parametrize(
    "where, step",
    [("loop.must_save_or_stop:3", 4), pytest.param("loop.train_epoch:2", 7, marks=pytest.mark.slow)],
)
def test_a_signal_between_two_steps_of_two_ranks_takes_no_batch_twice_and_skips_none(where, step, tmp_path):
    """The ranks stop two steps later, and these need batches of their own: not the last one, and not none."""
    log, late = tmp_path / "log", {"AT": where, "SIGNALS": str(TERM)}
    argv = [*TINY, "--log-every", 3]
    assert run(2, log, *argv, "--save-dir", tmp_path / "straight") == [0, 0], log.read_text()
    codes = run(2, log, *argv, "--save-dir", tmp_path / "run", only={0: late, 1: late})
    assert codes == [143, 143], log.read_text()
    assert payload(tmp_path / "run")["step"] == step and payload(tmp_path / "run")["row_sums"]
    assert run(2, log, "--resume", "auto", "--save-dir", tmp_path / "run") == [0, 0], log.read_text()
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")
    rows = [
        [{k: v for k, v in row.items() if k not in TIMING} for row in read_steps(tmp_path / name)]
        for name in ("straight", "run")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]][:3] == [3, 5, 6]


@pytest.mark.slow
def test_a_dry_run_on_two_ranks_takes_the_same_steps_on_both(tmp_path):
    log = tmp_path / "log"
    assert run(2, log, *TINY, "--save-dir", tmp_path / "run", "--dry-run") == [0, 0], log.read_text()
    assert log.read_text().count("projected minutes ") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_stopped_and_resumed_on_two_ranks_is_the_same_run(tmp_path):
    log = tmp_path / "log"
    assert run(2, log, *TINY, "--save-dir", tmp_path / "straight") == [0, 0], log.read_text()
    only = {0: {"AT": "train_utils.hits:1", "SIGNALS": str(TERM)}}
    assert run(2, log, *TINY, "--save-dir", tmp_path / "run", only=only) == [143, 143], log.read_text()
    assert run(2, log, "--resume", "auto", "--save-dir", tmp_path / "run") == [0, 0], log.read_text()
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")
    assert log.read_text().count("done: best") == 2  # only one rank prints


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("where", ["loop.train_step:7", "train_utils.hits:1", "harness.checkpoint.save:1"])
def test_a_rank_that_dies_ends_the_other_with_a_clear_message(dies, where, tmp_path):
    if dies == 1 and "save" in where:
        where = "base.device.Runtime.barrier:1"
    log, save_dir = tmp_path / "log", tmp_path / "run"
    codes = run(2, log, *TINY, "--save-dir", save_dir, only={dies: {"AT": where, "SIGNALS": "9"}})
    said = log.read_text()
    assert codes[dies] == -9 and codes[1 - dies] == 6, said
    assert "another rank ended" in said and "--resume auto" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_bad_image_that_one_rank_meets_is_named_and_ends_both(photos, tmp_path):
    data, log = tmp_path / "data", tmp_path / "log"
    shutil.copytree(photos, data)
    (data / "train" / "dog" / "dog_3.JPEG").write_bytes(b"")
    codes = run(2, log, *SMALL, "--data-dir", data, "--save-dir", tmp_path / "run")
    assert sorted(codes) == [3, 6], log.read_text()
    assert "dog_3.JPEG" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.slow
def test_two_runs_on_one_host_do_not_interfere(tmp_path):
    """Started through torchrun, as by a user."""
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                str(ROOT / "train.py"),
                *TINY,
                "--seed",
                str(k),
                "--save-dir",
                str(tmp_path / str(k)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for k in range(2)
    ]
    for k, process in enumerate(started):
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0 and out.count("done: best") == 1, out
        assert payload(tmp_path / str(k))["config"]["seed"] == k


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else touch requeued; fi',
    "srun": 'shift; exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


def slurm_job(where: Path, *argv: str, fakes: dict[str, str] = FAKES) -> subprocess.Popen:
    """Start docs/slurm.sh in `where`, in a process group of its own, with stand-ins for SLURM's commands."""
    for name, body in fakes.items():
        (where / name).write_text(f"#!/bin/bash\n{body}\n")
        (where / name).chmod(0o755)
    variables = environment(
        PATH=f"{where}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node1",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        PYTHONPATH=str(ROOT),
    )
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), *argv]
    with (where / "slurm-7.log").open("a") as log:
        options = {"cwd": where, "env": variables, "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, **options)


RANKS = """trap 'echo; echo Stopped at step 5; exit 143' TERM
sleep 0.5 # until the shell that started this has its traps
echo $PPID $TORCH_ELASTIC_SHUTDOWN_TIMEOUT > started
for k in {1..400}; do sleep 0.05; done"""  # of a training that is stopped


@pytest.mark.parametrize("reason", ["time limit", "preempted", "cancelled"])
def test_the_slurm_script_requeues_a_stopped_job_unless_it_was_cancelled(reason, tmp_path):
    job = slurm_job(tmp_path, fakes=FAKES | {"torchrun": RANKS})
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert time.monotonic() < deadline, (tmp_path / "slurm-7.log").read_text()
        time.sleep(0.02)
    step, seconds = map(int, (tmp_path / "started").read_text().split())
    warning = re.search(r"--signal=USR1@(\d+)", (ROOT / "docs" / "slurm.sh").read_text())
    assert 30 < seconds < int(warning[1])
    if reason == "cancelled":
        os.killpg(job.pid, TERM)  # the batch shell, too
    else:
        os.kill(step, signal.SIGUSR1 if reason == "time limit" else TERM)
    assert job.wait(30) != 0
    assert "Stopped at step 5" in (tmp_path / "slurm-7.log").read_text()
    assert (tmp_path / "requeued").exists() == (reason != "cancelled")


@pytest.mark.slow
def test_the_slurm_script_puts_a_stopped_job_back_into_the_queue_and_a_finished_one_not(tmp_path):
    """With stand-ins for SLURM's commands; the whole process group gets USR1, as a job step does."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    log = tmp_path / "slurm-7.log"

    def job(stop: bool) -> int:
        process = slurm_job(tmp_path, *TINY, "--save-dir", "run")
        deadline = time.monotonic() + 200
        while stop and " 1/3 " not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        if stop:
            os.killpg(process.pid, signal.SIGUSR1)
        return process.wait(200)

    assert job(stop=True) != 0 and (tmp_path / "requeued").exists(), log.read_text()
    (tmp_path / "requeued").unlink()
    assert job(stop=False) == 0 and not (tmp_path / "requeued").exists(), log.read_text()
    assert len(payload(tmp_path / "run")["rows"]) == 3


# --- the same losses as one rank ---


PLAIN = ("--mixup-alpha", "0", "--cutmix-alpha", "0", "--drop-path-rate", "0")


def losses_of_a_run(variables: dict[str, str], save_dir: str) -> None:
    """Train with frozen BatchNorm, writing every step's loss to a file."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    run = built(config_of(*PLAIN, "--save-dir", save_dir), Path(save_dir))
    for module in run.state.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module
    losses, real = [], loop.train_step
    loop.train_step = lambda *args, **vote: (losses.append(real(*args, **vote)), losses[-1])[1]
    loop.fit(run, MetricLogger(Path(save_dir), enabled=run.runtime.is_main, log_every=4))
    if run.runtime.is_main:
        (Path(save_dir) / "losses.json").write_text(json.dumps([step.result() for step in losses]))


def test_bad_images_of_all_ranks_are_counted(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for k in range(5):
        (data / "train" / "cat" / f"cat_{k}.JPEG").write_bytes(b"no image")
    counts, log = [], tmp_path / "log"
    for world, stop in ((1, 0), (2, 0), (2, 4)):  # the last one is resumed in an epoch
        where = ["--data-dir", data, "--save-dir", tmp_path / f"run{world}{stop}"]
        argv = [*SMALL, *where, "--on-bad-image", "skip"]
        if stop:
            assert run(world, log, *argv, "--stop-after", stop) == [0] * world
            argv = [*where, "--resume", "auto"]
        assert run(world, log, *argv) == [0] * world, log.read_text()
        counts.append([row["bad_images"] for row in payload(where[3])["rows"]])
    alone, two, resumed = counts
    assert alone == two == resumed
    assert min(alone) >= 5  # of 72 images in batches of 8, each is read in each epoch


@pytest.mark.slow
def test_two_ranks_have_the_losses_and_scores_of_one(tmp_path):
    found = []
    for world in (1, 2):
        save_dir = tmp_path / str(world)
        save_dir.mkdir()
        started = [
            SERVER.Process(target=losses_of_a_run, args=(variables, str(save_dir)))
            for variables in ranks(world, free_port())
        ]
        for process in started:
            process.start()
        assert [finish(process) for process in started] == [0] * world
        saved = payload(save_dir) | {"steps": read_steps(save_dir)}
        found.append((json.loads((save_dir / "losses.json").read_text()), saved))
    (alone, one), (shared, two) = found
    for row, same in zip(one["steps"], two["steps"], strict=True):  # one rank writes the means over both
        assert (row["step"], row["batch_size"]) == (same["step"], same["batch_size"])
        assert row["train_loss"] == pytest.approx(same["train_loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)
    alone, shared = ([StepResult(*result) for result in results] for results in (alone, shared))
    assert len(alone) == 15 and all(result.finite for result in shared)
    assert [result.loss for result in shared] == pytest.approx([r.loss for r in alone], rel=1e-5)
    assert [result.norm for result in shared] == pytest.approx([r.norm for r in alone], rel=1e-4)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert [a[k] for k in ("val_top1", "ema_val_top1", "train_top1")] == [
            b[k] for k in ("val_top1", "ema_val_top1", "train_top1")
        ]
