"""Scores compared with scikit-learn and with loops, on random cases with many ties."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from analysis import predictions
from analysis.scores import Pair, calibration, confused_pairs, per_class
from base.device import Runtime


def predicted(logits, labels):
    """The predictions of a model that returns its input."""
    runtime = Runtime(torch.device("cpu"))
    return predictions.predict({"": torch.nn.Identity()}, [(logits, labels)], runtime)[""]


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_everything_equals_scikit_learn(seed, num_classes, n):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, 4, (n, num_classes)).astype(np.float32))  # many ties
    labels = torch.from_numpy(rng.integers(0, num_classes, n))
    found = predicted(logits, labels)
    y, classes = labels.numpy(), found.predicted

    assert classes.tolist() == logits.numpy().argmax(1).tolist()  # NumPy promises the lowest
    assert found.hits[:, 0].mean() == pytest.approx(sk.accuracy_score(y, classes))
    # scikit-learn gives ties to the higher class; turned around, it is our rule.
    turned = logits.numpy()[:, ::-1], num_classes - 1 - y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top5 = (
            sk.top_k_accuracy_score(turned[1], turned[0], k=5, labels=range(num_classes))
            if num_classes > 2
            else 1.0
        )
    assert found.hits[:, 1].mean() == pytest.approx(top5)
    probabilities = logits.double().softmax(1).numpy()
    loss = sk.log_loss(y, probabilities, labels=range(num_classes))
    assert found.losses.mean() == pytest.approx(loss, rel=1e-5)
    assert found.confidence == pytest.approx(probabilities.max(1), rel=1e-5)

    options = {"labels": range(num_classes), "output_dict": True, "zero_division": 0}
    report = sk.classification_report(y, classes, **options)
    for row in per_class(y, classes, range(num_classes)):
        assert row[1:] == pytest.approx(tuple(report[str(row.label)].values()))


def test_nan_is_never_correct_and_never_predicted():
    logits = torch.tensor([[float("nan"), 1.0, 0.0], [float("nan")] * 3, [0.0, float("nan"), float("-inf")]])
    found = predicted(logits, torch.tensor([0, 0, 1]))
    assert found.predicted.tolist() == [1, 0, 0] and not found.hits[:, 0].any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_calibration_is_the_loop_of_its_definition(seed, n, bins):
    rng = np.random.default_rng(seed)
    confidence, right = rng.integers(0, 2 * bins + 1, n) / (2 * bins), rng.random(n) < 0.5  # edges included
    error, found = 0.0, calibration(confidence, right, bins)
    for low, high, count in zip(found.edges, found.edges[1:], found.count, strict=False):
        inside = (confidence > low) & (confidence <= high) | (low == 0) & (confidence == 0)
        assert count == inside.sum()
        if count:
            error += count / n * abs(right[inside].mean() - confidence[inside].mean())
    assert found.ece == pytest.approx(error)


def test_calibration_of_known_cases():
    sure, half = np.ones(10), np.full(10, 0.5)
    right = np.arange(10) < 5
    assert calibration(sure, np.ones(10, bool)).ece == 0
    assert calibration(sure, right).ece == 0.5
    assert calibration(half, right).ece == 0
    assert np.isnan(calibration(half, right).accuracy[0]) and calibration(half, right).count.sum() == 10


def test_confused_pairs_are_sorted_by_number_then_share():
    matrix = np.array([[5, 2, 0], [2, 1, 1], [1, 0, 1]])
    assert confused_pairs(matrix) == [
        Pair(1, 0, 2, 0.5),
        Pair(0, 1, 2, 2 / 7),
        Pair(2, 0, 1, 0.5),
        Pair(1, 2, 1, 0.25),
    ]
    assert confused_pairs(np.diag([3, 0])) == []
