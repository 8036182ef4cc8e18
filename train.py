"""Train a ResNet-50: flags -> config -> build -> fit. Start reading here; loop.py is next."""

from __future__ import annotations

import gc
import sys

from base import flags
from base.errors import run as run_command
from base.process import is_main, say

EPILOG = """examples:
  python train.py --epochs 90 --drop-path-rate 0.2        ImageNet in ./data/imagenet, the documents' recipe
  python train.py --resume auto                           continue the run in --save-dir
  python train.py --config recipes/digits.yaml            five minutes on two CPU cores, no data needed
  python train.py --dry-run                               the plan, two steps at each size, expected hours"""


def build_parser() -> flags.Parser:
    description = "Train a ResNet-50 (or another architecture) from scratch."
    return flags.build_parser("train.py", description, EPILOG, flags.TRAIN_GROUPS)


def main(argv: list[str] | None = None) -> int:
    """Train, resume, or look at what would be trained; return the exit code.

    Usage, paths and the data layout are checked first, before torch is imported or a file is written.
    """
    config, typed = flags.parse(build_parser(), argv)
    config, index, directory, saved = check(config, typed)
    if config.summary or config.dry_run:
        return preview(config, index)

    from base.device import lost_ranks_named
    from harness import build, session
    from loop import fit

    runtime = build.open_runtime(config)
    with lost_ranks_named(runtime):
        run, identity = session.prepare(config, index, runtime, directory, saved)
        if run is None:
            return 0
        with session.kept_safe(run, config, directory, saved, identity) as log:
            say(session.introduction(run, config))
            fit(run, log)
            say(session.conclusion(run, config))
    return 0


def check(config, typed: flags.Given):
    """Check all that can be checked without torch; return the config, the data, --save-dir and a checkpoint.

    A resumed run takes the flags that were not typed from its checkpoint.
    """
    from harness import rundir
    from harness.log import check_trackers
    from sources import layouts

    directory = rundir.scan(config.save_dir)
    saved = rundir.find_checkpoint(config.resume, directory)
    if saved:
        config = rundir.resumed_config(config, typed, saved["config"])
    notes = flags.check_train(config, typed)
    index = layouts.open_dataset(**flags.data_args(config))
    check_trackers(tensorboard=config.tensorboard, wandb=bool(config.wandb))
    for note in (*notes, *index.notes):
        say(note)
    if is_main() and not (config.summary or config.dry_run):
        rundir.check(directory, resuming=bool(config.resume), overwrite=config.overwrite)
    return config, index, directory, saved


def preview(config, index) -> int:
    """Show the model (--summary) or try the plan out (--dry-run); train nothing."""
    from harness import build, dryrun

    phases = build.make_plan(config, index, world_size=1)
    if config.summary:
        dryrun.print_summary(build.model_args(config, index), phases)
    else:
        dryrun.dry_run(config, index, build.open_runtime(config), phases)
    return 0


if __name__ == "__main__":
    gc.disable()  # until training begins: importing torch makes a million objects that stay
    sys.exit(run_command(main))
