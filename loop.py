"""The run over its epochs: train, score, log, save, stop. `fit` is progressive resizing, whole.

What is trained and on what is decided in train.py; here it arrives as values. One epoch and one step
are in train_utils.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from base.device import Runtime
from base.errors import Stopped
from base.progress import Eta, Progress, duration
from dataloader import Loader
from harness import checkpoint
from harness.interrupts import Interrupted, StopSignals
from harness.log import MetricLogger
from sources.index import Split
from train_utils import (
    EarlyStopping,
    EvalResult,
    Phase,
    Step,
    TrainState,
    evaluate,
    phase_of,
    train_one_epoch,
)

SLOW_DATA = 10  # percent of an epoch's time, and seconds: below either, waiting is not worth a word


class Finished(Exception):
    """--stop-after was reached: saved, nothing went wrong."""


@dataclass
class Run:
    """A training run: its state, its plan, and how to make what each phase needs."""

    state: TrainState
    phases: tuple[Phase, ...]
    runtime: Runtime
    save_dir: Path
    file_name: str  # of checkpoints, after last_ and best_
    val: Split
    train_sample: Split  # clean training accuracy: under MixUp the training loss says nothing about the gap
    make_loader: Callable[[Phase], Loader]
    make_eval: Callable[[Split, Phase], Loader]
    make_step: Callable[[Phase], Step]
    facts: dict  # what every checkpoint holds besides the state: config, model_args, eval, ...
    say: Callable[[str], None] = print
    name_of: Callable[[int], str] = str  # a training sample's name
    slow_data_hint: str = ""  # said once, if training waits for data
    bad_sample_said: bool = False  # that images of the training sample are bad
    early: EarlyStopping = field(default_factory=lambda: EarlyStopping(None))
    eval_every: int = 1
    save_every: tuple[float, str] = (1, "ep")
    stop_after: int | None = None
    after_epoch: Callable[[], None] = lambda: None
    stop: StopSignals = field(default_factory=StopSignals)

    def __post_init__(self):
        self.eta = Eta(self.phases, len(self.val))
        self.last_save = time.monotonic()

    @property
    def epochs(self) -> int:
        return self.phases[-1].last_epoch

    @property
    def finished(self) -> bool:
        return len(self.state.rows) >= self.epochs or self.early.should_stop(self.state.best["waited"])

    @property
    def judged_by(self) -> str:
        """The score that picks the best checkpoint."""
        return "val_top1" if self.state.ema.module is None else "ema_val_top1"

    def path(self, kind: str) -> Path:
        return self.save_dir / f"{kind}_{self.file_name}"


def fit(run: Run, log: MetricLogger) -> None:
    """Train through the phases that are left; raises `Stopped` once a stop signal was honoured.

    An epoch whose steps are all taken but which has no row yet was stopped before it was scored.
    """
    if best_is_lost(run):
        save(run, "last")
        save(run, "best")
    if run.finished:
        return
    for phase in run.phases:
        if phase.last_epoch <= len(run.state.rows):
            continue  # finished before the restart
        loader, how = run.make_loader(phase), run.make_step(phase)
        for epoch in range(max(phase.first_epoch, len(run.state.rows) + 1), phase.last_epoch + 1):
            if train_epoch(run, phase, epoch, loader, how) and is_scored(run, epoch) and is_saved(run, epoch):
                save(run, "last")  # whatever happens in scoring, the epoch is kept; saved anew with its row
            finish_epoch(run, score_epoch(run, phase, epoch), log)
            if run.finished:
                return


def train_epoch(run: Run, phase: Phase, epoch: int, loader: Loader, how: Step) -> bool:
    """The steps of `epoch` that are left: all of them, or those after a mid-epoch stop. Whether there were any."""
    start = run.state.step - phase.step_before(epoch)
    if start == 0:
        run.state.start_epoch()
    if start >= phase.steps_per_epoch:
        return False
    loader.order.seek(epoch, start)
    with Progress(
        phase.steps_per_epoch,
        f"{epoch:>3}/{run.epochs} {phase.image_size} px",
        unit="steps",
        initial=start,
        enabled=run.runtime.is_main,
    ) as bar:
        between = Between(run, phase, epoch, loader, bar)
        train_one_epoch(run.state, how, interruptible(run, loader), between)
    if between.back_offs:
        tell(
            run,
            f"note: {between.back_offs} steps of epoch {epoch} overflowed under fp16 and were passed over; "
            f"the scale is {run.state.scaler.get_scale():g} now",
        )
    return True


def is_scored(run: Run, epoch: int) -> bool:
    return epoch % run.eval_every == 0 or epoch == run.epochs


def is_saved(run: Run, epoch: int) -> bool:
    """Whether `epoch` is saved whatever its score: by --save-every, and at the end."""
    every, unit = run.save_every
    return unit == "min" or epoch % every == 0 or epoch == run.epochs


def interruptible(run: Run, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader`; a stop signal does not wait for one, which a stuck disk may never send."""
    batches, batch = iter(loader), None
    while True:
        try:
            run.stop.waiting = run.runtime.world_size == 1  # many ranks stop together, after the step
            if not run.stop.received:
                batch = next(batches, None)
            run.stop.waiting = False
        except Interrupted:
            pass
        if run.stop.received and run.runtime.world_size == 1:
            save_or_stop(run)
        if batch is None:
            return
        yield batch


