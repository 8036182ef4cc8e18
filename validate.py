"""Score a checkpoint: raw and EMA weights, per class, what is confused with what, how far confidence can be trusted.

Model, image size, preprocessing and, unless other data is named, the dataset come from the checkpoint;
so the first line of the table is what training logged.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from base import flags, idle, process
from base.errors import DataError, UsageError, printable, run

EPILOG = """examples:
  python validate.py checkpoints/best_resnet50_imagenet_1k.pt --data-dir ./data/imagenet
  python validate.py CHECKPOINT --image-sizes 224,256,288 --tta flip --recalibrate-bn
writes scores.json, per_class.csv, confusion.csv, confused_pairs.csv, confusion.png and reliability.png"""
RECALIBRATION_IMAGES = 4096  # of the training images; enough for a mean, seconds on a GPU
SHOWN = 5  # pairs and classes on the screen


def build_parser() -> flags.Parser:
    parser = flags.build_parser("validate.py", "Score a checkpoint on its validation images.", EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a best_*.pt or last_*.pt that train.py wrote"
    )
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--image-sizes",
        type=flags.listing(flags.number(int, 8, 4096)),
        default=(),
        metavar="PX,PX,...",
        help="sizes to test at, details for the first; empty: the checkpoint's",
    )
    group.add_argument(
        "--tta", default="none", choices=("none", "flip"), help="also with the mirror image's answer"
    )
    group.add_argument(
        "--recalibrate-bn",
        action="store_true",
        help=f"also with BatchNorm statistics from {RECALIBRATION_IMAGES} training images",
    )
    group.add_argument(
        "--out", default="", metavar="DIR", help="for the files; empty: validation/ beside the checkpoint"
    )
    group.add_argument(
        "--json", default="", metavar="FILE", help="a copy of scores.json; '-' is standard output"
    )
    group = flags.add_dataset_args(parser)
    group.description = "flags that are not given come from the checkpoint"
    flags.add_asking_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = flags.parse(build_parser(), argv)
    from harness import rundir
    from sources import layouts

    rundir.check_checkpoint(config.checkpoint)
    if "data_dir" in typed:
        layouts.check_dir(config.data_dir)
    if process.world_size() > 1:
        raise UsageError("validate.py runs on one device", "start it with python, not with torchrun")
    from analysis import predictions
    from base.device import init_runtime, memory_for

    runtime = init_runtime(config.device, config.amp)
    models, payload = predictions.open_models(config.checkpoint, "both", runtime)
    facts = payload["eval"]
    sizes = check_sizes(config.image_sizes or (facts["image_size"],), payload)
    if config.recalibrate_bn and payload["model_args"]["arch"] in idle.NO_BATCH_NORM:
        raise UsageError(
            "--recalibrate-bn would do nothing: the model has no BatchNorm", "leave --recalibrate-bn out"
        )
    data = rundir.with_saved_data(config, typed, payload["config"])
    notes = flags.refuse_idle([row for row in flags.TABLE if row.name in rundir.DATA_FLAGS], data, typed)
    index = layouts.index(**flags.data_args(data))
    for note in filter(None, (*notes, *index.notes, flags.workers_note(config.num_workers))):
        screen(config)(note)
    index = dataclasses.replace(index, mean=facts["mean"], std=facts["std"])  # what the model is used to
    positions = positions_of(facts, index, say=screen(config))
    found = []
    for size in sizes:
        with memory_for(
            f"{size} px, batch {config.batch_size}", "give a smaller --batch-size", runtime.device
        ):
            found += scores_at(size, config, runtime, models, facts, index, positions)
    main_line = next(line for line in found if line["weights"] == ("ema" if "ema" in models else "raw"))
    out = Path(config.out) if config.out else Path(config.checkpoint).parent / "validation"
    deliver(config, out, found, main_line, payload, index, positions, runtime)
    return 0


def screen(config):
    """Where the table goes: standard output, unless the JSON is to have it."""
    file = sys.stderr if config.json == "-" else sys.stdout
    return lambda text: print(printable(text), file=file, flush=True)


def check_sizes(sizes: tuple[int, ...], payload: dict) -> tuple[int, ...]:
    own = payload["eval"]["image_size"]
    if payload["model_args"]["arch"] == "vit_b_16" and set(sizes) != {own}:
        raise UsageError(
            f"vit_b_16 works at {own} px only, the size it was trained at", "leave --image-sizes out"
        )
    return sizes


def positions_of(facts: dict, index, say) -> list[int]:
    """The model's class for each class of the data. Raises DataError where the model does not know one."""
    from analysis.scores import match_classes

    positions, unknown = match_classes(facts["classes"], index.classes)
    if unknown:
        some = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        raise DataError(
            f"the model does not know {len(unknown)} of the data's {len(index.classes)} classes: {some} "
            f"(it was trained on {facts['dataset']}: {', '.join(facts['classes'][:5])}, ...)",
            "name the data it was trained on: --dataset NAME --data-dir DIR",
        )
    if len(positions) < len(facts["classes"]):
        say(
            f"note: the data has {len(positions)} of the model's {len(facts['classes'])} classes; "
            "it may still guess any of them"
        )
    return positions


