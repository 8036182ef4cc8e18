"""The picture of analysis.batch: training batches and their soft labels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import figures
from base.device import Runtime, seed_everything
from dataloader import Loader
from harness import build
from loop import start_phase
from sources.index import DatasetIndex, short_names
from train_utils import StepOptions, phase_of


def draw(config, index: DatasetIndex) -> Figure:
    """Draw one row for each step: the mixed images above the shares of their classes."""
    phases = build.make_plan(config, index, world_size=1)
    phase = phase_of(phases, config.show_epoch)
    run = build.build(config, index, Runtime(torch.device("cpu")), phases, Path(config.save_dir))
    loader, options = start_phase(run, phase)
    loader.order.seek(config.show_epoch)
    names = [figures.shorten(name, 16) for name in short_names(index.class_names or index.classes)]
    first_step = phase.step_before(config.show_epoch)
    rows, steps = [], []
    for step, images, targets in mixed(loader, options, first_step, config.show_steps):
        shown = [as_pixels(image, index) for image in images[: config.show_images]]
        rows.append((shown, [label(target, names) for target in targets[: config.show_images]]))
        steps.append(f"step {step + 1}")
    mixing = f"mixup {config.mixup_alpha:g}, cutmix {config.cutmix_alpha:g}" if phase.mix else "no mixing"
    title = (
        f"What training sees in epoch {config.show_epoch}: {phase.image_size} px, batch {phase.batch_size}\n"
        f"augment {figures.shorten(phase.augment, 60)}, {mixing}, smoothing {config.label_smoothing:g}; "
        "below each image: the largest parts of its label"
    )
    return figures.strips(rows, title=title, names=steps)


def mixed(
    loader: Loader, options: StepOptions, first_step: int, count: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield `count` batches as train_step sees them: step, images (N, 3, H, W), targets (N, K)."""
    for step, (images, labels) in enumerate(islice(loader, count), first_step):
        seed_everything(options.seed, step, 0)  # as train_step does before it mixes
        yield step, *options.mixer(images, labels)


def as_pixels(image: Tensor, index: DatasetIndex) -> np.ndarray:
    """Return a normalized image (3, H, W) as (H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (index.mean, index.std))
    return (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def label(target: Tensor, names: list[str]) -> str:
    """Return the two largest shares of a soft label (K,), one per line, without what smoothing spreads."""
    shares, classes = target.topk(min(2, len(target)))
    rest = (1 - shares.sum().item()) / max(1, len(target) - 2)
    kept = [(s, k) for s, k in zip(shares.tolist(), classes.tolist(), strict=True) if s > rest + 0.005]
    return "\n".join(f"{s:.2f} {names[k]}" for s, k in kept or [(shares[0].item(), classes[0].item())])
