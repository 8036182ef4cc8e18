"""Train a ResNet-50: flags -> config -> build -> fit. Read it from top to bottom."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time
from pathlib import Path

from base import flags, process
from base.errors import run
from base.process import is_main, say

EPILOG = """examples:
  python train.py --epochs 90 --drop-path-rate 0.2          ImageNet in ./data/imagenet, the documents' recipe
  python train.py --resume auto                             go on where --save-dir stopped
  python train.py --dataset digits --config recipes/digits.yaml    five minutes on two CPU cores
  python train.py --dry-run                                 the plan, two steps at every size, hours to expect"""


def build_parser() -> flags.Parser:
    return flags.build_parser(
        "train.py", "Train a ResNet-50 (or another architecture) from scratch.", EPILOG, flags.TRAIN_GROUPS
    )


def main(argv: list[str] | None = None) -> int:
    """Usage, paths and the data layout are judged first, before torch is imported or a file written."""
    config, typed = flags.parse(build_parser(), argv)
    from harness import rundir
    from harness.log import check_trackers
    from sources import layouts

    found = rundir.scan(config.save_dir)
    saved = rundir.find_checkpoint(config.resume, found)
    if saved:
        config = rundir.resumed_config(config, typed, saved["config"])
    notes = flags.check_train(config, typed)
    index = layouts.index(**flags.data_args(config))
    check_trackers(tensorboard=config.tensorboard, wandb=bool(config.wandb))
    for note in (*notes, *index.notes):
        say(note)
    if config.summary or config.dry_run:
        return look_only(config, index)
    if is_main():
        rundir.check(found, resuming=bool(config.resume), overwrite=config.overwrite)
    return train(config, index, found, saved)


def look_only(config, index) -> int:
    """--summary and --dry-run: look at the run without starting it."""
    from harness import build, dryrun

    phases = build.make_plan(config, index, world_size=1)
    if config.summary:
        dryrun.print_summary(build.model_args(config, index), phases)
    else:
        dryrun.dry_run(config, index, build.open_runtime(config), phases)
    return 0


def train(config, index, found, saved: dict | None) -> int:
    """Build the run, take over a checkpoint if there is one, and only then write to the save directory."""
    import loop
    from base.device import lost_ranks_named
    from dataloader import end_workers
    from harness import build, preflight, rundir

    save_dir, name = found.path, rundir.checkpoint_name(config.arch, index.name)
    identity = rundir.identify(found, config.resume, saved, name)
    runtime = build.open_runtime(config)
    with lost_ranks_named(runtime):
        phases = build.make_plan(config, index, runtime.world_size)
        built = build.build(config, index, runtime, phases, save_dir, identity.id)
        if saved:
            rundir.restore(built, saved, config)
        elif config.init_from:
            build.start_from(built, config)
        if built.finished and not loop.best_is_lost(built):
            where = Path(config.resume).parent if identity.is_new else save_dir
            say(f"this run is complete: {len(built.state.rows)} epochs in {where}")
            return 0
        former = [path for path in found.checkpoints if path in found.files or not identity.is_new]
        preflight.check_resources(built, build.workers(config), former)
        lock = rundir.acquire(found, overwrite=config.overwrite, checkpoint=name) if runtime.is_main else None
        try:
            with rundir.explain_removal(save_dir):
                if saved and not rundir.resumes_in_place(config.resume, save_dir):
                    move_in(built, saved, config.resume, identity)
                (saved or {}).clear()  # taken over: its tensors would lie in memory for the whole run
                fit(config, index, built, identity)
        finally:
            end_workers()
            if lock:
                lock.release()
    return 0


def move_in(built, saved: dict, resume: str, identity) -> None:
    """A run that goes on in another directory has its checkpoints there before it trains."""
    import loop
    from harness import rundir

    if identity.is_new:
        loop.save(built, "last")
    if built.runtime.is_main and not loop.best_is_lost(built):
        rundir.copy_best(saved, resume, built.path("best"), identity.id)


def fit(config, index, built, identity) -> None:
    """Write down what the run is, and train."""
    import loop
    from base import files
    from base.device import environment
    from harness import preflight, rundir
    from harness.log import MetricLogger

    runtime, save_dir = built.runtime, built.save_dir
    if config.plot and runtime.is_main:
        built.after_epoch = Curves(built)
    if runtime.is_main:
        facts = (
            environment(runtime)
            | {
                "command": " ".join(sys.argv),
                "commit": process.commit(),
                "num_train": len(index.train),
                "num_val": len(index.val),
                "num_classes": len(index.classes),
                "run": identity.id,
                "checkpoint": built.file_name,
            }
            | ({"parent": identity.parent} if identity.parent else {})
        )
        files.write_json(save_dir / "config.json", flags.plain(config))
        files.write_json(save_dir / "env.json", facts)
    log = MetricLogger(
        save_dir,
        built.state.rows,
        enabled=runtime.is_main,
        tensorboard=config.tensorboard,
        wandb_project=config.wandb,
        config=flags.plain(config),
    )
    say("\n".join(introduction(built, config, index)))
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    with built.stop.installed(), preflight.explain_out_of_memory(built):
        try:
            loop.fit(built, log)
        except loop.Finished as reached:
            say(str(reached))
            return
        finally:
            log.close()
    say(conclusion(built, config))


def introduction(built, config, index) -> list[str]:
    from loop import ROW_HEADER
    from models import notes

    runtime = built.runtime
    lines = [
        f"{config.arch}, {sum(p.numel() for p in built.state.model.parameters()):,} parameters, on {runtime.device} "
        f"({runtime.precision}), {len(index.train):,} + {len(index.val):,} images of {len(index.classes)} classes"
    ]
    if runtime.device.type == "cpu" and config.device == "auto":
        lines.append("no GPU found: training on the CPU")
    lines += filter(None, (flags.workers_note(config.num_workers), *notes(config.use_blurpool)))
    for p in built.phases:
        lines.append(
            f"epochs {p.first_epoch:>3}-{p.last_epoch:<3} {p.image_size:>4} px  batch {p.batch_size:>4}  "
            f"{p.steps:>9,} steps" + ("" if p.mix else "  no mixing, no drop-path")
        )
    return [*lines, ROW_HEADER]


def conclusion(built, config) -> str:
    best = built.state.best
    lines = [f"done: best top-1 {best['score']:.2f} % at epoch {best['epoch']}, in {built.path('best')}"]
    if config.plot:
        lines.append(f"curves: {built.save_dir / 'plots' / 'curves.png'}")
    on_disk = config.dataset.partition(":")[0] not in ("digits", "synthetic", "hf")
    data = f"--data-dir {config.data_dir}" if on_disk else f"--dataset {config.dataset}"
    return "\n".join([*lines, f"next: python validate.py {built.path('best')} {data}"])


class Curves:
    """Draws a run's curves after an epoch, at most once a minute and at the end.

    From the run's files, in a process of its own: a failing picture must not cost a run.
    """

    def __init__(self, built):
        self.built, self.drawn = built, -math.inf

    def __call__(self) -> None:
        if time.monotonic() - self.drawn < 60 and not self.built.finished:
            return
        self.drawn = time.monotonic()
        command = [sys.executable, "-m", "analysis.plots", str(self.built.save_dir.resolve())]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            say(f"WARNING: no plots: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


if __name__ == "__main__":
    gc.disable()  # until training begins: importing torch makes a million objects that stay
    sys.exit(run(main))
