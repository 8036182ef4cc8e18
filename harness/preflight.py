"""What a run needs, checked at every start: room for checkpoints, shared memory, a step that fits the GPU.

Nothing here writes a file, and nothing changes what training computes. What the run will do and how
long it may take is shown by dryrun.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from base.device import MIB, memory_words
from base.errors import ResourceError, is_out_of_memory
from base.process import say
from dataloader import PREFETCH
from loop import Run, start_phase
from train_utils import Phase, StepOptions

KEPT_CHECKPOINTS = 5  # last_*, best_*, their prev_* and the one being written


def check_resources(run: Run, workers: int, former: Iterable[Path] = ()) -> None:
    """Raise ResourceError now for what would end the run hours later; warn about shared memory."""
    if run.runtime.is_main:
        check_disk(run, former)
        say(shared_memory_warning(run.phases, workers))
    if run.runtime.device.type == "cuda":
        check_step_memory(run)


def check_disk(run: Run, former: Iterable[Path] = ()) -> None:
    """Raises ResourceError unless the checkpoints fit; `former` ones are replaced or deleted."""
    room = {(s := file.stat()).st_ino: s.st_size for file in former}  # best is often a second name of last
    size = checkpoint_bytes(run)
    need = max(size, KEPT_CHECKPOINTS * size - sum(room.values()))
    there = next(p for p in (run.save_dir, *run.save_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise ResourceError(
            f"{run.save_dir} has {free / MIB:,.0f} MiB free; the checkpoints, {size / MIB:,.0f} MiB each, need {need / MIB:,.0f}",
            "free some space, or name another --save-dir",
        )


def checkpoint_bytes(run: Run) -> int:
    """What one checkpoint takes: weights, average, and what the optimizer keeps or is going to keep."""
    model = tensor_bytes(run.state.model.state_dict().values())
    average = 0 if run.state.ema.module is None else model
    return model + average + optimizer_bytes(run.state.optimizer)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    if optimizer.state:
        return sum(tensor_bytes(state.values()) for state in optimizer.state.values())
    weights = tensor_bytes(p for group in optimizer.param_groups for p in group["params"])
    if isinstance(optimizer, torch.optim.SGD):
        return weights if optimizer.defaults["momentum"] else 0
    return 2 * weights


def tensor_bytes(tensors: Iterable) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def shared_memory_warning(phases: Sequence[Phase], workers: int, where: str = "/dev/shm") -> str:
    """A warning where the batches that loader workers hold ready may not fit into shared memory."""
    if not workers or not Path(where).is_dir():
        return ""
    batch = max(
        phase.batch_size * phase.image_size**2 * 3 for phase in phases
    )  # uint8, of all ranks together
    need, free = workers * PREFETCH * batch, shutil.disk_usage(where).free
    if need <= free:
        return ""
    fitting = int(free // (PREFETCH * batch))
    return (
        f"WARNING: {workers} loader workers may hold {need / MIB:,.0f} MiB in {where}, which has {free / MIB:,.0f} MiB "
        f"free: give --num-workers {fitting}, or the container more (docker run --shm-size)"
    )


def check_step_memory(run: Run) -> None:
    """One forward and backward at the largest phase, so that memory runs out now and not at epoch 51.

    Leaves no trace: gradients are dropped, BatchNorm statistics and generators put back.
    Raises ResourceError with a batch that fits.
    """
    phase = max(run.phases, key=lambda p: p.batch_size * p.image_size**2)
    _, how = start_phase(run, phase)
    at_once = math.ceil(phase.batch_size / run.runtime.world_size / how.accumulate)

    def attempt(images: int) -> None:
        ballast = torch.empty(room_beside(run, phase), dtype=torch.uint8, device=run.runtime.device)
        try_step(run, how, phase, images)
        del ballast  # held until here: it stands for what else will be there

    fitting = largest_fitting(at_once, attempt)
    torch.cuda.empty_cache()
    if fitting < at_once:
        raise does_not_fit(run, phase, at_once, fitting, how.accumulate)


def room_beside(run: Run, phase: Phase) -> int:
    """Bytes that a step holds besides what `try_step` takes: optimizer state to come, batches made ready."""
    coming = 0 if run.state.optimizer.state else optimizer_bytes(run.state.optimizer)
    images = phase.batch_size // run.runtime.world_size * 3 * phase.image_size**2 * 4
    return coming + 3 * images  # as it was before mixing, and the next one, which prefetching has there twice


def try_step(run: Run, how: StepOptions, phase: Phase, images: int) -> None:
    """Forward and backward of `images` blank images, in training mode; everything is put back after it."""
    model, device, was_training = run.state.model, run.runtime.device, run.state.model.training
    # Not through DDP: a rank without memory would leave the others waiting.
    forward = how.forward if run.runtime.world_size == 1 else model
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        how.buffers.take()
        try:
            model.train()
            side, classes = phase.image_size, run.metadata["model_args"]["num_classes"]
            blank = torch.zeros(images, 3, side, side, device=device).contiguous(
                memory_format=torch.channels_last
            )
            with how.runtime.autocast():
                logits = forward(blank)
            how.loss(logits.float(), torch.full((images, classes), 1 / classes, device=device)).backward()
        finally:
            run.state.optimizer.zero_grad(set_to_none=True)
            how.buffers.restore()
            model.train(was_training)


def largest_fitting(batch: int, attempt: Callable[[int], None]) -> int:
    """The largest of `batch`, `batch` / 2, ... that `attempt` has memory for; 0 if none."""
    while batch and not _fits(batch, attempt):
        batch //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return batch


def _fits(batch: int, attempt: Callable[[int], None]) -> bool:
    try:
        attempt(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False  # and with the exception go the tensors its frames hold
    return True


def does_not_fit(run: Run, phase: Phase, at_once: int, fitting: int, accumulate: int) -> ResourceError:
    number = run.phases.index(phase) + 1
    what = (
        f"out of memory in phase {number}: {phase.image_size} px, batch {phase.batch_size}, {at_once} images at once"
        f" ({memory_words(run.runtime.device)})"
    )
    if not fitting:
        return ResourceError(
            what, "not one image fits: free the device, or give smaller --resize-schedule sizes"
        )
    sizes = [
        str(fitting * run.runtime.world_size * accumulate if p is phase else p.batch_size) for p in run.phases
    ]
    pieces = math.ceil(phase.batch_size / run.runtime.world_size / fitting)
    return ResourceError(
        what, f"{fitting} at once fit: give --accumulate {pieces}, or --phase-batch-sizes {','.join(sizes)}"
    )


@contextmanager
def out_of_memory_named(run: Run) -> Iterator[None]:
    """The one place where memory that runs out during training becomes a ResourceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        step = min(run.state.step, sum(p.steps for p in run.phases) - 1)
        phase = next(p for p in run.phases if step < p.first_step + p.steps)
        raise ResourceError(
            f"out of memory at step {run.state.step:,}: {phase.image_size} px, batch {phase.batch_size}"
            f" ({memory_words(run.runtime.device)})",
            "the last checkpoint is untouched: free the device and --resume auto, or add --accumulate 2 --allow-change accumulate",
        ) from error
