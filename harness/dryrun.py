"""--dry-run and --summary: what a run will do, tried out at every size, and how long it may take.

Nothing is written but a checkpoint in a temporary directory.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.device import MIB, Runtime
from base.errors import ResourceError
from base.process import say
from base.progress import duration
from harness import build, checkpoint
from harness.preflight import checkpoint_bytes, out_of_memory_named, tensor_bytes
from loop import Run, eval_batches, start_phase
from models import build_model
from models.summary import count_macs, count_params, format_table
from sources.index import DatasetIndex
from train_utils import Phase, StepOptions, check_diverged, evaluate, train_step

SECONDS = 2.0  # of timed steps at each size, where one takes less


def print_summary(model_args: dict, phases: Sequence[Phase]) -> None:
    """The layers with output shapes, parameters and multiply-adds, a table for each size of the plan."""
    model = build_model(**model_args)
    for size in dict.fromkeys(phase.image_size for phase in phases):
        print(format_table(model, size), end="\n\n", flush=True)


@dataclass
class Rate:
    """Images a second over the batches that passed `timed`; the first one is a warm-up."""

    images: int = 0
    seconds: float = 0.0
    batches: int = 0  # of them timed

    @property
    def per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)


def timed(batches: Iterable, rate: Rate, device: torch.device, seconds: float) -> Iterator:
    """Pass batches on and time what is done with them, until a second one is done and `seconds` are over.

    Compilation, kernel selection and worker start-up fall on the first batch, which is not counted
    unless it is the only one.
    """
    clock = time.perf_counter()
    for k, batch in enumerate(batches):
        yield batch
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if k < 2:
            rate.images, rate.seconds, rate.batches = 0, 0.0, 0
        rate.images, rate.seconds, rate.batches = (
            rate.images + len(batch[1]),
            rate.seconds + now - clock,
            rate.batches + 1,
        )
        clock = now
        if k and rate.seconds >= seconds:
            return


def dry_run(config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...]) -> None:
    """Print the plan; take two or more real steps (for SECONDS) and validate at every size; project the hours.

    Checkpoints are tried in a temporary directory; --save-dir is neither made nor touched.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = build.build(config, index, runtime, phases, Path(folder))
        if config.init_from:
            build.load_init_from(run, config)
        print("\n".join(describe(run, config, index)), flush=True)
        hours = [try_phase(run, phase, SECONDS) for phase in run.phases]
        print(try_checkpoint(run), flush=True)
    training, validation = (sum(parts) for parts in zip(*hours, strict=True))
    print(
        f"projected from these rates: {training + validation:.2f} h for the whole run, {training:.2f} h of it training and "
        f"{validation:.2f} h validation\n(a projection, warm-up left out; start-up and checkpoints are not in it)\n"
        f"nothing was written to {config.save_dir}: leave --dry-run out to train",
        flush=True,
    )


def describe(run: Run, config, index: DatasetIndex) -> list[str]:
    """The plan, a line for each phase."""
    model, runtime = run.state.model, run.runtime
    lines = [
        f"{config.arch}: {count_params(model):,} parameters, on {runtime.device} ({runtime.precision})",
        f"{index.name}: {len(index.train):,} training and {len(index.val):,} validation images of {len(index.classes)} classes",
        f"{run.epochs} epochs, {sum(p.steps for p in run.phases):,} steps of {config.optimizer}, {config.schedule} schedule",
        "",
        "  epochs    px  batch  steps/epoch       steps          learning rate  multiply-adds/image",
    ]
    for p in run.phases:
        low, high = lr_range(run.state.schedule, p)
        lines.append(
            f"{p.first_epoch:>4}-{p.last_epoch:<4} {p.image_size:>4}  {p.batch_size:>5}  {p.steps_per_epoch:>11,}  "
            f"{p.steps:>10,}  {low:.2e} .. {high:.2e}  {count_macs(model, p.image_size):>19,}"
        )
    return [*lines, ""]


