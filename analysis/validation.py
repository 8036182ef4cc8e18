"""Score a classifier on its validation images; print, write and draw the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from analysis import figures, predictions, score_figures, scores
from analysis.predictions import Classifier, Predictions
from base import files
from base.device import memory_for
from base.errors import DataError
from sources.index import Split, SubsetSplit, balanced_subset

SHOWN = 5  # pairs and classes printed
CLASS_COLUMNS = ("class", "name", "precision", "recall", "f1", "support")
PAIR_COLUMNS = ("truth", "prediction", "truth_name", "prediction_name", "times", "share")


def model_labels(classifier: Classifier, say: Callable[[str], None]) -> list[int]:
    """Return the model's label of each class of the data. Raises DataError for a class it does not know."""
    known = {name: label for label, name in enumerate(classifier.classes)}
    classes = classifier.index.classes
    if unknown := [name for name in classes if name not in known]:
        names = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        trained_on = f"{classifier.payload['eval']['dataset']}: {', '.join(classifier.classes[:5])}"
        trained_on += ", ..." * (len(classifier.classes) > 5)
        raise DataError(
            f"the model does not know {len(unknown)} of the data's {len(classes)} classes: {names} "
            f"(it was trained on {trained_on})",
            "name the data it was trained on: --dataset NAME --data-dir DIR",
        )
    if len(classes) < len(known):
        some = f"{len(classes)} of the model's {len(known)} classes"
        say(f"note: the data has {some}; the model may predict any class")
    return [known[name] for name in classes]


def score(
    classifier: Classifier,
    image_size: int,
    labels: list[int],
    *,
    crop: float,
    batch_size: int,
    num_workers: int,
    flip: bool,
    recalibration_images: int,
) -> list[tuple[dict, Predictions]]:
    """Score all weights and their variants at one image size: [(row of the table, predictions)].

    labels: the model's label of each class of the data
    crop: share of the resized image's short side
    flip: also average with the mirror image
    recalibration_images: also use BatchNorm statistics of about so many training images, unless 0
    """
    classifier, runtime = replace(classifier, image_size=image_size, crop=crop), classifier.runtime
    models, loading = dict(classifier.models), (batch_size, num_workers)
    with memory_for(f"{image_size} px, batch {batch_size}", "lower --batch-size", runtime.device):
        if recalibration_images:
            images = recalibration_split(classifier.index.train, recalibration_images, batch_size)
            for name, model in classifier.models.items():
                title = f"BatchNorm of {name} at {image_size} px"
                batches = classifier.batches(images, title, *loading, skips_bad=True)
                models[f"{name} bn"] = predictions.recalibrate(model, batches, runtime)
        lookup = torch.as_tensor(labels, device=runtime.device)
        batches = classifier.batches(classifier.index.val, f"validation at {image_size} px", *loading)
        val = ((images, lookup[data_labels]) for images, data_labels in batches)
        found = predictions.predict(models, val, runtime, flip=flip)
    rows = [(table_row(name, classifier, given, labels), given) for name, given in found.items()]
    # The scores that training logged come first.
    return sorted(rows, key=lambda row: classifier.flip and row[0]["tta"] != "flip")


