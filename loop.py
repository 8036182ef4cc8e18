"""The training loop: phases, epochs, batches; scoring; choosing the best epoch; saving.

`harness.build` makes a `Run` from the flags, and `fit` trains it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from base.device import Runtime, memory_for
from base.errors import CheckpointError, Stopped
from base.parser import parse_augment
from base.process import say
from base.progress import Eta
from data_utils import BatchMixer
from dataloader import Loader, eval_loader, train_loader
from harness import checkpoint
from harness.interrupts import Interrupted, StopSignals
from harness.log import MetricLogger, Table
from harness.meter import Meter, listed
from models import set_drop_path_rate, train_mode
from sources.index import DatasetIndex, Split
from train_utils import EvalResult, Phase, StepOptions, TrainState, evaluate, phase_of, train_step

# Waiting for data in an epoch is reported if it takes more than both.
SLOW_DATA_PERCENT = SLOW_DATA_SECONDS = 10


class StopAfterReached(Exception):
    """The run was saved at --stop-after and can be resumed; this is not an error."""


@dataclass
class Run:
    """A training run: its state, its plan, its data, and when to validate, save and stop."""

    state: TrainState
    phases: tuple[Phase, ...]
    runtime: Runtime
    # data
    index: DatasetIndex
    train_sample: Split  # training images that train_top1 is measured on
    num_workers: int
    on_bad_image: str
    # steps
    options: StepOptions
    mixers: dict[bool, BatchMixer]  # by `Phase.mix`
    drop_path_rate: float
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]  # the model -> `StepOptions.forward`
    # validation and checkpoints
    save_dir: Path
    checkpoint_name: str  # file names are last_<checkpoint_name> and best_<checkpoint_name>
    metadata: dict  # what every checkpoint holds besides the state: config, model_args, eval, ...
    patience: int | None = None  # --early-stop-patience
    eval_every: int = 1  # epochs
    eval_size: int | None = None  # px; None: the size of the phase
    eval_crop: float | None = None  # None: `sources.images.default_crop`
    eval_flip: bool = False  # also score mirror images
    crop_root: str = ""  # where --cache-eval keeps the evaluation crops
    save_every: tuple[float, str] = (1, "ep")  # (N, "ep" or "min")
    stop_after: int | None = None  # optimizer steps
    data_hint: str = ""  # advice, printed once if training waits for data
    head_only: bool = False  # what `options.forward` was made for, see `Phase.head_only`
    bad_sample_reported: bool = False
    stop: StopSignals = field(default_factory=StopSignals)
    read_steps: Callable[[], bool] = lambda: False  # `Meter.read`: counts the running steps of an epoch

    def __post_init__(self):
        self.eta = Eta(self.phases, len(self.index.val), self.eval_size, self.eval_every)
        self.table = Table(self.epochs)
        self.last_save = time.monotonic()

    @property
    def epochs(self) -> int:
        return self.phases[-1].last_epoch

    @property
    def finished(self) -> bool:
        gave_up = self.patience is not None and self.state.best["waited"] >= self.patience
        return gave_up or len(self.state.rows) >= self.epochs

    @property
    def scoring(self) -> str:
        """How images are scored, as text; '' by default."""
        size = f"{self.eval_size} px" if self.eval_size else "the size of the phase"
        crop = f", crop {self.eval_crop:g}" if self.eval_crop else ""
        text = f"scored at {size}{crop}" + ", with mirror images" * self.eval_flip
        return text if self.eval_size or crop or self.eval_flip else ""

    @property
    def compiles(self) -> bool:
        config = self.metadata["config"]
        return config["compile"] or config["cuda_graphs"]

    @property
    def stop_after_reached(self) -> bool:
        return self.stop_after is not None and self.state.step >= self.stop_after

    @property
    def best_by(self) -> str:
        """The score that selects the best checkpoint."""
        return "val_top1" if self.state.ema.module is None else "ema_val_top1"

    @property
    def scored_models(self) -> dict[str, nn.Module]:
        """The raw model and, if there is one, the average, by the kind of their scores."""
        average = self.state.ema.module
        return {"val": self.state.model} | ({} if average is None else {"ema_val": average})

    def say(self, text: str) -> None:
        """Print `text`. A closed pipe or terminal counts as SIGHUP: the run is saved and stopped."""
        try:
            say(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            self.stop.received = self.stop.received or signal.SIGHUP

    def may_be_best(self, epoch: int) -> bool:
        """Return whether `epoch` is at the last size and past two thirds of the run.

        With --early-stop-patience all epochs at the last size may be, because any of them may be the last.
        """
        late = self.patience is not None or 3 * epoch > 2 * self.epochs
        earlier = [p.last_epoch for p in self.phases if p.image_size != self.phases[-1].image_size]
        return late and epoch > max(earlier, default=0)

    def path(self, kind: str) -> Path:
        return self.save_dir / f"{kind}_{self.checkpoint_name}"

    def is_scored(self, epoch: int) -> bool:
        return epoch % self.eval_every == 0 or epoch == self.epochs

    def scored_as(self, phase: Phase) -> tuple[int, int]:
        """Return the image size and the global batch size of scoring in `phase`.

        A batch has no more pixels than what a step trains at once (--accumulate), or has 64 images.
        """
        size, at_once = self.eval_size or phase.image_size, phase.batch_size // self.options.accumulate
        return size, max(64, at_once * phase.image_size**2 // size**2)

    def is_saved(self, epoch: int) -> bool:
        """Return whether `epoch` is saved even if it is not the best: by --save-every, or as the last."""
        every, unit = self.save_every
        return unit == "min" or epoch % every == 0 or epoch == self.epochs


def fit(run: Run, log: MetricLogger) -> None:
    """Train the remaining epochs.

    An epoch whose steps were all taken before the run was stopped, but which has no row, is only scored.
    Raises Stopped after a stop signal, StopAfterReached at --stop-after, DivergedError.
    """
    run.options.buffers.check()
    # Rank 0 decides for all: another rank might look when rank 0 has already repaired the files.
    if run.runtime.max_over_ranks(int(run.runtime.is_main and best_is_lost(run))):
        save(run)
        name_best(run)
    save_or_stop(run)  # a signal may have arrived already, and --stop-after may be behind a resumed run
    begun, loader = len(run.state.rows), None
    for phase in run.phases:
        epochs = range(max(phase.first_epoch, len(run.state.rows) + 1), phase.last_epoch + 1)
        if run.finished or not epochs:
            continue
        del loader  # ends its workers; its pinned memory is given back next
        loader, options = start_phase(run, phase)
        if run.compiles and (run.runtime.world_size > 1 or len(run.state.rows) > begun):
            # On one rank, preflight has compiled for the first size.
            run.say(f"compiling for {phase.image_size} px")
        for epoch in epochs:
            trained = train_epoch(run, phase, epoch, loader, options, log)
            if trained and run.is_scored(epoch) and run.is_saved(epoch):
                save(run)  # in case scoring fails; `finish_epoch` saves again, with the row
            finish_epoch(run, score_epoch(run, phase, epoch), log)
            if run.finished:
                break


def start_phase(run: Run, phase: Phase) -> tuple[Loader, StepOptions]:
    """Return the batches and the step options of `phase`. Progressive resizing happens here.

    A phase sets the image size, the batch size, the augmentation, whether MixUp, CutMix and drop-path are on,
    and whether the classifier alone is trained.
    """
    if run.runtime.device.type == "cuda":  # torch keeps the pinned memory of other batch sizes
        torch._C._host_emptyCache()  # since torch 2.12 also torch.accelerator.empty_host_cache
    train_mode(run.state.model, phase.head_only)
    if phase.head_only != run.head_only:  # DDP waits for the gradients that existed when it was made
        run.head_only = phase.head_only
        run.options = dataclasses.replace(run.options, forward=run.wrap(run.state.model))
    set_drop_path_rate(run.state.model, run.drop_path_rate if phase.mix else 0.0)
    loader = train_loader(
        run.index,
        image_size=phase.image_size,
        batch_size=phase.batch_size,
        augment=parse_augment(phase.augment),
        crop=run.eval_crop,
        seed=run.options.seed,
        on_bad_image=run.on_bad_image,
        num_workers=run.num_workers,
        runtime=run.runtime,
    )
    return loader, dataclasses.replace(run.options, mixer=run.mixers[phase.mix])


def train_epoch(
    run: Run, phase: Phase, epoch: int, loader: Loader, options: StepOptions, log: MetricLogger
) -> bool:
    """Take the remaining steps of `epoch`: fewer than all if the run was resumed in it.

    Return whether there were any.
    """
    done = run.state.step - phase.step_before(epoch)
    if done == 0:
        run.state.start_epoch()
    if done >= phase.steps_per_epoch:
        return False
    loader.order.seek(epoch, done)
    train_mode(run.state.model, phase.head_only)
    with Meter(run, phase, epoch, loader, log) as meter:
        for images, labels in interruptible(run, loader):
            step = train_step(run.state, options, images, labels, vote=must_save_or_stop(run))
            voted = meter.add(step, len(images) * run.runtime.world_size)
            # Ranks save and stop together: at a step whose votes all of them have read.
            if voted or run.runtime.world_size == 1 or run.stop_after_reached:
                save_or_stop(run)
        meter.read()
    seconds, waited = run.state.epoch_sums["seconds"], run.state.epoch_sums["waited"]
    if run.data_hint and waited > SLOW_DATA_SECONDS and 100 * waited > SLOW_DATA_PERCENT * seconds:
        share = f"{100 * waited / seconds:.0f} % of the time"
        run.say(f"note: {share} was spent waiting for data. {run.data_hint}")
        run.data_hint = ""
    return True


def interruptible(run: Run, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `loader`. A stop signal ends the wait for a batch: a disk may hang."""
    if run.runtime.world_size > 1:  # every rank takes every step; they stop together, after one
        yield from loader
        return
    batches, batch = iter(loader), None
    while True:
        try:
            run.stop.waiting = True
            if not run.stop.received:
                batch = next(batches, None)
            run.stop.waiting = False
        except Interrupted:
            pass
        if run.stop.received:
            save_or_stop(run)
        if batch is None:
            return
        yield batch


