"""Studies are valid, the runner resumes and survives, and the report claims no more than the runs show."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from runs import TIMING
from scipy import stats

import train
import validate
from ablation_runs import claims, findings, plots, report, results, run, statistics, studies, study, summary
from ablation_runs.study import Study
from ablation_runs.tables import Table
from analysis import figures
from base import flags
from base.errors import DataError, UsageError, UserError
from harness.log import read_metrics

IMAGES = {
    "tiny-imagenet": 100_000,
    "imagenet100": 126_689,
    "cifar100": 50_000,
    "cifar10": 50_000,
    "synthetic": 64,
    "imagenet": 2000,
}
EVERY = [
    (s, preset) for s in studies.STUDIES.values() for preset in study.PRESETS if preset != "cpu" or s.cpu
]
ids = [f"{s.name}-{preset}" for s, preset in EVERY]


def config_of(values):
    config, given = flags.parse(flags.train_parser(), flags.to_argv(values))
    flags.check_train(config, given)
    return config


# --- studies ---


@pytest.mark.parametrize(("which", "preset"), EVERY, ids=ids)
def test_every_variant_is_accepted_and_planned(which, preset):
    from train_utils import plan

    for one in which.runs(preset, seeds=(0,)):
        c = config_of(one.flags)
        images = 77_000 if c.split == "70-30" else IMAGES[c.dataset.partition(":")[0]]
        images = images * c.classes // (100 if c.dataset == "cifar100" else 200) if c.classes else images
        images = c.subset_size if c.subset else images - int(c.holdout)
        given = {name: getattr(c, name) for name in ("phase_batch_sizes", "phase_epochs", "phase_mix")}
        phases = plan(c.epochs, c.resize_schedule, images, c.batch_size, **given)
        assert phases[-1].last_epoch == c.epochs and sum(p.steps for p in phases) >= c.epochs


@pytest.mark.parametrize(("which", "preset"), [(s, preset) for s, preset in EVERY if preset != "smoke"])
def test_variants_differ_from_the_first_in_the_flags_they_name_and_in_no_other(which, preset):
    configs = {name: config_of(which.flags_of(name, preset)) for name in which.variants}
    assert len({repr(c) for c in configs.values()}) == len(configs)  # no two variants are the same experiment
    first, *others = which.variants
    base = flags.plain(configs[first])
    for variant in others:
        named = which.own_flags(first, preset).keys() | which.own_flags(variant, preset).keys()
        changed = {name for name, value in flags.plain(configs[variant]).items() if value != base[name]}
        assert changed and not changed - named - flags.idle_flags(configs[variant])


def test_every_name_is_a_flag_of_train():
    # to_argv skips names that it does not know.
    known = flags.defaults().keys()
    assert study.CPU.keys() | study.SMOKE.keys() <= known
    for one in studies.STUDIES.values():
        for values in (one.base, one.cpu, *one.variants.values(), *one.cpu_variants.values()):
            assert values.keys() <= known


def test_the_studies_of_the_documents_are_all_here():
    names = """tiny_imagenet_01 tiny_imagenet_02 tiny_imagenet_03 imagenet100_architectures
               efficientnet_size_augmentation tiny_imagenet_resnet18 cifar100_resnet34 lr_exploration
               sensitivity_grid augmentation optimizers schedules blurpool resize_schedules drop_path_rate
               ema stored_sides same_twice phase_augment pipeline
               recalibrate_bn finetune"""
    assert set(studies.STUDIES) == set(names.split())
    for one in studies.STUDIES.values():
        assert one.metric in ("val_top1", "ema_val_top1")
        assert all(re.fullmatch(r"[\w.+=-]+", name) for name in one.variants)  # they name directories
        assert not one.source or one.published or one.published_scores or one.source == "004"
        assert one.published_scores.keys() | one.cpu_variants.keys() <= one.variants.keys()


def test_every_study_names_its_primary_comparisons_and_has_seeds_and_a_cpu_version():
    for one in studies.STUDIES.values():
        others = [*one.variants][1:]
        assert set(one.controls) < {*others, ""}
        assert bool(one.primary) == bool(others and not one.grid and not one.scoring)
        assert len(one.seeds) == (2 if one.grid else 24 if not others else 6)
        assert one.cpu["holdout"] and one.cpu_title


def compute(which, variant, preset):
    """Return the sum over epochs of px^2."""
    from train_utils import plan

    c = config_of(which.flags_of(variant, preset))
    given = {"phase_epochs": c.phase_epochs, "phase_batch_sizes": c.phase_batch_sizes}
    return sum(
        (p.last_epoch - p.first_epoch + 1) * p.image_size**2
        for p in plan(c.epochs, c.resize_schedule, 10_000, c.batch_size, **given)
    )


@pytest.mark.parametrize("preset", ["full", "cpu"])
def test_the_controls_cost_as_much_as_what_they_control(preset):
    which = studies.RESIZE_SCHEDULES
    costs = [compute(which, variant, preset) for variant in which.variants]
    assert max(costs) / min(costs) < 1.04
    pair = [compute(studies.TINY_IMAGENET_02, v, preset) for v in ("progressive", "last-size-equal-compute")]
    assert max(pair) / min(pair) < 1.06


def test_a_grid_holds_every_combination_once_and_the_baseline_first():
    variants = study.grid({"lr": "2", "batch_size": "8"}, lr=("1", "2"), batch_size=("4", "8", "16"))
    assert len({tuple(own.values()) for own in variants.values()}) == 6
    assert next(iter(variants.items())) == ("lr=2_batch-size=8", {"lr": "2", "batch_size": "8"})
    assert next(iter(studies.SENSITIVITY_GRID.variants)) == "batch-size=400_weight-decay=1e-4_clip-norm=0.1"


def test_flags_after_two_dashes_override_the_base_but_not_the_variant():
    changed = config_of(studies.LR_EXPLORATION.flags_of("lr=0.1", extra={"lr": 7.0, "epochs": 3}))
    assert (changed.lr, changed.epochs) == (0.1, 3)


def test_a_recipes_flags_are_left_out_where_they_have_no_effect():
    flags_of = studies.SENSITIVITY_GRID.flags_of
    assert flags_of("batch-size=400_weight-decay=1e-4_clip-norm=1")["clip_mode"] == "value"
    assert "clip_mode" not in flags_of("batch-size=400_weight-decay=1e-4_clip-norm=0")
    assert "data_dir" not in flags_of("batch-size=400_weight-decay=1e-4_clip-norm=1")


def test_a_study_without_a_cpu_version_says_so():
    with pytest.raises(UsageError, match="no CPU preset"):
        TWO.runs("cpu")


# --- results ---


def grid_results(value_of, seeds=3):
    variants = study.grid({"lr": "1", "wd": "0"}, lr=("1", "2"), wd=("0", "5"))
    which = Study("g", "?", variants, grid=("lr", "wd"))
    runs = [
        finished(name, seed, val_top1=value_of(own, seed))
        for name, own in variants.items()
        for seed in range(seeds)
    ]
    return which, runs


def finished(variant, seed, **last):
    row = {"epoch": 1, "train_top1": 90.0, "val_top1": 50.0, "val_top5": 80.0, "ema_val_top1": None}
    row |= {"seconds": 60.0, "images_per_second": 100.0}
    return results.Result(variant, seed, "done", [row | last], {"num_val": 200})


def test_a_grids_effects_are_ranked_and_agree_with_scipy():
    noise = np.random.default_rng(1).normal(0, 1, (2, 2, 3))

    which, runs = grid_results(
        lambda f, s: 50 + 8 * (f["lr"] == "2") + noise[int(f["lr"] == "2"), int(f["wd"] == "5"), s]
    )
    lr, wd = results.effects(runs, which, "val_top1")
    assert (lr.flag, wd.flag) == ("lr", "wd")
    assert lr.p < 1e-4 and lr.span == pytest.approx(abs(lr.means["2"] - lr.means["1"]))
    # One parameter alone is scipy's one-way analysis of variance.
    one = Study("g", "?", study.grid({"lr": "1"}, lr=("1", "2", "3")), grid=("lr",))
    scores = {name: np.random.default_rng(k).normal(k, 1, 4) for k, name in enumerate(one.variants)}
    runs = [finished(n, s, val_top1=float(x)) for n, values in scores.items() for s, x in enumerate(values)]
    (effect,) = results.effects(runs, one, "val_top1")
    assert effect.p == pytest.approx(stats.f_oneway(*scores.values()).pvalue)


def test_an_incomplete_grid_is_not_ranked():
    which, runs = grid_results(lambda f, s: 50.0 + s)
    assert results.effects(runs[:-1], which, "val_top1") == []


def test_the_last_epoch_counts_not_the_best():
    r = finished("a", 0)
    r.rows = [{**r.rows[0], "val_top1": 99.0}, {**r.rows[0], "val_top1": 40.0}]
    assert (r.score("val_top1"), r.score("gap"), r.minutes) == (40.0, 50.0, 2.0)
    r.status = "unfinished"
    assert r.score("val_top1") is None


# --- conclusions ---

TWO = Study("two", "Is b better?", {"a": {}, "b": {"lr": 1}, "c": {"lr": 2}})


def made(**scores):
    return [
        finished(name, seed, val_top1=float(x))
        for name, values in scores.items()
        for seed, x in enumerate(values)
    ]


SIX = (50, 51, 52, 50.5, 51.5, 50)
CLEAR = (60, 61.5, 61.5, 60.5, 62, 60)
NOISY = (51, 50, 55, 50, 51, 49)


def test_a_difference_inside_the_noise_is_undecided():
    text = summary.conclusion(TWO, made(a=SIX, b=NOISY, c=(50, 53, 50, 52, 50, 51)))
    reason = "Undecided (interval and permutation test do not both show a difference from a)"
    assert text.startswith(f"{reason}: b and c.")


def test_a_difference_beyond_the_noise_is_stated_with_its_interval():
    text = summary.conclusion(TWO, made(a=SIX, b=CLEAR, c=NOISY))
    assert re.match(
        r"\*\*b\*\* is better than a by 10\.1 points .*interval \+9\.6 to \+10\.6, p = 0\.031, 6 seeds\)",
        text,
    )
    assert "10.1 points smaller with b" in text and "show a difference from a): c." in text


def test_five_seeds_decide_nothing():
    text = summary.conclusion(TWO, made(a=SIX[:5], b=CLEAR[:5], c=NOISY[:5]))
    assert text.startswith("Fewer than 6 finished pairs of runs: b and c. Power:") and "better" not in text


def test_only_primary_comparisons_get_a_verdict():
    which = Study("two", "?", TWO.variants, controls=("b",))
    found = results.compare(made(a=SIX, b=CLEAR, c=NOISY), which, "val_top1")
    assert (found["b"].verdict, found["b"].p) == (statistics.EXPLORATORY, None)
    assert found["c"].verdict == statistics.UNDECIDED
    text = summary.conclusion(which, made(a=SIX, b=CLEAR, c=NOISY))
    assert "Not among the primary comparisons, so without a verdict: b." in text


def test_a_control_is_named_beside_the_verdicts_it_puts_into_proportion():
    runs, which = made(a=SIX, b=CLEAR, c=NOISY), Study("two", "?", TWO.variants, controls=("b",))
    text = findings.short(which, runs)
    assert text == "top-1 against a: undecided: c +0.2; without a verdict: b +10.1"
    assert "without a verdict" not in findings.short(TWO, runs)


def test_only_seeds_that_both_have_are_paired():
    runs = [*made(a=(1, 2, 3, 4), b=(2, 4)), finished("b", 7, val_top1=99.0), finished("c", 7)]
    variants, found = results.differences(runs, TWO, "val_top1")
    assert variants == ["b"] and found.tolist()[0][:2] == [1, 2] and np.isnan(found[0, 2:]).all()


def test_variants_at_chance_are_named():
    runs = made(a=(30, 34, 32), b=(4.0, 6.0, 4.5), c=(5, 25, 5))
    assert "chance" not in summary.conclusion(TWO, runs)
    for r in runs:
        r.env["num_classes"] = 20
    assert "At chance (5 %; the interval ends below twice that): b." in summary.conclusion(TWO, runs)


def test_a_diverged_run_scores_as_chance_does():
    runs = made(a=SIX, b=CLEAR, c=NOISY)
    for r in runs:
        r.env["num_classes"] = 20
    runs[6].status = runs[7].status = "diverged"  # of b
    found = results.compare(runs, TWO, "val_top1")["b"]
    assert found.n == 6 and found.verdict == statistics.UNDECIDED
    assert results.by_seed(runs, "b", "val_top1")[0] == 5
    assert "A diverged run scores as random predictions do." in summary.markdown(TWO, "full", runs, [])


def test_a_diverged_run_has_no_scores_of_a_kind_that_its_flags_do_not_make():
    runs = made(a=SIX, b=CLEAR, c=NOISY)
    for r in runs:
        r.env["num_classes"], r.record = 20, {"flags": ["--no-ema"]}
    runs[6].status = "diverged"
    assert runs[6].score("val_top1") == 5
    assert runs[6].score("ema_val_top1") is None and runs[6].score("ema_bn_val_top1") is None
    assert "EMA top-1" not in summary.markdown(TWO, "full", runs, [])


def test_the_images_are_counted_where_they_were_scored():
    runs = made(a=SIX, b=CLEAR)
    assert results.one_image(runs) == 0.5  # of 200 held-out images
    runs[0].hits = {"raw": np.ones(1000, bool)}
    assert results.one_image(runs) == 0.1


def test_runs_with_other_flags_than_the_studys_are_named():
    runs = made(a=SIX, b=CLEAR)
    for r in runs:
        own = TWO.flags_of(r.variant) | {"seed": r.seed}
        r.record = {"flags": flags.to_argv(own)}
    assert "Not all runs" not in summary.markdown(TWO, "full", runs, [])
    runs[7].record["flags"].append("--l1=0.5")
    left_out = runs[8].record["flags"].pop(0)
    named = f"b-seed1 (`--l1=0.5`), b-seed2 (`without {left_out}`)."
    assert f"**Not all runs have the flags of the study:** {named}" in summary.markdown(TWO, "full", runs, [])


def test_one_seed_and_failed_runs_conclude_nothing():
    runs = made(a=(50,), b=(90,), c=(10,))
    runs[2].status = "diverged"
    text = summary.conclusion(TWO, runs)
    assert text == "Fewer than 6 finished pairs of runs: b and c. Not every run finished: c (diverged)."


def test_the_power_line_says_how_many_seeds_are_needed_and_what_these_see():
    runs = made(a=SIX, b=NOISY)
    power = results.power(runs, TWO)
    gaps = np.subtract(NOISY, SIX)
    assert power.deviation == pytest.approx(np.std(gaps, ddof=1)) and power.seeds == 6
    assert power.needed == statistics.pairs_needed(0.5, power.deviation)
    said = summary.conclusion(TWO, runs)
    assert f"6 seeds detect a difference of {power.sees:.1f} points with 80 % probability; to" in said
    pilot = statistics.pairs_needed(0.5, np.std(gaps[:2], ddof=1))
    few = summary.power_line(TWO, results.power(runs, TWO, most=2), power)
    assert f" To detect 0.5 points with 80 % probability takes {pilot} seeds" in few
    assert said.endswith(f"takes {power.needed} seeds (estimated from the first two seeds: {pilot}).")


def test_an_a_a_study_counts_false_verdicts():
    which = Study("same", "?", {"same": {}}, seeds=tuple(range(24)))
    runs = made(same=60 + np.random.default_rng(1).normal(0, 1, 24))
    six, twelve, three = results.false_verdicts(runs, which)
    assert (six.pairs, twelve.pairs, six.times, six.runs) == (6, 12, 200, 24)
    assert (three.pairs, three.comparisons) == (6, 3)
    assert six.decided <= 20 and "| 24 | 1 | 12 | 200 |" in summary.markdown(which, "full", runs, [])
    assert results.false_verdicts(runs[:11], which) == [] == results.false_verdicts(runs, TWO)


def test_the_final_score_is_that_of_the_official_images():
    hits = np.array([True, False, True, True])
    r = finished("a", 0, val_top1=10.0)
    r.record, r.hits = {"flags": ["--holdout=50"]}, {"raw": hits}
    assert (r.score("val_top1"), r.logged("val_top1"), r.held_out, r.num_val) == (75.0, 10.0, True, 4)
    assert r.score("gap") == 15.0
    text = summary.markdown(TWO, "full", [r], [])
    assert "held-out top-1" in text and "scored once, after the last epoch" in text


def test_the_interval_over_images_needs_the_hits_of_the_same_images():
    runs = made(a=SIX, b=CLEAR)
    assert results.seeds_and_images(runs, TWO, "b") is None
    rng = np.random.default_rng(0)
    for r in runs:
        r.hits = {"raw": rng.random(400) < r.rows[-1]["val_top1"] / 100}
    low, high = results.seeds_and_images(runs, TWO, "b")
    seeds = results.compare(runs, TWO, "val_top1")["b"]
    assert (low + high) / 2 == pytest.approx(seeds.mean)
    runs[-1].hits = {"raw": np.ones(7, bool)}
    assert results.seeds_and_images(runs, TWO, "b") is not None  # that seed is left out


# --- tables ---


def test_a_table_in_latex_escapes_what_latex_would_read_and_in_csv_has_no_marks():
    table = Table("t", "50 % of A_B & C:", ["a", "b"], [["**x_1**", "`--lr=1 $ # {~^\\}`"], ["1 ± 2", "-"]])
    text = table.latex()
    assert r"\caption{50 \% of A\_B \& C}" in text and text.count(r"\\") == 3
    assert (
        r"\textbf{x\_1} & \texttt{-{}-lr=1 \$ \# \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}}"
        in text
    )
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"1 $\pm$ 2 & -"))
    assert table.csv().splitlines() == ['"a, mean","a, deviation",b', r"x_1,,'--lr=1 $ # {~^\}", "1,2,"]
    intervals = Table("t", "", ["n", "i"], [["+0.5", "-0.25 to +1.50"], ["1,234", "-"]])
    assert intervals.csv().splitlines() == ['n,"i, low","i, high"', "0.5,-0.25,1.5", "1234,,"]
    assert "$-$0.25 to +1.50" in intervals.latex()
    assert Table("t", "", ["a", "b"], [["1", "-"]]).without_empty_columns().header == ["a"]


# --- the runner, with a stand-in for train.py that has its flags and needs no torch ---

FAKE = """
import json, pathlib, signal, sys, time
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
run = pathlib.Path(words["--save-dir"]); log = run / "metrics.jsonl"
stop = []; signal.signal(signal.SIGTERM, lambda *a: stop.append(1))
starts = run / "started"; starts.write_text(str(int(starts.read_text()) + 1) if starts.exists() else "1")
(run / "best_x.pt").write_text(""); (run / "last_x.pt").write_text("")
if words["--lr"] == "666": print("error: step 3: loss is nan"); sys.exit(5)
if words["--lr"] == "13": print("error: no such thing\\nfix: none"); sys.exit(3)
done = len(log.read_text().splitlines()) if log.exists() else 0
for epoch in range(done + 1, 4):
    row = dict(epoch=epoch, train_top1=50.0, val_top5=90.0, ema_val_top1=None, images_per_second=10.0)
    row |= dict(seconds=6.0, val_top1=float(words["--lr"]) + int(words["--seed"]))
    log.open("a").write(json.dumps(row) + "\\n")
    for _ in range(int(words.get("--epochs", 0))):
        time.sleep(.05)
        if stop: sys.exit(143)
