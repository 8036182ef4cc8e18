"""What surrounds the training loop: build and restore the run; protect it while it trains; sum it up."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base import flags
from base.device import Runtime, environment
from base.files import write_json
from base.process import say
from harness import build, crop_cache, preflight, rundir
from harness.log import MetricLogger
from harness.rundir import RunIdentity, SaveDir
from harness.workers import end_workers
from loop import Run, StopAfterReached, best_is_lost, save
from models.layers import BLURPOOL_NOTICE
from models.summary import count_params
from sources import splits
from sources.index import DatasetIndex, FileSplit


def prepare(
    config, index: DatasetIndex, runtime: Runtime, directory: SaveDir, saved: dict | None
) -> tuple[Run | None, RunIdentity]:
    """Build the run and restore the checkpoint `saved`; write nothing. The run is None if it is complete."""
    rundir.check_ranks(runtime, saved)
    name = rundir.checkpoint_name(config.arch, index.name)
    identity = rundir.identify(directory, config.resume, saved, name)
    phases = build.make_plan(config, index, runtime.world_size)
    run = build.build(config, index, runtime, phases, directory.path, identity.id)
    if saved:
        rundir.restore(run, saved, config)
    else:
        say(build.load_weights(run, config))
    if run.finished and not best_is_lost(run):
        where = Path(config.resume).parent if identity.is_new else directory.path
        say(f"This run is complete: {len(run.state.rows)} epochs in {where}.")
        return None, identity
    former = [path for path in directory.checkpoints if path in directory.files or not identity.is_new]
    preflight.check_resources(run, former)
    crop_cache.check_disk(run)
    return run, identity


@contextmanager
def protected(
    run: Run, config, directory: SaveDir, saved: dict | None, identity: RunIdentity
) -> Iterator[MetricLogger]:
    """Train `run` inside this context: yield its log, and hold the lock of its directory.

    Stop signals are handled by the run. Running out of memory and a removed directory become
    ResourceErrors. At the end the log is closed, the loader workers are killed and the lock is released.
    """
    values, main = flags.plain(config), run.runtime.is_main
    lock = log = None
    if main:
        lock = rundir.acquire(directory, overwrite=config.overwrite, checkpoint=run.checkpoint_name)
    try:
        with rundir.explain_removal(run.save_dir):
            if saved and not rundir.resumes_in_place(config.resume, run.save_dir):
                if identity.is_new:
                    save(run)
                if main and not best_is_lost(run):
                    rundir.copy_best(saved, config.resume, run.path("best"), identity.id)
                if main:
                    rundir.copy_steps(saved, config.resume, run.save_dir / "steps.jsonl")
            (saved or {}).clear()  # already restored: free its tensors
            if main:
                write_json(run.save_dir / "config.json", values, parents=False)
                write_json(run.save_dir / "env.json", environment_of(run, identity), parents=False)
                say(splits.write_down(run.index))
            trackers = {name: getattr(config, name) for name in ("tensorboard", "wandb", "trackio")}
            options = {"enabled": main, "log_every": config.log_every, "plot": config.plot, "config": values}
            log = MetricLogger(run.save_dir, run.state.rows, run.state.step, **options, **trackers)
            crop_cache.fill(run)
            if not gc.isenabled():
                gc.freeze()
                gc.enable()
            with run.stop.installed(), preflight.explain_out_of_memory(run):
                yield log
            if run.finished:
                crop_cache.delete(run)
    except StopAfterReached as stop:
        say(str(stop))
    finally:
        if log:
            log.close()
        end_workers()
        if lock:
            lock.release()


def environment_of(run: Run, identity: RunIdentity) -> dict:
    """Return the content of env.json: what is needed to reproduce the run, besides the flags."""
    values = {
        **environment(run.runtime),
        "command": shlex.join(sys.argv),
        "commit": run.metadata["commit"],
        "dataset": run.index.name,
        "num_train": len(run.index.train),
        "num_val": len(run.index.val),
        "num_classes": len(run.index.classes),
        "run": identity.id,
        "checkpoint": run.checkpoint_name,
    }
    return values | ({"parent": identity.parent} if identity.parent else {})


def introduction(run: Run, config) -> str:
    """Return what is printed before training: model, data, device, phases and the heading of the table."""
    runtime, index, parameters = run.runtime, run.index, count_params(run.state.model)
    images = f"{len(index.train):,} + {len(index.val):,} images of {len(index.classes)} classes"
    lines = [f"{config.arch}, {parameters:,} parameters, on {runtime.device} ({runtime.precision})", images]
    if runtime.device.type == "cpu" and config.device == "auto":
        lines.append("no GPU found: training on the CPU")
    lines += [BLURPOOL_NOTICE] * config.use_blurpool
    for p in run.phases:
        notes_of = ("" if p.mix else "  no mixing, no drop-path") + "  head only" * p.head_only
        notes_of += enlarged(index, p.image_size)
        lines.append(
            f"epochs {p.first_epoch:>3}-{p.last_epoch:<3} {p.image_size:>4} px  batch {p.batch_size:>4}  "
            f"{p.steps:>9,} steps{notes_of}"
        )
    lines += filter(None, [run.scoring, crop_cache.note(run)])
    steps, average = sum(p.steps for p in run.phases), run.state.ema
    if (run.stop_after or 0) > steps:
        lines.append(f"note: --stop-after {run.stop_after:,} is not used: the run has {steps:,} steps")
    if config.ema and average.decay_at(steps) < average.decay != flags.BY_NAME["ema_decay"].default:
        reached = f"the ramp only reaches {average.decay_at(steps):.4f} in {steps:,} steps"
        lines.append(f"note: --ema-decay is not used: {reached}; --no-ema-ramp turns it off")
    return "\n".join([*lines, run.table.heading()])


def enlarged(index: DatasetIndex, image_size: int) -> str:
    """Return a note if training at `image_size` px enlarges packed copies of larger images; '' otherwise."""
    side = getattr(index.train.whole.for_size(image_size), "side", None)  # of packed data
    small = side is not None and side < image_size and not index.native_size
    return f"  from copies of {side} px" if small else ""


def conclusion(run: Run, config) -> str:
    """Return what is printed after training: the best score, and the files and commands to look at next."""
    best, path = run.state.best, shlex.quote(str(run.path("best")))
    top1 = f"{'EMA ' * run.best_by.startswith('ema')}top-1 {best['score']:.2f} %"
    lines = [f"done: best {top1} at epoch {best['epoch']}, in {run.path('best')}"]
    if config.plot:
        lines.append(f"curves: {run.save_dir / 'plots' / 'curves.png'}")
    photo = "IMAGE"  # any one; if the data are image files, one of them
    if isinstance(files := run.index.val.whole, FileSplit):
        photo = shlex.quote(os.path.join(files.root, run.index.val.name(0)))
    return "\n".join(
        [
            *lines,
            "next:",
            f"  python predict.py {path} {photo}",
            f"  python validate.py {path}",
            f"  python -m analysis.misclassified {path}",
            f"  python -m analysis.report {shlex.quote(str(run.save_dir))}",
        ]
    )
