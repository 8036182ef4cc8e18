"""Report a study from the files of its runs: markdown, CSV, pictures, and a conclusion that keeps out of the noise.

Statistics are in results.py, pictures in plots.py; here they become text.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

from ablation_runs.run import RUNS
from ablation_runs.studies import STUDIES
from ablation_runs.study import PRESETS, Study
from base import errors, flags
from base.errors import DataError, UsageError

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "results"
PRIVATE = ("data_dir", "save_dir", "resume", "config", "init_from", "class_list")  # paths of one machine
CSV_COLUMNS = (
    "variant",
    "seed",
    "status",
    "epochs",
    "train_top1",
    "val_top1",
    "val_top5",
    "ema_val_top1",
    "gap",
    "images_per_second",
    "minutes",
    "commit",
)


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="-m ablation_runs.report", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("study", metavar="STUDY", help="its name; python -m ablation_runs.run --list shows them")
    add("--preset", default="full", choices=PRESETS, help="the preset that was run")
    add("--smoke", action="store_true", help="the same as --preset smoke")
    add("--runs", default=RUNS, metavar="DIR", help="the runner's --out")
    add("--out", default="", metavar="DIR", help="where the report goes; default: beside the runs")
    add(
        "--publish",
        action="store_true",
        help="copy the report and the runs' small files to ablation_runs/results/",
    )
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.study not in STUDIES:
        raise UsageError(f"no study {args.study!r}", f"there are {', '.join(STUDIES)}")
    study, preset = STUDIES[args.study], "smoke" if args.smoke else args.preset
    directory = Path(args.runs) / study.directory(preset)
    out = PUBLISHED / study.directory(preset) if args.publish else Path(args.out or directory)
    print(write(study, preset, directory, out))
    if args.publish:
        publish(directory, out, study)
    errors.tell(f"written: {out}/summary.md, summary.csv and pictures")
    return 0


def write(study: Study, preset: str, directory: Path, out: Path) -> str:
    """Write summary.md, summary.csv and the pictures into `out`; returns the markdown.

    Raises DataError where `directory` holds no run of the study.
    """
    from ablation_runs import plots, results

    runs = results.load(directory, study)
    if not runs:
        again = "" if preset == "full" else f" --preset {preset}"
        raise DataError(
            f"no runs of {study.name} in {directory}", f"python -m ablation_runs.run {study.name}{again}"
        )
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(runs, study, preset, out)
    text = markdown(study, preset, runs, [path.name for path in pictures])
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    write_csv(out / "summary.csv", runs)
    return text


def markdown(study: Study, preset: str, runs: list, pictures: list[str]) -> str:
    parts = [
        f"# {study.title(preset)}",
        study.question,
        *table(study, preset, runs),
        f"**Conclusion.** {conclusion(study, runs)}",
    ]
    if study.reported:
        parts.append(f"**Reported there** (`{study.source}`, one seed): {study.reported}")
    parts += [
        *ema_table(study, runs),
        *effect_table(study, runs),
        *(f"![{name[:-4]}]({name})" for name in pictures),
    ]
    parts += [f"- {note}" for note in (*study.notes, *how_to_read(study, runs))]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("\n- ", "\n\n- ", 1)


def table(study: Study, preset: str, runs: list) -> list[str]:
    """One row per variant: last epoch, mean and spread over seeds."""
    from ablation_runs import results

    verdicts = {v.variant: v for v in results.verdicts(runs, study, study.score)}
    gaps = {v.variant: v for v in results.verdicts(runs, study, "gap")}
    lines = [
        "| variant | flags | seeds | top-1 | EMA top-1 | train top-1 | gap | against the first | gap against the first "
        "| img/s | minutes | reported there |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in study.variants:
        mine = [r for r in runs if r.variant == variant.name]
        if not mine:
            continue
        own = variant.cpu if preset == "cpu" and variant.cpu is not None else variant.flags
        cells = [f"**{variant.name}**", f"`{own}`" if own else "base", seeds_cell(mine)]
        cells += [
            spread(results.scores(runs, variant.name, c))
            for c in ("val_top1", "ema_val_top1", "train_top1", "gap")
        ]
        cells += [against(verdicts.get(variant.name)), against(gaps.get(variant.name), ("larger", "smaller"))]
        cells += [
            average([r.images_per_second for r in mine], ",.0f"),
            average([r.minutes for r in mine], ".1f"),
        ]
        lines.append("| " + " | ".join([*cells, variant.reported or "-"]) + " |")
    return ["\n".join(lines)]


def seeds_cell(runs: list) -> str:
    done = sum(r.status == "done" for r in runs)
    others = sorted({r.status for r in runs} - {"done"})
    return f"{done}" + "".join(f", {sum(r.status == word for r in runs)} {word}" for word in others)


def spread(scores: dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    import numpy as np

    values = list(scores.values())
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def average(values: list, spec: str) -> str:
    known = [value for value in values if value]
    return format(sum(known) / len(known), spec) if known else "-"


def interval(difference) -> str:
    """'+1.20 [+0.40, +2.00]', or the difference alone of a single seed."""
    text = f"{difference.mean:+.2f}"
    return text if difference.low is None else f"{text} [{difference.low:+.2f}, {difference.high:+.2f}]"


def against(verdict, words: tuple[str, str] = ("better", "worse")) -> str:
    from ablation_runs import results

    if verdict is None or verdict.difference is None:
        return "-"
    word = {results.BETTER: words[0], results.WORSE: words[1], results.UNKNOWN: "one seed"}.get(
        verdict.word, verdict.word
    )
    return f"{interval(verdict.difference)}: {word}"


def conclusion(study: Study, runs: list) -> str:
    """What the runs allow to be said, and no more."""
    from ablation_runs import results

    base, what = (
        study.variants[0].name,
        "averaged weights" if study.score == "ema_val_top1" else "raw weights",
    )
    verdicts = results.verdicts(runs, study, study.score)
    sentences = [
        f"**{v.variant}** is {v.word} than {base} by {abs(v.difference.mean):.1f} points of top-1 ({what}; 95 % interval "
        f"{v.difference.low:+.1f} to {v.difference.high:+.1f}, {v.difference.n} seeds)."
        for v in verdicts
        if v.word in (results.BETTER, results.WORSE)
    ]
    inside = [v.variant for v in verdicts if v.word == results.NOISE]
    if inside:
        names = listed(inside) if len(inside) <= 8 else f"the {len(inside)} other variants"
        sentences.append(f"Nothing can be said about {names}: the difference to {base} is inside the noise.")
    if unknown := [v.variant for v in verdicts if v.word == results.UNKNOWN]:
        sentences.append(f"Not enough finished pairs of runs to judge {listed(unknown)}.")
    if stuck := results.at_chance(runs, study):
        sentences.append(
            f"At chance ({results.chance(runs):.2g} %; the interval ends below twice that): {listed(stuck)}."
        )
    gaps = [v for v in results.verdicts(runs, study, "gap") if v.word in (results.BETTER, results.WORSE)]
    sentences += [
        f"The gap between training and validation is {'larger' if v.difference.mean > 0 else 'smaller'} with {v.variant}, "
        f"by {abs(v.difference.mean):.1f} points."
        for v in gaps
    ]
    ranked = [
        e for e in results.effects(runs, study, study.score) if e.p is not None and e.p < 1 - results.LEVEL
    ]
    if ranked:
        sentences.append(
            f"Parameters that matter beyond the noise, most first: {listed([e.parameter for e in ranked])}."
        )
    broken = sorted({f"{r.variant} ({r.status})" for r in runs if r.status != "done"})
    if broken:
        sentences.append(f"Not every run finished: {listed(broken)}.")
    return " ".join(sentences) or "No variant to compare yet."


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ema_table(study: Study, runs: list) -> list[str]:
    """Averaged against raw weights of the same runs."""
    from ablation_runs import results

    gains = {v.name: results.ema_gain(runs, v.name) for v in study.variants}
    if not any(gains.values()):
        return []
    lines = [
        "Averaged against raw weights of the same run, last epoch:",
        "",
        "| variant | raw | averaged | averaged - raw |",
        "|---|---|---|---|",
    ]
    for name, gain in gains.items():
        if gain:
            raw, averaged = (
                spread(results.scores(runs, name, column)) for column in ("val_top1", "ema_val_top1")
            )
            lines.append(f"| {name} | {raw} | {averaged} | {interval(gain)} |")
    return ["\n".join(lines)]


def effect_table(study: Study, runs: list) -> list[str]:
    """A grid's parameters, ranked by how much of the variance they explain."""
    from ablation_runs import results

    found = results.effects(runs, study, study.score)
    if not found:
        return []
    lines = [
        "| parameter | mean top-1 at each value | best - worst | share of variance | p (F test against seeds, Holm) |",
        "|---|---|---|---|---|",
    ]
    for effect in found:
        means = ", ".join(f"{value}: {mean:.2f}" for value, mean in effect.means.items())
        p = "-" if effect.p is None else f"{effect.p:.3f}"
        lines.append(
            f"| {effect.parameter} | {means} | {effect.span:.2f} | {100 * effect.share:.0f} % | {p} |"
        )
    return ["\n".join(lines)]


