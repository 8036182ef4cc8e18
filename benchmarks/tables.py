"""Fill the tables of README.md and benchmarks/README.md from the rows in benchmarks/results/<machine>/.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. `python -m benchmarks.tables`
writes them all; a test compares. With a directory of results, it prints that directory's tables instead.
To publish results, copy the .jsonl files of an --out to benchmarks/results/<machine>/ and run it.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from base import errors, files, flags
from base.errors import DataError
from base.process import ROOT
from benchmarks.targets import targets

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
UNMEASURED = "*Not measured yet*: `python -m benchmarks.{command} --out DIR`{where}."
IMAGENET = 1_281_167  # training images
LOOPS = ("project", "plain loop")  # of parity
Rows = list[dict]
Table = list[list[object]]  # the header, then the lines
Maker = Callable[[Rows], tuple[Table, Rows]]  # also returns the rows it used


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("results", nargs="?", default="", metavar="DIR", help="Print the tables of DIR.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.results:
        rows = load([Path(args.results)])
        print("\n".join(f"{name}\n\n{filled(name, rows)}" for name in TABLES))
        return 0
    rows = load(result_directories())
    for page in files.rewrite(PAGES, lambda text: fill(text, rows)):
        print(f"{page.relative_to(ROOT)}: written")
    return 0


def result_directories() -> list[Path]:
    return sorted(path for path in RESULTS.glob("*") if path.is_dir())


def load(directories: Iterable[Path]) -> Rows:
    """Return all rows; `gpu_machine` says whether any row of their directory was measured on a GPU."""
    from benchmarks import records

    rows = []
    for directory in directories:
        found = records.load(directory)
        gpu_machine = any(row.get("cuda") for row in found)
        rows += [row | {"gpu_machine": gpu_machine} for row in found]
    return rows


def of_gpus(rows: Rows) -> Rows:
    """Return the rows of machines with a GPU, those of the loader included."""
    return [row for row in rows if row["gpu_machine"] and not row.get("narrow")]


def fill(text: str, rows: Rows) -> str:
    """Return `text` with every marked table made from `rows`. Raises DataError for an unknown table."""
    return files.fill_parts(text, "table", lambda name: filled(name, rows))


def filled(name: str, rows: Rows) -> str:
    """Return a table as Markdown, with where it was measured below it, or that it was not measured."""
    if name not in TABLES:
        raise DataError(f"there is no table {name!r}", f"choose from {', '.join(TABLES)}")
    part, make = TABLES[name]
    table, used = make(rows if name in ANY_MACHINE else of_gpus(rows))
    if not table[1:]:
        where = "" if name in ANY_MACHINE else " on a machine with a GPU"
        return UNMEASURED.format(command="first_minute " * bool(where) + part, where=where) + "\n"
    header, *lines = [[shown(cell) for cell in line] for line in table]
    right = [all(map(is_number, column)) for column in zip(*lines, strict=True)]
    places = dict.fromkeys(f"{row['machine']}, torch {row['torch']}, commit {row['commit']}" for row in used)
    drawn = files.markdown_table(header, lines, right)
    return f"{drawn}\n\n{'; '.join(places)}.\n" if used else f"{drawn}\n"


def shown(cell: object) -> str:
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}" if abs(cell) < 10 else f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").isdigit()


# --- the tables: each returns its cells and the rows they come from -----------------------------------


def columns(rows: Rows, cells: dict[str, str]) -> tuple[Table, Rows]:
    """Return the table of the columns `cells`, {heading: key}, with a line for each row.

    If the rows come from several machines, the first column names them.
    """
    if len({row["machine"] for row in rows}) > 1 and "GPU" not in cells:
        cells = {"machine": "short"} | cells
    short = [row | {"short": row["machine"].partition(",")[0]} for row in rows]
    return [list(cells), *([row.get(key) for key in cells.values()] for row in short)], rows


def machine(rows: Rows) -> tuple[Table, Rows]:
    cells = {"GPU": "device", "driver": "driver_version", "CPU cores": "cores", "power limit": "power_limit"}
    cells |= {"highest SM clock": "clocks_max_sm", "bf16 TFLOP/s (8192 x 8192 product)": "matmul_tflops"}
    cells |= {"copy, TB/s read and written": "copy_tb_per_s"}
    return columns(of_part(rows, "environment"), cells)


def gpu_tests(rows: Rows) -> tuple[Table, Rows]:
    used = [row for row in of_part(rows, "gpu-tests") if "passed" in row]
    return columns(used, {name: name for name in ("passed", "failed", "skipped")})


STEP = {"px": "size", "batch": "batch_size"}
SPEED = {"images/s": "images_per_second"}
COMPARED = {"x bare": "times_bare", "x timm": "times_timm"}


def step(rows: Rows) -> tuple[Table, Rows]:
    used = [row for row in rows if row["benchmark"] == "step" and is_documents(row)]
    used = [row | {"name": row["variant"] or row["loop"]} for row in used]
    used.sort(key=lambda row: row["size"])  # stable: the loops stay in their order
    counted = {"kernels": "kernels", "GPU busy %": "busy_percent", "waits": "waits"}
    eager = {"x eager's speed": "times_faster_than_default"}
    # Only ratios can be compared between visits, which were to different machines of one kind.
    speed = SPEED | {"ms": "milliseconds"} if len({row["commit"] for row in used}) == 1 else {}
    return columns(used, STEP | {"loop": "name"} | speed | COMPARED | eager | counted)


def large_batches(rows: Rows) -> tuple[Table, Rows]:
    used = [r for r in rows if r["benchmark"] == "step" and (r["loop"], r["variant"]) == ("project", "")]
    used = [row for row in used if not is_documents(row)]
    full = [row for row in of_part(rows, "large-batches") if not row["fits"]]
    used += [row | {"images_per_second": "does not fit"} for row in full]
    used.sort(key=lambda row: (row["size"], row["batch_size"]))
    return columns(used, STEP | SPEED | COMPARED | {"memory, MiB": "memory_mib"})


def syncs(rows: Rows) -> tuple[Table, Rows]:
    cells = {"run": "run", "from": "where", "waits": "count", "steps": "steps", "a step": "per_step"}
    used = of_part(rows, "syncs")  # lines move from commit to commit
    return columns([row | {"where": re.sub(r":\d+", "", row["place"])} for row in used], cells)


def loader(rows: Rows) -> tuple[Table, Rows]:
    """Images per second by the number of workers, and what the step can take."""
    used = [row for row in rows if row["benchmark"] == "loader" and row["augmentation"] == "full"]
    workers = sorted({row["workers"] for row in used})
    wanted = {}
    for row in rows:
        if row["benchmark"] == "step" and row["loop"] == "project" and is_documents(row):
            wanted[row["size"]] = max(wanted.get(row["size"], 0.0), row["images_per_second"])
    rates = {(row["size"], row["loader"], row["workers"]): row["images_per_second"] for row in used}
    pairs = dict.fromkeys((size, name) for size, name, _ in sorted(rates, key=lambda key: key[0]))
    lines = [[px, name, *(rates.get((px, name, n)) for n in workers), wanted.get(px)] for px, name in pairs]
    return [["px", "loader", *(f"{n} workers" for n in workers), "the step takes"], *lines], used


def whole_run(rows: Rows) -> tuple[Table, Rows]:
    """train.py as a whole, and what its rate means for the documents' 90 epochs."""
    used = of_part(rows, "whole-run")
    lines, hours = [], Counter()
    for row in used:
        name, rate = row["run"], row["images_per_second"]
        took = row["epochs_of_90"] * IMAGENET / rate / 3600
        hours[name] += took
        cells = [row["size"], row["batch_size"], rate, row["data_wait_percent"], row["epochs_of_90"]]
        lines.append([name, *cells, f"{took:.2f}", f"{hours[name]:.2f}"])
    header = ["run", "px", "batch", "images/s", "waits for data, %", "epochs (of 90)"]
    return [[*header, "hours of ImageNet", "hours, cumulative"], *lines], used


