"""Tiny runs that are built in this process, for tests that look inside them."""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import loop
import train
from base import flags
from base.errors import UserError
from harness import build
from loop import Run
from models import train_mode
from sources import layouts
from train_utils import train_step

TINY = shlex.split(
    "--dataset digits --subset --subset-size 40 --arch resnet_tiny --drop-path-rate 0.3 --epochs 3 "
    "--resize-schedule 8,16,24 --phase-batch-sizes 8,8,8 --num-workers 0 --device cpu --amp off"
)


def config_of(*arguments: object):
    """Return the config of TINY overridden by `arguments`. Raises UsageError where train.py would."""
    config, typed = flags.parse(train.build_parser(), [*TINY, *map(str, arguments)])
    flags.check_train(config, typed)
    return config


def built(config, save_dir: Path) -> Run:
    """Return the run as train.py would build it."""
    index = layouts.open_dataset(**flags.data_args(config))
    runtime = build.open_runtime(config)
    return build.build(config, index, runtime, build.make_plan(config, index, runtime.world_size), save_dir)


def tiny_run(save_dir: Path, *arguments: object) -> Run:
    return built(config_of(*arguments, "--save-dir", save_dir), save_dir)


def look(make_config: Callable) -> tuple:
    """Return what distinguishes a run: its data, plan and values, and four of its steps."""
    try:
        config = make_config()
        run = built(config, Path())
        index = layouts.open_dataset(**flags.data_args(config))
    except UserError as error:
        return ("refused", error.what)
    finally:
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
    scoring = (run.eval_every, run.eval_size, run.eval_crop, run.eval_flip)
    values = (scoring, run.patience, run.save_every, run.stop_after, run.runtime, deterministic)
    steps = trace(run, run.phases[0])
    for _ in range(6):  # enough for plateau: a loss that is best, and five that are no better
        run.state.schedule.observe(1.0)
    steps += trace(run, run.phases[-1])
    phases = [replace(phase, mix=True, augment="") for phase in run.phases]  # the steps show these
    return (index.fingerprint(), phases, values, steps)


def trace(run: Run, phase, count: int = 2) -> list:
    """Return (loss, learning rate, weights, EMA weights) after each of the first steps of `phase`."""
    (loader, options), state = loop.start_phase(run, phase), run.state
    workers, compiled = loader.batches.num_workers, options.forward is not state.model
    seen = [workers, compiled]
    loader.order.seek(phase.first_epoch)
    state.step = phase.first_step
    state.schedule.seek(phase.first_step)
    train_mode(state.model, phase.head_only)
    for _, (images, labels) in zip(range(count), loader, strict=False):
        loss = train_step(state, options, images, labels).result().loss
        averaged = state.ema.module and hashed(state.ema.module)
        seen.append((loss, state.schedule.last_lr, hashed(state.model), averaged))
    return seen


def hashed(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()
