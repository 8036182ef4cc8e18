"""The text of a report: tables and a conclusion from the results of a study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ablation_runs import results
from ablation_runs.results import BETTER, NOISE, UNKNOWN, WORSE, Difference, Result
from ablation_runs.study import Study
from base import files, flags

CSV_SCORES = ("train_top1", "val_top1", "val_top5", "ema_val_top1", "gap")
METRICS = {"val_top1": "top-1", "ema_val_top1": "EMA top-1"}
GAP_WORDS = {BETTER: "larger", WORSE: "smaller"}
HOW_TO_READ = (
    "Scores are top-1 of the last epoch, in percent: mean ± standard deviation over seeds. The gap is "
    "training minus validation top-1. Differences are to the first variant, paired by seed, with a 95 % t "
    "interval; 'better' and 'worse' hold after Holm's correction for the number of variants."
)


def markdown(study: Study, preset: str, runs: list[Result], pictures: list[str]) -> str:
    """Return the report; `pictures` are file names beside it."""
    parts = [
        f"# {study.title(preset)}",
        study.question,
        variant_table(study, preset, runs),
        f"**Conclusion.** {conclusion(study, runs)}",
    ]
    if study.published:
        parts.append(f"**Published result** (document `{study.source}`, one seed): {study.published}")
    parts += [ema_table(study, runs), effect_table(study, runs)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    notes = [*study.notes.splitlines(), HOW_TO_READ, *run_notes(study, runs)]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(filter(None, parts))


def variant_table(study: Study, preset: str, runs: list[Result]) -> str:
    """Return a table with a row per variant: last epoch, mean and spread over seeds."""
    scores, gaps = (results.compare(runs, study, column) for column in (study.metric, "gap"))
    rows = []
    for variant in study.variants:
        if not (own := results.of_variant(runs, variant)):
            continue
        words = " ".join(flags.to_argv(study.own_flags(variant, preset)))
        row = [f"**{variant}**", f"`{words}`" if words else "base", count_seeds(own)]
        for column in ("val_top1", "ema_val_top1", "train_top1", "gap"):
            row.append(spread(results.by_seed(runs, variant, column)))
        row += [difference(scores.get(variant), {}), difference(gaps.get(variant), GAP_WORDS)]
        row.append(average([run.images_per_second for run in own], ",.0f"))
        row.append(average([run.minutes for run in own], ".1f"))
        rows.append([*row, study.published_scores.get(variant, "-")])
    header = ["variant", "flags", "seeds", "top-1", "EMA top-1", "train top-1", "gap"]
    header += [f"{METRICS[study.metric]} difference", "gap difference", "images/s", "minutes", "published"]
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def count_seeds(runs: list[Result]) -> str:
    """Return "3", or for instance "2, 1 failed"."""
    others = sorted({run.status for run in runs} - {"done"})
    counts = {word: sum(run.status == word for run in runs) for word in ("done", *others)}
    return ", ".join(str(n) if word == "done" else f"{n} {word}" for word, n in counts.items())


def spread(scores: dict[int, float]) -> str:
    """Return the mean and standard deviation over seeds."""
    values = list(scores.values())
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}" if values else "-"


def average(values: list[float | None], spec: str) -> str:
    known = [value for value in values if value]
    return format(sum(known) / len(known), spec) if known else "-"


def difference(d: Difference | None, words: dict[str, str]) -> str:
    """Return the difference with its verdict, which `words` may replace."""
    words = {UNKNOWN: "one seed"} | words
    return f"{interval(d)}: {words.get(d.verdict, d.verdict)}" if d else "-"


def interval(d: Difference) -> str:
    """Return "+1.20 [+0.40, +2.00]", or the difference alone for a single seed."""
    return f"{d.mean:+.2f}" + ("" if d.low is None else f" [{d.low:+.2f}, {d.high:+.2f}]")


def conclusion(study: Study, runs: list[Result]) -> str:
    """Say what the runs show, and no more."""
    baseline, sentences = next(iter(study.variants)), []
    differences = results.compare(runs, study, study.metric)
    for variant, d in differences.items():
        if d and d.verdict in (BETTER, WORSE):
            size = f"{abs(d.mean):.1f} points of {METRICS[study.metric]}"
            evidence = f"95 % interval {d.low:+.1f} to {d.high:+.1f}, {d.n} seeds"
            sentences.append(f"**{variant}** is {d.verdict} than {baseline} by {size} ({evidence}).")
    if noise := [variant for variant, d in differences.items() if d and d.verdict == NOISE]:
        names = listed(noise) if len(noise) <= 8 else f"the other {len(noise)} variants"
        sentences.append(f"No conclusion about {names}: the difference to {baseline} is within the noise.")
    if unknown := [variant for variant, d in differences.items() if not d or d.verdict == UNKNOWN]:
        sentences.append(f"Not enough finished pairs of runs to judge {listed(unknown)}.")
    if stuck := results.at_chance(runs, study):
        level = f"{results.chance(runs):.2g} %; the interval ends below twice that"
        sentences.append(f"At chance ({level}): {listed(stuck)}.")
    for variant, d in results.compare(runs, study, "gap").items():
        if d and d.verdict in GAP_WORDS:
            size = f"{abs(d.mean):.1f} points {GAP_WORDS[d.verdict]}"
            sentences.append(f"The gap between training and validation is {size} with {variant}.")
    effects = results.effects(runs, study, study.metric)
    if matter := [flags.dashed(e.flag) for e in effects if e.p is not None and e.p < 1 - results.LEVEL]:
        sentences.append(f"Flags that matter beyond the noise, most important first: {listed(matter)}.")
    if broken := sorted({f"{run.variant} ({run.status})" for run in runs if run.status != "done"}):
        sentences.append(f"Not every run finished: {listed(broken)}.")
    return " ".join(sentences) or "No variant to compare yet."


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def ema_table(study: Study, runs: list[Result]) -> str:
    """Return a table of EMA against raw weights; empty if no variant has an EMA."""
    rows = []
    for variant in study.variants:
        if gain := results.ema_gain(runs, variant):
            scores = (results.by_seed(runs, variant, column) for column in ("val_top1", "ema_val_top1"))
            rows.append([variant, *map(spread, scores), interval(gain)])
    heading = "EMA against raw weights of the same run, last epoch:\n\n"
    return heading + table(["variant", "raw", "EMA", "EMA - raw"], rows) if rows else ""


def effect_table(study: Study, runs: list[Result]) -> str:
    """Return a table of a grid's flags, ranked by the variance they explain; empty for other studies."""
    rows = []
    for effect in results.effects(runs, study, study.metric):
        means = ", ".join(f"{value}: {mean:.2f}" for value, mean in effect.means.items())
        p = "-" if effect.p is None else f"{effect.p:.3f}"
        share = f"{100 * effect.share:.0f} %"
        rows.append([flags.dashed(effect.flag), means, f"{effect.span:.2f}", share, p])
    header = ["flag", "mean top-1 at each value", "best - worst", "share of variance", "p (F test, Holm)"]
    return table(header, rows) if rows else ""


