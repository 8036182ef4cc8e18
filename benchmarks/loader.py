"""What loading an image into a batch costs: this project's loader compared with others, in one run.

`python -m benchmarks.loader --data-dir DIR --out OUT` reads class folders in DIR/train, packs them, and
compares each loader with the packed copy in turns (A B B A ...), from a warm page cache. A pass is a whole
number of batches. CPU time (user and system, of this process and its workers) comes first, because a busy
machine changes it least; images per second hold only within one run.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from base import errors, flags, process
from base.errors import UsageError

REFERENCE = "packed"  # every other loader takes turns with it
AUGMENTATIONS = ("basic", "full", "evaluation")


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.loader", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    sides = flags.listing(flags.number(int, 8))
    workers = [n for n in (1, 2, 4, 8, 16) if n <= process.cores()]
    kept = "Keeps links to the images and the packed copies for the next run (default: temporary)."
    stored = "Packed sides in px; also as raw pixels."
    passes = "Measured passes of each loader; the best and the median count."
    add("--data-dir", default="", metavar="DIR", help="Directory with train/<class>/*.JPEG, full size.")
    add("--out", default="benchmark-results", metavar="DIR", help="Rows go to DIR/loader.jsonl.")
    add("--table", action="store_true", help="Only print the table of --out, and draw it.")
    add("--sizes", type=positive, nargs="+", default=[64, 128, 224], metavar="PX", help="Image sizes.")
    add("--workers", type=positive, nargs="+", default=workers, metavar="N", help="Loader processes.")
    add("--augmentations", nargs="+", choices=AUGMENTATIONS, default=list(AUGMENTATIONS), help="Pipelines.")
    add("--stored-sides", type=sides, default=(96, 192, 320), metavar="LIST", help=stored)
    add("--images", type=positive, default=2000, metavar="N", help="Maximum images, spread over the classes.")
    add("--batches", type=positive, default=8, metavar="N", help="Batches of 128 per worker in a pass.")
    add("--passes", type=positive, default=5, metavar="N", help=passes)
    add("--work-dir", default="", metavar="DIR", help=kept)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from benchmarks import records

    if not args.table:
        if not args.data_dir:
            raise UsageError("no --data-dir", "name a directory with train/<class>/*.JPEG")
        errors.doing("loading torch and packing the images")
        with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as scratch:
            measure_all(args, Path(args.work_dir or scratch))
    rows = records.load(args.out, "loader")
    print(records.table(rows, COLUMNS))
    if rows:
        draw(rows, Path(args.out) / "loader.png")
    return 0


def measure_all(args, work_dir: Path) -> None:
    """Measure what `args.out` does not hold yet; append each row when it is measured."""
    import cv2
    import torch

    from benchmarks import records
    from benchmarks.loader_peers import Setting, loaders

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    data = prepare(args.data_dir, args.images, args.stored_sides, work_dir)
    done, missing = records.finished(args.out, "loader"), set()
    for size, augmentation, workers in itertools.product(args.sizes, args.augmentations, args.workers):
        setting = Setting(size, augmentation, workers, batches=args.batches * workers)
        for row in compare(loaders(data, setting), setting, args.passes, done, missing):
            records.append(args.out, row | records.environment())
            done.add(row["row"])
            print(records.line(row, COLUMNS), flush=True)


# --- the data -------------------------------------------------------------------------------------


def prepare(data_dir: str, limit: int, sides: tuple[int, ...], work_dir: Path):
    """Return the `Data` of at most `limit` images: linked as class folders, and packed."""
    from benchmarks.loader_peers import Data
    from sources.layouts import open_dataset
    from sources.packed import open_packed

    folder = work_dir / "folders"
    link(data_dir, limit, folder)
    listed = ",".join(map(str, sides))
    pack(folder, work_dir / "packed", "--stored-sides", listed)
    pack(folder, work_dir / "raw", "--stored-sides", listed, "--raw-sides", listed, "--eval-sizes", "none")
    indices = {
        REFERENCE: open_packed(work_dir / "packed"),
        "packed, raw": open_packed(work_dir / "raw"),
        "full-size": open_dataset("imagenet", str(folder)),
    }
    return Data(folder, indices, tuple(sides))


def link(data_dir: str, limit: int, folder: Path) -> None:
    """Link at most `limit` images of `data_dir`/train into `folder`/train; they are `folder`/val as well."""
    from benchmarks.storage import some_of

    _, images = some_of(data_dir, limit)
    for i in images.ids.tolist():
        path = folder / images.base.name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(os.path.abspath(images.base.path(i)))
    if not (folder / "val").is_symlink():
        (folder / "val").symlink_to("train")


def pack(folder: Path, out: Path, *options: str) -> None:
    """Run pack_dataset.py, which is quick if `out` is complete already."""
    from benchmarks.parity import start

    paths = ["--data-dir", str(folder.absolute()), "--out", str(out.absolute())]
    start([str(process.ROOT / "pack_dataset.py"), *paths, "--on-bad-image", "skip", *options])


# --- measuring ------------------------------------------------------------------------------------


def compare(starts: dict[str, Callable], setting, passes: int, done: set, missing: set) -> Iterator[dict]:
    """Yield the row of each loader that is not in `done`, compared with REFERENCE in turns.

    A loader that cannot start, such as one whose package is not installed, is skipped; each reason is
    printed once and added to `missing`.
    """
    where = f"{setting.size} px, {setting.augmentation}, {setting.workers} workers"
    columns = {
        "benchmark": "loader",
        "size": setting.size,
        "augmentation": setting.augmentation,
        "workers": setting.workers,
        "passes": passes,
        "batches": setting.batches,
    }
    reference = None
    for name, start in starts.items():
        row = f"{where}, {name}"
        if name == REFERENCE or row in done:
            continue
        try:
            loader = start()
        except (ImportError, RuntimeError) as error:  # not installed, or not for this machine
            reason = str(error).strip().splitlines()[-1]
            if reason not in missing:
                print(f"{name}: skipped ({reason})", flush=True)
            missing.add(reason)
            continue
        reference = reference or starts[REFERENCE]()
        ours, theirs = in_turns((reference, loader), passes)
        found = {REFERENCE: row_of(ours, ours), name: row_of(theirs, ours)}
        for kind, values in found.items():
            if f"{where}, {kind}" not in done:
                yield columns | {"row": f"{where}, {kind}", "loader": kind} | values
        del loader  # ends its workers before the next one starts


def row_of(measured: list[tuple], packed: list[tuple]) -> dict[str, float]:
    """Return the columns of a loader from (CPU us per image, images per second) of its passes."""
    pairs = list(zip(measured, packed, strict=True))
    return {
        "cpu_us": round(min(cpu for cpu, _ in measured), 1),
        "cpu_us_median": round(statistics.median(cpu for cpu, _ in measured), 1),
        "images_per_second": round(statistics.median(rate for _, rate in measured), 1),
        "packed_cpu_us": round(min(cpu for cpu, _ in packed), 1),
        "packed_saves_cpu": round(statistics.median(own[0] / ref[0] for own, ref in pairs), 2),
        "packed_is_faster": round(statistics.median(ref[1] / own[1] for own, ref in pairs), 2),
    }


def in_turns(loaders: tuple[Iterable, ...], passes: int) -> list[list[tuple[float, float]]]:
    """Take a pass of each loader to warm up, then `passes` in turns; return what `one_pass` does of each."""
    for loader in loaders:
        one_pass(loader)
    measured = [[] for _ in loaders]
    for k in range(passes):
        for i in range(len(loaders))[:: 1 if k % 2 == 0 else -1]:
            measured[i].append(one_pass(loaders[i]))
    return measured


def one_pass(loader: Iterable) -> tuple[float, float]:
    """Return (CPU microseconds per image, images per second) of all batches of one pass."""
    cpu, started = cpu_seconds(), time.perf_counter()
    images = sum(len(batch[1]) for batch in loader)
    seconds = time.perf_counter() - started
    return (cpu_seconds() - cpu) / images * 1e6, images / seconds


def cpu_seconds() -> float:
    """Return the CPU seconds that this process, its threads and its living workers have used (Linux)."""
    # The clock of a process, as clock_getcpuclockid(3) numbers it.
    clocks = [(~worker.pid << 3) | 2 for worker in multiprocessing.active_children()]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {  # heading -> (column, format)
    "CPU us/image: best": ("cpu_us", ",.0f"),
    "median": ("cpu_us_median", ",.0f"),
    "images/s": ("images_per_second", ",.0f"),
    "packed: less CPU": ("packed_saves_cpu", ".2f"),
    "faster": ("packed_is_faster", ".2f"),
}


def draw(rows: list[dict], path: Path) -> None:
    """Draw the CPU time of an image by size: a panel for each pipeline, at the fewest workers."""
    from analysis import figures

    rows = [row for row in rows if row["workers"] == min(r["workers"] for r in rows)]
    keys = ("augmentation", "size", "loader")
    panels, sizes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in keys)
    figure = figures.figure(1.2 + 3.4 * len(panels), 3.4, "CPU time of an image, best pass")
    titles, drawn = {"basic": "crop + flip", "full": "full augmentation"}, {}
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        own = [name for name in names if any((r["augmentation"], r["loader"]) == (panel, name) for r in rows)]
        width = 0.85 / len(own)
        for k, name in enumerate(own):
            shown = [row for row in rows if (row["augmentation"], row["loader"]) == (panel, name)]
            places = [sizes.index(row["size"]) + (k - (len(own) - 1) / 2) * width for row in shown]
            color = figures.LINES[names.index(name) % len(figures.LINES)]
            hatch = "///" * (names.index(name) >= len(figures.LINES))
            drawn[name] = axis.bar(places, [row["cpu_us"] for row in shown], width, color=color, hatch=hatch)
        axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axis.set(title=titles.get(panel, panel), ylabel="CPU us / image", yscale="log")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, fontsize=7)
    print(f"picture: {figures.save(figure, path)}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