def must_save_or_stop(run: Run) -> bool:
    """Return this rank's vote: whether --save-every is due or a stop signal has come."""
    return is_save_due(run) or run.stop.received != 0


def is_save_due(run: Run) -> bool:
    every, unit = run.save_every
    return unit == "min" and time.monotonic() - run.last_save >= 60 * every


def save_or_stop(run: Run) -> None:
    """Save if --save-every says so; save and stop after a stop signal or at --stop-after.

    Called between two steps or two validation batches, on all ranks at the same place.
    """
    due = run.runtime.max_over_ranks(int(is_save_due(run)))
    stopping = run.runtime.max_over_ranks(run.stop.received)
    if due or stopping or run.stop_after_reached:
        save(run)
    if stopping or run.stop_after_reached:
        command = f"python train.py --save-dir {shlex.quote(str(run.save_dir))} --resume auto"
        text = f"Stopped at step {run.state.step:,}. To continue: {command}"  # docs/slurm.sh looks for it
        raise Stopped(stopping, text) if stopping else StopAfterReached(text)


def score_epoch(run: Run, phase: Phase, epoch: int) -> dict:
    """Return the row of `epoch` for metrics.jsonl; its scores are None unless --eval-every scores it."""
    started, sums, state = time.perf_counter(), run.state.epoch_sums, run.state
    row = {
        "epoch": epoch,
        "image_size": phase.image_size,
        "batch_size": phase.batch_size,
        "lr": state.schedule.last_lr,
        "train_loss": sums["loss"] / sums["images"] if sums["images"] else None,
        "train_top1": None,
        **{f"{kind}_{name}": None for kind in ("val", "ema_val") for name in ("loss", "top1", "top5")},
    }
    left_out = 0
    if run.is_scored(epoch):
        scores, left_out = score(run, phase)
        row |= scores
        run.eta.observe_validation(run.scored_as(phase)[0], time.perf_counter() - started)
    seconds, skipped = sums["seconds"], sums["bad_steps"] * phase.batch_size  # images of skipped steps
    return row | {
        "images_per_second": (sums["images"] + skipped) / seconds if seconds else None,
        "data_wait_percent": 100 * sums["waited"] / seconds if seconds else None,
        "seconds": seconds + time.perf_counter() - started,
        "bad_steps": sums["bad_steps"],
        "bad_images": over_ranks(run, sums["bad_images"] + left_out),
        "best": False,
    }


