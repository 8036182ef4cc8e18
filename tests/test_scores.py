"""Scores against scikit-learn and against loops, on random cases full of ties."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from analysis import predictions
from analysis.scores import Pair, calibration, confused_pairs, confusion, match_classes, per_class


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_everything_equals_scikit_learn(seed, num_classes, n):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, 4, (n, num_classes)).astype(np.float32))  # many ties
    labels = torch.from_numpy(rng.integers(0, num_classes, n))
    answers = predictions.Answers(*(part.numpy() for part in predictions._answers(logits, labels)))
    y, guesses = labels.numpy(), answers.guesses

    assert guesses.tolist() == logits.numpy().argmax(1).tolist()  # NumPy promises the lowest
    assert answers.right[:, 0].mean() == pytest.approx(sk.accuracy_score(y, guesses))
    # scikit-learn gives ties to the higher class; turned around, it is our rule.
    turned = logits.numpy()[:, ::-1], num_classes - 1 - y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top5 = (
            sk.top_k_accuracy_score(turned[1], turned[0], k=5, labels=range(num_classes))
            if num_classes > 2
            else 1.0
        )
    assert answers.right[:, 1].mean() == pytest.approx(top5)
    probabilities = logits.double().softmax(1).numpy()
    assert answers.losses.mean() == pytest.approx(
        sk.log_loss(y, probabilities, labels=range(num_classes)), rel=1e-5
    )
    assert answers.confidence == pytest.approx(probabilities.max(1), rel=1e-5)

    matrix = confusion(y, guesses, num_classes)
    assert np.array_equal(matrix, sk.confusion_matrix(y, guesses, labels=range(num_classes)))
    found = per_class(y, guesses, range(num_classes))
    report = sk.classification_report(
        y, guesses, labels=range(num_classes), output_dict=True, zero_division=0
    )
    assert found.macro_f1 == pytest.approx(report["macro avg"]["f1-score"])
    for k in range(num_classes):
        ours = found.precision[k], found.recall[k], found.f1[k], found.support[k]
        assert ours == pytest.approx(tuple(report[str(k)].values()))


def test_nan_is_never_right_and_no_guess():
    logits = torch.tensor([[float("nan"), 1.0, 0.0], [float("nan")] * 3, [0.0, float("nan"), float("-inf")]])
    _, guesses, _, _, right = predictions._answers(logits, torch.tensor([0, 0, 1]))
    assert guesses.tolist() == [1, 0, 0] and not right[:, 0].any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_calibration_is_the_loop_of_its_definition(seed, n, bins):
    rng = np.random.default_rng(seed)
    confidence, right = (
        rng.integers(0, 2 * bins + 1, n) / (2 * bins),
        rng.random(n) < 0.5,
    )  # also on the edges
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
    assert confused_pairs(matrix, 1) == [Pair(1, 0, 2, 0.5)]
    assert confused_pairs(np.diag([3, 0])) == []


def test_classes_are_found_by_name():
    positions, unknown = match_classes(("cat", "dog", "owl"), ("owl", "cat"))
    assert positions.tolist() == [2, 0] and unknown == []
    assert match_classes(("cat",), ("cow", "cat", "ape"))[1] == ["cow", "ape"]
