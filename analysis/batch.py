"""Show what training sees: batches after augmentation and mixing, with their soft labels.

Takes the flags of train.py and draws the very batches that this run would train on. Order, augmentation
and mixing are functions of the seed and the step, so nothing needs to be trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

from base import flags
from base.errors import UsageError, doing, run

EPILOG = """examples:
  python -m analysis.batch --data-dir data/imagenet --show-epoch 31          the first batches of phase 2
  python -m analysis.batch --dataset digits --augment affine --cutmix-alpha 0
  python -m analysis.batch --config recipes/digits.yaml --show-steps 5       with any flags of train.py"""

SHOWN = ("what most runs set", "data", "loading", "phases", "loss and regularization", "command")
STARTS = {"resume", "dry_run", "summary"}  # flags about a start of train.py; this only draws


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.batch", "Show the batches that train.py would train on.", EPILOG)
    add = parser.add_argument_group("picture").add_argument
    add("--out", default="", metavar="DIR", help="Output directory; by default --save-dir/plots.")
    add("--show-epoch", type=flags.positive, default=1, metavar="N", help="Epoch to show.")
    add("--show-steps", type=flags.positive, default=4, metavar="N", help="Batches, one in each row.")
    add("--show-images", type=flags.positive, default=8, metavar="N", help="Images of each batch.")
    for title, group in flags.TRAIN_GROUPS.items():
        shown = (f if title in SHOWN and f.name not in STARTS | {"lr"} else flags.hidden(f) for f in group)
        flags.add_flags(parser, title, shown)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    if unread := sorted(STARTS & given):
        what = f"{flags.dashed(unread[0])} would do nothing: this command only draws a batch"
        raise UsageError(what, "leave it out")
    flags.check_train(config, given)
    if config.show_epoch > config.epochs:
        problem = f"--show-epoch {config.show_epoch} > --epochs {config.epochs}"
        raise UsageError(problem, "name an epoch of the run")
    from sources import folders, layouts

    doing("loading the data and torch")
    index = layouts.open_dataset(**flags.data_args(config))
    config, _ = flags.fit_to_data(config, given, len(index.train))

    from analysis import batch_figures, figures

    folder = Path(config.out) if config.out else Path(config.save_dir) / "plots"
    folders.check_outside(index, folder, "--out" if config.out else "--save-dir")
    print(figures.save(batch_figures.draw(config, index), folder / "batch.png"))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
