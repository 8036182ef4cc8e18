"""Run a study: every variant with every seed, each through train.py's command line.

What is done is skipped, what was stopped goes on (--resume auto), and a variant that fails is
reported while the others run. Results are read by report.py; studies are data in studies.py.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablation_runs.studies import STUDIES
from ablation_runs.study import PRESETS, Run, merged
from base import errors, flags
from base.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
RUNS = "./checkpoints/ablation"
DIVERGED = errors.DivergedError.exit_code
EPILOG = """examples:
  python -m ablation_runs.run --list
  python -m ablation_runs.run ema --smoke                                      the machinery, in a minute
  python -m ablation_runs.run ema --data-dir data/tiny-imagenet                three seeds of every variant
  python -m ablation_runs.run ema --data-dir data/tiny20 --preset cpu          a small machine's version of it
  python -m ablation_runs.run ema --shard $SLURM_ARRAY_TASK_ID/8 --data-dir D  an eighth of the runs
  python -m ablation_runs.run ema --data-dir D -- --lr 2e-3 --device cuda:1    flags laid over the study's base"""


def shard(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8): the second of eight."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise flags.argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, such as 2/8")
    return int(part), int(parts)


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="-m ablation_runs.run", description=__doc__.split("\n\n")[0], epilog=EPILOG)
    parser.formatter_class = flags.argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("study", nargs="?", default="", metavar="STUDY", help="its name; --list shows them")
    add("--list", action="store_true", help="the studies and their questions")
    add("--dry-run", action="store_true", help="print the commands and what is done of them, start nothing")
    add(
        "--preset",
        default="full",
        choices=PRESETS,
        help="cpu: what a study names for a small machine (default: full)",
    )
    add("--smoke", action="store_true", help="the same as --preset smoke: seconds a run, on generated images")
    add(
        "--seeds",
        type=flags.listing(flags.natural),
        default=None,
        metavar="N,N,...",
        help="default: the study's",
    )
    add("--variants", type=flags.listing(str), default=(), metavar="NAME,...", help="only these")
    add("--jobs", type=flags.positive, default=1, metavar="N", help="runs at a time (default: 1)")
    add(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="only the I-th of N parts of the runs, I from 1",
    )
    add("--data-dir", default="", metavar="DIR", help="the dataset (default: data/<dataset>)")
    add(
        "--out",
        default=RUNS,
        metavar="DIR",
        help=f"runs go to DIR/<study>/<variant>-seed<n> (default: {RUNS})",
    )
    add(
        "--keep",
        default="best",
        choices=("best", "all", "none"),
        help="checkpoints of finished runs (default: best)",
    )
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:cut])
    if args.list or not args.study:
        print(
            "\n".join(f"{s.name:<32} {len(s.variants):>3} variants  {s.question}" for s in STUDIES.values())
        )
        return 0
    preset = "smoke" if args.smoke else args.preset
    runs = chosen(args.study, preset, args.seeds, args.variants, args.shard, shlex.join(words[cut + 1 :]))
    jobs = [Job(run, Path(args.out) / run.study / run.name, args.data_dir) for run in runs]
    if args.dry_run:
        for job in jobs:
            print(f"{job.status():<9} {shlex.join(['python', 'train.py', *job.arguments])}")
        return 0
    code = run_all(jobs, args.jobs, args.keep)
    if not code:
        asked = [
            *(["--preset", preset] if preset != "full" else []),
            *(["--runs", args.out] if args.out != RUNS else []),
        ]
        print(f"next: {shlex.join(['python', '-m', 'ablation_runs.report', args.study, *asked])}")
    return code


def chosen(name: str, preset: str, seeds, variants, part: tuple[int, int], extra: str = "") -> list[Run]:
    """The runs asked for. Raises UsageError for a study or variant that does not exist."""
    study = STUDIES.get(name)
    if study is None:
        raise UsageError(f"no study {name!r}", f"there are {', '.join(STUDIES)}")
    unknown = set(variants) - {v.name for v in study.variants}
    if unknown:
        raise UsageError(
            f"{name} has no variant {', '.join(sorted(unknown))}",
            f"it has {', '.join(v.name for v in study.variants)}",
        )
    runs = [run for run in study.runs(preset, seeds, extra) if not variants or run.variant in variants]
    i, n = part
    return runs[i - 1 :: n]


