"""The validation images a model gets wrong, the surest mistake first: truth, guess, confidence."""

from __future__ import annotations

import math
import sys

from analysis.arguments import add_checkpoint_args, out_dir, parse
from base import flags
from base.errors import UsageError, run

EPILOG = """examples:
  python -m analysis.misclassified checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.misclassified CHECKPOINT --only n02123045 --count 12        mistakes on one class
writes misclassified.png and misclassified.json (every mistake, not only those in the picture)"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.misclassified", "Show the surest mistakes of a model.", EPILOG)
    parser.add_argument("--count", type=flags.positive, default=24, metavar="N", help="images in the picture")
    parser.add_argument(
        "--only", default="", metavar="CLASS", help="only images of this class (folder or name)"
    )
    add_checkpoint_args(parser)
    flags.add_dataset_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = parse(build_parser(), argv)
    from analysis import figures
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, typed)
    found = classifier.predict_val()
    wrong = found.most_confident_errors()
    total = len(found.labels)
    if config.only:
        label = label_of(config.only, classifier.classes, classifier.names)
        wrong = wrong[found.labels[wrong] == label]
        total = int((found.labels == label).sum())
    title = (
        f"Surest mistakes of {classifier.title}\n{len(wrong)} of {total} validation images are misclassified"
    )
    folder = out_dir(config)
    if len(wrong):
        print(
            figures.save(
                picture(classifier, found, wrong[: config.count], title), folder / "misclassified.png"
            )
        )
    else:
        print(f"no mistakes in {total} validation images")
    print(write(classifier, found, wrong, folder))
    return 0


def label_of(wanted: str, classes: list[str], names: list[str]) -> int:
    """The label of a class by its folder or its name. Raises UsageError where there is none."""
    for known in (classes, names):
        if wanted in known:
            return known.index(wanted)
    raise UsageError(f"--only {wanted}: no such class", f"there are {', '.join(names[:12])}, ...")


def picture(classifier, found, ids, title: str):
    from analysis import figures

    names = [figures.shorten(name, 22) for name in classifier.names]
    captions = [
        f"is {names[found.labels[i]]}\npredicted {names[found.predicted[i]]}\n{100 * found.confidence[i]:.0f} % sure"
        for i in ids
    ]
    return figures.gallery(list(classifier.val_pixels(ids)), captions, title=title)


def write(classifier, found, wrong, folder):
    """Every mistake as JSON, for tables and for `analysis.report`."""
    from harness.rundir import write_json

    classes = classifier.classes
    mistakes = [
        {
            "id": int(i),
            "file": classifier.index.val.name(int(i)),
            "truth": classes[found.labels[i]],
            "prediction": classes[found.predicted[i]],
            "confidence": round(float(found.confidence[i]), 4),
            "truth_probability": round(math.exp(-found.losses[i]), 4),
        }
        for i in wrong
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "misclassified.json"
    write_json(path, {"images": len(found.labels), "mistakes": mistakes})
    return path


if __name__ == "__main__":
    sys.exit(run(main))
