"""Train a ResNet-50: flags -> config -> Run -> fit. Start reading here, then read loop.py."""

from __future__ import annotations

import gc
import signal
import sys

from base import flags
from base.errors import Stopped, doing
from base.errors import run as run_command
from base.process import is_main, say

EPILOG = """examples:
  python train.py --epochs 90 --drop-path-rate 0.2        train on ImageNet in ./data/imagenet
  python train.py --data-dir photos --pretrained          fine-tune torchvision's weights on class folders
  python train.py --resume auto                           resume the run in --save-dir
  python train.py --config recipes/digits.yaml            digits, in minutes on a CPU; needs no data
  python train.py --dry-run                               show the plan and the expected hours"""


def build_parser() -> flags.Parser:
    description = "Train a ResNet-50 (or another architecture), from scratch or pretrained."
    return flags.build_parser("train.py", description, EPILOG, flags.TRAIN_GROUPS)


def main(argv: list[str] | None = None) -> int:
    """Train, resume, or preview a run; return the exit code.

    Usage, paths and the data layout are checked first: before the run's directory is written, and without
    importing torch, unless a checkpoint has to be read.
    """
    config, typed = flags.parse(build_parser(), argv)
    try:
        return start(config, typed)
    except BrokenPipeError:  # `| head`; once training has begun, the loop saves and stops
        if config.summary or config.dry_run:
            raise
        raise Stopped(signal.SIGPIPE, "the output was closed before training began") from None


def start(config, typed: flags.Given) -> int:
    config, index, directory, saved = check(config, typed)
    if config.summary or config.dry_run:
        return preview(config, index, resumed=bool(saved))

    from base.device import explain_lost_ranks
    from harness import build, session
    from loop import fit

    runtime = build.open_runtime(config)
    with explain_lost_ranks(runtime):
        run, identity = session.prepare(config, index, runtime, directory, saved)
        if run is None:
            return 0
        with session.protected(run, config, directory, saved, identity) as log:
            say(session.introduction(run, config))
            fit(run, log)
            run.say(session.conclusion(run, config))
    return 0


def check(config, typed: flags.Given):
    """Check everything that can be checked without torch.

    Return the config, the `DatasetIndex`, the `SaveDir`, and the checkpoint to resume from or None.
    A resumed run takes the flags that were not typed from its checkpoint, or from its config.json.
    """
    from harness import rundir
    from harness.log import check_trackers
    from sources import folders, layouts
    from sources.archives import pretrained

    directory = rundir.scan(config.save_dir)
    saved = rundir.find_checkpoint(config.resume, directory)
    restarted = config.resume == "auto" and not saved and directory.flags
    if restarted:
        config = rundir.restarted_config(config, typed, directory)
    if saved:
        config = rundir.resumed_config(config, typed, saved["config"])
    notes = flags.check_train(config, typed)
    doing("loading the data and torch")
    index = layouts.open_dataset(**flags.data_args(config))
    if saved:
        index, fitted = rundir.as_trained(index, saved), ""
    else:
        if not config.summary:
            index = pretrained.prepare(index, **flags.weights_args(config))
        config, fitted = (config, "") if restarted else flags.fit_to_data(config, typed, len(index.train))
    check_trackers(tensorboard=config.tensorboard, wandb=bool(config.wandb), trackio=bool(config.trackio))
    for note in (*notes, *index.notes, fitted):
        say(note)
    if is_main() and not (config.summary or config.dry_run):
        folders.check_outside(index, config.save_dir, "--save-dir")
        rundir.check(directory, resuming=bool(config.resume), overwrite=config.overwrite)
    return config, index, directory, saved


def preview(config, index, resumed: bool) -> int:
    """Print the model (--summary), or try out the plan (--dry-run)."""
    from base.device import explain_lost_ranks
    from harness import build, dryrun

    if config.summary:
        phases = build.make_plan(config, index, world_size=1)
        dryrun.print_summary(build.model_args(config, index), phases)
        return 0
    runtime = build.open_runtime(config)
    gc.enable()  # it takes training steps
    with explain_lost_ranks(runtime):
        phases = build.make_plan(config, index, runtime.world_size)
        dryrun.dry_run(config, index, runtime, phases, resumed)
    return 0


if __name__ == "__main__":
    gc.disable()  # until training begins: importing torch makes a million objects that are never freed
    sys.exit(run_command(main))