class Between:
    """What happens between two steps: the books, the bar, a timed save, a stop."""

    def __init__(self, run: Run, phase: Phase, epoch: int, loader: Loader, bar: Progress):
        self.run, self.phase, self.epoch, self.loader, self.bar = run, phase, epoch, loader, bar
        self.clock, self.waited, self.bad = time.perf_counter(), 0.0, 0
        self.images, self.seconds, self.back_offs = 0, 0.0, 0

    def __call__(self, images: int, finite: bool) -> None:
        run, sums, now = self.run, self.run.state.epoch_sums, time.perf_counter()
        sums["seconds"] += now - self.clock
        sums["waited"] += self.loader.waited - self.waited
        sums["bad_images"] += len(self.loader.bad) - self.bad
        self.images, self.seconds = self.images + images, self.seconds + now - self.clock
        self.clock, self.waited, self.bad = now, self.loader.waited, len(self.loader.bad)
        run.eta.observe_training(self.phase.image_size, self.images, self.seconds)
        if not finite and run.state.bad_in_a_row:
            self.report_bad_step()
        elif not finite:
            self.back_offs += 1  # no fault of the images: said once an epoch
        left = duration(run.eta.remaining(run.state.step, len(run.state.rows)))
        self.bar.update(
            1,
            f"loss {sums['loss'] / max(1, sums['images']):.3f}  lr {run.state.schedule.last_lr:.1e}  "
            f"{self.images / self.seconds:,.0f} img/s  wait {100 * sums['waited'] / sums['seconds']:.0f}%  "
            f"{left} left",
        )
        save_or_stop(run, self.bar)

    def report_bad_step(self) -> None:
        state, phase, order = self.run.state, self.phase, self.loader.order
        step = state.step - 1 - phase.step_before(self.epoch)
        ids = order.ids(self.epoch)[step * phase.batch_size : (step + 1) * phase.batch_size]
        names = listed([self.run.name_of(int(i)) for i in ids[:9]])
        tell(
            self.run,
            f"WARNING: step {state.step} was not finite and was passed over; its {len(ids)} images: {names}",
        )


def listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def save_or_stop(run: Run, bar: Progress | None = None) -> None:
    """Between two steps or batches: a save that is due by the clock, a stop signal, --stop-after."""
    every, unit = run.save_every
    timed = unit == "min"
    due = timed and run.runtime.any_rank(int(time.monotonic() - run.last_save >= 60 * every))
    stopping = run.runtime.any_rank(run.stop.received)
    reached = run.stop_after is not None and run.state.step >= run.stop_after
    if due or stopping or reached:
        save(run, "last")
    if not (stopping or reached):
        return
    if bar:
        bar.close()
    go_on = f"stopped at step {run.state.step:,}; go on with: python train.py --save-dir {run.save_dir} --resume auto"
    raise Stopped(stopping, go_on) if stopping else Finished(go_on)


def score_epoch(run: Run, phase: Phase, epoch: int) -> dict:
    """The epoch's row: training sums, and raw and EMA weights scored together in one pass over val."""
    started, sums, state = time.perf_counter(), run.state.epoch_sums, run.state
    row = {
        "epoch": epoch,
        "image_size": phase.image_size,
        "batch_size": phase.batch_size,
        "lr": state.schedule.last_lr,
        "train_loss": sums["loss"] / sums["images"] if sums["images"] else None,
        "train_top1": None,
    }
    row |= {f"{kind}_{name}": None for kind in ("val", "ema_val") for name in ("loss", "top1", "top5")} | {
        "better": None
    }
    if is_scored(run, epoch):
        row |= scores(run, phase)
        run.eta.observe_validation(phase.image_size, time.perf_counter() - started)
        state.schedule.observe(row["val_loss"])
    seconds, left_out = sums["seconds"], row.pop("bad_images", 0)
    return row | {
        "images_per_second": sums["images"] / seconds if seconds else None,
        "data_wait_percent": 100 * sums["waited"] / seconds if seconds else None,
        "seconds": seconds + time.perf_counter() - started,
        "bad_steps": sums["bad_steps"],
        "bad_images": sums["bad_images"] + left_out,
        "best": False,
    }


