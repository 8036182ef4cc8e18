"""What the commands of this folder look at: a checkpoint's model, the data it was trained on, its guesses.

A part, not a command. Model, preprocessing and (unless other data is named) dataset come from the
checkpoint, so a command line is `CHECKPOINT --data-dir DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base import flags
from base.device import init_runtime
from base.errors import DataError, UsageError
from base.progress import Progress
from dataloader import eval_loader
from harness import checkpoint, rundir
from sources import layouts
from sources.images import EvalTransform
from sources.index import DatasetIndex, SubsetSplit


@dataclass
class Subject:
    """A model in eval mode and how to feed it."""

    model: nn.Module
    device: torch.device
    facts: dict  # the checkpoint's "eval": classes, class_names, mean, std, image_size, crop
    payload: dict  # the checkpoint
    index: DatasetIndex | None  # None where only files are looked at
    title: str  # for pictures: architecture, dataset, which weights

    @property
    def names(self) -> list[str]:
        """Class names for people, in label order."""
        return [str(name).split(",")[0] for name in self.facts["class_names"]]

    @property
    def image_size(self) -> int:
        return self.facts["image_size"]

    def pixels(self, images: Sequence[bytes | np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Encoded images (or pixels) -> (n, S, S, 3) uint8, through the transform of validation."""
        transform = EvalTransform(self.image_size, self.facts["crop"])
        return np.stack([transform(image, name) for image, name in zip(images, names, strict=True)])

    def validation_pixels(self, ids: Sequence[int]) -> np.ndarray:
        split = self.index.val
        return self.pixels(split.read(ids), [split.name(int(i)) for i in ids])

    def batch(self, pixels: np.ndarray) -> Tensor:
        """(n, S, S, 3) uint8 -> (n, 3, S, S) normalised, on the device."""
        mean, std = (
            torch.tensor(self.facts[key], device=self.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float()
        return (images / 255 - mean) / std


def open_subject(config, typed: frozenset[str], needs_data: bool = True) -> Subject:
    """The subject that a command line names. Data flags that were not typed come from the checkpoint.

    Raises CheckpointError, DataError where the data has other classes than the model.
    """
    model, payload = checkpoint.load_model(config.checkpoint, config.weights)
    facts = payload["eval"]
    device = init_runtime(config.device, "off").device
    index = None
    if needs_data:
        index = layouts.open_dataset(**flags.data_args(rundir.with_saved_data(config, typed, payload["config"])))
        if list(index.classes) != list(facts["classes"]):
            raise DataError(
                f"the model knows {len(facts['classes'])} classes, the data has {len(index.classes)} (or others)",
                "name the data it was trained on: --dataset NAME --data-dir DIR",
            )
        index = replace(index, mean=facts["mean"], std=facts["std"])  # what the model is used to
    weights = "EMA weights" if config.weights == "ema" and payload["ema"].get("shadow") else "raw weights"
    title = f"{payload['model_args']['arch']}, {len(facts['classes'])} classes, {weights}, {facts['image_size']} px"
    return Subject(model.to(device), device, facts, payload, index, title)


def out_dir(config) -> Path:
    return Path(config.out) if config.out else Path(config.checkpoint).parent / "plots"


def spread_ids(num_samples: int, count: int) -> np.ndarray:
    """`count` positions spread evenly: validation lies in class order, so these are of many classes."""
    return np.unique(np.linspace(0, num_samples - 1, min(count, num_samples)).round().astype(int))


def check_ids(ids: Sequence[int], num_samples: int, flag: str) -> np.ndarray:
    """`ids` as an array. Raises UsageError for a position that is not there."""
    outside = [i for i in ids if i >= num_samples]
    if outside:
        raise UsageError(
            f"{flag} {outside[0]}: there are {num_samples} images", f"count from 0 to {num_samples - 1}"
        )
    return np.asarray(ids, int)


@dataclass(frozen=True)
class Guesses:
    """What the model says to every validation image, in order; all arrays (n,)."""

    labels: np.ndarray
    guess: np.ndarray  # class with the largest logit
    confidence: np.ndarray  # its probability
    truth: np.ndarray  # the probability of the label

    def most_confident_errors(self) -> np.ndarray:
        """Ids of the misclassified images, the surest mistake first."""
        wrong = np.flatnonzero(self.guess != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


@torch.no_grad()
def guesses(subject: Subject, batch_size: int = 64, limit: int | None = None) -> Guesses:
    """Every validation image once (or `limit` of them, spread evenly, in place of all)."""
    split = subject.index.val
    ids = np.arange(len(split)) if limit is None else spread_ids(len(split), limit)
    loader = eval_loader(
        SubsetSplit(split, ids),
        subject.index,
        image_size=subject.image_size,
        batch_size=batch_size,
        device=subject.device,
        crop=subject.facts["crop"],
    )
    rows = []
    with Progress(len(loader), "validation images", unit="batches") as bar:
        for images, labels in loader:
            probabilities = subject.model(images).float().softmax(1)  # (N, K)
            confidence, guess = probabilities.max(1)
            rows.append((labels, guess, confidence, probabilities.gather(1, labels[:, None])[:, 0]))
            bar.update()
    return Guesses(*(torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)))
