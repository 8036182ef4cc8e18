"""Train a ResNet-50: flags -> config -> build -> fit. Start reading here; loop.py is next."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    from harness import build
    from loop import fit

    runtime = build.open_runtime(config)
    with lost_ranks_named(runtime):
        run, identity = prepare(config, index, runtime, directory, saved)
        if run is None:
            return 0
        with safely(run, config, directory, saved, identity) as log:
            say(introduction(run, config))
            fit(run, log)
            say(conclusion(run, config))
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


def prepare(config, index, runtime, directory, saved: dict | None):
    """Build the run and restore its checkpoint; write nothing. The run is None if it is complete."""
    from harness import build, preflight, rundir
    from loop import best_is_lost

    name = rundir.checkpoint_name(config.arch, index.name)
    identity = rundir.identify(directory, config.resume, saved, name)
    phases = build.make_plan(config, index, runtime.world_size)
    run = build.build(config, index, runtime, phases, directory.path, identity.id)
    if saved:
        rundir.restore(run, saved, config)
    elif config.init_from:
        build.load_init_from(run, config)
        say(f"starting from the weights of {config.init_from}" + ", with a new head" * config.reset_head)
    if run.finished and not best_is_lost(run):
        where = Path(config.resume).parent if identity.is_new else directory.path
        say(f"This run is complete: {len(run.state.rows)} epochs in {where}.")
        return None, identity
    former = [path for path in directory.checkpoints if path in directory.files or not identity.is_new]
    preflight.check_resources(run, former)
    return run, identity


@contextmanager
def safely(run, config, directory, saved: dict | None, identity) -> Iterator:
    """Hold the save directory, log, honour stop signals and explain a lack of memory while a run trains."""
    from base.files import write_json
    from dataloader import end_workers
    from harness import preflight, rundir
    from harness.log import MetricLogger
    from loop import Finished, best_is_lost, save

    values, main = flags.plain(config), run.runtime.is_main
    lock = rundir.acquire(directory, overwrite=config.overwrite, checkpoint=run.file_name) if main else None
    log = None
    try:
        with rundir.explain_removal(run.save_dir):
            if saved and not rundir.resumes_in_place(config.resume, run.save_dir):
                if identity.is_new:
                    save(run, "last")
                if main and not best_is_lost(run):
                    rundir.copy_best(saved, config.resume, run.path("best"), identity.id)
            (saved or {}).clear()  # restored: its tensors would stay in memory for the whole run
            if main:
                write_json(run.save_dir / "config.json", values, parents=False)
                write_json(run.save_dir / "env.json", environment(run, identity), parents=False)
            log = MetricLogger(
                run.save_dir,
                run.state.rows,
                enabled=main,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb,
                config=values,
                plot=config.plot,
            )
            if not gc.isenabled():
                gc.freeze()
                gc.enable()
            with run.stop.installed(), preflight.explain_out_of_memory(run):
                yield log
    except Finished as reached:
        say(str(reached))
    finally:
        if log:
            log.close()
        end_workers()
        if lock:
            lock.release()


def environment(run, identity) -> dict:
    """Return what a reader needs to reproduce the run, for env.json."""
    from base.device import environment

    values = {
        **environment(run.runtime),
        "command": " ".join(sys.argv),
        "commit": run.metadata["commit"],
        "num_train": len(run.index.train),
        "num_val": len(run.index.val),
        "num_classes": len(run.index.classes),
        "run": identity.id,
        "checkpoint": run.file_name,
    }
    return values | ({"parent": identity.parent} if identity.parent else {})


def introduction(run, config) -> str:
    from harness.log import ROW_HEADER
    from models import notes

    state, runtime, index = run.state, run.runtime, run.index
    parameters = sum(p.numel() for p in state.model.parameters())
    images = f"{len(index.train):,} + {len(index.val):,} images of {len(index.classes)} classes"
    lines = [f"{config.arch}, {parameters:,} parameters, on {runtime.device} ({runtime.precision}), {images}"]
    if runtime.device.type == "cpu" and config.device == "auto":
        lines.append("no GPU found: training on the CPU")
    lines += filter(None, (flags.workers_note(config.num_workers), *notes(config.use_blurpool)))
    for p in run.phases:
        lines.append(
            f"epochs {p.first_epoch:>3}-{p.last_epoch:<3} {p.image_size:>4} px  batch {p.batch_size:>4}  "
            f"{p.steps:>9,} steps" + ("" if p.mix else "  no mixing, no drop-path")
        )
    return "\n".join([*lines, ROW_HEADER])


def conclusion(run, config) -> str:
    best, path = run.state.best, run.path("best")
    lines = [f"done: best top-1 {best['score']:.2f} % at epoch {best['epoch']}, in {path}"]
    if config.plot:
        lines.append(f"curves: {run.save_dir / 'plots' / 'curves.png'}")
    on_disk = config.dataset.partition(":")[0] not in ("digits", "synthetic", "hf")
    data = f"--data-dir {config.data_dir}" if on_disk else f"--dataset {config.dataset}"
    return "\n".join([*lines, f"next: python validate.py {path} {data}"])


if __name__ == "__main__":
    gc.disable()  # until training begins: importing torch makes a million objects that stay
    sys.exit(run_command(main))