def recalibration_split(train: Split, count: int, batch_size: int) -> SubsetSplit:
    """Draw training images of all classes, in whole batches so that each image counts the same.

    Shuffled: most data is stored by class, and batches of one class would lack the variance between classes.
    """
    count = max(min(count, len(train)) // batch_size, 1) * batch_size
    ids = balanced_subset(train.labels, min(count, len(train)), seed=2)
    return SubsetSplit(train, np.random.Generator(np.random.Philox(2)).permutation(ids))


def table_row(name: str, classifier: Classifier, found: Predictions, labels: list[int]) -> dict:
    """Return a row of the table; `name` is as in "ema bn flip"."""
    weights, *variants = name.split()
    top1, top5 = 100 * found.hits.mean(0)
    classes = scores.per_class(found.labels, found.predicted, labels)
    return {
        "image_size": classifier.image_size,
        "crop": classifier.crop,
        "weights": weights,
        "bn": "recalibrated" if "bn" in variants else "trained",
        "tta": "flip" if "flip" in variants else "none",
        "top1": float(top1),
        "top5": float(top5),
        "loss": float(found.losses.mean(dtype=float)),
        "num_samples": len(found.labels),
        "macro_f1": 100 * float(np.mean([row.f1 for row in classes])),
        "ece": 100 * scores.calibration(found.confidence, found.hits[:, 0]).ece,
    }


def hits_of(results: list[tuple[dict, Predictions]]) -> dict[str, np.ndarray]:
    """Return {"ema": (n,) bool, and "ema bn" if recalibrated, ...} at the first size, without TTA."""
    plain = [(row, found) for row, found in results if row["tta"] == "none"]
    kinds = {"trained": "", "recalibrated": " bn"}
    return {row["weights"] + kinds[row["bn"]]: found.hits[:, 0] for row, found in reversed(plain)}


def write_scores(
    classifier: Classifier,
    checkpoints: list[Path],
    results: list[tuple[dict, Predictions]],
    labels: list[int],
    out: Path,
    say: Callable[[str], None],
) -> dict:
    """Print the table and the worst mistakes, write and draw the scores; return what scores.json holds.

    checkpoints: one, or those whose weights are averaged
    The details are those of the first result of the classifier's weights.
    """
    chosen, found = next(pair for pair in results if pair[0]["weights"] == classifier.weights)
    matrix = confusion_matrix(found.labels, found.predicted, labels=range(len(classifier.classes)))
    pairs = scores.confused_pairs(matrix)
    per_class = scores.per_class(found.labels, found.predicted, labels)
    calibration = scores.calibration(found.confidence, found.hits[:, 0])
    payload, index, runtime = classifier.payload, classifier.index, classifier.runtime
    rows = [row for row, _ in results]
    arch = payload["model_args"]["arch"]
    weights = chosen["weights"].replace("ema", "EMA")
    subject = f"{arch} on {index.name}, {weights} weights, {chosen['image_size']} px"
    data = f"{len(index.val):,} images of {len(index.classes)} classes"
    device = f"{runtime.device} ({runtime.precision})"
    say(f"{', '.join(map(str, checkpoints))}: epoch {len(payload['rows'])}, {data}, {device}")
    say(table(rows))
    say(worst(pairs, per_class, classifier.names, subject))
    tables = write_tables(classifier, matrix, per_class, pairs, out)
    numbers = {
        "checkpoint": ", ".join(path.name for path in checkpoints),
        "run": payload.get("run", ""),
        "model_args": payload["model_args"],
        "epoch": len(payload["rows"]),
        "dataset": index.name,
        "fingerprint": index.fingerprint(),
        "results": rows,
        "details_of": chosen,
        "calibration": calibration.plain(),
        **tables,
    }
    files.write_json(out / "scores.json", numbers)
    subject += f": top-1 {chosen['top1']:.2f} %"
    title = f"Confusion matrix of {subject}, {matrix.sum():,} images"
    figures.save(score_figures.confusion(matrix, classifier.names, pairs, title), out / "confusion.png")
    title = f"Calibration of {subject}".replace(": ", "\n")
    figures.save(score_figures.reliability(calibration, title), out / "reliability.png")
    say(f"tables and pictures: {out}")
    return numbers


def table(rows: list[dict]) -> str:
    header = "   px   crop weights BatchNorm    TTA    top-1   top-5    loss  macro F1  ECE %"
    line = (
        "{image_size:>5}  {crop:>5.3g} {weights:<7} {bn:<12} {tta:<4}  {top1:>6.2f}  {top5:>6.2f}  "
        "{loss:>6.3f}  {macro_f1:>8.2f}  {ece:>5.1f}"
    )
    return "\n".join([header, *(line.format(**row) for row in rows)])


def worst(
    pairs: list[scores.Pair], per_class: list[scores.ClassScore], names: list[str], subject: str
) -> str:
    """Return the most confused pairs and the classes with the lowest recall, as text."""
    support = {row.label: row.support for row in per_class}
    lines = [f"most confused ({subject}):"] if pairs else ["no mistakes"]
    for pair in pairs[:SHOWN]:
        counts = f"{pair.times} of {support[pair.truth]}, {100 * pair.share:.0f} %"
        lines.append(f"  {names[pair.truth]} predicted as {names[pair.prediction]}: {counts}")
    hardest = sorted((row for row in per_class if row.support and row.recall < 1), key=lambda row: row.recall)
    if hardest:
        recalls = [f"{names[row.label]} {100 * row.recall:.0f} %" for row in hardest[:SHOWN]]
        lines.append(f"lowest recall: {', '.join(recalls)}")
    return "\n".join(lines)


def write_tables(classifier: Classifier, matrix: np.ndarray, per_class: list, pairs: list, out: Path) -> dict:
    """Write the CSV files; return their rows as scores.json holds them."""
    classes, names = classifier.classes, classifier.payload["eval"]["class_names"]
    class_rows = [(classes[label], names[label], *values) for label, *values in per_class]
    pair_rows = [(classes[i], classes[j], names[i], names[j], times, share) for i, j, times, share in pairs]
    for name, columns, rows in (
        ("per_class.csv", CLASS_COLUMNS, class_rows),
        ("confused_pairs.csv", PAIR_COLUMNS, pair_rows),
    ):
        cells = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
        files.write(out / name, files.csv_text([column.replace("_", " ") for column in columns], cells))
    rows = ((name, *counts) for name, counts in zip(classes, matrix.tolist(), strict=True))
    files.write(out / "confusion.csv", files.csv_text(("truth \\ prediction", *classes), rows))
    return {
        "per_class": [dict(zip(CLASS_COLUMNS, row, strict=True)) for row in class_rows],
        "confused_pairs": [dict(zip(PAIR_COLUMNS, row, strict=True)) for row in pair_rows[:100]],
    }
