"""Tiny training runs through the real command line, and functions to tell whether two are equal."""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import pkgutil
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Three phases with mixing, drop-path, augmentation and EMA.
TINY = shlex.split(
    "--arch resnet_tiny --epochs 3 --resize-schedule 16,24,32 --phase-batch-sizes 24,16,16 "
    "--phase-epochs 1,1,1 --drop-path-rate 0.3 --augment full --lr 1e-3 --device cpu --amp off --seed 3"
)
TIMING = {"images_per_second", "data_wait_percent", "seconds"}  # columns that differ between any two runs


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, args)]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def cli(*args: object, **extra: str) -> subprocess.CompletedProcess:
    """Run train.py in a process of its own."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, env=environment(**extra), timeout=300
    )


def payload(run_dir: Path, kind: str = "last") -> dict:
    (path,) = Path(run_dir).glob(f"{kind}_*.pt")
    return torch.load(path, map_location="cpu", weights_only=True)


def digest(run_dir: Path, kind: str = "last") -> dict[str, str]:
    """Return a hash of each part of a checkpoint in which two equal runs must agree, bit for bit."""
    content = payload(run_dir, kind)
    names = ("model", "ema", "optimizer", "schedule", "scaler", "step", "best")
    parts = {name: content[name] for name in names}
    parts["rows"] = [{k: v for k, v in row.items() if k not in TIMING} for row in content["rows"]]
    return {name: hashlib.sha256(exact(value).encode()).hexdigest() for name, value in parts.items()}


def exact(value) -> str:
    """Return a text that two values share only if they are equal bit for bit."""
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        return f"{value.dtype}{tuple(value.shape)}{digest}"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return "{" + ",".join(f"{k}:{exact(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(exact, value)) + "]"
    return repr(value)


# Processes start in a twentieth of a second: they are forked from a server that has imported everything.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "numpy", "cv2", "albumentations", "train", "harness.build", "loop", "sources.layouts", "runs"]
)


def _at(where: str, act) -> None:
    """Call `act` just before the nth call of a function, or after it; `where` is 'module.name:n' or ':n+'."""
    (place, _, nth), calls = where.partition(":"), []
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls.append(1)
        now, late = len(calls) == int(nth.rstrip("+")), nth.endswith("+")
        if now and not late:
            act()
        result = real(*args, **kwargs)
        if now and late:
            act()
        return result

    setattr(owner, name, wrapped)


def _send(numbers: list[str]) -> None:
    """Send signals to the whole process group, as a terminal does for Ctrl-C, and a cluster's scheduler.

    '.' waits until the next signal counts as another one.
    """
    for number in numbers:
        if number == ".":
            time.sleep(1.2)
        else:
            os.kill(0, int(number))


def _in_child(argv: list[str], output: str, variables: dict[str, str]) -> None:
    os.setsid()  # so that it can be killed together with its workers
    os.environ.update(variables)
    if "AT" in variables:
        _at(variables["AT"], lambda: _send(variables["SIGNALS"].split()))
    if "HANG" in variables:  # "place>marker": a file that says when it hangs
        place, _, marker = variables["HANG"].partition(">")
        _at(place, lambda: (Path(marker).touch(), time.sleep(1000)))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    import train
    from base import errors

    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    code = errors.run(lambda _: train.main(argv))
    sys.stdout.flush()
    sys.exit(code)


def spawn(*args: object, output: Path, **variables: str) -> multiprocessing.Process:
    """Start train.py's main in a forked process, with its output appended to a file."""
    process = SERVER.Process(target=_in_child, args=(list(map(str, args)), str(output), variables))
    process.start()
    return process


def finish(process, timeout: float = 120) -> int:
    process.join(timeout)
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR2)  # it writes where it is into its output
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError("the run did not end")
    return process.exitcode
