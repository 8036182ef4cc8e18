"""The validation images a model gets wrong, the surest mistake first: truth, guess, confidence."""

from __future__ import annotations

import sys

from analysis.arguments import add_checkpoint_args, parse
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
    from analysis.subject import guesses, open_subject, out_dir

    subject = open_subject(config, typed)
    found = guesses(subject)
    wrong = found.most_confident_errors()
    total = len(found.labels)
    if config.only:
        label = label_of(config.only, subject.facts["classes"], subject.names)
        wrong = wrong[found.labels[wrong] == label]
        total = int((found.labels == label).sum())
    title = f"Surest mistakes of {subject.title}\n{len(wrong)} of {total} validation images are misclassified"
    folder = out_dir(config)
    if len(wrong):
        print(
            figures.save(picture(subject, found, wrong[: config.count], title), folder / "misclassified.png")
        )
    else:
        print(f"no mistakes in {total} validation images")
    print(write(subject, found, wrong, folder))
    return 0


def label_of(wanted: str, classes: list[str], names: list[str]) -> int:
    """The label of a class by its folder or its name. Raises UsageError where there is none."""
    for known in (classes, names):
        if wanted in known:
            return known.index(wanted)
    raise UsageError(f"--only {wanted}: no such class", f"there are {', '.join(names[:12])}, ...")


def picture(subject, found, ids, title: str):
    from analysis import figures

    names = [figures.shorten(name, 22) for name in subject.names]
    captions = [
        f"is {names[found.labels[i]]}\nguess {names[found.guess[i]]}\n{100 * found.confidence[i]:.0f} % sure"
        for i in ids
    ]
    return figures.gallery(list(subject.validation_pixels(ids)), captions, title=title)


def write(subject, found, wrong, folder):
    """Every mistake as JSON, for tables and for `analysis.report`."""
    from harness.rundir import write_json

    classes = subject.facts["classes"]
    mistakes = [
        {
            "id": int(i),
            "file": subject.index.val.name(int(i)),
            "truth": classes[found.labels[i]],
            "guess": classes[found.guess[i]],
            "confidence": round(float(found.confidence[i]), 4),
            "truth_probability": round(float(found.truth[i]), 4),
        }
        for i in wrong
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "misclassified.json"
    write_json(path, {"images": len(found.labels), "mistakes": mistakes})
    return path


if __name__ == "__main__":
    sys.exit(run(main))