def run_notes(study: Study, runs: list[Result]) -> list[str]:
    """Return notes on the validation set and the machine, and commands to try next."""
    notes = []
    if image := results.one_image(runs):
        notes.append(
            "The intervals cover the choice of the seeds, but not that of the validation images: there are "
            f"{100 / image:,.0f}, and each is worth {image:.2g} points."
        )
    if env := next((run.env for run in runs if run.env), None):
        notes.append(
            f"Machine: {env.get('device')}, {env.get('cores')} cores, {env.get('threads')} torch threads, "
            f"{env.get('precision')}, torch {env.get('torch')}, commit {env.get('commit') or 'unknown'}."
        )
    found = [path for run in runs if run.directory for path in sorted(run.directory.glob("best_*.pt"))]
    best = found[0] if found else "CHECKPOINT"
    return notes + [f"To inspect a model: `{c.format(best=best, data='DATA')}`" for c in study.commands]


def csv_table(runs: list[Result]) -> str:
    """Return a CSV with one line per run."""
    header = ("variant", "seed", "status", "epochs", *CSV_SCORES, "images_per_second", "minutes", "commit")
    rows = []
    for run in runs:
        row = [run.variant, run.seed, run.status, len(run.rows), *map(run.score, CSV_SCORES)]
        row += [run.images_per_second, run.minutes, run.env.get("commit")]
        rows.append([round(value, 4) if isinstance(value, float) else value for value in row])
    return files.csv_text(header, rows)
