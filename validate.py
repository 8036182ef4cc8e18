"""Score a checkpoint: raw and EMA weights, each class, the confusion matrix, and calibration.

Model, image size and preprocessing come from the checkpoint, and so does the dataset unless another one is
named; so the first line of the table is what training logged.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from base import flags, idle, process
from base.errors import DataError, UsageError, run, tell

EPILOG = """examples:
  python validate.py checkpoints/best_resnet50_imagenet_1k.pt --data-dir ./data/imagenet
  python validate.py CHECKPOINT --image-sizes 224,256,288 --tta flip --recalibrate-bn
writes scores.json, per_class.csv, confusion.csv, confused_pairs.csv, confusion.png and reliability.png"""
RECALIBRATION_IMAGES = 4096  # enough for a mean, and seconds on a GPU
SHOWN = 5  # pairs and classes printed
CLASS_COLUMNS = ("class", "name", "precision", "recall", "f1", "support")
PAIR_COLUMNS = ("truth", "prediction", "truth_name", "prediction_name", "times", "share")


# fmt: off
SCORES = (
    flags.Flag("image_sizes", "trace", "Image sizes to test, by default the checkpoint's.",
               flags.listing(flags.pixels), (), "PX,PX,..."),
    flags.Flag("tta", "trace", "Test-time augmentation: also average with the mirror image.",
               ("none", "flip"), "none", "NAME"),
    flags.Flag("recalibrate_bn", "trace",
               f"Also use BatchNorm statistics of {RECALIBRATION_IMAGES} training images."),
    flags.Flag("out", "files", "Output directory; by default validation/ beside the checkpoint.",
               str, "", "DIR"),
    flags.Flag("json", "output", "Copy of scores.json; '-' is standard output.", str, "", "FILE"),
)
# fmt: on


def build_parser() -> flags.Parser:
    parser = flags.build_parser("validate.py", "Score a checkpoint on its validation images.", EPILOG)
    help_text = "Checkpoint that train.py wrote (best_*.pt or last_*.pt)."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=help_text)
    flags.add_flags(parser, "scores", SCORES)
    data = flags.add_flags(parser, "data", flags.DATASET)
    data.description = "Flags that are not given come from the checkpoint."
    flags.add_flags(parser, "device", flags.INFERENCE)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    from harness import rundir
    from sources import layouts

    rundir.check_checkpoint(config.checkpoint)
    if "data_dir" in given:
        layouts.check_dir(config.data_dir)
    if process.world_size() > 1:
        raise UsageError("validate.py runs on one device", "start it with python, not with torchrun")
    from analysis import predictions
    from base.device import init_runtime, memory_for

    say = tell if config.json == "-" else process.say
    runtime = init_runtime(config.device, config.amp)
    classifier = predictions.load(config.checkpoint, "both", runtime)
    sizes = config.image_sizes or (classifier.image_size,)
    check_architecture(classifier.payload["model_args"]["arch"], classifier.image_size, sizes, config)
    classifier = predictions.open_data(classifier, config, given, say)
    if note := flags.workers_note(config.num_workers):
        say(note)
    labels = model_labels(classifier, say)
    results = []
    for size in sizes:
        with memory_for(f"{size} px, batch {config.batch_size}", "lower --batch-size", runtime.device):
            results += score(replace(classifier, image_size=size), config, labels)
    out = Path(config.out) if config.out else Path(config.checkpoint).parent / "validation"
    write_scores(classifier, results, labels, out, config, say)
    return 0


def check_architecture(arch: str, trained_at: int, sizes: tuple[int, ...], config) -> None:
    """Raise UsageError for what the architecture cannot do."""
    if arch == "vit_b_16" and set(sizes) != {trained_at}:
        raise UsageError(f"vit_b_16 works at {trained_at} px only", "leave --image-sizes out")
    if config.recalibrate_bn and arch in idle.NO_BATCH_NORM:
        raise UsageError(f"--recalibrate-bn would do nothing: {arch} has no BatchNorm", "leave it out")


def model_labels(classifier, say) -> list[int]:
    """Return the model's label of each class of the data. Raises DataError for a class it does not know."""
    known = {name: label for label, name in enumerate(classifier.classes)}
    classes = classifier.index.classes
    if unknown := [name for name in classes if name not in known]:
        some = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        trained_on = f"{classifier.payload['eval']['dataset']}: {', '.join(classifier.classes[:5])}, ..."
        raise DataError(
            f"the model does not know {len(unknown)} of the data's {len(classes)} classes: {some} "
            f"(it was trained on {trained_on})",
            "name the data it was trained on: --dataset NAME --data-dir DIR",
        )
    if len(classes) < len(known):
        say(
            f"note: the data has {len(classes)} of the model's {len(known)} classes; it may predict any class"
        )
    return [known[name] for name in classes]


