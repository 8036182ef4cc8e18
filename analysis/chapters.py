"""The chapters of a report, made from the files of runs: nothing is trained or scored here."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import learning_curves, step_curves
from analysis.markdown import to_html
from analysis.page import Markup, Section, chart, details, facts, image, join, page, section, table, tag
from analysis.runs import (
    SCORE_COLUMNS,
    VALIDATED,
    RunFiles,
    changed_flags,
    differing_data,
    differing_flags,
    phases,
    shown,
    validated,
)
from base import flags
from base.progress import duration

CAPTIONS = {
    "misclassified.png": "The most confident mistakes",
    "gradcam.png": "Grad-CAM: where the evidence for the predicted class is",
    "gradcam_misclassified.png": "Grad-CAM of the most confident mistakes: evidence for prediction and truth",
    "batch.png": "What training sees: augmented and mixed images with their soft labels",
    "kernels.png": "First-layer kernels",
    "filtered.png": "Learned filters applied to an image",
    "feature_maps.png": "Feature maps at every resolution",
    "stride_padding.png": "How stride and padding change the response of a filter",
    "loss_landscape.png": "The loss around the weights, before and after training",
    "lr_finder.png": "LR range test",
}
DRAWN_AS_CHARTS = ("curves.png", "lr.png", "steps.png", "compare.png")
RELOAD = 30  # seconds
MOST_ROWS = 20  # of a table that is not folded away


def document(
    runs: Sequence[RunFiles], studies: Sequence[Path], notes: dict[str, list[str]], reload: bool = False
) -> str:
    """Return the page.

    notes:  by the name of a run, what could not be drawn
    reload: whether the page loads itself again and again, because it is written after each epoch
    """

    def pictures(run: RunFiles) -> Markup:
        failed = [tag("p", note, class_="soft") for note in notes.get(run.name, [])]
        return join([galleries(run), *failed])

    sections = [study(folder, k) for k, folder in enumerate(studies)]
    if runs:
        sections += [
            overview(runs),
            curves(runs),
            *steps(runs),
            each_run("Validation", "validation", runs, validation),
            each_run("Pictures", "pictures", runs, pictures),
            each_run("Environment and flags", "environment", runs, environment),
        ]
    names = [source.name for source in (*runs, *studies)]
    title = f"Training report: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    lead = f"{len(runs)} run{'s' * (len(runs) != 1)}" if runs else "From the files of the study's runs"
    lead += f"; this page reloads itself every {RELOAD} seconds while training goes on" if reload else ""
    return page(title, lead, sections, RELOAD if reload else 0)


def overview(runs: Sequence[RunFiles]) -> Section:
    """Summarize one run, or compare several in a table with the flags that differ."""
    if len(runs) == 1:
        return section("Summary", "summary", summary(runs[0]))
    content = [table(SCORE_COLUMNS, [run.scores() for run in runs])]
    rows = []
    for name in differing_flags(runs):
        values = [shown(run.config[name]) if name in run.config else "?" for run in runs]
        rows.append([flag(name), *values])
    rows += [[name, *(run.env.get(name, "?") for run in runs)] for name in differing_data(runs)]
    if rows:
        content += [tag("h3", "What differs"), table(["flag or data", *(run.name for run in runs)], rows)]
    else:
        content.append(
            tag("p", "All flags that affect training are the same, and so is the number of images.")
        )
    return section("Summary", "summary", *content)


def flag(name: str) -> Markup:
    return tag("code", flags.dashed(name))


def summary(run: RunFiles) -> Markup:
    """Return the numbers that a reader looks for first."""
    config, last, best = run.config, run.rows[-1], run.best
    values: dict[str, object] = {}
    if best:
        weights = "EMA" if run.score.startswith("ema") else "raw"
        values[f"best top-1, {weights} weights"] = f"{run.best_top1:.2f} %"
        values["at epoch"] = best["epoch"]
        top5 = best.get(run.score.replace("top1", "top5"))
        if top5 is not None:
            values["its top-5"] = f"{top5:.2f} %"
    if last.get("train_top1") is not None and last.get("val_top1") is not None:
        gap = last["train_top1"] - last["val_top1"]
        values["training - validation, points"] = f"{gap:+.1f}"
    values["epochs"] = f"{len(run.rows)} of {config.get('epochs', '?')}"
    values["time"] = duration(3600 * run.hours)
    if last.get("images_per_second"):
        values["images/s, last epoch"] = f"{last['images_per_second']:,.0f}"
    if "arch" in config:
        values["architecture"] = config["arch"]
    if run.dataset:
        values["dataset"] = run.dataset
    sizes = [f"{size}\N{NO-BREAK SPACE}px" for _, size, _ in phases(run.rows)]
    values["image sizes"] = " → ".join(sizes)
    if bad := sum(row.get("bad_steps") or 0 for row in run.rows):
        values["steps with a non-finite loss or gradient"] = bad
    return facts(values)


def curves(runs: Sequence[RunFiles]) -> Section:
    """Draw the charts of one run or of several, with the table of every epoch folded away."""
    charts = [chart(fig) for fig in learning_curves.charts(runs)]
    return section("Curves", "curves", tag("div", *charts, class_="charts"), *map(epochs_table, runs))


def steps(runs: Sequence[RunFiles]) -> list[Section]:
    """Draw the charts over the steps, if the runs logged any."""
    charts = [chart(fig) for fig in step_curves.charts(runs)]
    note = tag("p", step_curves.NOTE * (len(runs) == 1) + step_curves.SMOOTHED, class_="soft")
    return [section("Steps", "steps", note, tag("div", *charts, class_="charts"))] if charts else []


def epochs_table(run: RunFiles) -> Markup:
    columns = [name for name in run.rows[0] if name != "best"]

    def cell(name: str, value: object) -> str:
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        if name == "lr":
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = [[cell(name, row.get(name)) for name in columns] for row in run.rows]
    header = [name.replace("_", " ") for name in columns]
    return details(f"Every epoch of {run.name}", table(header, rows))


def each_run(
    title: str, anchor: str, runs: Sequence[RunFiles], content_of: Callable[[RunFiles], Markup]
) -> Section:
    """Return a chapter with content_of(run) of each run, under the run's name if there are several."""
    parts = []
    for run in runs:
        parts += [tag("h3", run.name)] if len(runs) > 1 else []
        parts.append(content_of(run))
    return section(title, anchor, *parts)


