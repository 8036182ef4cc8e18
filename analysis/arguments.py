"""What the commands about a checkpoint share: their flags, the check of the checkpoint, and saving pictures.

Each command is started as `python -m analysis.NAME`; its `--help` gives examples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from base import flags
from base.errors import doing

MOST_PICTURES = 200  # in one file: matplotlib draws at most 65,535 pixels a side


def checkpoint_parser(name: str, description: str, epilog: str, *, writes: bool = True) -> flags.Parser:
    """Return a parser for `python -m analysis.NAME CHECKPOINT`; the command adds flags of its own."""
    parser = flags.build_parser(f"-m analysis.{name}", description, epilog)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="Checkpoint that train.py wrote (best_*.pt or last_*.pt).")
    if writes:
        out = "Output directory; by default plots/ beside the checkpoint."
        add("--out", default="", metavar="DIR", help=out)
    weights = "Weights to use; falls back to raw if there is no EMA."
    add("--weights", default="ema", choices=("ema", "raw"), help=weights)
    add("--device", default="auto", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 or mps.")
    flags.DEBUG.add_to(parser)
    flags.add_flags(parser, "data", flags.SAVED_DATA).description = flags.SAVED_DATA_NOTE
    return parser


def parse(parser: flags.Parser, argv: list[str] | None):
    """Parse as `flags.parse`, fill in --out, check that the checkpoint exists before torch is imported."""
    from harness import rundir

    config, given = flags.parse(parser, argv)
    rundir.check_checkpoint(config.checkpoint)
    if not getattr(config, "out", "given"):
        config = dataclasses.replace(config, out=str(Path(config.checkpoint).parent / "plots"))
    doing(f"loading torch and {config.checkpoint}")
    return config, given


def save(config, pictures: dict) -> None:
    """Write figures by file name into the output directory and print their paths."""
    from analysis import figures

    for name, fig in pictures.items():
        print(figures.save(fig, Path(config.out, name)))