class Job:
    """A run and its directory: the command, what is known of it, and starting it."""

    def __init__(self, run: Run, directory: Path, data_dir: str = ""):
        self.run, self.directory, self.problem = run, directory, ""
        dataset = next(
            (v for f, v in zip(run.flags, run.flags[1:], strict=False) if f == "--dataset"), "imagenet"
        )
        data = from_root(Path(data_dir)) if data_dir else f"data/{dataset}"
        own = [word.replace("{data}", data) for word in run.flags]
        on_disk = (
            []
            if "--data-dir" in own or dataset.partition(":")[0] in ("digits", "synthetic")
            else ["--data-dir", data]
        )
        self.arguments = [*own, *on_disk, "--save-dir", from_root(directory), "--resume", "auto"]

    def recorded(self) -> dict:
        from base import schemas

        return schemas.read_json(
            self.directory / "run.json", schemas.StudyRun, "delete it: the run starts again", missing={}
        )

    def status(self) -> str:
        """done, diverged, failed, started or new; changed: there is a run of this name, made with other flags."""
        known = self.recorded()
        if known and what_trains(known.get("flags", [])) != what_trains(self.run.flags):
            return "changed"
        return known.get("status") or ("started" if (self.directory / "metrics.jsonl").is_file() else "new")

    def record(self, status: str, code: int) -> None:
        content = {
            "study": self.run.study,
            "variant": self.run.variant,
            "seed": self.run.seed,
            "flags": self.run.flags,
            "status": status,
            "exit_code": code,
        }
        partial = self.directory / "run.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.directory / "run.json")


def what_trains(words: list[str]) -> dict[str, str | None]:
    """The flags that change what is learned: a run made with other workers is the same run."""
    return {
        name: value
        for name, value in merged(shlex.join(words)).items()
        if name.removeprefix("no-").replace("-", "_") not in flags.FREE_ON_RESUME
    }


def from_root(path: Path) -> str:
    """`path` as the runs see it, whose working directory is this repository."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Stopping:
    """A stop signal for the runner is one for every run under way; they save, and nothing new starts."""

    def __init__(self):
        self.signal, self.children, self.lock = 0, set(), threading.Lock()

    def __call__(self, number: int, frame=None) -> None:
        self.signal = number
        with self.lock:
            for child in self.children:
                child.send_signal(signal.SIGTERM)

    def call(self, command: list[str], log) -> int:
        """Start `command` and wait for it."""
        with self.lock:
            # A session of its own: Ctrl-C reaches it through us alone, and so once.
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.children.add(child)
        try:
            return child.wait()
        finally:
            with self.lock:
                self.children.discard(child)


def launch(arguments: list[str], log, stopping: Stopping) -> int:
    """train.py with `arguments` in a process of its own, its output in the file `log`; the exit code."""
    return stopping.call([sys.executable, str(TRAIN), *arguments], log)


def run_all(jobs: list[Job], at_once: int, keep: str) -> int:
    """Run what is not done yet; 0, or the exit code of the first that failed, or of the stop signal."""
    stopping = Stopping()
    before = {number: signal.signal(number, stopping) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if at_once == 1:
            codes = [run_one(job, stopping, keep) for job in jobs]
        else:
            with ThreadPoolExecutor(at_once) as pool:
                codes = list(pool.map(lambda job: run_one(job, stopping, keep), jobs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = [(job, code) for job, code in zip(jobs, codes, strict=True) if code not in (0, DIVERGED)]
    if stopping.signal:
        print("stopped; the same command goes on")
        return 128 + stopping.signal
    for job, code in failed:
        print(f"FAILED with exit code {code}: {job.run.name}: {job.problem}", flush=True)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are done")
    return failed[0][1] if failed else 0


def run_one(job: Job, stopping: Stopping, keep: str) -> int:
    if stopping.signal:
        return 0
    if job.status() in ("done", "diverged"):
        print(f"{job.run.name}: {job.status()} before", flush=True)
        return 0
    if job.status() == "changed":
        job.problem = f"made with other flags; delete {job.directory} or name another --out"
        return UsageError.exit_code
    started = time.monotonic()
    job.directory.mkdir(parents=True, exist_ok=True)
    print(f"{job.run.name}: {shlex.join(['python', 'train.py', *job.arguments])}", flush=True)
    with open(job.directory / "log.txt", "a", encoding="utf-8") as log:
        code = launch(job.arguments, log, stopping)
    if stopping.signal:
        return 0
    status = {0: "done", DIVERGED: "diverged"}.get(code, "failed")
    job.record(status, code)
    job.problem = last_words(job.directory) if code else ""
    if status == "done":
        clear_checkpoints(job.directory, keep)
    print(f"{job.run.name}: {status} after {time.monotonic() - started:.0f} s", flush=True)
    return code


def clear_checkpoints(directory: Path, keep: str) -> None:
    """Free the disk: a finished run is known by run.json, and of its checkpoints only the best is looked at."""
    for path in directory.glob("*.pt") if keep != "all" else ():
        if keep == "none" or not path.name.startswith("best_"):
            path.unlink()


def last_words(directory: Path) -> str:
    """What a failed run said: its error, or else the last line."""
    lines = (directory / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output"
    )


if __name__ == "__main__":
    sys.exit(errors.run(main))