def validation(run: RunFiles) -> Markup:
    """Return what validate.py wrote beside the checkpoint, or the command that writes it."""
    folder, scores = run.path / "validation", run.validation
    if not scores:
        command = tag("code", f"python validate.py {run.checkpoint() or 'CHECKPOINT'}")
        return tag("p", "No validation details yet: run ", command)
    what = f"Of {scores.get('checkpoint', 'a checkpoint')}, epoch {scores.get('epoch', '?')}"
    parts = [table([*VALIDATED.values()], validated(scores), what), class_tables(scores)]
    for name, caption in (("confusion.png", "Confusion matrix"), ("reliability.png", "Calibration")):
        if (folder / name).is_file():
            parts.append(image(folder / name, caption))
    return join(parts)


def class_tables(scores: dict) -> Markup:
    """Return the most confused pairs beside the hardest classes, with all classes folded away if many."""
    pairs = []
    for pair in scores["confused_pairs"][:MOST_ROWS]:
        share = f"{100 * pair['share']:.1f}"
        pairs.append([pair["truth_name"], pair["prediction_name"], pair["times"], share])
    header = ["truth", "prediction", "times", "% of its class"]
    confused = table(header, pairs, "Most confused pairs")
    rows = []
    for one in sorted(scores["per_class"], key=lambda one: one["recall"]):
        percent = [f"{100 * one[key]:.1f}" for key in ("precision", "recall", "f1")]
        rows.append([one["name"], *percent, one["support"]])
    header = ["class", "precision %", "recall %", "F1 %", "images"]
    many = len(rows) > MOST_ROWS
    caption = f"The {MOST_ROWS} hardest classes" if many else "Classes, hardest first"
    hardest = table(header, rows[:MOST_ROWS], caption)
    every = [details(f"All {len(rows)} classes", table(header, rows))] if many else []
    return join([tag("div", confused, hardest, class_="charts"), *every])


def galleries(run: RunFiles) -> Markup:
    """Return the pictures that commands left in plots/, the known ones first, and lr_finder.png."""
    paths = [*sorted((run.path / "plots").glob("*.png")), run.path / "lr_finder.png"]
    found = {path.name: path for path in paths if path.name not in DRAWN_AS_CHARTS and path.is_file()}
    if not found:
        commands = "gradcam, misclassified, batch, filters or loss_landscape"
        return tag("p", f"No pictures yet. Draw them with python -m analysis.NAME, where NAME is {commands}.")
    names = [*(name for name in CAPTIONS if name in found), *(name for name in found if name not in CAPTIONS)]
    return join(image(found[name], CAPTIONS.get(name, name)) for name in names)


def environment(run: RunFiles) -> Markup:
    """Return the machine, the versions, the command line and all flags."""
    rows = [[key.replace("_", " "), shown(value)] for key, value in run.env.items() if key != "command"]
    parts = [table(["environment", ""], rows)] if rows else [tag("p", "There is no env.json.")]
    if run.env.get("command"):
        parts.append(tag("p", "Command: ", tag("code", run.env["command"])))
    changed = [[flag(name), *values] for name, values in changed_flags(run.config).items()]
    if changed:
        parts.append(table(["flag", "here", "default"], changed, "Flags that are not at their default"))
    every = [[flag(name), shown(value)] for name, value in run.config.items()]
    return join([*parts, details("All flags", table(["flag", "value"], every))])


def study(folder: Path, number: int) -> Section:
    """Return the text, pictures and table that ablation_runs.report wrote into a study's directory."""
    parts = [to_html((folder / "summary.md").read_text(encoding="utf-8"), folder)]
    if (folder / "summary.csv").is_file():
        with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        rows = [row for row in rows if len(row) == len(header)]
        parts.append(details("Every run of the study", table(header, rows)))
    return section(f"Study {folder.name}", f"study{number}", *parts)