def over_ranks(run: Run, count: int) -> int:
    """Return the sum of the ranks' counts."""
    return int(run.runtime.sum_over_ranks(torch.tensor(float(count), device=run.runtime.device)))


def score(run: Run, phase: Phase) -> tuple[dict, int]:
    """Score raw and EMA weights in one pass over val, and the raw weights on the training sample.

    Return the scores as columns of the row, and how many bad images of the sample were left out.
    """
    results, _ = evaluate_split(run, run.scored_models, run.index.val, phase)
    train, bad = evaluate_split(run, {"train": run.state.model}, run.train_sample, phase)
    if bad and not run.bad_sample_reported:
        run.bad_sample_reported = True
        left_out = f"{len(bad)} of {len(run.train_sample)} images: {listed(bad)}"
        run.say(f"note: train_top1 leaves out {left_out}")
    row = {"train_top1": train["train"].top1 if train["train"].num_samples else None}
    for kind, result in results.items():
        row |= {f"{kind}_{name}": getattr(result, name) for name in ("loss", "top1", "top5")}
    return row, len(bad)


def evaluate_split(
    run: Run, models: dict[str, nn.Module], split: Split, phase: Phase
) -> tuple[dict[str, EvalResult], list[str]]:
    """Score `models`; return the results and the names of bad images left out."""

    def stop_if_asked() -> None:
        if run.runtime.max_over_ranks(run.stop.received):
            save_or_stop(run)

    loader = eval_batches(run, split, phase)
    batches = interruptible(run, loader)
    size, batch = run.scored_as(phase)
    fix = "the last checkpoint is intact: free memory and use --resume auto"
    fix += ", or score at a smaller --eval-size with --allow-change eval_size" if run.eval_size else ""
    with memory_for(f"scoring at {size} px, batch {batch}", fix, run.runtime.device):
        results = evaluate(models, batches, run.runtime, stop_if_asked, flip=run.eval_flip)
    return results, loader.bad


