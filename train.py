"""Train a ResNet-50: flags -> config -> build -> fit. Read it from top to bottom."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import flags
from errors import CheckpointError, run

EPILOG = """examples:
  python train.py --epochs 90 --drop-path-rate 0.2          ImageNet in ./data/imagenet, the documents' recipe
  python train.py --resume auto                             go on where --save-dir stopped
  python train.py --dataset digits --config recipes/digits.yaml    five minutes on two CPU cores
  python train.py --dry-run                                 the plan, two steps at every size, hours to expect"""


def build_parser() -> flags.Parser:
    return flags.build_parser("train.py", "Train a ResNet-50 (or another architecture) from scratch.", EPILOG,
                              flags.TRAIN_GROUPS)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Usage, paths and the data layout are judged first, before torch is imported or a file written."""
    config, typed = flags.parse(build_parser(), argv)
    import rundir
    from metrics import check_trackers
    from sources import layouts

    saved = rundir.find_resume(config.resume, config.save_dir, say)
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
        rundir.check(config.save_dir, resuming=bool(config.resume), overwrite=config.overwrite)
    return train(config, index, Path(config.save_dir), saved)


def look_only(config, index) -> int:
    """--summary and --dry-run: look at the run without starting it."""
    import build
    import dryrun

    phases = build.make_plan(config, index, world_size=1)
    if config.summary:
        dryrun.print_summary(build.model_args(config, index), phases)
    else:
        dryrun.dry_run(config, index, build.open_runtime(config), phases)
    return 0


def train(config, index, save_dir: Path, saved: dict | None) -> int:
    """Build the run, take over a checkpoint if there is one, and only then write to `save_dir`."""
    import build
    import rundir
    import trainer
    from runtime import end_workers, lost_ranks_named

    runtime = build.open_runtime(config)
    with lost_ranks_named(runtime):
        built = build.build(config, index, runtime, build.make_plan(config, index, runtime.world_size), save_dir)
        if saved:
            restore(built, saved, config)
        elif config.init_from:
            start_from(built, config)
        if built.finished and not trainer.best_is_lost(built):
            say(f"this run is complete: {len(built.state.rows)} epochs in {save_dir}")
            return 0
        lock = rundir.claim(save_dir, overwrite=config.overwrite) if runtime.is_main else None
        try:
            if saved and config.resume != "auto":
                trainer.carry_best(built, Path(config.resume).parent)
            fit(config, index, built)
        finally:
            end_workers()
            if lock:
                lock.release()
    return 0


def fit(config, index, built) -> None:
    """Look whether all that the run needs is there, write down what it is, and train."""
    import build
    import preflight
    import rundir
    import trainer
    from metrics import MetricLogger
    from runtime import environment

    runtime, save_dir = built.runtime, built.save_dir
    if config.plot and runtime.is_main:
        built.after_epoch = Curves(built)
    preflight.check_resources(built, build.workers(config))
    if runtime.is_main:
        facts = environment(runtime) | {"command": " ".join(sys.argv), "commit": rundir.commit(), "num_train": len(index.train),
                                        "num_val": len(index.val), "num_classes": len(index.classes)}  # fmt: skip
        rundir.write_json(save_dir / "config.json", flags.plain(config))
        rundir.write_json(save_dir / "env.json", facts)
    log = MetricLogger(save_dir, built.state.rows, enabled=runtime.is_main, tensorboard=config.tensorboard,
                       wandb_project=config.wandb, config=flags.plain(config))  # fmt: skip
    say("\n".join(introduction(built, config, index)))
    with built.stop.installed(), preflight.out_of_memory_named(built):
        try:
            trainer.fit(built, log)
        except trainer.Finished as reached:
            say(str(reached))
            return
        finally:
            log.close()
    say(conclusion(built, config))


def introduction(built, config, index) -> list[str]:
    from models import notes
    from trainer import ROW_HEADER

    runtime = built.runtime
    lines = [f"{config.arch}, {sum(p.numel() for p in built.state.model.parameters()):,} parameters, on {runtime.device} "
             f"({runtime.precision}), {len(index.train):,} + {len(index.val):,} images of {len(index.classes)} classes"]  # fmt: skip
    if runtime.device.type == "cpu" and config.device == "auto":
        lines.append("no GPU found: training on the CPU")
    lines += filter(None, (flags.workers_note(config.num_workers), *notes(config.use_blurpool)))
    for p in built.phases:
        lines.append(f"epochs {p.first_epoch:>3}-{p.last_epoch:<3} {p.image_size:>4} px  batch {p.batch_size:>4}  "
                     f"{p.steps:>9,} steps" + ("" if p.mix else "  no mixing, no drop-path"))  # fmt: skip
    return [*lines, ROW_HEADER]


def conclusion(built, config) -> str:
    best = built.state.best
    lines = [f"done: best top-1 {best['score']:.2f} % at epoch {best['epoch']}, in {built.path('best')}"]
    if config.plot:
        lines.append(f"curves: {built.save_dir / 'plots' / 'curves.png'}")
    on_disk = config.dataset.partition(":")[0] not in ("digits", "synthetic", "hf")
    data = f"--data-dir {config.data_dir}" if on_disk else f"--dataset {config.dataset}"
    return "\n".join([*lines, f"next: python validate.py {built.path('best')} {data}"])


def say(text: str) -> None:
    """Print on the first rank."""
    if text and is_main():
        print(text, flush=True)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def restore(built, saved: dict, config) -> None:
    """Take over a checkpoint's state; refuse one that this run cannot go on from."""
    import rundir
    from trainer import replan

    rundir.check_precision(saved["precision"], built.runtime.precision, config.allow_change)
    say(rundir.check_fingerprint(saved["fingerprint"], built.facts["fingerprint"], config.allow_change))
    same_plan = saved["total_steps"] == built.facts["total_steps"]
    rundir.check_model_args(saved["model_args"], built.facts["model_args"])
    if not same_plan:
        saved = saved | {"schedule": saved["schedule"] | {"position": 0}}
    try:
        built.state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}",
                              "start a new run from its weights with --init-from") from error  # fmt: skip
    if not same_plan:
        replan(built)
    if built.runtime.any_rank(built.state.step) != built.state.step:
        raise CheckpointError("the ranks found different checkpoints", "let all of them see the same --save-dir")


def start_from(built, config) -> None:
    """--init-from: other weights instead of random ones."""
    import build

    build.take_weights(config.init_from, built.state.model, config.reset_head)
    built.state.ema = build.build_ema(config, built.state.model, built.phases)
    say(f"starting from the weights of {config.init_from}" + (", with a new head" if config.reset_head else ""))


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
    sys.exit(run(main))
