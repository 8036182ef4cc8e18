"""Checks before every run: disk space for checkpoints, and whether the GPU has enough memory.

Nothing here writes a file or changes what training computes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from base.device import MIB, memory_for, memory_words
from base.errors import ResourceError, is_out_of_memory
from base.phases import phase_batches
from base.process import say
from harness.rundir import nearest_existing
from loop import Run, start_phase
from models import train_mode
from optim.saved import example_state
from train_utils import Phase, StepOptions, evaluate, phase_of, smallest_piece

CHECKPOINTS_ON_DISK = 5  # last_*, best_*, the prev_* of both, and the one being written


def check_resources(run: Run, former: Iterable[Path] = ()) -> None:
    """Raise ResourceError now for a lack of disk or GPU memory that would end the run hours later.

    former: checkpoints that the run will replace or delete
    """
    if run.runtime.is_main:
        check_disk(run, former)
    if run.runtime.device.type == "cuda":
        # With synchronized BatchNorm, each pass waits for all ranks, of which one may be short of memory.
        if not any(isinstance(norm, torch.nn.SyncBatchNorm) for norm in run.options.buffers.norms):
            check_step_memory(run)
        check_eval_memory(run)
    if run.runtime.world_size == 1 and run.options.forward is not run.state.model:
        check_compilation(run)


def check_disk(run: Run, former: Iterable[Path] = ()) -> None:
    """Raise ResourceError unless the run's checkpoints fit on the disk."""
    stats = [file.stat() for file in former]
    former_sizes = {s.st_ino: s.st_size for s in stats}  # best_* and last_* may be one file
    size = checkpoint_bytes(run)
    need = max(size, CHECKPOINTS_ON_DISK * size - sum(former_sizes.values()))
    free = shutil.disk_usage(nearest_existing(run.save_dir)).free
    if free < need:
        what = f"checkpoints of {size / MIB:,.0f} MiB each need {need / MIB:,.0f} MiB"
        raise ResourceError(
            f"{run.save_dir} has {free / MIB:,.0f} MiB free; {what}",
            "free some space, or use another --save-dir",
        )


def checkpoint_bytes(run: Run) -> int:
    """Return the size of a checkpoint: weights, average and optimizer state."""
    model = tensor_bytes(run.state.model.state_dict().values())
    average = 0 if run.state.ema.module is None else model
    return model + average + optimizer_bytes(run.state.optimizer)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size that the optimizer's state will have once every parameter is trained."""
    size = 0
    for group in optimizer.param_groups:
        kept = [v for v in example_state(optimizer, group).values() if isinstance(v, Tensor) and v.ndim]
        size += len(kept) * tensor_bytes(group["params"])
    return size


