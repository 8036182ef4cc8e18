"""Run a study: every variant with every seed, each with its own train.py command.

Finished runs are skipped, stopped runs are resumed, and a failed run is reported while the others go on.
validate.py scores a finished run once. If the study holds images out of training, it scores the official
validation images, which nothing has seen before.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ablation_runs import studies
from ablation_runs.study import FINAL, PRESETS, Flags, Run, data_flags
from base import errors, files, flags, process
from base.errors import UsageError, did_you_mean
from base.process import ROOT
from harness.interrupts import STOP_SIGNALS

TRAIN, SCORE = ROOT / "train.py", ROOT / "validate.py"
RUNS = "./checkpoints/ablation"
train_parser = cache(flags.train_parser)
SCORED_WITH = ("device", "amp", "num_workers")  # flags that validate.py shares with the run
FREE = flags.FREE_ON_RESUME - flags.OF_A_START  # flags that do not affect training
DIVERGED = errors.DivergedError.exit_code
EPILOG = """examples:
  python -m ablation_runs.run --list
  python -m ablation_runs.run ema --smoke                                      a one-minute check without data
  python -m ablation_runs.run ema --data-dir data/tiny-imagenet                all variants, six seeds each
  python -m ablation_runs.run schedules --data-dir data/cifar100 --preset cpu --pilot  two seeds, to plan more
  python -m ablation_runs.run schedules --data-dir data/cifar100 --preset cpu          scaled down for a CPU
  python -m ablation_runs.run ema --shard $SLURM_ARRAY_TASK_ID/8 --data-dir D  an eighth of the runs
  python -m ablation_runs.run ema --data-dir D -- --lr 2e-3 --device cuda:1    override the base flags"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m ablation_runs.run", __doc__.split("\n\n")[0], EPILOG)
    add, numbers, names = parser.add_argument, flags.listing(flags.natural), flags.listing(str)
    add("study", nargs="?", default="", metavar="STUDY", help="Name of the study.")
    add("--list", action="store_true", help="List the studies and their questions.")
    add("--dry-run", action="store_true", help="Print the command and state of each run; start nothing.")
    add("--preset", default="full", choices=PRESETS, help="Size of the study; cpu is for a small machine.")
    add("--smoke", dest="preset", action="store_const", const="smoke", help="Short for --preset smoke.")
    add("--seeds", type=numbers, default="", metavar="N,N,...", help="Random seeds; if empty, the study's.")
    add("--pilot", action="store_true", help="Run two seeds, then say how many seeds the question needs.")
    add("--variants", type=names, default="", metavar="NAME,...", help="Run only these variants.")
    add("--jobs", type=flags.positive, default=1, metavar="N", help="Number of simultaneous runs.")
    add("--shard", type=shard, default="1/1", metavar="I/N", help="Run only part I (from 1) of N.")
    add("--data-dir", default="", metavar="DIR", help="Dataset directory; if empty, data/<dataset>.")
    add("--out", default=RUNS, metavar="DIR", help="Runs are written to DIR/<study>/<variant>-seed<n>.")
    add("--keep", default="best", choices=("best", "all", "none"), help="Checkpoints to keep of each run.")
    flags.DEBUG.add_to(parser)
    return parser