def scores(run: Run, phase: Phase) -> dict:
    """Of the row: val_* and ema_val_* over the validation set, train_top1 over the training sample.

    And bad_images: those of the sample, which `make_eval` leaves out where training replaces them.
    """

    def between_batches(count: int) -> None:
        if run.runtime.any_rank(run.stop.received):
            save_or_stop(run)

    averaged = run.state.ema.module
    models = {"val": run.state.model} | ({} if averaged is None else {"ema_val": averaged})

    def scored(models: dict, split: Split) -> tuple[dict[str, EvalResult], list[str]]:
        loader = run.make_eval(split, phase)
        return evaluate(models, interruptible(run, loader), run.runtime, between_batches), loader.bad

    results, _ = scored(models, run.val)
    clean, bad = scored({"train": run.state.model}, run.train_sample)
    if bad and not run.bad_sample_said:
        run.bad_sample_said = True
        tell(
            run,
            f"note: train_top1 leaves out {len(bad)} of {len(run.train_sample)} images, which are bad: {listed(bad)}",
        )
    row = {"train_top1": clean["train"].top1 if clean["train"].num_samples else None, "bad_images": len(bad)}
    for kind, result in results.items():
        row |= {
            f"{kind}_{f.name}": getattr(result, f.name)
            for f in dataclasses.fields(EvalResult)
            if f.name != "num_samples"
        }
    if averaged is not None:
        row["better"] = "ema" if row["ema_val_top1"] > row["val_top1"] else "raw"
    return row


def finish_epoch(run: Run, row: dict, log: MetricLogger) -> None:
    """Decide whether this is the best epoch, log its row, and save."""
    row["best"] = judge(run, row)
    run.state.rows.append(row)
    run.state.start_epoch()
    log.log(
        row
    )  # before it is saved: a resumed run cuts what it has too much, but cannot add a row that is lost
    if row["best"] or run.finished or is_saved(run, row["epoch"]):
        save(run, "last")
    if row["best"]:
        save(run, "best")
    tell(run, format_row(row))
    waited = row["data_wait_percent"] or 0
    if run.slow_data_hint and waited > SLOW_DATA and waited / 100 * row["seconds"] > SLOW_DATA:
        tell(run, f"note: {waited:.0f} % of the time went into waiting for data. {run.slow_data_hint}")
        run.slow_data_hint = ""
    run.after_epoch()


def judge(run: Run, row: dict) -> bool:
    """Whether this epoch is the best so far; ties keep the earlier.

    At the last size only, and past two thirds of the run: what an early end would miss. With
    --early-stop-patience the end may be any, so from the first epoch at that size on.
    """
    score, best = row[run.judged_by], run.state.best
    early = run.early.patience is not None
    if (
        score is None
        or row["epoch"] < run.phases[-1].first_epoch
        or not (early or 3 * row["epoch"] > 2 * run.epochs)
    ):
        return False
    if math.isfinite(score) and score > best["score"]:
        run.state.best = {"score": score, "epoch": row["epoch"], "waited": 0}
        return True
    run.state.best = best | {"waited": best["waited"] + 1}
    return False


def save(run: Run, kind: str) -> None:
    """Write last_*, or give the last_* just written the name best_* as well. Raises DivergedError for a ruined state."""
    if kind == "last":
        run.state.check_finite()  # on every rank: they hold the same state, and end together
    if run.runtime.is_main:
        if kind == "last":
            checkpoint.save(run.path("last"), run.facts | run.state.state_dict())
        else:
            checkpoint.link(run.path("last"), run.path(kind))
    run.last_save = time.monotonic()
    run.runtime.barrier()


def best_is_lost(run: Run) -> bool:
    """Whether a run was killed between saving its best epoch as last_* and giving that file its second name."""
    state, best, last = run.state, run.path("best"), run.path("last")
    if not (state.rows and state.rows[-1]["best"]):
        return False
    epoch = len(state.rows)
    phase = phase_of(run.phases, min(epoch, run.epochs))
    just_saved = state.step == phase.step_before(epoch) + phase.steps_per_epoch
    return just_saved and not (best.exists() and last.exists() and best.samefile(last))


def tell(run: Run, text: str) -> None:
    """Say it. An output that is gone (a closed pipe, a lost terminal) is a stop signal, not an error."""
    try:
        run.say(text)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run.stop.received = run.stop.received or signal.SIGHUP


ROW_HEADER = " epoch   px batch       lr  train loss  top-1 |  val loss  top-1  top-5 |   ema  top-1  top-5 |   img/s  wait    time"


def format_row(row: dict) -> str:
    """One aligned line per epoch."""

    def show(name: str, spec: str, width: int) -> str:
        value = row[name]
        return f"{'-':>{width}}" if value is None else format(value, f">{width}{spec}")

    cells = [
        show("epoch", "d", 6),
        show("image_size", "d", 4),
        show("batch_size", "d", 5),
        show("lr", ".2e", 8),
        show("train_loss", ".4f", 11),
        show("train_top1", ".2f", 6),
        "|",
        show("val_loss", ".4f", 9),
        show("val_top1", ".2f", 6),
        show("val_top5", ".2f", 6),
        "|",
        show("ema_val_loss", ".3f", 5),
        show("ema_val_top1", ".2f", 6),
        show("ema_val_top5", ".2f", 6),
        "|",
        show("images_per_second", ",.0f", 7),
        show("data_wait_percent", ".0f", 4) + "%",
        f"{duration(row['seconds']):>7}",
    ]
    return (
        " ".join(cells) + (f"  {row['better']}" if row["better"] else "") + ("  best" if row["best"] else "")
    )