def lr_range(schedule, phase: Phase, points: int = 2000) -> tuple[float, float]:
    """The lowest and highest learning rate of the phase, from a look at up to `points` of its steps."""
    last = phase.first_step + phase.steps - 1
    steps = {*range(phase.first_step, last, max(1, phase.steps // points)), last}
    rates = [schedule.lr_at(step) for step in steps]
    return min(rates), max(rates)


def try_phase(run: Run, phase: Phase, seconds: float) -> tuple[float, float]:
    """Real steps and a validation with the real loaders; the hours of training and validation to expect."""
    device = run.runtime.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loader, how = start_phase(run, phase)
    loader.order.seek(phase.first_epoch)
    run.state.step = phase.first_step
    run.state.schedule.seek(phase.first_step)
    run.state.start_epoch()
    training, validation = Rate(), Rate()
    endless = itertools.chain.from_iterable(
        itertools.repeat(loader)
    )  # it goes on with the next epoch by itself
    with out_of_memory_named(run):
        run.state.model.train()
        losses, bad = [], 0
        for images, labels in timed(itertools.islice(endless, phase.steps), training, device, seconds):
            loss, finite = train_step(run.state, how, images, labels)
            losses, bad = losses + [loss] * finite, bad + (not finite)
            check_diverged(run.state)
        averaged = run.state.ema.module
        models = {"val": run.state.model} | ({} if averaged is None else {"ema": averaged})
        evaluate(
            models,
            timed(eval_batches(run, run.index.val, phase), validation, device, seconds / 2),
            run.runtime,
        )
    print(
        f"{phase.image_size:>4} px: {training.per_second:>8,.1f} img/s training ({training.batches} steps timed, "
        f"loss {sum(losses) / max(1, len(losses)):.3f}), {validation.per_second:>8,.1f} img/s validation, "
        f"memory {memory_of(run, phase, how)}",
        flush=True,
    )
    if bad:
        searching = run.state.scaler.is_enabled() and not run.state.bad_in_a_row
        say(
            f"{'note' if searching else 'WARNING'}: {bad} steps at {phase.image_size} px were not finite"
            + (", as fp16 looks for its scale" if searching else "")
        )
    validations = sum(
        epoch % run.eval_every == 0 or epoch == run.epochs
        for epoch in range(phase.first_epoch, phase.last_epoch + 1)
    )
    images = len(run.index.val) + len(run.train_sample) / len(
        models
    )  # the training sample is scored with one model
    return (
        phase.steps * phase.batch_size / training.per_second / 3600,
        validations * images / run.runtime.world_size / validation.per_second / 3600,
    )


def memory_of(run: Run, phase: Phase, how: StepOptions) -> str:
    if run.runtime.device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return f"{peak / MIB:,.0f} MiB of {total / MIB:,.0f}"
    return f"about {estimated_memory(run, phase, how) / MIB:,.0f} MiB"


def estimated_memory(run: Run, phase: Phase, how: StepOptions) -> int:
    """Bytes of weights, gradients, optimizer, average, batch, and what the forward keeps for the backward."""
    model, images = run.state.model, math.ceil(phase.batch_size / run.runtime.world_size)
    fixed = checkpoint_bytes(run) + tensor_bytes(model.parameters())
    two, four = (saved_bytes(run, how, n, phase.image_size) for n in (2, 4))
    # From two counts: what autocast keeps of the weights does not grow with the batch.
    activations = two + (four - two) / 2 * (math.ceil(images / how.accumulate) - 2)
    return int(fixed + activations + 2 * images * 3 * phase.image_size**2 * 4)


def saved_bytes(run: Run, how: StepOptions, images: int, image_size: int) -> int:
    """Bytes that autograd keeps from a forward of `images` images, the parameters themselves not counted."""
    weights = {p.data_ptr() for p in run.state.model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # an address counts once as long as nothing else can move in
        return tensor

    batch = torch.zeros(images, 3, image_size, image_size, device=run.runtime.device)
    how.buffers.take()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), run.runtime.autocast():
        run.state.model(batch.contiguous(memory_format=torch.channels_last))
    how.buffers.restore()
    return sum(storages.values())


def try_checkpoint(run: Run) -> str:
    """Write the state, read it back, compare every tensor. Raises ResourceError where they differ."""
    path, started = run.path("last"), time.perf_counter()
    payload = run.metadata | run.state.state_dict()
    checkpoint.save(path, payload)
    back = checkpoint.load(path)
    if not _same(payload, {name: back[name] for name in payload}):
        raise ResourceError(
            "a checkpoint did not come back as it was written", "check memory and disk of this machine"
        )
    return (
        f"checkpoint: {path.stat().st_size / MIB:,.0f} MiB, written and read back bit for bit in "
        f"{duration(time.perf_counter() - started)}"
    )


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(torch.nan_to_num(a.cpu()), torch.nan_to_num(b.cpu()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or a != a
