"""Scores of predictions: confused pairs, per-class precision and recall, calibration, and hits.npz.

NumPy arrays in, plain numbers out. Classes are 0 ... K - 1.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from base import files
from base.errors import DataError


class Pair(NamedTuple):
    """One class predicted in place of another."""

    truth: int
    prediction: int
    times: int
    share: float  # of the images of the true class


def confused_pairs(matrix: np.ndarray) -> list[Pair]:
    """The mistakes in a confusion matrix (K, K), most frequent first; ties by share, then by class."""
    mistakes = matrix - np.diag(np.diag(matrix))
    support = matrix.sum(1)
    pairs = [
        Pair(int(i), int(j), int(mistakes[i, j]), float(mistakes[i, j] / support[i]))
        for i, j in zip(*mistakes.nonzero(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.times, -pair.share, pair.truth, pair.prediction))


class ClassScore(NamedTuple):
    """Scores of one class, as shares; 0 if the class is never predicted or has no images."""

    label: int
    precision: float
    recall: float
    f1: float
    support: int  # images of the class


def per_class(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[int]) -> list[ClassScore]:
    """labels (n,), predicted (n,) -> the scores of each of `classes`."""
    columns = precision_recall_fscore_support(labels, predicted, labels=list(classes), zero_division=0)
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return [ClassScore(*shares, support=int(support)) for *shares, support in rows]


@dataclass(frozen=True)
class Calibration:
    """How well confidence predicts accuracy; arrays (bins,), NaN for an empty bin."""

    edges: np.ndarray  # (bins + 1,)
    count: np.ndarray  # images
    accuracy: np.ndarray  # share of correct predictions
    confidence: np.ndarray  # mean
    ece: float  # expected calibration error: mean |accuracy - confidence| over images

    def plain(self) -> dict[str, list[float] | float]:
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Calibration over equal bins of confidence (https://arxiv.org/abs/1706.04599).

    confidence (n,) in [0, 1], correct (n,) bool. As in the paper, a bin includes its upper edge.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    hits = np.bincount(bin_of, correct, minlength=bins)
    total = np.bincount(bin_of, confidence, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy, mean = hits / count, total / count
    return Calibration(edges, count, accuracy, mean, float(np.abs(hits - total).sum() / len(confidence)))


def write_hits(path: str | os.PathLike, hits: dict[str, np.ndarray]) -> None:
    """Write {weights: (n,) bool}, one bit per image and always the same bytes."""
    (images,) = {len(found) for found in hits.values()}
    with files.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, images=images, **{name: np.packbits(found) for name, found in hits.items()})


def read_hits(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return what `write_hits` wrote; {} if there is no file. Raises DataError if it is damaged."""
    if not os.path.isfile(path):
        return {}
    try:
        with np.load(path, allow_pickle=False) as found:
            images = int(found["images"])
            bits = {name: found[name] for name in found.files if name != "images"}
        if any(len(packed) != -(-images // 8) for packed in bits.values()):
            raise ValueError(f"it does not hold {images} images")
        return {name: np.unpackbits(packed, count=images).astype(bool) for name, packed in bits.items()}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}", "delete it, or score the run again") from None