def shard(text: str) -> tuple[int, int]:
    """Parse "2/8", the second of eight parts, as (2, 8)."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 2/8")
    return int(part), int(parts)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:end])
    if args.list or not args.study:
        for study in studies.STUDIES.values():
            word = "variant " if len(study.variants) == 1 else "variants"
            print(f"{study.name:<32} {len(study.variants):>3} {word}  {study.question}")
        return 0
    if args.pilot and args.seeds:
        raise UsageError("--pilot and --seeds contradict each other", "leave one of them out")
    runs = chosen_runs(args, train_parser().given(words[end + 1 :]))
    jobs = [Job(run, Path(args.out) / run.study / run.name, args.data_dir) for run in runs]
    if args.dry_run:
        for job in jobs:
            print(f"{job.status():<9} {job.command()}")
        return 0
    code = run_all(jobs, args.jobs, args.keep)
    if not code and args.pilot:
        from ablation_runs import summary

        study = studies.find(args.study)
        print(summary.advice(study, Path(args.out) / study.directory(args.preset)))
    elif not code:
        preset = ["--preset", args.preset] if args.preset != "full" else []
        where = ["--runs", args.out] if args.out != RUNS else []
        print(f"next: {shlex.join(['python', '-m', 'ablation_runs.report', args.study, *preset, *where])}")
    return code


def chosen_runs(args, extra: Flags) -> list[Run]:
    """Return the runs asked for. Raises UsageError for an unknown study or variant."""
    study = studies.find(args.study)
    if unknown := set(args.variants) - study.variants.keys():
        what = f"{study.name} has no variant {', '.join(sorted(unknown))}"
        hint = did_you_mean(min(unknown), study.variants)
        raise UsageError(what, f"{hint}choose from {', '.join(study.variants)}")
    part, parts = args.shard
    variants = args.variants or study.variants
    seeds = study.seeds[:2] if args.pilot else tuple(dict.fromkeys(args.seeds))
    runs = study.runs(args.preset, seeds, extra)
    return [run for run in runs if run.variant in variants][part - 1 :: parts]


class Job:
    """A run, its directory, and the arguments of train.py and of validate.py, which scores it at the end."""

    def __init__(self, run: Run, directory: Path, data_dir: str = ""):
        self.run, self.directory, self.problem = run, directory, ""
        dataset, words = run.flags.get("dataset", "imagenet"), flags.to_argv(run.flags)
        data = from_root(Path(data_dir)) if data_dir else f"data/{dataset}"
        self.data = data_flags(words, dataset, data)
        words = [word for word in words if not word.startswith("--data-dir=")]
        self.arguments = [*self.data, *words, f"--save-dir={from_root(directory)}", "--resume=auto"]

    def scoring(self) -> list[str]:
        """Return the arguments of validate.py for the last checkpoint."""
        checkpoint = next(self.directory.glob("last_*.pt"), self.directory / "last_*.pt")
        out = ["--save-hits", f"--out={from_root(self.directory / FINAL)}"]
        return [from_root(checkpoint), *self.data, *self.scored_with(), *out]

    def scored_with(self) -> list[str]:
        """Return the flags of validate.py that affect the score: those of the run, and its precision.

        With --amp auto, a run on a CPU may have been in fp32 where validate.py would choose bf16.
        """
        same = {name: self.run.flags[name] for name in SCORED_WITH if name in self.run.flags}
        if read(self.directory / "env.json", "Env").get("precision") == "fp32":
            same["amp"] = "off"
        official = ["--holdout=0", "--no-subset"] if self.run.flags.get("holdout") else []
        return [*flags.to_argv(same), *self.run.scoring, *official]

    def command(self) -> str:
        return shlex.join(["python", "train.py", *self.arguments])

    def status(self) -> str:
        """Return done, diverged, failed, started, new, or changed, if the run on disk has other flags."""
        record = self.read_record()
        if record and what_trains(record.get("flags", [])) != what_trains(flags.to_argv(self.run.flags)):
            return "changed"
        return record.get("status") or ("started" if (self.directory / "metrics.jsonl").is_file() else "new")

    def read_record(self) -> dict:
        return read(self.directory / "run.json", "StudyRun")

    def record(self, status: str, code: int, seconds: float, load: float) -> None:
        """Write run.json: what was run, from which commit, on how busy a machine, for how long.

        seconds: since the last start; load: of the machine then, the mean number of processes at work
        """
        content = asdict(self.run) | {"flags": flags.to_argv(self.run.flags), "scoring": self.scored_with()}
        content |= {"status": status, "exit_code": code}
        content["commit"] = process.commit()
        content["minutes"] = round(self.read_record().get("minutes", 0) + seconds / 60, 2)
        content["load"] = [round(load, 2), round(os.getloadavg()[0], 2)]  # before and after
        files.write_json(self.directory / "run.json", content)


def what_trains(words: list[str]) -> Flags | None:
    """Return the flags that affect training; the number of workers, for instance, does not.

    --data-dir is among them if the study sets it, because variants may differ in it.

    Return None if `words`, perhaps from the run.json of an older version, has flags that no longer exist.
    """
    try:
        values = vars(train_parser().parse_args(words))
    except UsageError:
        return None
    return {name: value for name, value in values.items() if name not in FREE}


def read(path: Path, schema: str) -> dict:
    from base import schemas

    return schemas.read_json(path, getattr(schemas, schema), "delete it to start the run again", missing={})


def from_root(path: Path) -> str:
    """Return `path` relative to the repository's root, where the runs are started, or an absolute path."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Stopping:
    """A signal handler that makes every active run save and stop, and lets no new one start."""

    def __init__(self):
        self.signal, self.children = 0, set()

    def __call__(self, number: int, frame=None) -> None:
        self.signal = number
        for child in tuple(self.children):
            child.terminate()


