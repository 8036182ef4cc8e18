"""Draw what the published studies found, and write it into README.md and ablation_runs/README.md.

`python -m ablation_runs.findings` draws overview.png, and makes everything between `<!-- studies: NAME -->`
and `<!-- end of studies -->` from ablation_runs/results/. What was learned, in words, is in a study's
results/<study>/reading.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ablation_runs import claims, plots, results, statistics, studies, summary
from ablation_runs.report import PUBLISHED
from ablation_runs.results import Result
from ablation_runs.study import Study
from analysis import figures
from base import errors, files, flags
from base.process import ROOT

PAGES = (ROOT / "README.md", ROOT / "ablation_runs" / "README.md")
PICTURE = PUBLISHED.parent / "overview.png"
Published = list[tuple[Study, str, list[Result]]]  # study, preset, runs


def build_parser() -> flags.Parser:
    return flags.build_parser("-m ablation_runs.findings", __doc__.split("\n\n")[0])


def main(argv: list[str] | None = None) -> int:
    build_parser().parse_args(argv)
    found = published()
    print(figures.save(plots.overview([(study, runs) for study, _, runs in found]), PICTURE))
    for page in files.rewrite(PAGES, lambda text: fill(text, found)):
        print(f"{page.relative_to(ROOT)}: written")
    return 0


def published(directory: Path = PUBLISHED) -> Published:
    """Return the studies in `directory`, in the order of studies.py."""
    found = []
    for study in studies.STUDIES.values():
        for preset in ("full", "cpu"):
            if runs := results.load(directory / study.directory(preset), study):
                found.append((study, preset, runs))
    return found


def fill(text: str, found: Published) -> str:
    """Return `text` with every marked part made from the studies `found`."""
    return files.fill_parts(text, "studies", lambda name: PARTS[name](found))


def overview(found: Published) -> str:
    """Return a table with a row for each study: its question and what is decided."""
    rows = []
    for study, preset, runs in found:
        where = f"[{study.name}](ablation_runs/results/{study.directory(preset)}/summary.md)"
        rows.append([where, study.question, short(study, runs), scale(study, preset)])
    header = ["study", "question, at full size", "finding at this scale, in points", "scale"]
    return files.markdown_table(header, rows)


def short(study: Study, runs: list[Result]) -> str:
    """Return the verdicts in a few words, with the differences in points."""
    for f in results.false_verdicts(runs, study)[:1]:
        return f"compared with itself {f.times} times: {100 * f.decided / f.times:.1f} % called different"
    if gains := results.gains(runs, study, "ema_bn_val_top1", "ema_val_top1"):
        values = ", ".join(f"{name} {d.mean:+.1f} ({d.verdict})" for name, d in gains.items())
        return f"EMA top-1 after re-estimation: {values}"
    compared = {} if study.grid else results.compare(runs, study, study.metric)
    notes = dict.fromkeys(results.at_chance(runs, study), " (at chance)")
    values = {name: f"{name} {d.mean:+.1f}{notes.get(name, '')}" for name, d in compared.items()}
    groups = {
        verdict: summary.named(compared, verdict)
        for verdict in (statistics.BETTER, statistics.WORSE, statistics.UNDECIDED)
    }
    words = [f"{verdict}: {', '.join(map(values.get, names))}" for verdict, names in groups.items() if names]
    if words and (others := [value for name, value in values.items() if name not in study.primary]):
        words.append(f"without a verdict: {', '.join(others)}")
    against = f"{summary.METRICS[study.metric]} against {next(iter(study.variants))}: "
    return against + "; ".join(words) if words else summary.conclusion(study, runs)


def interval(d: statistics.Difference) -> str:
    return f"{d.mean:+.1f} [{d.interval[0]:+.1f}, {d.interval[1]:+.1f}]"


def scale(study: Study, preset: str) -> str:
    """Return the data and the network of a study, without the numbers of images."""
    return re.sub(r" \([^)]*\)", "", study.cpu_title) if preset == "cpu" else "full size"


def details(found: Published) -> str:
    """Return a section for each study: question, command, tables, conclusion, meaning and a picture."""
    return "\n\n".join(section(*one) for one in found)


def section(study: Study, preset: str, runs: list[Result]) -> str:
    name, data = study.directory(preset), study.flags_of(runs[0].variant, preset).get("dataset", "imagenet")
    scaled = f" --preset {preset}" if preset != "full" else ""
    minutes = sum(run.record.get("minutes", 0) for run in runs)
    seeds = ",".join(map(str, sorted({run.seed for run in runs})))
    parts = [f"### {study.title(preset)}", f"*Question.* {study.question}"]
    parts.append(
        f"*Runs.* `{runs[0].threads}python -m ablation_runs.run {study.name}{scaled} --data-dir data/{data} "
        f"--seeds {seeds}`: {len(runs)} runs, {minutes:,.0f} minutes in all. "
        f"[Report](results/{name}/summary.md)."
    )
    if study.notes:
        parts.append(f"*Notes.* {' '.join(study.notes.splitlines())}")
    parts.append(summary.other_flags(study, preset, runs))
    parts.append(summary.variant_table(study, preset, runs).without_empty_columns().markdown())
    tables = (
        summary.comparison_table(study, runs, study.metric),
        summary.gain_table(study, runs, "batch_norm"),
        summary.effect_table(study, runs),
    )
    parts += [table.without_empty_columns().markdown() for table in tables if table]
    parts.append(f"*Conclusion.* {summary.conclusion(study, runs)}")
    reading = PUBLISHED / name / "reading.md"
    if reading.is_file():
        parts.append(f"*Reading.* {reading.read_text(encoding='utf-8').strip()}")
    wanted = ("differences.png",) * bool(study.primary) + ("effects.png", "curves.png")
    pictures = [picture for picture in wanted if (PUBLISHED / name / picture).is_file()]
    parts += [f"![{study.name}](results/{name}/{picture})" for picture in pictures[:1]]
    return "\n\n".join(filter(None, parts))


def claim_table(found: Published) -> str:
    """Return a row for each claim of the documents: what the studies say about it, at their scale."""
    known = {}
    for study, _, runs in found:  # a study in full before the one scaled down
        known.setdefault(study.name, (study, runs))
    rows = []
    for claim in claims.CLAIMS:
        status, evidence = "not measured", f"`{claim.study}`"
        if claim.study in known:
            study, runs = known[claim.study]
            status, d = claims.judge(claim, runs, study)
            status = status if status == claims.UNDECIDED else f"**{status}** at this scale"
            if d and d.interval:
                evidence += f", {claim.variant}: {interval(d)} points, {d.n} seeds"
        rows.append([claim.document, claim.text, status, evidence])
    return files.markdown_table(["document", "claim", "at the scale of our study", "evidence"], rows)


PARTS = {"overview": overview, "details": details, "claims": claim_table}

if __name__ == "__main__":
    sys.exit(errors.run(main))
