"""Tiny runs built in this process, for tests that look inside one."""

from pathlib import Path

import build
import flags
import train
from sources import layouts
from trainer import Run

TINY = [
    *("--dataset", "digits", "--subset", "--subset-size", "40", "--arch", "resnet_tiny", "--drop-path-rate", "0.3"),
    *("--epochs", "3", "--resize-schedule", "8,16,24", "--phase-batch-sizes", "8,8,8"),
    *("--num-workers", "0", "--device", "cpu", "--amp", "off"),
]


def config_of(*arguments: object):
    """The config of TINY with `arguments` over it, refused or noted as train.py would."""
    config, typed = flags.parse(train.build_parser(), [*TINY, *map(str, arguments)])
    flags.check_train(config, typed)
    return config


def built(config, save_dir: Path) -> Run:
    """The run as train.py would build it."""
    index = layouts.index(**flags.data_args(config))
    runtime = build.open_runtime(config)
    return build.build(config, index, runtime, build.make_plan(config, index, runtime.world_size), save_dir)


def tiny_run(save_dir: Path, *arguments: object) -> Run:
    return built(config_of(*arguments, "--save-dir", save_dir), save_dir)
