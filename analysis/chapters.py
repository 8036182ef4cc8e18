"""The chapters of a report: from the files of runs to the markup of each section.

Only files are read here; nothing is trained, scored or drawn. `report` decides which runs and where to.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from analysis import runs as reading
from analysis.markdown import to_html
from analysis.page import Markup, details, facts, image, join, section, table, tag
from analysis.runs import RunFiles, series, shown
from analysis.svg import Line, chart
from base import flags
from base.progress import duration

ORANGE, BLUE, VERMILLION = 4, 0, 1  # colours of the page, as in plots
# What the pictures in plots/ show; curves.png and lr.png are drawn anew, with hover.
CAPTIONS = {
    "misclassified.png": "The surest mistakes",
    "gradcam.png": "Grad-CAM: where the evidence for the guessed class is",
    "gradcam_misclassified.png": "Grad-CAM of the surest mistakes: evidence for the guess and for the truth",
    "batch.png": "What training sees: augmented and mixed images with their soft labels",
    "kernels.png": "First-layer kernels",
    "filtered.png": "Learned filters applied to an image",
    "feature_maps.png": "Feature maps at every resolution",
    "stride_padding.png": "What stride and padding do to a filter's answer",
    "loss_landscape.png": "The loss around the weights, before and after training",
    "lr_finder.png": "LR range test",
}
REDRAWN = ("curves.png", "lr.png", "compare.png")
ENOUGH_ROWS = 20


def summary(run: RunFiles) -> Markup:
    """The numbers one looks for first."""
    config, last, best = run.config, run.rows[-1], run.best
    pairs: list[tuple[str, object]] = []
    if best:
        weights = "EMA" if run.score.startswith("ema") else "raw"
        pairs += [
            ("best top-1", f"{run.best_top1:.2f} %"),
            ("at epoch", f"{best['epoch']} ({weights} weights)"),
        ]
        top5 = best.get(run.score.replace("top1", "top5"))
        pairs += [("its top-5", f"{top5:.2f} %")] if top5 is not None else []
    gap = last.get("train_top1"), last.get("val_top1")
    if None not in gap:
        pairs.append(("training - validation, last epoch", f"{gap[0] - gap[1]:+.1f} points of top-1"))
    pairs += [
        ("epochs", f"{len(run.rows)} of {config.get('epochs', '?')}"),
        ("time", duration(3600 * run.hours)),
    ]
    if last.get("images_per_second"):
        pairs.append(("training speed, last epoch", f"{last['images_per_second']:,.0f} images/s"))
    pairs += [
        (name, shown(config[key]))
        for key, name in (("arch", "architecture"), ("dataset", "dataset"))
        if key in config
    ]
    pairs.append(("image sizes", " → ".join(f"{size} px" for _, size, _ in reading.phases(run.rows))))
    bad = sum(row.get("bad_steps") or 0 for row in run.rows)
    return facts(pairs + ([("steps that were not finite", bad)] if bad else []))


def overview(runs: Sequence[RunFiles]):
    """Summary of one run; a table of several, with the flags that differ."""
    if len(runs) == 1:
        return section("Summary", "summary", summary(runs[0]))
    content = [table(reading.SCORES, [reading.scores(run) for run in runs])]
    differing = reading.differing_flags(runs)
    if differing:
        rows = [
            [
                tag("code", flags.dashed(name)),
                *(shown(run.config[name]) if name in run.config else "?" for run in runs),
            ]
            for name in differing
        ]
        content += [tag("h3", "Flags that differ"), table(["flag", *(run.name for run in runs)], rows)]
    else:
        content.append(tag("p", "No flag that changes training differs."))
    return section("Summary", "summary", *content)


def curves(runs: Sequence[RunFiles]):
    """Charts: every curve of one run, or one curve of every run."""
    charts = charts_of_one(runs[0]) if len(runs) == 1 else charts_of_many(runs)
    return section("Curves", "curves", tag("div", *charts, class_="charts"), *map(epochs_table, runs))


def charts_of_one(run: RunFiles) -> list[Markup]:
    marks = [(first, f"{size} px, batch {batch}") for first, size, batch in reading.phases(run.rows)]
    best = (run.best["epoch"], run.best_top1) if run.best else None

    def lines(kind: str, training: str) -> list[Line]:
        return [
            Line(training, *series(run.rows, f"train_{kind}"), ORANGE, 2),
            Line("validation, raw", *series(run.rows, f"val_{kind}"), BLUE, 1),
            Line("validation, EMA", *series(run.rows, f"ema_val_{kind}"), VERMILLION),
        ]

    speed = [Line("training speed", *series(run.rows, "images_per_second"), BLUE)]
    return [
        chart("Top-1", "%", lines("top1", "training sample, clean"), marks=marks, best=best),
        chart("Loss", "nats", lines("loss", "training, mixed targets"), spec=".4f", marks=marks),
        chart(
            "Learning rate",
            "at the epoch's end",
            [Line("lr", *series(run.rows, "lr"), BLUE)],
            spec=".3e",
            marks=marks,
        ),
        chart("Training speed", "images/s", speed, spec=",.0f", marks=marks),
    ]


def charts_of_many(runs: Sequence[RunFiles]) -> list[Markup]:
    def lines(column) -> list[Line]:
        return [Line(run.name, *series(run.rows, column(run)), k, k // 7 % 4) for k, run in enumerate(runs)]

    return [
        chart("Validation top-1", "%, EMA weights where kept", lines(lambda run: run.score)),
        chart(
            "Validation loss",
            "nats, the same weights",
            lines(lambda run: run.score.replace("top1", "loss")),
            spec=".4f",
        ),
        chart("Training loss", "nats, against mixed targets", lines(lambda run: "train_loss"), spec=".4f"),
        chart("Learning rate", "at the epoch's end", lines(lambda run: "lr"), spec=".3e"),
    ]


def epochs_table(run: RunFiles) -> Markup:
    columns = [name for name in run.rows[0] if name not in ("better", "best")]

    def cell(name: str, value: object) -> str:
        if value is None or not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.2e}" if name == "lr" else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = [[cell(name, row.get(name)) for name in columns] for row in run.rows]
    return details(f"Every epoch of {run.name}", table([name.replace("_", " ") for name in columns], rows))


def validation(run: RunFiles) -> Markup:
    """What validate.py wrote beside the checkpoint, or how to have it written."""
    from base import schemas

    folder = run.path / "validation"
    scores = schemas.read_json(folder / "scores.json", schemas.Scores, "run validate.py again", missing={})
    if not scores:
        return tag(
            "p",
            "No details of the validation: run ",
            tag("code", f"python validate.py {run.checkpoint() or 'CHECKPOINT'}"),
        )
    wanted = {
        "image_size": "px",
        "weights": "weights",
        "bn": "BatchNorm",
        "tta": "TTA",
        "top1": "top-1 %",
        "top5": "top-5 %",
        "loss": "loss",
        "macro_f1": "macro F1",
        "ece": "ECE %",
    }
    rows = [
        [f"{line[key]:.3f}" if isinstance(line.get(key), float) else line.get(key, "-") for key in wanted]
        for line in scores["results"]
    ]
    parts = [table(list(wanted.values()), rows)]
    pairs = [
        [p["truth_name"], p["guess_name"], p["times"], f"{100 * p['share']:.1f}"]
        for p in scores["confused_pairs"]
    ]
    confused = table(
        ["is", "taken for", "times", "% of its class"], pairs[:ENOUGH_ROWS], "Most confused pairs"
    )
    classes = sorted(scores["per_class"], key=lambda c: c["recall"])
    cells = [
        [c["name"], *(f"{100 * c[key]:.1f}" for key in ("precision", "recall", "f1")), c["support"]]
        for c in classes
    ]
    header = ["class", "precision %", "recall %", "F1 %", "images"]
    if len(cells) <= ENOUGH_ROWS:
        parts.append(tag("div", confused, table(header, cells, "Classes, hardest first"), class_="charts"))
    else:
        hardest = table(header, cells[:ENOUGH_ROWS], f"The {ENOUGH_ROWS} hardest classes")
        parts.append(tag("div", confused, hardest, class_="charts"))
        parts.append(details(f"All {len(cells)} classes", table(header, cells)))
    for name, words in (("confusion.png", "Confusion matrix"), ("reliability.png", "Calibration")):
        if (folder / name).is_file():
            parts.append(image(folder / name, words))
    return join(parts)


def galleries(run: RunFiles) -> Markup:
    """Every picture that a command left in plots/, known ones first, and lr_finder.png."""
    found = {
        path.name: path for path in sorted((run.path / "plots").glob("*.png")) if path.name not in REDRAWN
    }
    if (run.path / "lr_finder.png").is_file():
        found["lr_finder.png"] = run.path / "lr_finder.png"
    names = sorted(found, key=lambda name: ([*CAPTIONS, name].index(name), name))
    if not names:
        return tag(
            "p", "No pictures yet: python -m analysis.gradcam, misclassified, batch, filters, loss_landscape."
        )
    return join([image(found[name], CAPTIONS.get(name, name)) for name in names])


def environment(run: RunFiles) -> Markup:
    """Machine, versions, command, and every flag."""
    rows = [[key.replace("_", " "), shown(value)] for key, value in run.env.items() if key != "command"]
    parts = [table(["environment", ""], rows)] if rows else [tag("p", "No env.json.")]
    if run.env.get("command"):
        parts.append(tag("p", "Command: ", tag("code", run.env["command"])))
    untypical = [
        [tag("code", flags.dashed(name)), *pair] for name, pair in reading.untypical_flags(run.config).items()
    ]
    if untypical:
        parts.append(table(["flag", "here", "default"], untypical, "Flags that are not the default"))
    every = [[tag("code", flags.dashed(name)), shown(value)] for name, value in run.config.items()]
    return join([*parts, details("Every flag", table(["flag", "value"], every))])


def side_by_side(title: str, anchor: str, runs: Sequence[RunFiles], what):
    """A chapter with what(run) of each run, under the run's name where there are several."""
    parts = []
    for run in runs:
        parts += [tag("h3", run.name)] if len(runs) > 1 else []
        parts.append(what(run))
    return section(title, anchor, *parts)


def study(folder: Path, number: int):
    """A study's directory as ablation_runs.report left it: its text with the pictures, and its table."""
    text = (folder / "summary.md").read_text(encoding="utf-8")
    parts = [to_html(text, folder)]
    if (folder / "summary.csv").is_file():
        with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        parts.append(
            details("Every run of the study", table(header, [row for row in rows if len(row) == len(header)]))
        )
    return section(f"Study {folder.name}", f"study{number}", *parts)