def scores_at(size: int, config, runtime, models: dict, facts: dict, index, positions) -> list[dict]:
    """One line of the table for each set of weights, with and without what was asked for besides."""
    import torch

    from analysis import predictions
    from base.progress import Progress
    from dataloader import eval_loader
    from sources.index import SubsetSplit, balanced_subset

    shared = {
        "image_size": size,
        "batch_size": config.batch_size,
        "device": runtime.device,
        "crop": facts["crop"],
        "num_workers": min(config.num_workers, process.cores()),
    }
    asked = dict(models)
    if config.recalibrate_bn:
        count = min(RECALIBRATION_IMAGES, len(index.train))
        count = max(count // config.batch_size, 1) * config.batch_size  # whole batches: each counts the same
        ids = balanced_subset(index.train.labels, min(count, len(index.train)), seed=2)
        for name, model in models.items():
            loader = eval_loader(SubsetSplit(index.train, ids), index, **shared)
            with Progress(len(loader), f"BatchNorm of {name} at {size} px", unit="batches") as bar:
                asked[f"{name} bn"] = predictions.recalibrate(model, bar.over(loader), runtime)
    loader = eval_loader(index.val, index, **shared)
    lookup = torch.as_tensor(positions, device=runtime.device)
    with Progress(len(loader), f"validation at {size} px", unit="batches") as bar:
        answers = predictions.ask(
            asked,
            ((images, lookup[labels]) for images, labels in bar.over(loader)),
            runtime,
            flip=config.tta == "flip",
        )
    return [line_of(size, name, given, positions) for name, given in answers.items()]


def line_of(size: int, name: str, answers, positions) -> dict:
    """The scores of one set of answers; `answers` itself rides along for the details."""
    from analysis.scores import calibration, per_class

    top1, top5 = 100 * answers.right.mean(0)
    weights, *extra = name.split()
    return {
        "image_size": size,
        "weights": weights,
        "bn": "recalibrated" if "bn" in extra else "trained",
        "tta": "flip" if "flip" in extra else "none",
        "top1": float(top1),
        "top5": float(top5),
        "loss": float(answers.losses.mean(dtype=float)),
        "num_samples": len(answers.labels),
        "macro_f1": 100 * per_class(answers.labels, answers.guesses, positions).macro_f1,
        "ece": 100 * calibration(answers.confidence, answers.right[:, 0]).ece,
        "answers": answers,
    }


def table(lines: list[dict]) -> str:
    rows = ["   px  weights  BatchNorm     TTA    top-1   top-5    loss  macro F1  ECE %"]
    for line in lines:
        rows.append(
            f"{line['image_size']:>5}  {line['weights']:<7}  {line['bn']:<12}  {line['tta']:<4}  "
            f"{line['top1']:>6.2f}  {line['top5']:>6.2f}  {line['loss']:>6.3f}  {line['macro_f1']:>8.2f}  "
            f"{line['ece']:>5.1f}"
        )
    return "\n".join(rows)


def deliver(
    config, out: Path, lines: list[dict], chosen: dict, payload: dict, index, positions, runtime
) -> None:
    """The table and the worst on the screen; everything, of `chosen` in detail, into files."""
    from analysis import figures, score_figures
    from analysis.scores import calibration, confused_pairs, confusion, per_class
    from base import files

    say, facts, answers = screen(config), payload["eval"], chosen["answers"]
    classes, names = facts["classes"], [str(name).split(",")[0] for name in facts["class_names"]]
    matrix = confusion(answers.labels, answers.guesses, len(classes))
    pairs, reliable = confused_pairs(matrix), calibration(answers.confidence, answers.right[:, 0])
    report = per_class(answers.labels, answers.guesses, positions)
    of = f"{payload['model_args']['arch']} on {index.name}, {chosen['weights']} weights, {chosen['image_size']} px"
    say(
        f"{config.checkpoint}: epoch {len(payload['rows'])}, {len(index.val):,} images of {len(index.classes)} classes, "
        f"{runtime.device} ({runtime.precision})\n{table(lines)}"
    )
    say(worst(pairs, report, names, of))
    numbers = numbers_of(config, lines, chosen, payload, index, reliable, report, pairs)
    for name, text in tables_of(matrix, report, pairs, classes, names).items():
        files.write(out / name, text)
    files.write(out / "scores.json", files.json_text(numbers))
    present = [k for k in range(len(classes)) if matrix[k].any() or matrix[:, k].any()]
    back = {k: i for i, k in enumerate(present)}
    shown = [
        pair._replace(truth=back[pair.truth], guess=back[pair.guess]) for pair in pairs[: score_figures.PAIRS]
    ]
    picture = score_figures.confusion(
        matrix[present][:, present],
        [names[k] for k in present],
        shown,
        f"Confusion of {of}: {len(answers.labels):,} images, top-1 {chosen['top1']:.2f} %",
    )
    figures.save(picture, out / "confusion.png")
    figures.save(score_figures.reliability(reliable, f"Calibration of {of}"), out / "reliability.png")
    say(f"tables and pictures: {out}")
    if config.json == "-":
        print(files.json_text(numbers), end="")
    elif config.json:
        files.write(config.json, files.json_text(numbers))


def worst(pairs, report, names: list[str], of: str) -> str:
    lines = [f"most confused ({of}):"] if pairs else ["no mistakes"]
    support = dict(zip(report.classes.tolist(), report.support.tolist(), strict=True))
    for pair in pairs[:SHOWN]:
        lines.append(
            f"  {names[pair.truth]} taken for {names[pair.guess]}: {pair.times} of {support[pair.truth]}, {100 * pair.share:.0f} %"
        )
    weakest = [i for i in report.recall.argsort(kind="stable") if report.support[i] and report.recall[i] < 1][
        :SHOWN
    ]
    if weakest:
        shown = ", ".join(f"{names[report.classes[i]]} {100 * report.recall[i]:.0f} %" for i in weakest)
        lines.append(f"least often recognised: {shown}")
    return "\n".join(lines)


def numbers_of(
    config, lines: list[dict], chosen: dict, payload: dict, index, reliable, report, pairs
) -> dict:
    """Everything but the confusion matrix, JSON-ready."""
    classes, names = payload["eval"]["classes"], payload["eval"]["class_names"]

    results = [{key: value for key, value in line.items() if key != "answers"} for line in lines]
    return {
        "checkpoint": Path(config.checkpoint).name,
        "model_args": payload["model_args"],
        "epoch": len(payload["rows"]),
        "dataset": index.name,
        "fingerprint": index.fingerprint(),
        "results": results,
        "details_of": results[lines.index(chosen)],
        "calibration": {
            "edges": reliable.edges.tolist(),
            "count": reliable.count.tolist(),
            "accuracy": reliable.accuracy.tolist(),
            "confidence": reliable.confidence.tolist(),
            "ece": reliable.ece,
        },
        "per_class": [
            {
                "class": classes[k],
                "name": str(names[k]),
                "precision": float(p),
                "recall": float(r),
                "f1": float(f),
                "support": int(n),
            }
            for k, p, r, f, n in zip(
                report.classes.tolist(),
                report.precision,
                report.recall,
                report.f1,
                report.support,
                strict=True,
            )
        ],
        "confused_pairs": [
            {
                "truth": classes[p.truth],
                "guess": classes[p.guess],
                "truth_name": str(names[p.truth]),
                "guess_name": str(names[p.guess]),
                "times": p.times,
                "share": p.share,
            }
            for p in pairs[:100]
        ],
    }


def tables_of(matrix, report, pairs, classes: list[str], names: list[str]) -> dict[str, str]:
    """The CSV files, by name."""
    from base import files

    per_class = zip(
        report.classes.tolist(), report.precision, report.recall, report.f1, report.support, strict=True
    )
    return {
        "per_class.csv": files.csv_text(
            ("class", "name", "precision", "recall", "f1", "support"),
            ((classes[k], names[k], f"{p:.6f}", f"{r:.6f}", f"{f:.6f}", n) for k, p, r, f, n in per_class),
        ),
        "confusion.csv": files.csv_text(
            ("truth \\ guess", *classes), ((classes[k], *row) for k, row in enumerate(matrix.tolist()))
        ),
        "confused_pairs.csv": files.csv_text(
            ("truth", "guess", "truth name", "guess name", "times", "share"),
            (
                (
                    classes[p.truth],
                    classes[p.guess],
                    names[p.truth],
                    names[p.guess],
                    p.times,
                    f"{p.share:.6f}",
                )
                for p in pairs
            ),
        ),
    }


if __name__ == "__main__":
    sys.exit(run(main))
