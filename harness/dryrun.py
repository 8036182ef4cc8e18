"""--summary and --dry-run: what a run will do, tried out at each size, and how long it will take.

Nothing is written except a checkpoint in a temporary directory.
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
from harness.preflight import checkpoint_bytes, explain_out_of_memory, tensor_bytes
from loop import Run, eval_batches, start_phase
from models import build_model
from models.summary import count_macs, count_params, format_table
from sources.index import DatasetIndex
from train_utils import Phase, StepOptions, evaluate, train_step

SECONDS = 2.0  # to time steps at each size; at least one step


def print_summary(model_args: dict, phases: Sequence[Phase]) -> None:
    """Print the layers with output shapes, parameters and multiply-adds, as a table for each size."""
    model = build_model(**model_args)
    for size in dict.fromkeys(phase.image_size for phase in phases):
        say(f"{format_table(model, size)}\n")


def dry_run(config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...]) -> None:
    """Print the plan; train and validate briefly at each size; try a checkpoint; project the hours.

    --save-dir is neither created nor changed.
    """
    with tempfile.TemporaryDirectory() as directory:
        run = build.build(config, index, runtime, phases, Path(directory))
        if config.init_from:
            build.load_init_from(run, config)
        say(describe(run, config))
        hours = [try_phase(run, phase, SECONDS) for phase in run.phases]
        say(try_checkpoint(run))
    training, validation = (sum(parts) for parts in zip(*hours, strict=True))
    say(
        f"projected: {training + validation:.2f} h for the whole run: {training:.2f} h of training and "
        f"{validation:.2f} h of validation\n"
        "(a projection from these rates, without warm-up, start-up and checkpoints)\n"
        f"nothing was written to {config.save_dir}; leave out --dry-run to train"
    )


def describe(run: Run, config) -> str:
    """Return the model, the data and the plan as text, with a line for each phase."""
    model, runtime, index = run.state.model, run.runtime, run.index
    steps = sum(p.steps for p in run.phases)
    images = f"{len(index.train):,} training and {len(index.val):,} validation images"
    lines = [
        f"{config.arch}: {count_params(model):,} parameters, on {runtime.device} ({runtime.precision})",
        f"{index.name}: {images} of {len(index.classes)} classes",
        f"{run.epochs} epochs, {steps:,} steps of {config.optimizer}, {config.schedule} schedule",
        "",
        "  epochs    px  batch  steps/epoch       steps          learning rate  multiply-adds/image",
    ]
    for p in run.phases:
        low, high = lr_range(run.state.schedule, p)
        lines.append(
            f"{p.first_epoch:>4}-{p.last_epoch:<4} {p.image_size:>4}  {p.batch_size:>5}  "
            f"{p.steps_per_epoch:>11,}  {p.steps:>10,}  {low:.2e} .. {high:.2e}  "
            f"{count_macs(model, p.image_size):>19,}"
        )
    return "\n".join([*lines, ""])


def lr_range(schedule, phase: Phase, points: int = 2000) -> tuple[float, float]:
    """Return the lowest and highest learning rate of the phase, from about `points` of its steps."""
    last = phase.first_step + phase.steps - 1
    steps = {*range(phase.first_step, last, max(1, phase.steps // points)), last}
    rates = [schedule.lr_at(step) for step in steps]
    return min(rates), max(rates)


def try_phase(run: Run, phase: Phase, seconds: float) -> tuple[float, float]:
    """Train and validate with the real loaders for about `seconds`, two batches or more; print the rates.

    Return the hours of training and the hours of validation that the whole phase is expected to take.
    """
    state, runtime, average = run.state, run.runtime, run.state.ema.module
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    loader, options = start_phase(run, phase)
    loader.order.seek(phase.first_epoch)
    state.step = phase.first_step
    state.schedule.seek(phase.first_step)
    state.model.train()
    training, validation, steps = Rate(), Rate(), []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))  # the loader advances its own epoch
    models = {"val": state.model} | ({} if average is None else {"ema": average})
    with explain_out_of_memory(run):
        for images, labels in timed(itertools.islice(epochs, phase.steps), training, runtime, seconds):
            steps.append(train_step(state, options, images, labels).result())
            state.count(steps[-1])
        batches = eval_batches(run, run.index.val, phase)
        evaluate(models, timed(batches, validation, runtime, seconds / 2), runtime)
    losses = [step.loss for step in steps if step.finite]
    details = f"{training.batches} steps timed, loss {sum(losses) / max(1, len(losses)):.3f}"
    say(
        f"{phase.image_size:>4} px: {training.per_second:>8,.1f} img/s training ({details}), "
        f"{validation.per_second:>8,.1f} img/s validation, memory {memory_used(run, phase, options)}"
    )
    if bad := len(steps) - len(losses):
        searching = state.scaler.is_enabled() and not state.bad_in_a_row
        level, reason = ("note", ", as fp16 searches for its scale") if searching else ("WARNING", "")
        say(f"{level}: {bad} steps at {phase.image_size} px were not finite{reason}")
    validations = sum(map(run.is_scored, range(phase.first_epoch, phase.last_epoch + 1)))
    # Only the raw weights are scored on the training sample.
    scored = validations * (len(run.index.val) + len(run.train_sample) / len(models))
    return phase.steps * phase.batch_size / training.per_second / 3600, scored / validation.per_second / 3600


@dataclass
class Rate:
    """What `timed` has measured."""

    images: int = 0  # over all ranks
    seconds: float = 0.0
    batches: int = 0

    @property
    def per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)


def timed(batches: Iterable, rate: Rate, runtime: Runtime, seconds: float) -> Iterator:
    """Yield batches and time what is done with each, until two are done and `seconds` have passed.

    The first one is a warm-up (compilation, choice of kernels, start of workers); it counts only if it
    is the only one.
    """
    clock = time.perf_counter()
    for k, batch in enumerate(batches):
        yield batch
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        now = time.perf_counter()
        if k == 1:
            rate.images, rate.seconds, rate.batches = 0, 0.0, 0
        rate.images += len(batch[1]) * runtime.world_size
        rate.seconds += now - clock
        rate.batches += 1
        clock = now
        if runtime.any_rank(int(k > 0 and rate.seconds >= seconds)):  # together: steps are collective
            return


def memory_used(run: Run, phase: Phase, options: StepOptions) -> str:
    """Return, as text, the peak GPU memory, or on a CPU an estimate of what a step needs."""
    if run.runtime.device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return f"{peak / MIB:,.0f} MiB of {total / MIB:,.0f}"
    return f"about {estimated_memory(run, phase, options) / MIB:,.0f} MiB"


def estimated_memory(run: Run, phase: Phase, options: StepOptions) -> int:
    """Return the bytes of weights, gradients, optimizer state, average, batch and saved activations."""
    images = math.ceil(phase.batch_size / run.runtime.world_size)
    fixed = checkpoint_bytes(run) + tensor_bytes(run.state.model.parameters())
    # A line through two batch sizes: what autocast keeps of the weights does not grow with the batch.
    two, four = (saved_bytes(run, options, n, phase.image_size) for n in (2, 4))
    activations = two + (four - two) / 2 * (math.ceil(images / options.accumulate) - 2)
    return int(fixed + activations + 2 * images * 3 * phase.image_size**2 * 4)


def saved_bytes(run: Run, options: StepOptions, images: int, image_size: int) -> int:
    """Return the bytes that autograd keeps of a forward pass on `images` images, without the parameters."""
    weights = {p.data_ptr() for p in run.state.model.parameters()}
    storages: dict[int, int] = {}
    kept = []  # keeps the tensors alive, so that no address is used twice

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    batch = torch.zeros(images, 3, image_size, image_size, device=run.runtime.device)
    options.buffers.take()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), run.runtime.autocast():
        run.state.model(batch.contiguous(memory_format=torch.channels_last))
    options.buffers.restore()
    return sum(storages.values())


def try_checkpoint(run: Run) -> str:
    """Write a checkpoint, read it back and compare every value. Raises ResourceError if one differs."""
    path, started = run.path("last"), time.perf_counter()
    payload = run.metadata | run.state.state_dict()
    checkpoint.save(path, payload)
    loaded = checkpoint.load(path)
    if not _same(payload, {name: loaded[name] for name in payload}):
        what = "a checkpoint was not read back as it was written"
        raise ResourceError(what, "check the memory and the disk of this machine")
    size, seconds = path.stat().st_size / MIB, duration(time.perf_counter() - started)
    return f"checkpoint: {size:,.0f} MiB, written and read back bit for bit in {seconds}"


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(torch.nan_to_num(a.cpu()), torch.nan_to_num(b.cpu()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or a != a