def score(classifier, config, labels: list[int]) -> list[tuple]:
    """Score all weights, and their variants that were asked for: [(result, predictions)]."""
    import torch

    from analysis import predictions
    from base.progress import Progress

    def batches(split, title: str):
        loader = classifier.loader(split, config.batch_size, config.num_workers)
        with Progress(len(loader), f"{title} at {classifier.image_size} px", unit="batches") as bar:
            yield from bar.over(loader)

    runtime, models = classifier.runtime, dict(classifier.models)
    if config.recalibrate_bn:
        images = recalibration_images(classifier.index.train, config.batch_size)
        for name, model in classifier.models.items():
            seen = batches(images, f"BatchNorm of {name}")
            models[f"{name} bn"] = predictions.recalibrate(model, seen, runtime)
    lookup = torch.as_tensor(labels, device=runtime.device)
    val = ((images, lookup[labels]) for images, labels in batches(classifier.index.val, "validation"))
    found = predictions.predict(models, val, runtime, flip=config.tta == "flip")
    return [(result(name, classifier.image_size, given, labels), given) for name, given in found.items()]


def recalibration_images(train, batch_size: int):
    """Draw training images of all classes, in whole batches so that each image counts the same."""
    from sources.index import SubsetSplit, balanced_subset

    count = min(RECALIBRATION_IMAGES, len(train))
    count = max(count // batch_size, 1) * batch_size
    return SubsetSplit(train, balanced_subset(train.labels, min(count, len(train)), seed=2))


def result(name: str, image_size: int, predictions, labels: list[int]) -> dict:
    """Return a line of the table; `name` is as in "ema bn flip"."""
    import numpy as np

    from analysis.scores import calibration, per_class

    weights, *variants = name.split()
    top1, top5 = 100 * predictions.hits.mean(0)
    classes = per_class(predictions.labels, predictions.predicted, labels)
    return {
        "image_size": image_size,
        "weights": weights,
        "bn": "recalibrated" if "bn" in variants else "trained",
        "tta": "flip" if "flip" in variants else "none",
        "top1": float(top1),
        "top5": float(top5),
        "loss": float(predictions.losses.mean(dtype=float)),
        "num_samples": len(predictions.labels),
        "macro_f1": 100 * float(np.mean([row.f1 for row in classes])),
        "ece": 100 * calibration(predictions.confidence, predictions.hits[:, 0]).ece,
    }


def write_scores(classifier, results: list[tuple], labels: list[int], out: Path, config, say) -> None:
    """Print the table and the worst mistakes; write all scores, with the details of one result."""
    from analysis import scores
    from base import files

    chosen, predictions = next(pair for pair in results if pair[0]["weights"] == classifier.weights)
    matrix = scores.confusion(predictions.labels, predictions.predicted, len(classifier.classes))
    pairs = scores.confused_pairs(matrix)
    per_class = scores.per_class(predictions.labels, predictions.predicted, labels)
    calibration = scores.calibration(predictions.confidence, predictions.hits[:, 0])
    payload, index, runtime = classifier.payload, classifier.index, classifier.runtime
    arch = payload["model_args"]["arch"]
    subject = f"{arch} on {index.name}, {chosen['weights']} weights, {chosen['image_size']} px"
    data = f"{len(index.val):,} images of {len(index.classes)} classes"
    device = f"{runtime.device} ({runtime.precision})"
    say(f"{config.checkpoint}: epoch {len(payload['rows'])}, {data}, {device}")
    say(table([line for line, _ in results]))
    say(worst(pairs, per_class, classifier.names, subject))
    tables = write_tables(classifier, matrix, per_class, pairs, out)
    numbers = {
        "checkpoint": Path(config.checkpoint).name,
        "model_args": payload["model_args"],
        "epoch": len(payload["rows"]),
        "dataset": index.name,
        "fingerprint": index.fingerprint(),
        "results": [line for line, _ in results],
        "details_of": chosen,
        "calibration": calibration.plain(),
        **tables,
    }
    files.write_json(out / "scores.json", numbers)
    draw(matrix, pairs, calibration, classifier.names, f"{subject}: top-1 {chosen['top1']:.2f} %", out)
    say(f"tables and pictures: {out}")
    if config.json == "-":
        print(files.json_text(numbers), end="")
    elif config.json:
        files.write_json(config.json, numbers)


def table(lines: list[dict]) -> str:
    rows = ["   px  weights  BatchNorm     TTA    top-1   top-5    loss  macro F1  ECE %"]
    row = (
        "{image_size:>5}  {weights:<7}  {bn:<12}  {tta:<4}  {top1:>6.2f}  {top5:>6.2f}  {loss:>6.3f}  "
        "{macro_f1:>8.2f}  {ece:>5.1f}"
    )
    return "\n".join(rows + [row.format(**line) for line in lines])


def worst(pairs: list, per_class: list, names: list[str], subject: str) -> str:
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


def write_tables(classifier, matrix, per_class: list, pairs: list, out: Path) -> dict:
    """Write the CSV files; return their rows as scores.json holds them."""
    from base import files

    classes, names = classifier.classes, classifier.payload["eval"]["class_names"]
    class_rows = [(classes[label], names[label], *scores) for label, *scores in per_class]
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


def draw(matrix, pairs: list, calibration, names: list[str], subject: str, out: Path) -> None:
    from analysis import figures, score_figures

    title = f"Confusion matrix of {subject}, {matrix.sum():,} images"
    figures.save(score_figures.confusion(matrix, names, pairs, title), out / "confusion.png")
    figures.save(score_figures.reliability(calibration, f"Calibration of {subject}"), out / "reliability.png")


if __name__ == "__main__":
    sys.exit(run(main))
