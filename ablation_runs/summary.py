"""The text of a report: tables and a conclusion from the results of a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ablation_runs import results, statistics
from ablation_runs.results import Power, Result
from ablation_runs.statistics import BETTER, EXPLORATORY, MIN_PAIRS, TOO_FEW, UNDECIDED, WORSE, Difference
from ablation_runs.study import Study
from ablation_runs.tables import Table
from base import files, flags

CSV_SCORES = ("train_top1", "val_top1", "val_top5", "ema_val_top1", "gap")
METRICS = {"val_top1": "top-1", "ema_val_top1": "EMA top-1"}
GAINS = {  # table -> its title, the column and heading of a score, and those of what it is compared with
    "ema": ("EMA against raw weights of the same run, last epoch:", "ema_val_top1", "EMA", "val_top1", "raw"),
    "batch_norm": (
        "BatchNorm statistics of the EMA weights, re-estimated from training images before they are scored:",
        "ema_bn_val_top1", "re-estimated", "ema_val_top1", "as trained",
    ),
}  # fmt: skip
GAP_WORDS = {BETTER: "larger", WORSE: "smaller"}
MOST_SEEDS = 10  # that a pilot asks for
SAME_LOAD = 1.5  # times the lowest load, if speeds are to be compared
HOW_TO_READ = f"""\
Scores are top-1 of the last epoch, in percent: mean ± standard deviation over seeds. The gap is training \
minus validation top-1.
Differences are from the first variant, paired by seed, with a 95 % t interval over seeds. 'better' and \
'worse' need {MIN_PAIRS} pairs and two tests that agree: the interval excludes zero, and p is at most 0.05. \
p comes from flipping the signs of the seeds' differences, and is adjusted for all primary comparisons of \
the study (max-t); the intervals are not. Gaps and gains of the EMA are tested as families of their own.
A verdict is about other seeds on these images. The interval over seeds and images also covers the choice of \
the validation images; it decides nothing."""
HELD_OUT = (
    "Choices are made on {held} images held out of training. The scores are those of the official validation "
    "images ({scored}), which were scored once, after the last epoch."
)


def markdown(study: Study, preset: str, runs: list[Result], pictures: list[str]) -> str:
    """Return the report; `pictures` are file names beside it."""
    parts = [f"# {study.title(preset)}", study.question, f"**Conclusion.** {conclusion(study, runs)}"]
    if study.published:
        parts.append(f"**Published result** (document `{study.source}`, one seed): {study.published}")
    parts.append(other_flags(study, preset, runs))
    parts += [table.markdown() for table in tables(study, preset, runs)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    notes = [*study.notes.splitlines(), *HOW_TO_READ.splitlines(), *run_notes(study, runs)]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(filter(None, parts))


def other_flags(study: Study, preset: str, runs: list[Result]) -> str:
    """Name the runs that were started with other flags than the study's; '' if there are none."""
    found = []
    for run in (run for run in runs if run.record.get("flags")):
        own = set(flags.to_argv(study.flags_of(run.variant, preset) | {"seed": run.seed}))
        had = set(run.record["flags"])
        if other := [*sorted(had - own), *(f"without {word}" for word in sorted(own - had))]:
            found.append(f"{run.variant}-seed{run.seed} (`{' '.join(other)}`)")
    return f"**Not all runs have the flags of the study:** {', '.join(found)}." if found else ""


def tables(study: Study, preset: str, runs: list[Result]) -> list[Table]:
    """Return the report's tables that have rows, without their empty columns."""
    found = [
        variant_table(study, preset, runs),
        comparison_table(study, runs, study.metric),
        comparison_table(study, runs, "gap"),
        *(gain_table(study, runs, name) for name in GAINS),
        effect_table(study, runs),
        false_verdict_table(study, runs),
    ]
    return [table.without_empty_columns() for table in found if table]


def variant_table(study: Study, preset: str, runs: list[Result]) -> Table:
    """Return a table with a row per variant: last epoch, mean and spread over seeds.

    Speeds are left out where the runs had machines of different load.
    """
    rows, loads = [], [load for run in runs for load in run.record.get("load", ())]
    comparable = not loads or max(loads) <= SAME_LOAD * max(1.0, min(loads))
    for variant in study.variants:
        if not (own := results.of_variant(runs, variant)):
            continue
        words = " ".join(flags.to_argv(study.own_flags(variant, preset)))
        row = [f"**{variant}**", f"`{words}`" if words else "base", count_seeds(own)]
        for column in ("val_top1", "ema_val_top1", "train_top1", "gap"):
            row.append(spread(results.by_seed(runs, variant, column)))
        held = {run.seed: run.logged(study.metric) for run in own if run.held_out}
        row.append(spread({seed: score for seed, score in held.items() if score is not None}))
        row.append(average([run.images_per_second for run in own], ",.0f") if comparable else "-")
        row.append(average([run.minutes for run in own], ".1f") if comparable else "-")
        rows.append([*row, study.published_scores.get(variant, "-")])
    header = ["variant", "flags", "seeds", "top-1", "EMA top-1", "train top-1", "gap", "held-out top-1"]
    return Table("variants", "", [*header, "images/s", "minutes", "published"], rows)