def launch(script: Path, arguments: list[str], log, stopping: Stopping) -> int:
    """Run a command of ours as a child process with its output in the file `log`; return the exit code."""
    command = [sys.executable, str(script), *arguments]
    # In its own session, a child gets Ctrl-C only from `stopping`, and so only once.
    child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    stopping.children.add(child)
    if stopping.signal:  # it arrived while the child was starting
        child.terminate()
    try:
        return child.wait()
    finally:
        stopping.children.discard(child)


def run_all(jobs: list[Job], at_once: int, keep: str) -> int:
    """Run all jobs. Return 0, or the exit code of the first failure or of the stop signal."""
    stopping = Stopping()
    caught = [n for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # by nohup
    before = {number: signal.signal(number, stopping) for number in caught}
    try:
        if at_once == 1:
            codes = [run_one(job, stopping, keep) for job in jobs]
        else:
            with ThreadPoolExecutor(at_once) as pool:
                codes = list(pool.map(lambda job: run_one(job, stopping, keep), jobs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping.signal:
        print("stopped; run the same command again to continue")
        return 128 + stopping.signal
    failed = [(job, code) for job, code in zip(jobs, codes, strict=True) if code not in (0, DIVERGED)]
    for job, code in failed:
        print(f"FAILED with exit code {code}: {job.run.name}: {job.problem}", flush=True)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are done")
    return failed[0][1] if failed else 0


def run_one(job: Job, stopping: Stopping, keep: str) -> int:
    """Run a job unless it is done or a stop signal arrived; return the exit code."""
    if stopping.signal:
        return 0
    status = job.status()
    if status in ("done", "diverged"):
        print(f"{job.run.name}: already {status}", flush=True)
        return 0
    if status == "changed":
        job.problem = f"the existing run has other flags; delete {job.directory} or choose another --out"
        return UsageError.exit_code
    started, load = time.monotonic(), os.getloadavg()[0]
    job.directory.mkdir(parents=True, exist_ok=True)
    print(f"{job.run.name}: {job.command()}", flush=True)
    if not job.read_record():  # whatever ends this process, the next one knows with which flags the run began
        job.record("started", 0, 0.0, load)
    with open(job.directory / "log.txt", "a", encoding="utf-8") as log:
        code = launch(TRAIN, job.arguments, log, stopping)
        if code == 0 and not stopping.signal:
            code = launch(SCORE, job.scoring(), log, stopping)
    seconds = time.monotonic() - started
    if stopping.signal:
        job.record("started", code, seconds, load)
        return 0
    status = {0: "done", DIVERGED: "diverged"}.get(code, "failed")
    job.record(status, code, seconds, load)
    job.problem = error_in(job.directory / "log.txt") if code else ""
    if status == "done":
        delete_checkpoints(job.directory, keep)
    print(f"{job.run.name}: {status} after {seconds:.0f} s", flush=True)
    return code


def error_in(log: Path) -> str:
    """Return the last error in a run's output, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def delete_checkpoints(directory: Path, keep: str) -> None:
    """Delete the checkpoints of a finished run, except its best one or as `keep` says."""
    for path in directory.glob("*.pt") if keep != "all" else ():
        if keep == "none" or not path.name.startswith("best_"):
            path.unlink()


if __name__ == "__main__":
    sys.exit(errors.run(main))
