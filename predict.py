"""Predict the classes of images, in files and folders; or export the model for other programs.

Images are preprocessed as in validation, so an image gets the same prediction here as there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from base import files, flags, process
from base.errors import DataError, UsageError, doing, one_line, run, tell

EPILOG = """examples:
  python predict.py checkpoints/best_resnet50_imagenet_1k.pt cat.jpg photos/
  python predict.py CHECKPOINT photos/ --csv predictions.csv       '-' is standard output
  python predict.py CHECKPOINT --export onnx --out exported"""


def no_images(config) -> str | bool:
    return not config.images and "no image is named"


# fmt: off
PREDICTIONS = (
    flags.Flag("weights", "Weights to use; falls back to raw if there is no EMA.",
               ("ema", "raw"), "ema", "NAME"),
    flags.Flag("top", "Classes per image.", flags.positive, 5, "K", idle=no_images),
    flags.Flag("json", "Write predictions as JSON; '-' is standard output.", str, "", "FILE",
               idle=no_images),
    flags.Flag("csv", "Write predictions as CSV; '-' is standard output.", str, "", "FILE",
               idle=no_images),
)
EXPORT = (
    flags.Flag("export", "Write the model in this format, with a model card.",
               ("", "onnx", "safetensors", "torchvision"), "", "FORMAT"),
    flags.Flag("out", "Output directory of the export; by default beside the checkpoint.",
               str, "", "DIR", idle=lambda c: not c.export and "it needs --export"),
)
LOADING = [flags.Flag(name, idle=no_images) for name in ("batch_size", "num_workers")]
# fmt: on


def build_parser() -> flags.Parser:
    parser = flags.build_parser("predict.py", "Predict the class of images.", EPILOG)
    help_text = "Checkpoint that train.py wrote (best_*.pt or last_*.pt)."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=help_text)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="Image files, or folders of images.")
    flags.add_flags(parser, "predictions", PREDICTIONS)
    flags.add_flags(parser, "export", EXPORT)
    flags.add_flags(parser, "device", flags.INFERENCE)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    if not (config.images or config.export):
        raise UsageError("no images given", "name image files or folders, or --export FORMAT")
    flags.refuse_idle((*PREDICTIONS, *EXPORT, *LOADING), config, given)
    if config.json and config.json == config.csv:
        raise UsageError(f"--json and --csv both write to {config.json}", "give them different names")
    for flag in ("json", "csv"):
        if (path := getattr(config, flag)) not in ("", "-"):
            files.check_output(path, f"--{flag}")
    from harness import rundir

    rundir.check_checkpoint(config.checkpoint)
    paths, bad = find_images(config.images or ())

    doing(f"loading torch and {config.checkpoint}")
    from analysis import export, predictions
    from base.device import init_runtime

    say = tell if "-" in (config.json, config.csv) else process.say
    classifier = predictions.load(config.checkpoint, config.weights, init_runtime(config.device, config.amp))
    if config.amp == "auto":
        classifier = classifier.in_its_precision()
    found = []
    if paths:
        if len(paths) > config.batch_size and (note := flags.workers_note(config, given)):
            say(note)
        loading = (config.batch_size, config.num_workers)
        found, unreadable = classifier.predict_files(paths, config.top, *loading)
        bad += unreadable
        write_predictions(classifier, found, bad, config, say)
    if config.export:
        out = Path(config.out or Path(config.checkpoint).parent)
        path, card = export.export(config.export, classifier, out)
        say(f"written and checked: {path}, described in {card}")
    if bad:
        for path, reason in bad:
            tell(f"bad image {one_line(path)}: {reason}")
        raise DataError(
            f"{len(bad)} of {len(found) + len(bad)} images could not be used, see above",
            "replace them or leave them out; all others have predictions",
        )
    return 0


def find_images(names: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return image paths, those of a folder sorted; and folders without images, with the reason."""
    from sources.folders import is_hidden, is_image, passed_over

    paths, bad = [], []
    for name in names:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        inside, others = [], []
        seen = set()

        def unreadable(error: OSError) -> None:
            bad.append((os.fspath(error.filename), error.strerror or str(error)))

        for folder, subfolders, entries in os.walk(name, followlinks=True, onerror=unreadable):
            if (place := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
                subfolders.clear()
                continue
            seen.add(place)
            # As in training: hidden folders are not read, and of two names for one, the link comes last.
            visible = [sub for sub in subfolders if not is_hidden(os.fsencode(sub))]
            subfolders[:] = sorted(visible, key=lambda sub: (os.path.islink(os.path.join(folder, sub)), sub))
            inside += [os.path.join(folder, e) for e in sorted(entries) if is_image(os.fsencode(e))]
            others += map(os.fsencode, entries)
        paths += inside
        if passed := passed_over(others):
            tell(f"{name}: {passed}")
        if not inside:
            bad.append((name, "no images in this folder"))
    return paths, bad


def write_predictions(classifier, found: list[dict], bad: list, config, say) -> None:
    """Write the predictions as JSON and CSV; print them as a table if neither was asked for."""
    texts = {}
    if config.json:
        content = {
            "checkpoint": Path(config.checkpoint).name,
            "weights": classifier.weights,
            "image_size": classifier.image_size,
            "images": found,
            "bad": [{"file": path, "reason": reason} for path, reason in bad],
        }
        texts[config.json] = files.json_text(content)
    if config.csv:
        rows = (
            (image["file"], rank, each["class"], each["name"], f"{each['probability']:.6f}")
            for image in found
            for rank, each in enumerate(image["predictions"], 1)
        )
        texts[config.csv] = files.csv_text(("file", "rank", "class", "name", "probability"), rows)
    for path, text in texts.items():
        if path == "-":
            print(text, end="")
        else:
            say(f"written: {files.write(files.followed(path), text)}")
    if not texts:
        print_table(found)


def print_table(found: list[dict]) -> None:
    width = max((len(one_line(image["file"])) for image in found), default=0)
    for image in found:
        file = one_line(image["file"])
        for each in image["predictions"]:
            folder = "" if each["name"] == each["class"] else f"  ({one_line(each['class'])})"
            print(f"{file:<{width}}  {100 * each['probability']:>6.2f} %  {one_line(each['name'])}{folder}")
            file = ""


if __name__ == "__main__":
    sys.exit(run(main))