def comparison_table(study: Study, runs: list[Result], column: str) -> Table:
    """Return the differences of `column` from the first variant with their verdicts; none for a grid."""
    gap, rows = column == "gap", []
    for variant, d in results.compare(runs, study, column).items() if not study.grid else ():
        both = None if gap else results.seeds_and_images(runs, study, variant)
        row = [f"**{variant}**", str(d.n), f"{d.mean:+.2f}", bounds(d.interval), bounds(both)]
        verdict = GAP_WORDS.get(d.verdict, d.verdict) if gap else d.verdict
        rows.append([*row, statistics.p_value(d.p).removeprefix("= "), verdict])
    what = "in the gap, in points" if gap else f"in {METRICS[column]}, in points (+ is better)"
    title = f"Differences from {next(iter(study.variants))} {what}:"
    header = ["variant", "pairs", "difference", "95 % t interval", "over seeds and images"]
    return Table("gaps" if gap else "comparisons", title, [*header, "p (max-t)", "verdict"], rows)


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


def bounds(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "-"


def conclusion(study: Study, runs: list[Result]) -> str:
    """Say what the runs show, and no more."""
    sentences = [] if study.grid else verdicts(study, runs)
    if stuck := results.at_chance(runs, study):
        level = f"{results.chance(runs):.2g} %; the interval ends below twice that"
        sentences.append(f"At chance ({level}): {listed(stuck)}.")
    for variant, d in results.compare(runs, study, "gap").items():
        if d.verdict in GAP_WORDS:
            size = f"{abs(d.mean):.1f} points {GAP_WORDS[d.verdict]}"
            sentences.append(f"The gap between training and validation is {size} with {variant}.")
    for variant, d in results.gains(runs, study, "ema_bn_val_top1", "ema_val_top1").items():
        sentences.append(f"{variant}: BatchNorm statistics re-estimated, {d.mean:+.1f} points: {d.verdict}.")
    effects = results.effects(runs, study, study.metric)
    if matter := [flags.dashed(e.flag) for e in effects if e.p is not None and e.p <= statistics.ALPHA]:
        sentences.append(f"Flags that matter beyond the noise, most important first: {listed(matter)}.")
    elif effects:
        sentences.append("Undecided: no flag of the grid matters beyond the noise.")
    for f in results.false_verdicts(runs, study):
        share, sets = 100 * f.decided / f.times, f" of each of {f.comparisons} variants" * (f.comparisons > 1)
        pairings = f"Of {f.times} random pairings of {f.pairs} pairs{sets}"
        sentences.append(f"{pairings}, {share:.1f} % were decided wrongly.")
    if broken := sorted({f"{run.variant} ({run.status})" for run in runs if run.status != "done"}):
        sentences.append(f"Not every run finished: {listed(broken)}.")
    if power := results.power(runs, study):
        sentences.append(power_line(study, power, results.power(runs, study, most=2) or power))
    return " ".join(sentences) or "No variant to compare yet."


def verdicts(study: Study, runs: list[Result]) -> list[str]:
    """Return a sentence for each variant that differs, and one for each reason to say nothing."""
    first, sentences = next(iter(study.variants)), []
    found = results.compare(runs, study, study.metric)
    for variant, d in found.items():
        if d.verdict in (BETTER, WORSE):
            size = f"{abs(d.mean):.1f} points of {METRICS[study.metric]}"
            interval = "95 % interval {:+.1f} to {:+.1f}".format(*d.interval)
            evidence = f"{interval}, p {statistics.p_value(d.p)}, {d.n} seeds"
            sentences.append(f"**{variant}** is {d.verdict} than {first} by {size} ({evidence}).")
    missing = [variant for variant in study.primary if variant not in found]
    few = [variant for variant, d in found.items() if d.verdict == TOO_FEW] + missing
    others = named(found, EXPLORATORY) if study.primary else []
    undecided = f"Undecided (interval and permutation test do not both show a difference from {first})"
    for sentence, names in (
        (undecided, named(found, UNDECIDED)),
        (f"Fewer than {MIN_PAIRS} finished pairs of runs", few),
        ("Not among the primary comparisons, so without a verdict", others),
    ):
        sentences += [f"{sentence}: {listed(names)}."] if names else []
    return sentences


def named(found: dict[str, Difference], verdict: str) -> list[str]:
    return [variant for variant, d in found.items() if d.verdict == verdict]


def power_line(study: Study, power: Power, pilot: Power) -> str:
    """Say how many seeds the question needs, and what these can see."""
    share = f" in one of {power.comparisons} comparisons" if power.comparisons > 1 else ""
    text = f"Power: between seeds, a difference varies by {power.deviation:.2f} points (standard deviation)."
    probably = f"with {100 * statistics.POWER:.0f} % probability"
    if power.seeds >= MIN_PAIRS:
        text += f" {power.seeds} seeds detect a difference of {power.sees:.1f} points{share} {probably}; "
        text += f"to detect {study.worth:g} points takes {power.needed} seeds"
    else:
        text += f" To detect {study.worth:g} points{share} {probably} takes {power.needed} seeds"
    return text + (f" (estimated from the first two seeds: {pilot.needed})." if pilot != power else ".")


def advice(study: Study, directory: Path) -> str:
    """Return what the first two seeds of a study say about the number of seeds, and the flag for it."""
    runs = results.load(directory, study)
    if study.grid or not study.primary:
        return f"{study.name} compares no pairs of variants; it is planned with {len(study.seeds)} seeds"
    if not (pilot := results.power(runs, study, most=2)):
        return "the pilot has no two finished pairs of runs"
    seeds = min(pilot.needed, MOST_SEEDS)
    sees = statistics.detectable(pilot.deviation, seeds, pilot.comparisons)
    return (
        f"{power_line(study, pilot, pilot)}\n"
        f"next: --seeds {','.join(map(str, range(seeds)))}, to detect {sees:.1f} points"
    )


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def gain_table(study: Study, runs: list[Result], name: str) -> Table:
    """Return a row for each variant that has both scores of GAINS[name]; empty if none has."""
    title, column, heading, over, other = GAINS[name]
    rows = []
    for variant, gain in results.gains(runs, study, column, over).items():
        scores = (spread(results.by_seed(runs, variant, each)) for each in (over, column))
        rows.append([variant, *scores, f"{gain.mean:+.2f}", bounds(gain.interval), gain.verdict])
    header = ["variant", other, heading, f"{heading} - {other}", "95 % t interval", "verdict"]
    return Table(name, title, header, rows)


def effect_table(study: Study, runs: list[Result]) -> Table:
    """Return a table of a grid's flags, ranked by the variance they explain; empty for other studies."""
    rows = []
    for effect in results.effects(runs, study, study.metric):
        means = ", ".join(f"{value}: {mean:.2f}" for value, mean in effect.means.items())
        share, p = f"{100 * effect.share:.0f} %", statistics.p_value(effect.p).removeprefix("= ")
        rows.append([flags.dashed(effect.flag), means, f"{effect.span:.2f}", share, p])
    header = ["flag", "mean top-1 at each value", "best - worst", "share of variance", "p (F test, Holm)"]
    return Table("effects", "Main effects, over all values of the other flags:", header, rows)


def false_verdict_table(study: Study, runs: list[Result]) -> Table:
    """Return how often an A/A study called one variant better or worse than itself; else no rows."""
    rows = []
    for f in results.false_verdicts(runs, study):
        counts = map(str, (f.runs, f.comparisons, f.pairs, f.times))
        rows.append([*counts, f"{100 * f.decided / f.times:.1f} %"])
    title = "One variant against itself, its runs paired at random; at most 5 % should be decided:"
    return Table("false_verdicts", title, ["runs", "comparisons", "pairs", "pairings", "decided"], rows)


def run_notes(study: Study, runs: list[Result]) -> list[str]:
    """Return notes on the validation set and the machine, and commands to try next."""
    notes = []
    if image := results.one_image(runs):
        notes.append(f"There are {100 / image:,.0f} validation images; each is worth {image:.2g} points.")
    if held := next((run.env["num_val"] for run in runs if run.held_out and run.env.get("num_val")), None):
        scored = next((f"{run.num_val:,}" for run in runs if run.hits), "not yet")
        notes.append(HELD_OUT.format(held=f"{held:,}", scored=scored))
    if any(run.env for run in runs):
        loads = [load for run in runs for load in run.record.get("load", ())]
        busy = f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        names = ("device", "cores", "threads", "precision", "torch", "commit")
        seen = {name: every(runs, name) for name in names}
        notes.append(
            "Machine: {device}, {cores} cores, {threads} torch threads, {precision}, torch {torch}, "
            "commit {commit}".format(**seen)
            + f"{busy}."
        )
    if any(run.status == "diverged" for run in runs):
        notes.append("A diverged run scores as random predictions do.")
    found = [path for run in runs if run.directory for path in sorted(run.directory.glob("best_*.pt"))]
    best = found[0] if found else "CHECKPOINT"
    return notes + [f"To inspect a model: `{c.format(best=best, data='DATA')}`" for c in study.commands]


def every(runs: list[Result], name: str) -> str:
    """Return the values of env.json that the runs have, such as "bf16 and fp32"."""
    return listed(sorted({str(run.env.get(name) or "?") for run in runs if run.env}))


def csv_table(runs: list[Result]) -> str:
    """Return a CSV with one line per run."""
    header = ("variant", "seed", "status", "epochs", *CSV_SCORES, "held_out_top1", "images_per_second")
    header += ("minutes", "load", "commit", "command")
    rows = []
    for run in runs:
        row = [run.variant, run.seed, run.status, len(run.rows), *map(run.score, CSV_SCORES)]
        row += [run.logged("val_top1") if run.held_out else None, run.images_per_second, run.minutes]
        row += [max(run.record.get("load", ()), default=None), run.env.get("commit"), run.command]
        rows.append([round(value, 4) if isinstance(value, float) else value for value in row])
    return files.csv_text(header, rows)
