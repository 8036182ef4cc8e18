"""Checks at every start of a run: disk space for checkpoints, shared memory, a step that fits the GPU.

Nothing here writes a file or changes what training computes. What a run will do, and how long it may
take, is in dryrun.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from base.device import MIB, memory_for, memory_words
from base.errors import ResourceError, is_out_of_memory
from base.process import say
from dataloader import PREFETCH
from harness.rundir import nearest_existing
from loop import Run, start_phase
from train_utils import Phase, StepOptions

KEPT_CHECKPOINTS = 5  # last_*, best_*, their prev_* and the one being written


def check_resources(run: Run, former: Iterable[Path] = ()) -> None:
    """Raise ResourceError now for what would end the run hours later; warn about shared memory.

    former: checkpoints that the run will replace or delete
    """
    if run.runtime.is_main:
        check_disk(run, former)
        say(shared_memory_warning(run.phases, run.num_workers))
    if run.runtime.device.type == "cuda":
        check_step_memory(run)


def check_disk(run: Run, former: Iterable[Path] = ()) -> None:
    """Raise ResourceError unless the run's checkpoints fit on the disk."""
    former_sizes = {(s := file.stat()).st_ino: s.st_size for file in former}  # best_* may be last_* again
    size = checkpoint_bytes(run)
    need = max(size, KEPT_CHECKPOINTS * size - sum(former_sizes.values()))
    free = shutil.disk_usage(nearest_existing(run.save_dir)).free
    if free < need:
        what = f"the checkpoints of {size / MIB:,.0f} MiB each need {need / MIB:,.0f}"
        raise ResourceError(
            f"{run.save_dir} has {free / MIB:,.0f} MiB free; {what}",
            "free some space, or use another --save-dir",
        )


def checkpoint_bytes(run: Run) -> int:
    """Return the size of one checkpoint: weights, average and optimizer state."""
    model = tensor_bytes(run.state.model.state_dict().values())
    average = 0 if run.state.ema.module is None else model
    return model + average + optimizer_bytes(run.state.optimizer)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the optimizer's state, or before the first step what it is going to be."""
    if optimizer.state:
        return sum(tensor_bytes(state.values()) for state in optimizer.state.values())
    weights = tensor_bytes(p for group in optimizer.param_groups for p in group["params"])
    if isinstance(optimizer, torch.optim.SGD):
        return weights if optimizer.defaults["momentum"] else 0
    return 2 * weights


def tensor_bytes(tensors: Iterable) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def shared_memory_warning(phases: Sequence[Phase], workers: int, directory: str = "/dev/shm") -> str:
    """Return a warning if the batches that loader workers prepare may not fit into shared memory, or ''."""
    if not workers or not Path(directory).is_dir():
        return ""
    batch = max(phase.batch_size * phase.image_size**2 * 3 for phase in phases)  # uint8, of all ranks
    need, free = workers * PREFETCH * batch, shutil.disk_usage(directory).free
    if need <= free:
        return ""
    return (
        f"WARNING: {workers} loader workers may need {need / MIB:,.0f} MiB in {directory}, which has "
        f"{free / MIB:,.0f} MiB free: use --num-workers {free // (PREFETCH * batch)}, or give the container "
        "more (docker run --shm-size)"
    )


def check_step_memory(run: Run) -> None:
    """Try a forward and a backward at the largest phase: memory should run out now, not at epoch 51.

    Leaves no trace. Raises ResourceError with a batch size that fits.
    """
    phase = max(run.phases, key=lambda p: p.batch_size * p.image_size**2)
    _, options = start_phase(run, phase)
    ranks, accumulate = run.runtime.world_size, options.accumulate
    images = math.ceil(phase.batch_size / ranks / accumulate)

    def attempt(images: int) -> None:
        room = torch.empty(room_beside(run, phase), dtype=torch.uint8, device=run.runtime.device)
        try_step(run, options, phase, images)
        del room  # kept until here: it stands for what a real step needs besides

    fitting = largest_fitting(images, attempt)
    torch.cuda.empty_cache()
    if fitting == images:
        return
    fix = "not one image fits: free the device, or use smaller sizes in --resize-schedule"
    if fitting:
        sizes = [fitting * ranks * accumulate if p is phase else p.batch_size for p in run.phases]
        pieces = math.ceil(phase.batch_size / ranks / fitting)
        fix = f"{fitting} fit: use --accumulate {pieces}, or --phase-batch-sizes {','.join(map(str, sizes))}"
    raise ResourceError(
        f"out of memory in phase {run.phases.index(phase) + 1}: {phase.image_size} px, batch size "
        f"{phase.batch_size}, {images} images at once ({memory_words(run.runtime.device)})",
        fix,
    )


def room_beside(run: Run, phase: Phase) -> int:
    """Return the bytes that a step needs besides `try_step`: optimizer state to come, batches in waiting."""
    coming = 0 if run.state.optimizer.state else optimizer_bytes(run.state.optimizer)
    images = phase.batch_size // run.runtime.world_size * 3 * phase.image_size**2 * 4
    return coming + 3 * images  # the batch before mixing, and the next one, which prefetching holds twice


def try_step(run: Run, options: StepOptions, phase: Phase, images: int) -> None:
    """Run forward and backward on `images` blank images in training mode, and restore everything."""
    model, device, was_training = run.state.model, run.runtime.device, run.state.model.training
    # Not through DDP: a rank without memory would leave the others waiting.
    forward = options.forward if run.runtime.world_size == 1 else model
    side, classes = phase.image_size, len(run.index.classes)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        options.buffers.take()
        try:
            model.train()
            blank = torch.zeros(images, 3, side, side, device=device)
            with options.runtime.autocast():
                logits = forward(blank.contiguous(memory_format=torch.channels_last))
            targets = torch.full((images, classes), 1 / classes, device=device)
            options.loss(logits.float(), targets).backward()
        finally:
            run.state.optimizer.zero_grad(set_to_none=True)
            options.buffers.restore()
            model.train(was_training)


def largest_fitting(images: int, attempt: Callable[[int], None]) -> int:
    """Return the largest of `images`, `images` / 2, ... that `attempt` has memory for; 0 if none."""
    while images:
        try:
            attempt(images)
            return images
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        images //= 2  # after the handler, whose exception keeps the tensors of its frames alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


@contextmanager
def explain_out_of_memory(run: Run) -> Iterator[None]:
    """Turn memory that runs out during training into a ResourceError that names step and phase."""
    try:
        yield
    except (RuntimeError, MemoryError):
        step = min(run.state.step, sum(p.steps for p in run.phases) - 1)
        phase = next(p for p in run.phases if step < p.first_step + p.steps)
        what = f"step {run.state.step:,}: {phase.image_size} px, batch size {phase.batch_size}"
        options = "free the device and use --resume auto, or add --accumulate 2 --allow-change accumulate"
        with memory_for(what, f"the last checkpoint is intact: {options}", run.runtime.device):
            raise