def loader_cpu(rows: Rows) -> tuple[Table, Rows]:
    """CPU microseconds of an image, with one worker, at each size."""
    used = [row for row in rows if row["benchmark"] == "loader" and row["workers"] == 1]
    found = {(row["loader"], row["augmentation"], row["size"]): row["cpu_us"] for row in used}
    sizes = sorted({row["size"] for row in used})
    pipelines = {"basic": "crop + flip", "full": "full augmentation", "evaluation": "evaluation"}
    at = " / ".join(map(str, sizes))
    lines = []
    for name in dict.fromkeys(row["loader"] for row in used):
        times = [[found.get((name, pipeline, size)) for size in sizes] for pipeline in pipelines]
        lines.append([name, *(" / ".join(map(shown, cells)) if any(cells) else "" for cells in times)])
    return [["loader", *(f"{text}, {at} px" for text in pipelines.values())], *lines], used


def trainings(rows: Rows) -> tuple[Table, Rows]:
    """The last epoch of each training."""
    cells = {"data": "part", "run": "run", "architecture": "arch", "epochs": "count", "px": "image_size"}
    cells |= {"top-1 %": "val_top1", "train top-1 %": "train_top1", "minutes": "minutes"} | SPEED
    runs: dict[tuple, Rows] = {}
    for row in rows:
        if row["benchmark"] == "first_minute" and row.get("epochs"):
            runs.setdefault((row["machine"], row["part"], row["run"]), []).append(row)
    used = []
    for epochs in runs.values():
        last = max(epochs, key=lambda row: row["epoch"])
        whole = last["epoch"] == last["epochs"]
        count = str(last["epochs"]) if whole else f"{last['epoch']} of {last['epochs']}, stopped"
        used.append(last | {"count": count, "minutes": sum(row["seconds"] for row in epochs) / 60})
    return columns(used, cells)


