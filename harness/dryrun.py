"""--summary and --dry-run: what a run will do, tried out at each size, and how long it will take.

Nothing is written except a checkpoint in a temporary directory.
"""

from __future__ import annotations

import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from base.device import MIB, Runtime
from base.process import say
from base.progress import duration
from harness import build, checkpoint
from harness.preflight import explain_out_of_memory
from loop import Run, eval_batches, start_phase
from models import build_model
from models.summary import count_macs, count_params, format_table
from sources.index import DatasetIndex
from train_utils import Phase, StepResult, evaluate, train_step

SECONDS = 2.0  # to time steps at each size; at least one step
HOST_BOUND = 0.1  # the share of a step that a GPU works on alone, below which the host is the limit


def print_summary(model_args: dict, phases: Sequence[Phase]) -> None:
    """Print the layers with output shapes, parameters and multiply-adds, as a table for each size."""
    model = build_model(**model_args)
    for size in dict.fromkeys(phase.image_size for phase in phases):
        say(f"{format_table(model, size)}\n")


def dry_run(
    config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...], resumed: bool = False
) -> None:
    """Print the plan; train and validate briefly at each size; try a checkpoint; project the hours.

    --save-dir is neither created nor changed. A `resumed` run needs no weights to start from.
    """
    with tempfile.TemporaryDirectory() as directory:
        run = build.build(config, index, runtime, phases, Path(directory))
        if not resumed:
            say(build.load_weights(run, config))
        say(describe(run, config))
        say(MEASURED)
        costs = [try_phase(run, phase, SECONDS) for phase in run.phases]
        projections = [project(run, phase, *cost) for phase, cost in zip(run.phases, costs, strict=True)]
        say(f"\n{try_checkpoint(run)}\n")
    say(projection_table(run.phases, projections))
    say(graphs_hint(config, run, [training for training, _ in costs]))
    say(f"Nothing was written to {config.save_dir}; leave out --dry-run to train.")


def describe(run: Run, config) -> str:
    """Return the model, the data and the plan as text, with a line for each phase."""
    model, runtime, index = run.state.model, run.runtime, run.index
    steps = sum(p.steps for p in run.phases)
    images = f"{len(index.train):,} training and {len(index.val):,} validation images"
    lines = [
        f"{config.arch}: {count_params(model):,} parameters, on {runtime.device} ({runtime.precision})",
        f"{index.name}: {images} of {len(index.classes)} classes",
        f"{run.epochs} epochs, {steps:,} steps of {config.optimizer}, {config.schedule} schedule",
        *filter(None, [run.scoring]),
        "",
        "  epochs    px  batch  steps/epoch       steps         learning rate  GMAC/image",
    ]
    for p in run.phases:
        low, high = lr_range(run.state.schedule, p)
        lines.append(
            f"{p.first_epoch:>4}-{p.last_epoch:<4} {p.image_size:>4}  {p.batch_size:>5}  "
            f"{p.steps_per_epoch:>11,}  {p.steps:>10,}  {low:>8.2e} .. {high:.2e}  "
            f"{count_macs(model, p.image_size) / 1e9:>10.3g}" + "  head only" * p.head_only
        )
    return "\n".join([*lines, ""])


