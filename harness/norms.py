"""Can every BatchNorm of a plan be trained? It needs more than one value per channel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from base.errors import UsageError
from models import build_model
from models.summary import smallest_norm_map
from train_utils import Phase, smallest_piece


def check_norms(config, model_args: dict, samples: int, phases: tuple[Phase, ...], world_size: int) -> None:
    """Raise UsageError if a BatchNorm would see a single value per channel, which has no variance."""

    @functools.cache
    def smallest_map(size: int) -> int:
        with torch.device("meta"):
            return smallest_norm_map(build_model(**model_args), size)

    def fits(size: int, batch: int, accumulate: int = config.accumulate) -> bool:
        if batch < world_size or batch % world_size:
            return False
        images = smallest_piece(batch // world_size, accumulate) * (world_size if config.sync_bn else 1)
        return images > 1 or smallest_map(size) != 1

    for number, phase in enumerate(phases, 1):
        if not fits(phase.image_size, phase.batch_size):
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            pieces = config.accumulate
            piece = f" in the smallest piece of --accumulate {pieces}" if pieces > 1 else ""
            raise UsageError(
                f"phase {number}: batch size {phase.batch_size} at {phase.image_size} px leaves one image"
                f"{ranks}{piece}, so BatchNorm of {config.arch} would see one value per channel",
                "use " + " or ".join(plans_that_fit(config, phases, samples, fits)),
            )


def plans_that_fit(
    config, phases: tuple[Phase, ...], samples: int, fits: Callable[..., bool]
) -> Iterator[str]:
    """Yield the smallest changes to the flags that would make `check_norms` accept the plan."""
    sizes, batches = config.resize_schedule, config.phase_batch_sizes
    for pieces in range(min(config.accumulate, phases[0].batch_size) - 1, 0, -1):
        if all(fits(phase.image_size, phase.batch_size, pieces) for phase in phases):
            yield f"--accumulate {pieces}"
            break
    if batches:
        pairs = zip(sizes, batches, strict=True)
        larger = [next((b for b in range(batch, samples + 1) if fits(size, b)), 0) for size, batch in pairs]
        if all(larger):
            yield f"--phase-batch-sizes {','.join(map(str, larger))}"
    else:
        for batch in range(config.batch_size, samples + 1):
            if all(fits(size, max(1, batch >> k)) for k, size in enumerate(sizes)):
                yield f"--batch-size {batch}"
                break
    yield "larger sizes in --resize-schedule"
