"""What is computed from guesses and labels once a model has been asked: confusion, calibration, per-class scores.

NumPy arrays in, plain numbers out; no model, no file, no picture. Classes are 0 ... K - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def confusion(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """labels (n,), guesses (n,) -> (K, K) counts, a row for each true class."""
    cells = np.bincount(labels * num_classes + guesses, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


class Pair(NamedTuple):
    """A class taken for another."""

    truth: int
    guess: int
    times: int
    share: float  # of the true class's samples


def confused_pairs(matrix: np.ndarray, count: int | None = None) -> list[Pair]:
    """The most frequent mistakes of a confusion matrix (K, K); ties by share, then by class."""
    mistakes = matrix - np.diag(np.diag(matrix))
    support = matrix.sum(1)
    pairs = [
        Pair(int(i), int(j), int(mistakes[i, j]), float(mistakes[i, j] / support[i]))
        for i, j in zip(*mistakes.nonzero(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.times, -pair.share, pair.truth, pair.guess))[:count]


@dataclass(frozen=True)
class Calibration:
    """How far confidence can be taken at its word; arrays (bins,), NaN where a bin is empty."""

    edges: np.ndarray  # (bins + 1,)
    count: np.ndarray  # samples
    accuracy: np.ndarray  # share that is right
    confidence: np.ndarray  # mean
    ece: float  # mean |accuracy - confidence| over samples


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error over equal bins of confidence (https://arxiv.org/abs/1706.04599).

    confidence (n,) in [0, 1], right (n,) bool. A bin holds its upper edge, as in the paper.
    """
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    hits, sure = (np.bincount(which, values, minlength=bins) for values in (right, confidence))
    with np.errstate(invalid="ignore"):
        accuracy, mean = hits / count, sure / count
    return Calibration(edges, count, accuracy, mean, float(np.abs(hits - sure).sum() / len(confidence)))


@dataclass(frozen=True)
class PerClass:
    """scikit-learn's classification report as arrays (m,), one entry for each class asked about; shares, not percent."""

    classes: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray

    @property
    def macro_f1(self) -> float:
        return float(self.f1.mean())


def per_class(labels: np.ndarray, guesses: np.ndarray, classes: Sequence[int]) -> PerClass:
    """Precision, recall and F1 of each of `classes`; 0 where a class is never guessed or never there."""
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(labels, guesses, labels=np.asarray(classes), zero_division=0)
    return PerClass(np.asarray(classes), *map(np.asarray, found))


def match_classes(known: Sequence[str], present: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Where each class of a dataset stands among a model's: ((m,) positions, names the model does not know)."""
    position = {name: k for k, name in enumerate(known)}
    unknown = [name for name in present if name not in position]
    return np.array([position.get(name, -1) for name in present], np.int64), unknown