def tensor_bytes(tensors: Iterable) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def check_step_memory(run: Run) -> None:
    """Try a forward and backward pass of the largest phase: if memory is short, fail now, not at epoch 51.

    Through the plain model: if one rank ran out of memory inside DDP, the others would wait for it, and a
    compiled pass needs no more memory. Changes nothing. Raises ResourceError with a batch size that fits.
    """
    phase = max(run.phases, key=lambda p: (p.batch_size * p.image_size**2, not p.head_only))
    _, options = start_phase(run, phase)
    ranks, accumulate = run.runtime.world_size, options.accumulate
    images = math.ceil(phase.batch_size / ranks / accumulate)

    def attempt(images: int) -> None:
        # A stand-in for the memory that a real step needs in addition to `try_step`.
        ballast = torch.empty(ballast_bytes(run, phase), dtype=torch.uint8, device=run.runtime.device)
        try_step(run, options, phase, images, run.state.model)
        del ballast

    fitting = largest_fitting(images, attempt)
    torch.cuda.empty_cache()
    if fitting == images:
        return
    fix = "not even one image fits: free GPU memory, or use smaller sizes in --resize-schedule"
    if fitting:
        pieces = math.ceil(phase.batch_size / ranks / fitting)
        sizes = batches_with(run, phase, fitting * ranks * accumulate)
        ways = [f"--phase-batch-sizes {','.join(map(str, sizes))}"]
        if all(smallest_piece(p.batch_size // ranks, pieces) > 1 for p in run.phases):  # BatchNorm needs two
            ways.insert(0, in_pieces(run, pieces))
        fix = f"{fitting} fit: use {', or '.join(ways)}"
    raise ResourceError(
        f"out of memory in phase {run.phases.index(phase) + 1}: {phase.image_size} px, batch size "
        f"{phase.batch_size}, {images} images at once ({memory_words(run.runtime.device)})",
        fix,
    )


def in_pieces(run: Run, pieces: int) -> str:
    """Return the flags that split each batch of `run` into so many pieces."""
    return f"--accumulate {pieces}" + " --no-cuda-graphs" * run.metadata["config"]["cuda_graphs"]


def batches_with(run: Run, phase: Phase, batch_size: int) -> list[int]:
    """Return --phase-batch-sizes with `batch_size` in place of that of `phase`.

    From the flags, because a size in --resize-schedule may be two phases (--freeze-epochs) or none.
    """
    config = run.metadata["config"]
    sizes = config["resize_schedule"]
    batches = config["phase_batch_sizes"] or phase_batches(config["batch_size"], len(sizes))
    short = (phase.image_size, phase.batch_size)
    return [batch_size if each == short else each[1] for each in zip(sizes, batches, strict=True)]


def check_eval_memory(run: Run) -> None:
    """Try to score the largest batch of an evaluation. Changes nothing.

    Raises ResourceError if memory is short.
    """
    size, batch = max(map(run.scored_as, run.phases), key=lambda scored: scored[0] ** 2 * scored[1])
    images, device = math.ceil(batch / run.runtime.world_size), run.runtime.device
    alone = replace(run.runtime, world_size=1)  # a rank that runs out of memory must not let others wait
    # What steps will have left behind: the optimizer's state and copies, and the gradients.
    steps = new_optimizer_bytes(run) + copies_bytes(run) + tensor_bytes(run.state.parameters)

    def attempt(images: int) -> None:
        prefetched = 2 * images * 3 * size**2 * 4  # before and after it is normalized
        ballast = torch.empty(steps + prefetched, dtype=torch.uint8, device=device)
        blank = torch.zeros(images, 3, size, size, device=device).contiguous(
            memory_format=torch.channels_last
        )
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        evaluate({"val": run.state.model}, [(blank, labels)], alone, flip=run.eval_flip)
        del ballast

    fitting = largest_fitting(images, attempt)
    torch.cuda.empty_cache()
    if fitting < images:
        lower = "--eval-size" if run.eval_size else "the sizes or batch sizes of the phases"
        what = f"out of memory when scoring {images} images at once at {size} px ({memory_words(device)})"
        raise ResourceError(what, f"free GPU memory, raise --accumulate, or lower {lower}")


def ballast_bytes(run: Run, phase: Phase) -> int:
    """Return the bytes that a step needs in addition to `try_step`: for the optimizer, and more batches."""
    batch = phase.batch_size // run.runtime.world_size * 3 * phase.image_size**2 * 4
    new = new_optimizer_bytes(run) + copies_bytes(run)
    return new + 3 * batch  # the batch before mixing, and the prefetched one twice


def new_optimizer_bytes(run: Run) -> int:
    """Return the bytes that the optimizer's state will take and does not take yet."""
    optimizer = run.state.optimizer
    taken = sum(tensor_bytes(state.values()) for state in optimizer.state.values())
    return max(0, optimizer_bytes(optimizer) - taken)


def copies_bytes(run: Run) -> int:
    """Return the bytes of the copies from which a bad step is undone, see `optim.undo.Kept`."""
    optimizer = run.state.optimizer
    weights = tensor_bytes(run.state.parameters)
    return 0 if optimizer.defaults.get("fused") else weights + optimizer_bytes(optimizer)


def check_compilation(run: Run) -> None:
    """Compile the next phase now, before the run writes anything. Raises what torch.compile raises.

    Nothing is compiled twice: training finds what was compiled here. Later phases compile at their first
    step.
    """
    phase = phase_of(run.phases, min(len(run.state.rows) + 1, run.epochs))
    _, options = start_phase(run, phase)
    say(f"compiling for {phase.image_size} px")
    with explain_out_of_memory(run):
        try_step(run, options, phase, math.ceil(phase.batch_size / options.accumulate), options.forward)


def try_step(
    run: Run, options: StepOptions, phase: Phase, images: int, forward: Callable[[Tensor], Tensor]
) -> None:
    """Run `forward` and backward on `images` blank images in training mode, and restore everything."""
    model, device = run.state.model, run.runtime.device
    side, classes = phase.image_size, len(run.index.classes)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            train_mode(model, phase.head_only)
            blank = torch.zeros(images, 3, side, side, device=device)
            with options.runtime.autocast():
                logits = forward(blank.contiguous(memory_format=torch.channels_last))
            targets = torch.full((images, classes), 1 / classes, device=device)
            options.loss(logits.float(), targets).backward()
        finally:
            run.state.optimizer.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)


def largest_fitting(images: int, attempt: Callable[[int], None]) -> int:
    """Return the largest of `images`, `images` / 2, ... that `attempt` has memory for; 0 if none."""
    while images:
        try:
            attempt(images)
            return images
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        images //= 2  # outside the handler: the exception keeps the tensors of its frames alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


@contextmanager
def explain_out_of_memory(run: Run) -> Iterator[None]:
    """Turn running out of memory during training into a ResourceError that names the step and the phase."""
    try:
        yield
    except (RuntimeError, MemoryError):
        step = min(run.state.step, sum(p.steps for p in run.phases) - 1)
        phase = next(p for p in run.phases if step < p.first_step + p.steps)
        what = f"step {run.state.step:,}: {phase.image_size} px, batch size {phase.batch_size}"
        pieces = f"{in_pieces(run, 2 * run.options.accumulate)} --allow-change accumulate"
        fix = f"the last checkpoint is intact: free memory and use --resume auto, or add {pieces}"
        with memory_for(what, fix, run.runtime.device):
            raise