def eval_batches(run: Run, split: Split, phase: Phase) -> Loader:
    """Return the batches of `split`, as `phase` is scored. A bad validation image is always an error."""
    image_size, batch_size = run.scored_as(phase)
    return eval_loader(
        split,
        run.index,
        image_size=image_size,
        batch_size=batch_size,
        crop=run.eval_crop,
        crop_root=run.crop_root,
        on_bad_image="fail" if split is run.index.val else run.on_bad_image,
        num_workers=run.num_workers,
        runtime=run.runtime,
    )


def finish_epoch(run: Run, row: dict, log: MetricLogger) -> None:
    """Decide about the learning rate and the best epoch; log the row of this one, save, and print it."""
    if row["val_loss"] is not None:
        run.state.schedule.observe(row["val_loss"], comparable=is_scored_as_before(run, row))
    row["best"] = update_best(run, row)
    run.state.rows.append(row)
    run.state.start_epoch()
    # Before saving: a resumed run can cut surplus rows but cannot restore a lost one.
    log.log(row, run.state.step)
    if row["best"] or run.finished or run.is_saved(row["epoch"]):
        save(run)
    if row["best"]:
        name_best(run)
    left = 0 if run.finished else run.eta.remaining(run.state.step, len(run.state.rows))
    run.say(run.table.row(row, left))
    log.draw(now=run.finished)


def is_scored_as_before(run: Run, row: dict) -> bool:
    """Return whether the last scored epoch was scored at the image size of `row`, so that losses compare."""
    sizes = [r["image_size"] for r in run.state.rows if r["val_loss"] is not None]
    return run.eval_size is not None or sizes[-1:] in ([], [row["image_size"]])


def update_best(run: Run, row: dict) -> bool:
    """Make the epoch of `row` the best if its score is, else count it as a wait; return whether it is.

    A tie keeps the earlier epoch.
    """
    score, best, epoch = row[run.best_by], run.state.best, row["epoch"]
    if score is None or not run.may_be_best(epoch):
        return False
    if math.isfinite(score) and score > best["score"]:
        run.state.best = {"score": score, "epoch": epoch, "waited": 0}
        return True
    run.state.best = best | {"waited": best["waited"] + 1}
    return False


def save(run: Run) -> None:
    """Write the checkpoint last_*. Raises DivergedError if the state is not finite."""
    run.read_steps()  # the counts belong to the state
    run.state.check_finite()  # on every rank: all hold the same state and end together
    bad_images = over_ranks(run, run.state.epoch_sums["bad_images"])
    run.state.epoch_sums["bad_images"] = bad_images if run.runtime.is_main else 0
    if run.runtime.is_main:
        checkpoint.save(run.path("last"), run.metadata | run.state.state_dict())
    run.last_save = time.monotonic()
    run.runtime.barrier()


def name_best(run: Run) -> None:
    """Make best_* a second name of the last_* that was just written."""
    if run.runtime.is_main:
        checkpoint.link(run.path("last"), run.path("best"))
    run.runtime.barrier()


def best_is_lost(run: Run) -> bool:
    """Return whether the run was killed after its best epoch was saved as last_*, before it became best_*."""
    state = run.state
    if not (state.rows and state.rows[-1]["best"]):
        return False
    epoch = len(state.rows)
    phase = phase_of(run.phases, min(epoch, run.epochs))
    just_saved = state.step == phase.step_before(epoch) + phase.steps_per_epoch
    return just_saved and not all(is_in(state, run.path(kind)) for kind in ("last", "best"))


def is_in(state: TrainState, path: Path) -> bool:
    """Return whether the checkpoint `path` was saved at this step with this best epoch."""
    try:
        saved = checkpoint.load(path, values_only=True)
    except CheckpointError:
        return False
    return (saved["step"], saved["best"]) == (state.step, state.best)