def parity(rows: Rows) -> tuple[Table, Rows]:
    """The project against a plain loop, paired by seed, and the difference."""
    header = ["loop", "seeds", "top-1 %", "median CPU seconds"]
    used = [row for row in rows if row["benchmark"] == "parity"]
    by_seed = [{row["seed"]: row for row in used if row["loop"] == loop} for loop in LOOPS]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(seeds) < 2:
        return [header], used
    lines, tops = [], [[found[seed]["val_top1"] for seed in seeds] for found in by_seed]
    for loop, found, top1 in zip(LOOPS, by_seed, tops, strict=True):
        spread = f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}"
        lines.append([loop, len(seeds), spread, statistics.median(found[k]["cpu_seconds"] for k in seeds)])
    return [header, *lines, ["difference, 95 % interval", len(seeds), difference(*tops), None]], used


def difference(own: Sequence[float], plain: Sequence[float]) -> str:
    """Return the mean difference of paired scores and its 95 % t interval: "+0.25 [-0.10, +0.60]"."""
    from scipy import stats

    low, high = stats.ttest_rel(own, plain).confidence_interval()
    return f"{sum(own) / len(own) - sum(plain) / len(plain):+.2f} [{low:+.2f}, {high:+.2f}]"


def headline(rows: Rows) -> tuple[Table, Rows]:
    used = sorted((r for r in rows if r["benchmark"] == "headline"), key=lambda r: (r["dataset"], r["seed"]))
    used = [row | {"minutes": row["seconds"] / 60, "cpu": row["cpu_seconds"] / 60} for row in used]
    cells = {"data": "dataset", "loop": "loop", "seed": "seed", "epochs": "epochs", "top-1 %": "top1"}
    used = [row | {"top1": f"{row['val_top1']:.2f}"} for row in used]
    return columns(used, cells | {"minutes": "minutes", "CPU minutes": "cpu", "load before": "load"})


def of_part(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["benchmark"] == "first_minute" and row["part"] == part]


def is_documents(row: dict) -> bool:
    from benchmarks.step import BATCH_SIZES

    return BATCH_SIZES.get(row["size"]) == row["batch_size"]


ANY_MACHINE = ("targets", "loader-cpu", "parity", "headline")  # the other tables are of machines with a GPU
TABLES: dict[str, tuple[str, Maker]] = {  # name -> parts of first_minute that measure it, and its function
    "targets": ("step loader", targets),
    "loader-cpu": ("loader", loader_cpu),
    "parity": ("parity --data-dir data/cifar10", parity),
    "headline": ("headline cifar10 --data-dir data/cifar10", headline),
    "gpu-machine": ("environment", machine),
    "gpu-tests": ("gpu-tests", gpu_tests),
    "gpu-step": ("step", step),
    "gpu-large-batches": ("large-batches", large_batches),
    "gpu-syncs": ("syncs", syncs),
    "gpu-loader": ("loader", loader),
    "gpu-whole-run": ("whole-run", whole_run),
    "gpu-trainings": ("cifar10 cifar100 tiny-imagenet", trainings),
}


if __name__ == "__main__":
    sys.exit(errors.run(main))