def how_to_read(study: Study, runs: list) -> list[str]:
    from ablation_runs import results

    notes = [
        "Scores are those of the last epoch, in percent. Differences are paired by seed, with a 95 % t interval; 'better' and "
        "'worse' are said after Holm's adjustment for the number of variants."
    ]
    if image := results.one_image(runs):
        notes.append(
            f"The intervals cover the seeds, not the choice of the {100 / image:,.0f} validation images, "
            f"of which one is {image:.2g} points."
        )
    env = next((r.env for r in runs if r.env), {})
    if env:
        notes.append(
            f"Machine: {env.get('device')}, {env.get('cores')} cores, {env.get('threads')} torch threads, "
            f"{env.get('precision')}, torch {env.get('torch')}, commit {env.get('commit') or 'unknown'}."
        )
    for template in study.afterwards:
        best = next((p for r in runs if r.directory for p in sorted(r.directory.glob("best_*.pt"))), None)
        notes.append(f"To look inside: `{template.format(best=best or 'CHECKPOINT', data='DATA')}`")
    return notes


def write_csv(path: Path, runs: list) -> None:
    """One line per run."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for r in runs:
            own = {
                "variant": r.variant,
                "seed": r.seed,
                "status": r.status,
                "epochs": len(r.rows),
                "minutes": r.minutes,
                "images_per_second": r.images_per_second,
                "commit": r.env.get("commit"),
            }
            values = [own[name] if name in own else r.score(name) for name in CSV_COLUMNS]
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])


def publish(directory: Path, out: Path, study: Study) -> None:
    """Copy each run's small files, without what only this machine knows."""
    from ablation_runs import results
    from base import schemas

    for run in results.load(directory, study):
        target = out / run.directory.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "run.json"):
            if (run.directory / name).is_file():
                shutil.copyfile(run.directory / name, target / name)
        for name, schema, private in (
            ("config.json", schemas.Config, PRIVATE),
            ("env.json", schemas.Env, ("command",)),
        ):
            if (run.directory / name).is_file():
                kept = schemas.read_json(run.directory / name, schema, "delete it, or run the study again")
                text = json.dumps({k: v for k, v in kept.items() if k not in private}, indent=1)
                (target / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(errors.run(main))
