"""Show the validation images that a model gets wrong, the most confident mistake first."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from analysis import arguments
from base import files, flags
from base.errors import UsageError, run

EPILOG = """examples:
  python -m analysis.misclassified checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.misclassified CHECKPOINT --only n02123045 --count 12    the mistakes on one class
Writes misclassified.png, and misclassified.json with every mistake."""


def build_parser() -> flags.Parser:
    description = "Show the most confident mistakes of a model."
    parser = arguments.checkpoint_parser("misclassified", description, EPILOG)
    add = parser.add_argument
    few = flags.number(int, 1, arguments.MOST_PICTURES)
    add("--count", type=few, default=24, metavar="N", help="Number of images in the picture.")
    add("--only", default="", metavar="CLASS", help="Show mistakes on this class only (folder or name).")
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = arguments.parse(build_parser(), argv)
    from analysis import figures
    from analysis.predictions import load_with_data
    from sources.index import safe_name

    classifier = load_with_data(config, given)
    predictions = classifier.predict_val()
    wrong, total = predictions.most_confident_errors(), len(predictions.labels)
    name, of = "misclassified", ""
    if config.only:
        label = label_of(config.only, classifier.classes, classifier.names)
        wrong = wrong[predictions.labels[wrong] == label]
        total = int((predictions.labels == label).sum())
        name = f"misclassified_{safe_name(classifier.classes[label])}"
        of = f" of {figures.shorten(classifier.names[label], 60)}"
    if len(wrong):
        title = f"The most confident mistakes of {classifier.title}"
        title += f"\n{len(wrong)} of {total} validation images{of} are misclassified"
        shown, names = wrong[: config.count], [figures.shorten(name) for name in classifier.names]
        captions = [caption(predictions, i, names) for i in shown]
        fig = figures.gallery(classifier.val_pixels(shown), captions, title=title)
        arguments.save(config, {f"{name}.png": fig})
    else:
        print(f"no mistakes in {total} validation images{of}")
        Path(config.out, f"{name}.png").unlink(missing_ok=True)  # of an earlier checkpoint
    content = {"images": total, "mistakes": mistakes(classifier, predictions, wrong)}
    print(files.write_json(Path(config.out, f"{name}.json"), content))
    return 0


def label_of(wanted: str, classes: list[str], names: list[str]) -> int:
    """Return the label of a class, given its folder or its name. Raises UsageError for an unknown class."""
    for known in (classes, names):
        if wanted in known:
            return known.index(wanted)
    raise UsageError(f"--only {wanted}: no such class", f"name one of {', '.join(names[:12])}, ...")


def caption(predictions, i: int, names: list[str]) -> str:
    truth, predicted = names[predictions.labels[i]], names[predictions.predicted[i]]
    return f"truth: {truth}\nprediction: {predicted}\n{100 * predictions.confidence[i]:.0f} % sure"


def mistakes(classifier, predictions, ids) -> list[dict]:
    return [
        {
            "id": int(i),
            "file": classifier.index.val.name(int(i)),
            "truth": classifier.classes[predictions.labels[i]],
            "prediction": classifier.classes[predictions.predicted[i]],
            "confidence": round(float(predictions.confidence[i]), 4),
            "truth_probability": round(math.exp(-predictions.losses[i]), 4),
        }
        for i in ids
    ]


if __name__ == "__main__":
    sys.exit(run(main))