def lr_range(schedule, phase: Phase, points: int = 2000) -> tuple[float, float]:
    """Return the lowest and highest learning rate of the phase, from about `points` of its steps."""
    last = phase.first_step + phase.steps - 1
    steps = {*range(phase.first_step, last, max(1, phase.steps // points)), last}
    rates = [schedule.lr_at(step) for step in steps]
    return min(rates), max(rates)


# --- measuring ------------------------------------------------------------------------------------

MEASURED = """\
Measured here, in images per second (batches timed):
  px    training     loading     scoring     loading   loss  memory"""


@dataclass
class Rate:
    """What was timed: batches, their images over all ranks, and the seconds of work and of waiting."""

    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for data, not part of `seconds`
    behind: float = 0.0  # part of `seconds`, in which a GPU still worked after its last kernel was launched

    def __str__(self) -> str:
        if not self.batches:
            return "-"
        per_second = self.images / max(self.seconds, 1e-9)
        return f"{per_second:,.{0 if per_second >= 100 else 1}f} ({self.batches})"


@dataclass
class Cost:
    """The rate at which images are worked on, and the rate at which they are loaded without that work."""

    work: Rate
    loading: Rate

    def seconds(self, images: float, share: float = 1.0) -> tuple[float, float]:
        """Return the seconds of work on `images` images, each `share` of the measured work, and of waiting.

        Loading goes on during the work, so only what takes longer than the work is waited for. A short
        measurement waits for less, because the workers had batches ready.
        """
        work = share * self.work.seconds / max(1, self.work.images)
        waited = self.work.waited / max(1, self.work.images)
        loading = self.loading.seconds / max(1, self.loading.images)
        return images * work, images * max(waited, loading - work)


def try_phase(run: Run, phase: Phase, seconds: float) -> tuple[Cost, Cost]:
    """Train and score with the real loaders, each for about `seconds` and two batches or more.

    Print what was measured; return the cost of a training image and of a validation image.
    """
    state, runtime = run.state, run.runtime
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    loader, options = start_phase(run, phase)
    loader.order.seek(phase.first_epoch)
    state.step = phase.first_step
    state.schedule.seek(phase.first_step)
    training, scoring, steps = Rate(), Rate(), []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))  # the loader advances its own epoch
    with explain_out_of_memory(run):
        for images, labels in timed(itertools.islice(epochs, phase.steps), training, runtime, seconds):
            steps.append(train_step(state, options, images, labels))
        training = Cost(training, time_loading(epochs, loader.ahead, runtime, seconds / 2))
        loader = eval_batches(run, run.index.val, phase)
        batches = iter(loader)
        timed_batches = timed(batches, scoring, runtime, seconds / 2)
        evaluate(run.scored_models, timed_batches, runtime, flip=run.eval_flip)
        scoring = Cost(scoring, time_loading(batches, loader.ahead, runtime, seconds / 2))
    loss = mean_loss(run, phase, [step.result() for step in steps])
    rates = "".join(f"{rate!s:>12}" for cost in (training, scoring) for rate in (cost.work, cost.loading))
    say(f"{phase.image_size:>4}{rates} {loss:>6.3f}  {memory_used(runtime)}")
    return training, scoring


def timed(batches: Iterator, rate: Rate, runtime: Runtime, seconds: float) -> Iterator:
    """Yield batches and time what is done with each, until two are done and `seconds` have passed.

    The first two are warm-ups (compilation, choice of kernels, start of workers; the second one records CUDA
    graphs); they count only if there are no others. A GPU is waited for after each, to tell work from
    waiting for data.
    """
    for k in itertools.count():
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        started = time.perf_counter()
        yield batch
        launched = time.perf_counter()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        if k in (1, 2):
            vars(rate).update(vars(Rate()))
        rate.behind += time.perf_counter() - launched
        rate.batches += 1
        rate.images += len(batch[1]) * runtime.world_size
        rate.seconds += time.perf_counter() - started
        rate.waited += started - asked
        late = k > 0 and rate.seconds + rate.waited >= seconds
        if runtime.max_over_ranks(int(late)):  # together: steps are collective
            return


def time_loading(batches: Iterator, queued: int, runtime: Runtime, seconds: float) -> Rate:
    """Fetch batches and do nothing with them, until `seconds` have passed; return their rate.

    The first `queued` are not timed, because the workers may have had them ready. If there are no more,
    the rate is empty.
    """
    for _ in itertools.islice(batches, queued):
        pass
    rate = Rate()
    for _ in timed(batches, rate, runtime, seconds):
        pass
    return Rate(rate.batches, rate.images, rate.waited)


def mean_loss(run: Run, phase: Phase, results: Sequence[StepResult]) -> float:
    """Return the mean loss of the finite steps; say how many were not. Raises DivergedError."""
    for result in results:
        run.state.count(result)
    losses = [result.loss for result in results if result.finite]
    if bad := len(results) - len(losses):
        searching = run.state.scaler.is_enabled() and not run.state.bad_in_a_row
        level, reason = ("note", ", as fp16 searches for its scale") if searching else ("WARNING", "")
        say(f"{level}: {bad} steps at {phase.image_size} px were not finite{reason}")
    return sum(losses) / max(1, len(losses))


def graphs_hint(config, run: Run, training: Sequence[Cost]) -> str:
    """Return advice to use --cuda-graphs if at some size the GPU waits for the host; '' if it cannot help.

    Such a GPU is done with a step as soon as its last kernel has been launched.
    """
    runtime = run.runtime
    if runtime.device.type != "cuda" or runtime.world_size * config.accumulate > 1 or config.cuda_graphs:
        return ""
    pairs = zip(run.phases, training, strict=True)
    bound = {p.image_size: None for p, cost in pairs if cost.work.behind < HOST_BOUND * cost.work.seconds}
    if not bound:
        return ""
    where = f"at {', '.join(map(str, bound))} px"
    return f"note: {where} the GPU waits for the CPU to launch its kernels; --cuda-graphs avoids that"


# --- the projection -------------------------------------------------------------------------------


def project(run: Run, phase: Phase, training: Cost, scoring: Cost) -> list[float]:
    """Return the seconds of the phase: of training, waiting in training, scoring, waiting in scoring."""
    scorings = sum(map(run.is_scored, range(phase.first_epoch, phase.last_epoch + 1)))
    val = scoring.seconds(scorings * len(run.index.val))
    # Only the raw weights are scored on the training sample.
    sample = scoring.seconds(scorings * len(run.train_sample), share=1 / len(run.scored_models))
    # --cache-eval decodes each image once in a run; the dry run has no cache.
    waits = 1 / max(1, scorings) if run.crop_root else 1
    scored = (val[0] + sample[0], (val[1] + sample[1]) * waits)
    return [*training.seconds(phase.steps * phase.batch_size), *scored]


def projection_table(phases: Sequence[Phase], projections: Sequence[Sequence[float]]) -> str:
    """Return the projected hours, or minutes of a short run, as text: a line for each phase and the sum."""
    sums = [sum(column) for column in zip(*projections, strict=True)]
    unit, seconds = ("hours", 3600) if sum(sums) >= 3600 else ("minutes", 60)
    lines = [f"{f'projected {unit}':<22}  training   waiting   scoring   waiting     total"]
    names = [f"{p.epochs} epochs at {p.image_size} px" + ", head" * p.head_only for p in phases]
    names.append("whole run")
    for name, parts in zip(names, [*projections, sums], strict=True):
        lines.append(f"{name:<22}" + "".join(f"{part / seconds:>10.2f}" for part in (*parts, sum(parts))))
    return "\n".join([*lines, NOTES])


NOTES = """\
waiting: for images, where loading them takes longer than the work on them.
A projection from the rates above, without warm-up, start-up and checkpoints."""


def memory_used(runtime: Runtime) -> str:
    """Return, as text, the peak memory of the phase on a GPU, or of this process so far on a CPU."""
    if runtime.device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return f"{peak / MIB:,.0f} of {total / MIB:,.0f} MiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB:,.0f} MiB"


def try_checkpoint(run: Run) -> str:
    """Write a checkpoint and read it back."""
    path, started = run.path("last"), time.perf_counter()
    checkpoint.save(path, run.metadata | run.state.state_dict())
    checkpoint.load(path)
    size, seconds = path.stat().st_size / MIB, duration(time.perf_counter() - started)
    return f"checkpoint: {size:,.0f} MiB, written and read back in {seconds}"
