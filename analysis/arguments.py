"""Look inside a run or a model: one command each, `python -m analysis.<command> --help`.

Commands: plots, gradcam, misclassified, batch, filters, loss_landscape, report. They share
`predictions` (a model and its data), `feature_maps` and `figures`; here are the flags they share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from base import flags


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command about a checkpoint, besides those that name its data."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a best_*.pt or last_*.pt that train.py wrote")
    add("--out", default="", metavar="DIR", help="where pictures go; empty: plots/ beside the checkpoint")
    add(
        "--weights",
        default="ema",
        choices=("ema", "raw"),
        help="which weights; ema: raw ones where there is no EMA",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add("--debug", action="store_true", help="tracebacks for errors")


def parse(parser: flags.Parser, argv: list[str] | None):
    """As flags.parse, for commands about a checkpoint: one that is not there is told before torch is imported."""
    from harness import rundir

    config, typed = flags.parse(parser, argv)
    rundir.check_checkpoint(config.checkpoint)
    return config, typed


def out_dir(config) -> Path:
    """--out, or plots/ beside the checkpoint."""
    return Path(config.out) if config.out else Path(config.checkpoint).parent / "plots"
