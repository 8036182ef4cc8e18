"""Score a checkpoint: raw and EMA weights, each class, the confusion matrix, and calibration.

Model, image size and preprocessing come from the checkpoint, and so do the precision, where the device is
fast in it, and the dataset unless another one is named. So the first line of the table is what training
logged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from base import files, flags, idle, process
from base.errors import UsageError, doing, run, tell

EPILOG = """examples:
  python validate.py checkpoints/best_resnet50_imagenet_1k.pt --data-dir ./data/imagenet
  python validate.py CHECKPOINT --image-sizes 224,256,288 --tta flip --recalibrate-bn
  python validate.py CHECKPOINT CHECKPOINT CHECKPOINT --average --recalibrate-bn
writes scores.json, per_class.csv, confusion.csv, confused_pairs.csv, confusion.png and reliability.png"""
RECALIBRATION_IMAGES = 4096  # enough for a mean, and seconds on a GPU

# fmt: off
SCORES = (
    flags.Flag("image_sizes", "Image sizes to test, by default the checkpoint's.",
               flags.listing(flags.pixels), (), "PX,PX,..."),
    flags.Flag("crop", "Share of the image's short side to score, by default the checkpoint's.",
               flags.share, None, "F"),
    flags.Flag("tta", "Test-time augmentation: flip also averages the logits with those of the "
               "mirror image; by default as in training.", ("none", "flip"), None, "NAME"),
    flags.Flag("average", "Average the raw weights and BatchNorm statistics of several checkpoints, "
               "and score only that."),
    flags.Flag("recalibrate_bn",
               f"Also score with BatchNorm statistics re-estimated on {RECALIBRATION_IMAGES:,} training "
               "images."),
    flags.Flag("save_hits", "Also write hits.npz: which images each set of weights gets right."),
    flags.Flag("out", "Output directory; by default validation/ beside the (last) checkpoint, or "
               "validation_other_data/ for other images than the run's; with --average validation_average/.",
               str, "", "DIR"),
    flags.Flag("json", "Copy of scores.json; '-' is standard output.", str, "", "FILE"),
)
# fmt: on


def build_parser() -> flags.Parser:
    parser = flags.build_parser("validate.py", "Score a checkpoint on its validation images.", EPILOG)
    help_text = "Checkpoint that train.py wrote (best_*.pt or last_*.pt); several with --average."
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=help_text)
    flags.add_flags(parser, "scores", SCORES)
    flags.add_flags(parser, "data", flags.SAVED_DATA).description = flags.SAVED_DATA_NOTE
    flags.add_flags(parser, "device", flags.INFERENCE)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    check(config, given)
    doing(f"loading torch and {', '.join(config.checkpoints)}")
    from analysis import predictions, scores, validation
    from base.device import init_runtime

    say = tell if config.json == "-" else process.say
    runtime, checkpoints = init_runtime(config.device, config.amp), [Path(p) for p in config.checkpoints]
    if config.average:
        classifier = predictions.load_average(config.checkpoints, runtime)
    else:
        classifier = predictions.load(config.checkpoints[0], "both", runtime)
    if config.amp == "auto":
        classifier = classifier.in_its_precision()
    sizes = config.image_sizes or (classifier.image_size,)
    for size in sizes:
        classifier.at_size(size)
    if config.recalibrate_bn and (arch := classifier.payload["model_args"]["arch"]) in idle.NO_BATCH_NORM:
        raise UsageError(f"--recalibrate-bn would do nothing: {arch} has no BatchNorm", "leave it out")
    classifier = predictions.open_data(classifier, config, given, say)
    if note := flags.workers_note(config, given):
        say(note)
    labels = validation.model_labels(classifier, say)
    out = output_directory(classifier, config, given, say)
    results = []
    for size in sizes:
        results += validation.score(
            classifier,
            size,
            labels,
            crop=config.crop or classifier.crop,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            flip=config.tta == "flip" if config.tta else classifier.flip,
            recalibration_images=RECALIBRATION_IMAGES if config.recalibrate_bn else 0,
        )
    numbers = validation.write_scores(classifier, checkpoints, results, labels, out, say)
    if config.save_hits:
        scores.write_hits(out / "hits.npz", validation.hits_of(results))
    if config.json == "-":
        print(files.json_text(numbers), end="")
    elif config.json:
        files.write_json(files.followed(config.json), numbers)
    return 0


def check(config, given: flags.Given) -> None:
    """Refuse what is wrong before torch is imported, which takes seconds. Raises UserError."""
    from harness import rundir
    from sources import layouts

    if len(config.checkpoints) > 1 and not config.average:
        raise UsageError("several checkpoints are given", "score them one by one, or their --average")
    if len(config.checkpoints) == 1 and config.average:
        raise UsageError(
            "--average would do nothing: there is one checkpoint", "name several, or leave it out"
        )
    for path in config.checkpoints:
        rundir.check_checkpoint(path)
    if config.json not in ("", "-"):
        files.check_output(config.json, "--json")
    if "data_dir" in given:
        layouts.check_dir(config.data_dir)
    if process.world_size() > 1:
        raise UsageError("validate.py runs on one device", "start it with python, not with torchrun")


def output_directory(classifier, config, given: flags.Given, say) -> Path:
    """Make the directory of the scores. Those of other images than the run's go beside its own."""
    from analysis.predictions import has_own_data
    from sources import folders

    # After --holdout, the official images are as unseen as those that were held out.
    saved = classifier.payload["config"]
    elsewhere = any(getattr(config, name) != saved[name] for name in {"dataset", "data_dir"} & given)
    own = (saved.get("holdout") and config.holdout == 0 and not elsewhere) or has_own_data(classifier)
    if not own:
        say("note: these are not the images that the run was validated on; it may have been trained on some")
    name = "validation" + "_average" * config.average + "_other_data" * (not own)
    out = Path(config.out or Path(config.checkpoints[-1]).parent / name)
    folders.check_outside(classifier.index, out, "--out")
    return files.make_directory(out)


if __name__ == "__main__":
    sys.exit(run(main))