"""


FAKE_SCORE = """
import pathlib, sys
words = dict(word.partition("=")[::2] for word in sys.argv[2:])
assert pathlib.Path(sys.argv[1]).is_file() and "--save-hits" in words
pathlib.Path(words["--out"]).mkdir()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Arguments of the runner for a study of three variants and two seeds, with a stand-in for train.py."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    variants = {"low": {"lr": 1}, "mid": {"lr": 2}, "high": {"lr": 3}}
    (tmp_path / "score.py").write_text(FAKE_SCORE)
    monkeypatch.setattr(run, "TRAIN", script)
    monkeypatch.setattr(run, "SCORE", tmp_path / "score.py")
    monkeypatch.setitem(studies.STUDIES, "fake", Study("fake", "?", variants, seeds=(0, 1)))
    return ["fake", "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]


def starts(tmp_path):
    return {p.parent.name: int(p.read_text()) for p in (tmp_path / "runs" / "fake").glob("*/started")}


def replace_variant(monkeypatch, lr):
    variants = studies.STUDIES["fake"].variants | {"mid": {"lr": lr}}
    monkeypatch.setitem(studies.STUDIES, "fake", Study("fake", "?", variants, seeds=(0, 1)))


def test_finished_runs_are_skipped_and_their_checkpoints_deleted(fake, tmp_path, capsys):
    assert run.main([*fake, "--jobs", "3"]) == 0
    assert len(starts(tmp_path)) == 6
    kept = {p.name for p in (tmp_path / "runs/fake/mid-seed1").iterdir()}
    assert "best_x.pt" in kept and "last_x.pt" not in kept
    assert run.main([*fake, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("done      python train.py --data-dir") == 6
    assert run.main(fake) == 0
    assert set(starts(tmp_path).values()) == {1}


def test_a_seed_that_is_named_twice_runs_once(fake, tmp_path, capsys):
    assert run.main([*fake, "--seeds", "0,0", "--jobs", "2"]) == 0
    assert starts(tmp_path) == {"low-seed0": 1, "mid-seed0": 1, "high-seed0": 1}
    assert "3 of 3 runs are done" in capsys.readouterr().out


@pytest.mark.parametrize(("lr", "status", "code"), [(13, "failed", 3), (666, "diverged", 0)])
def test_a_failing_variant_is_reported_and_the_others_run(
    fake, tmp_path, monkeypatch, capsys, lr, status, code
):
    replace_variant(monkeypatch, lr)
    assert run.main(fake) == code
    said = capsys.readouterr().out
    assert f"mid-seed0: {status}" in said and "high-seed1: done" in said
    assert code == 0 or "FAILED with exit code 3: mid-seed0: error: no such thing" in said
    assert run.main(fake) == code
    assert starts(tmp_path)["mid-seed0"] == (
        2 if code else 1
    )  # a failed run is tried again; a diverged one is a result
    assert starts(tmp_path)["low-seed0"] == 1


def test_a_run_with_other_flags_does_not_count_as_done(fake, tmp_path, monkeypatch, capsys):
    run.main([*fake, "--seeds", "0"])
    replace_variant(monkeypatch, 2.5)
    capsys.readouterr()
    run.main([*fake, "--seeds", "0", "--dry-run"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "changed", "done"]
    assert run.main([*fake, "--seeds", "0"]) == 2 and set(starts(tmp_path).values()) == {1}
    assert "mid-seed0: the existing run has other flags; delete" in capsys.readouterr().out


def test_a_flag_of_an_older_version_makes_a_run_changed():
    assert run.what_trains(["--lr", "1e-3", "--subset"]) == run.what_trains(["--lr=0.001", "--subset"])
    assert run.what_trains(["--lr=0.001", "--gone=1"]) is None


def test_other_weights_or_data_of_the_study_make_a_run_changed():
    assert run.what_trains([]) != run.what_trains(["--init-from=w.pt"])
    assert run.what_trains(["--data-dir={data}-a"]) != run.what_trains(["--data-dir={data}-b"])


def test_other_workers_or_devices_do_not_make_a_run_changed(fake, tmp_path):
    run.main([*fake, "--seeds", "0"])
    assert run.main([*fake, "--seeds", "0", "--", "--num-workers", "3", "--device", "cuda:1"]) == 0
    assert set(starts(tmp_path).values()) == {1}


def test_shards_share_out_every_run_once(fake):
    def names(part):
        return [r.name for r in run.chosen_runs(run.build_parser().parse_args(["fake", "--shard", part]), {})]

    everything, parts = names("1/1"), [names(f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(name for part in parts for name in part) == sorted(everything) and len(everything) == 6


@pytest.mark.parametrize("bad", ["0/4", "5/4", "2", "a/b", "1/0"])
def test_an_invalid_shard_argument_is_refused(fake, bad):
    with pytest.raises(UsageError, match="such as 2/8"):
        run.main([*fake, "--shard", bad])


def test_an_unknown_name_lists_the_known_ones(fake):
    with pytest.raises(UsageError, match=r"unknown study 'emma'[\s\S]*ema"):
        run.main(["emma"])
    with pytest.raises(UsageError, match=r"no variant hi[\s\S]*low, mid, high"):
        run.main([*fake, "--variants", "hi"])
    with pytest.raises(UsageError, match="unknown study"):
        report.main(["emma"])


def test_a_stopped_study_is_continued(tmp_path, fake):
    """SIGTERM makes the active run save; the same command resumes it and runs the rest."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from ablation_runs import run, studies
from ablation_runs.study import Study
from ablation_runs.tables import Table
run.TRAIN = pathlib.Path({str(tmp_path / "fake.py")!r})
run.SCORE = pathlib.Path({str(tmp_path / "score.py")!r})
variants = {{"low": {{"lr": 1, "epochs": 10}}, "mid": {{"lr": 2, "epochs": 1}}}}
studies.STUDIES["fake"] = Study("fake", "?", variants)
sys.exit(run.main(sys.argv[1:]))
""")
    command = [sys.executable, str(driver), *fake, "--seeds", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "runs/fake/low-seed0/metrics.jsonl"
    for _ in range(200):
        if log.exists():
            break
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and "run the same command again" in out
    assert starts(tmp_path) == {"low-seed0": 1} and len(log.read_text().splitlines()) < 3
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    assert starts(tmp_path) == {"low-seed0": 2, "mid-seed0": 1}
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_stop_signal_reaches_a_run_that_is_just_starting(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TRAIN", tmp_path / "slow.py")
    run.TRAIN.write_text("import time; time.sleep(60)")
    stopping = run.Stopping()
    stopping(signal.SIGTERM)
    with open(tmp_path / "log.txt", "w") as log:
        assert run.launch(run.TRAIN, [], log, stopping) == -signal.SIGTERM


def test_a_run_says_what_it_is_before_it_starts_and_a_closed_terminal_stops_the_study(fake, monkeypatch):
    before = []

    def hang_up(script, arguments, log, stopping):
        (record,) = (path for path in (Path(fake[-1]) / "fake").glob("*/run.json"))
        before.append(json.loads(record.read_text()))
        os.kill(os.getpid(), signal.SIGHUP)
        return 143

    monkeypatch.setattr(run, "launch", hang_up)
    assert run.main(fake) == 128 + signal.SIGHUP
    assert [(record["status"], "--lr=1" in record["flags"]) for record in before] == [("started", True)]


def test_list_names_every_study(capsys):
    assert run.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in studies.STUDIES)


def test_every_run_is_given_its_data(fake):
    cifar100 = run.Job(study.Run("s", "v", 0, {"dataset": "cifar100"}), ROOT / "x").arguments
    assert cifar100 == ["--data-dir=data/cifar100", "--dataset=cifar100", "--save-dir=x", "--resume=auto"]
    stored = studies.STORED_SIDES.runs(seeds=(0,))[1]
    assert "--data-dir=/d/i100-packed-96-192-320" in run.Job(stored, ROOT / "x", "/d/i100").arguments
    digits = run.Job(study.Run("s", "v", 0, {"dataset": "digits"}), ROOT / "x").arguments
    assert not any(word.startswith("--data-dir") for word in digits)


# --- report ---


def test_the_report_of_a_grid_draws_heat_maps_and_ranks(tmp_path, monkeypatch, capsys):
    which = studies.SENSITIVITY_GRID
    rng = np.random.default_rng(1)
    for variant, own in which.variants.items():
        for seed in (0, 1):
            folder = tmp_path / which.name / f"{variant}-seed{seed}"
            folder.mkdir(parents=True)
            score = 60 + 5 * (own["clip_norm"] == "0.1") + rng.normal()
            row = finished(variant, seed, val_top1=score).rows[0]
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            (folder / "run.json").write_text(json.dumps({"status": "done"}))
    assert report.main([which.name, "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Flags that matter beyond the noise, most important first: --clip-norm." in text
    pictures = {path.name: path.stat().st_size for path in (tmp_path / which.name).glob("*.png")}
    assert pictures.keys() == {"curves.png", "effects.png", "heat_maps.png"}
    assert min(pictures.values()) > 5000


def test_a_grids_curves_have_a_panel_for_each_flag_and_its_heat_maps_one_scale():
    which, runs = grid_results(lambda f, s: 50 + 8 * (f["lr"] == "2") + s)
    lines = plots.panel_lines(runs, which)
    assert {flag: [*values] for flag, values in lines.items()} == {"--lr": ["1", "2"], "--wd": ["0", "5"]}
    assert all(len(own) == 6 for values in lines.values() for own in values.values())
    scores = results.grid_scores(runs[1:], which, "val_top1")
    assert scores.mask.sum() == 1 and scores.mean(-1).tolist() == [[51.5, 51], [59, 59]]
    (heat_map, _) = plots.heat_maps(runs, which, "title").axes
    assert heat_map.images[0].get_clim() == (51, 59)
    fig = plots.curves(runs, which, "val_top1", "title")
    assert [axis.get_title() for axis in fig.axes if axis.get_visible()] == ["--lr", "--wd"]


def test_a_curve_has_all_epochs_of_finished_runs_of_which_one_stopped_early():
    def made_of(status, **columns):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return results.Result("a", 0, status, rows)

    long = made_of("done", val_top1=[None, 20, None, 40], lr=[4, 3, 2, 1])
    short = made_of("done", val_top1=[None, 10], lr=[4, 2])
    unfinished = made_of("unfinished", val_top1=[None], lr=[4])
    curve = plots.curve([long, short, unfinished], "val_top1")
    assert [list(each) for each in curve] == [[2, 4], [15, 25], [10, 10], [20, 40]]
    curve = plots.curve([long, short, unfinished], "lr")
    assert [list(each) for each in curve] == [[1, 2, 3, 4], [4, 2.5, 2, 1], [4, 2, 2, 1], [4, 3, 2, 1]]
    assert [list(each) for each in plots.curve([unfinished], "lr")] == [[1], [4], [4], [4]]
    assert plots.curve([unfinished], "val_top1") is None and plots.curve([], "lr") is None
    assert plots.stopped_early([long, short]) and not plots.stopped_early([long, long, unfinished])


def test_values_of_a_flag_that_are_close_share_a_label():
    assert plots.neighbours([1, 1.1, 1.2, 3, 3], 0.15) == [[1, 1.1, 1.2], [3, 3]]
    which, runs = grid_results(lambda f, s: 50 + 8 * (f["lr"] == "2") + s)
    labels = [text.get_text() for text in plots.effects(runs, which, "title").axes[0].texts]
    assert labels == ["1", "2", "0, 5"]


def test_a_report_without_runs_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"no runs of ema[\s\S]*ablation_runs.run ema --preset cpu"):
        report.main(["ema", "--preset", "cpu", "--runs", str(tmp_path)])


def test_no_difference_is_reported_for_unfinished_runs(fake, tmp_path, monkeypatch):
    run.main([*fake, "--keep", "none"])
    (tmp_path / "runs/fake/mid-seed1/run.json").unlink()
    runs = results.load(tmp_path / "runs/fake", studies.STUDIES["fake"])
    assert sorted(results.by_seed(runs, "mid", "val_top1")) == [0]
    assert "mid (unfinished)" in summary.conclusion(studies.STUDIES["fake"], runs)


# --- end to end ---


def in_process(script, arguments, log, stopping):
    """Run train.py or validate.py in this process and return its exit code."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return (train if script == run.TRAIN else validate).main(arguments)
    except UserError as error:
        said.write(f"error: {error.what}\n")
        return error.exit_code
    finally:
        log.write(said.getvalue())


def test_a_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "launch", in_process)
    monkeypatch.setattr(report, "PUBLISHED", tmp_path / "published")
    out = ["--out", str(tmp_path)]
    assert run.main(["ema", "--smoke", "--seeds", "0,1", "--variants", "ramp-0.9999,plain-0.9999", *out]) == 0
    assert report.main(["ema", "--smoke", "--runs", str(tmp_path), "--publish"]) == 0
    text = (tmp_path / "published/ema-smoke/summary.md").read_text()
    assert "smoke test: tiny sizes, the scores mean nothing" in text and "There are 16" in text
    assert "EMA against raw weights" in text and "stuck at chance" in text
    rows = list(csv.DictReader((tmp_path / "published/ema-smoke/summary.csv").read_text().splitlines()))
    assert [(r["variant"], r["seed"], r["status"], r["epochs"]) for r in rows] == [
        ("ramp-0.9999", "0", "done", "3"),
        ("ramp-0.9999", "1", "done", "3"),
        ("plain-0.9999", "0", "done", "3"),
        ("plain-0.9999", "1", "done", "3"),
    ]
    # The EMA does not affect training, so with one seed the raw weights score the same.
    assert rows[0]["val_top1"] == rows[2]["val_top1"]
    for path in (tmp_path / "published").rglob("*.json*"):
        assert str(tmp_path) not in path.read_text()
    assert {p.name for p in (tmp_path / "published/ema-smoke").glob("*.png")} == {
        "curves.png",
        "differences.png",
    }


DIGITS = {"dataset": "digits", "holdout": 100, "arch": "resnet_tiny", "resize_schedule": [16], "epochs": 1}
DIGITS |= {
    "batch_size": 128,
    "augment": "basic",
    "num_workers": 0,
    "device": "cpu",
    "amp": "off",
    "lr": 0.003,
}


def test_any_row_of_a_study_can_be_repeated_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Also a run that is repeated alone, and from the command that its run.json has."""
    which = Study("again", "?", {"a": {}, "b": {"lr": 0.01}}, base=DIGITS)
    monkeypatch.setitem(studies.STUDIES, "again", which)
    monkeypatch.setattr(run, "launch", in_process)
    assert run.main(["again", "--pilot", "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert "takes" in said and re.search(r"next: --seeds 0,1,2,3,4,5(,\d)*, to detect", said)
    assert run.main(["again", "--variants", "b", "--seeds", "1", "--out", str(tmp_path / "two")]) == 0
    one, two = (tmp_path / name / "again" / "b-seed1" for name in ("one", "two"))
    record = json.loads((one / "run.json").read_text())
    assert record.keys() >= {"scoring", "commit", "load", "minutes"} and record["status"] == "done"
    repeat, score = results.read_run(one, "b").command.split(" && ")
    words = shlex.split(repeat)
    assert train.main([*words[words.index("train.py") + 1 :], "--save-dir", str(tmp_path / "three")]) == 0
    words = shlex.split(score.replace("checkpoints/", f"{tmp_path}/three/"))
    out = ["--save-hits", "--out", str(tmp_path / "three" / study.FINAL)]
    assert validate.main([*words[words.index("validate.py") + 1 :], *out]) == 0
    rows = [
        {name: value for name, value in read_metrics(folder)[-1].items() if name not in TIMING}
        for folder in (one, two, tmp_path / "three")
    ]
    assert rows[0] == rows[1] == rows[2] and rows[0]["val_top1"] > 10
    hits = [(f / study.FINAL / "hits.npz").read_bytes() for f in (one, two, tmp_path / "three")]
    assert hits[0] == hits[1] == hits[2]
    found = results.load(tmp_path / "one" / "again", which)
    assert [r.num_val for r in found] == [359] * 4 and all(r.held_out for r in found)


def test_pilot_and_seeds_contradict_each_other(fake):
    with pytest.raises(UsageError, match="--pilot and --seeds"):
        run.main([*fake, "--pilot", "--seeds", "3"])


def test_the_official_images_are_scored_with_the_runs_precision(tmp_path):
    job = run.Job(study.Run("s", "v", 0, DIGITS | {"subset": True, "amp": "bf16"}), tmp_path)
    (tmp_path / "last_x.pt").touch()
    assert job.scoring() == [
        *(str(tmp_path / "last_x.pt"), "--num-workers=0", "--device=cpu", "--amp=bf16", "--holdout=0"),
        *("--no-subset", "--save-hits", f"--out={tmp_path / 'final'}"),
    ]
    (tmp_path / "env.json").write_text('{"precision": "fp32"}')  # as --amp auto is on a CPU at 16 px
    assert "--amp=off" in run.Job(study.Run("s", "v", 0, DIGITS | {"amp": "auto"}), tmp_path).scoring()
    plain = run.Job(study.Run("s", "v", 0, {"dataset": "cifar10"}), tmp_path / "none", "/d").scoring()
    assert plain[1:3] == ["--data-dir=/d", "--save-hits"]


def test_pictures_come_in_the_formats_that_are_asked_for(tmp_path):
    runs = made(a=SIX, b=CLEAR, c=NOISY)
    first = plots.draw(runs, TWO, "full", tmp_path, ("svg", "pdf", "png"))
    assert [path.name for path in first][-1] == "differences.svg"
    heads = {kind: (tmp_path / f"differences.{kind}").read_bytes()[:5] for kind in ("svg", "pdf", "png")}
    assert heads == {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG\r"}
    plots.draw(runs, TWO, "full", tmp_path / "again", ("svg", "pdf"))
    for name in ("differences.svg", "differences.pdf"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(UsageError, match="--formats bmp"):
        report.main(["ema", "--formats", "bmp"])
    with pytest.raises(UsageError, match="--formats is empty"):
        report.main(["ema", "--formats", ""])
    with pytest.raises(UsageError, match="--out would do nothing"):
        report.main(["ema", "--publish", "--out", str(tmp_path)])


def test_published_files_have_no_paths(tmp_path):
    one = tmp_path / "runs" / "a-seed0"
    one.mkdir(parents=True)
    record = {"status": "done", "flags": ["--class-list=/home/me/list.txt", "--augment=flip,/home/me/a.yaml"]}
    (one / "run.json").write_text(json.dumps(record))
    (one / "metrics.jsonl").write_text('{"epoch": 1}\n')
    report.publish(tmp_path / "runs", tmp_path / "out", TWO)
    published = json.loads((tmp_path / "out" / "a-seed0" / "run.json").read_text())
    assert published == {"status": "done", "flags": ["--class-list=list.txt", "--augment=flip,a.yaml"]}


def test_the_overview_has_a_line_for_each_planned_comparison_and_colours_it_by_its_verdict():
    grid = Study("grid", "?", TWO.variants, grid=("lr",))
    alone = Study("alone", "?", TWO.variants, controls=("b", "c"))
    runs = made(a=SIX, b=CLEAR, c=NOISY)
    axis = plots.overview([(TWO, runs), (grid, runs), (alone, runs)], reach=8).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "c"]
    means = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert [line.get_color() for line in means] == [figures.GREEN, "0.6"]
    assert [line.get_marker() for line in means] == [">", "o"] and float(means[0].get_xdata()[0]) == 8
    assert [text.get_text() for text in axis.texts] == [" two: difference from a", "+10.1", "+0.2"]
    lines = plots.overview([(TWO, made(a=SIX, b=CLEAR, c=(51, 50, 80, 50, 51, 30)))], reach=12).axes[0].lines
    ends = [(line.get_marker(), float(line.get_xdata()[0])) for line in lines if line.get_markersize() == 5]
    assert ends == [("<", -12), (">", 12)]  # of c alone: its interval goes on at both ends
    assert plots.overview([(TWO, made(a=(50,), b=(52,), c=(51,)))])  # no intervals
    planned = Study("two", "?", TWO.variants, controls=("c",))
    lines = plots.overview([(planned, runs)]).axes[0].lines
    assert [m.get_markerfacecolor() for m in lines if len(m.get_xdata()) == 1] == [figures.GREEN, "white"]


# --- what is committed ---


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ablation_runs").glob("*.ipynb")), ids=lambda path: path.stem[-2:]
)
def test_notebooks_are_thin_and_hold_the_outputs_of_a_run(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert sum(len("".join(c["source"]).splitlines()) for c in cells) < 40
    assert all(c["execution_count"] for c in cells)
    outputs = [o for c in cells for o in c["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o["output_type"] == "error" for o in outputs)
    shown = ["".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]
    titles = [text.partition("\n")[0] for text in shown if text.startswith("# `")]
    for title in titles:
        folder = ROOT / "ablation_runs" / "results" / f"{re.findall('`(.*?)`', title)[0]}-cpu"
        table, reading = (folder / f"{name}.md" for name in ("summary", "reading"))
        assert re.sub(r"!\[.*\n", "", table.read_text(encoding="utf-8")) in shown, "run make notebooks"
        assert reading.read_text(encoding="utf-8") in shown, "run make notebooks"
    assert titles


PUBLISHED = sorted((ROOT / "ablation_runs" / "results").glob("*"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_results_are_complete_and_their_report_is_what_they_give_today(folder):
    name, _, preset = (
        folder.name.rpartition("-") if folder.name.endswith("-cpu") else (folder.name, "", "full")
    )
    which = studies.STUDIES[name]
    found = results.load(folder, which)
    seeds = {r.seed for r in found}
    assert {r.status for r in found} == {"done"} and len(seeds) >= len(which.seeds)
    for one in which.runs(preset, seeds=sorted(seeds)):
        assert run.Job(one, folder / one.name).status() == "done"  # with the flags that the study has now
        assert (folder / one.name / study.FINAL / "hits.npz").is_file()
    pictures = [f"{name}.png" for name in plots.NAMES if (folder / f"{name}.png").is_file()]
    text = summary.markdown(which, preset, found, pictures)
    assert (folder / "summary.md").read_text(encoding="utf-8") == text + "\n"
    assert (folder / "summary.csv").read_text(encoding="utf-8") == summary.csv_table(found)
    for table in summary.tables(which, preset, found):
        assert (folder / f"{table.name}.csv").read_text(encoding="utf-8") == table.csv()


def test_published_results_hold_no_path_and_are_small():
    small = [p for p in (ROOT / "ablation_runs" / "results").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in small) < 20_000_000
    assert not [
        p for p in small if p.suffix in (".json", ".md", ".csv") and re.search(r'["\s(]/\w+/', p.read_text())
    ]


@pytest.mark.parametrize("page", findings.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_say_what_the_published_results_give_today(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- studies:") == text.count("<!-- end of studies -->") > 0
    assert findings.fill(text, findings.published()) == text, "run python -m ablation_runs.findings"


def test_every_claim_names_a_comparison_that_its_study_makes():
    for claim in claims.CLAIMS:
        study = studies.STUDIES[claim.study]
        compared = (*study.primary, *study.controls)
        assert claim.variant in (study.variants if claim.column == claims.EMA_GAIN else compared), claim
        assert claim.document in ("000", "001", "002", "003", "004")


BETTER = [50, 51, 52, 53, 50, 51], [55, 56.5, 57, 58, 55.5, 56]
WORSE, SAME = BETTER[::-1], ([50, 51, 52, 53, 50, 51], [50.1, 50.9, 52.1, 52.9, 50.1, 50.9])


@pytest.mark.parametrize(
    ("expected", "scores", "status"),
    [
        ("better", BETTER, "confirmed"),
        ("better by 5.2", BETTER, "confirmed"),
        ("better by 9", BETTER, "direction confirmed, size contradicted"),
        ("better", WORSE, "contradicted"),
        ("better", SAME, "undecided"),
        ("worse", WORSE, "confirmed"),
        ("worse", BETTER, "contradicted"),
        ("no loss", BETTER, "confirmed"),
        ("no loss", SAME, "confirmed"),  # the interval excludes a loss of a point
        ("no loss", WORSE, "contradicted"),
        ("no loss", ([50, 51, 52, 53, 50, 51], [48, 53, 50, 55, 47, 54]), "undecided"),
        ("better", ([50, 51], [55, 56]), "undecided"),  # too few seeds for any verdict
        ("no loss", ([50, 51], [55, 56]), "undecided"),
    ],
)
def test_a_claim_is_judged_by_the_verdict_of_its_comparison(expected, scores, status):
    two = Study("two", "?", {"a": {}, "b": {"lr": 1}})
    expected, _, points = expected.partition(" by ")
    claim = claims.Claim("000", "b is better", "two", "b", expected, points=float(points) if points else None)
    assert claims.judge(claim, made(a=scores[0], b=scores[1]), two)[0] == status


@pytest.mark.parametrize("expected", ["worse", "no loss"])
def test_a_control_decides_no_claim(expected):
    claim = claims.Claim("000", "b is worse", "two", "b", expected)
    two = Study("two", "?", {"a": {}, "b": {"lr": 1}}, controls=("b",))
    scores = made(a=[50, 51, 52, 53, 50, 51], b=[40, 41, 42, 43, 40, 41.5])
    status, difference = claims.judge(claim, scores, two)
    assert (status, difference.verdict) == ("undecided", "not a primary comparison")


def test_a_variant_that_lacks_a_seed_of_the_pilot_is_reported():
    two = Study("two", "?", {"a": {}, "b": {"lr": 1}})
    runs = made(a=[50, 51, 52, 53, 50, 51], b=[52, 53, 54, 55, 53, 54])
    del runs[6]  # seed 0 of b failed
    assert "Power: " in summary.conclusion(two, runs)


def test_re_estimated_statistics_are_compared_within_each_run():
    runs, rng = made(a=[50] * 6), np.random.default_rng(0)
    for r in runs:
        right = rng.random(200) < 0.5
        r.hits = {"raw": right, "ema": right, "ema bn": right | (rng.random(200) < 0.2)}
    one = Study("one", "?", {"a": {}}, scoring=("--recalibrate-bn",), metric="ema_val_top1")
    table = summary.gain_table(one, runs, "batch_norm")
    expected = np.mean([100 * (r.hits["ema bn"].mean() - r.hits["ema"].mean()) for r in runs])
    assert table.rows[0][3] == f"{expected:+.2f}" and table.rows[0][-1] == "better"
    assert "re-estimated" in summary.conclusion(one, runs)
    assert not summary.gain_table(TWO, made(a=[1, 2], b=[1, 2]), "batch_norm")


def test_the_runner_scores_as_the_study_says(tmp_path):
    one = run.Job(studies.RECALIBRATE_BN.runs("cpu")[0], tmp_path, "d")
    assert "--recalibrate-bn" in one.scoring() and "--recalibrate-bn" not in one.arguments
    assert "--recalibrate-bn" not in run.Job(studies.EMA.runs("cpu")[0], tmp_path, "d").scoring()


def test_a_claim_about_a_run_that_is_missing_is_undecided():
    claim = claims.Claim("000", "?", "two", "b")
    assert claims.judge(claim, made(a=[1, 2]), TWO) == ("undecided", None)
