"""Pack a dataset for progressive training: store a resized copy of every image for each training size.
ILSVRC2012 tar files in --data-dir are read directly.

Run `python pack_dataset.py --data-dir data/imagenet --out data/imagenet-packed`, then
`python train.py --data-dir data/imagenet-packed`. The same command continues an interrupted run.
`--verify` packs nothing: it decodes every image of --data-dir and lists the bad ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from base import errors, flags, process
from base.errors import DataError, ResourceError, UsageError
from base.flags import Flag
from base.progress import Progress

# fmt: off
PACKING = (
    Flag("out", "files", "Output directory; required unless --verify is given.", str, "", "DIR"),
    Flag("stored_sides", "files", "Short sides in px of the stored training images; the default suits "
         "training at 64, 128 and 224 px.",
         flags.listing(flags.number(int, 8, 4096)), (96, 192, 320), "PX,PX,..."),
    Flag("quality", "files", "JPEG quality of the resized images.", flags.number(int, 1, 100), 90, "Q"),
    Flag("on_bad_image", "files", "fail lists bad images, leaves their shards unwritten and exits with 3; "
         "skip leaves only these images out.", ("fail", "skip"), "fail", "ACTION"),
    Flag("workers", "processes", "Number of processes.", flags.number(int, 1, 1024), process.cores(), "N"),
    Flag("verify", "output", "Decode all images, check packed shards, and write nothing."),
    flags.DEBUG,
)
# fmt: on


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="pack_dataset.py", description=__doc__.split("\n\n")[0])
    flags.add_flags(parser, "data", flags.SOURCE)
    flags.add_flags(parser, "packing", PACKING)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.verify == bool(args.out):
        raise UsageError("give either --out or --verify", "--out DIR packs the dataset, --verify checks it")
    index = open_index(args)
    for note in index.notes:
        print(note)
    if args.verify:
        return verify(index, args.workers)
    return pack(index, args.out, args.stored_sides, args.quality, args.workers, args.on_bad_image)


def open_index(args):
    """Return the DatasetIndex to pack: of the ILSVRC tar files, or of what train.py would read."""
    from sources.archives import tars
    from sources.layouts import open_dataset

    if args.dataset == "imagenet" and tars.present(args.data_dir):
        return tars.imagenet_tars(args.data_dir)
    options = {"class_list": args.class_list, "allow_class_mismatch": args.allow_class_mismatch}
    return open_dataset(args.dataset, args.data_dir, split=args.split, **options)


# --- packing -------------------------------------------------------------------------------------


def pack(index, out: str, sides: Sequence[int], quality: int, workers: int, on_bad_image="fail") -> int:
    """Pack the DatasetIndex `index` into `out`; return the exit code."""
    from sources import packing

    plan = packing.make_plan(index, sides, quality)
    os.makedirs(out, exist_ok=True)
    with _locked(out):
        records, groups = packing.start(out, plan), packing.groups_of(plan)
        missing = [group for group in groups if (group.part, group.k) not in records]
        if missing:
            _check_disk(packing.estimate(index, plan, missing), out)
        images = sum(len(group.ids) for group in groups)
        done = images - sum(len(group.ids) for group in missing)
        write = partial(packing.write_group, index, plan, out=out, on_bad_image=on_bad_image)
        bad = []
        with Progress(images, "packing", unit="images", initial=done) as progress:
            for group, record in in_processes(write, missing, workers):
                if "bad" in record:
                    bad += [{"part": group.part, **image} for image in record["bad"]]
                else:
                    packing.add_record(out, record)
                    records[group.part, group.k] = record
                progress.update(len(group.ids))
        _refuse_bad(bad)
        manifest = packing.finish(out, index, plan, records)
    _print_summary(manifest, out)
    return 0


@contextmanager
def _locked(out: str) -> Iterator[None]:
    """Lock `out` against a second packing; the kernel drops the lock with the last process that holds it."""
    import fcntl

    descriptor = os.open(out, os.O_RDONLY)
    try:
        for _ in range(20):  # the workers of a killed process take a moment to end
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise UsageError(f"another process is packing into {os.path.abspath(out)}", "wait for it to end")
        yield
    finally:
        os.close(descriptor)


def _check_disk(needed: dict[str, int], out: str) -> None:
    """Print the estimated sizes. Raises ResourceError if they exceed the free space."""
    total, free = sum(needed.values()), shutil.disk_usage(out).free
    for table, size in needed.items():
        print(f"{table:>12}  about {_bytes(size)}")
    print(f"{'total':>12}  about {_bytes(total)}, {_bytes(free)} free", flush=True)
    if total * 1.02 > free:  # a margin, because the total is estimated from a sample
        what = f"packing needs about {_bytes(total)} in {os.path.abspath(out)}, which has {_bytes(free)}"
        raise ResourceError(what, "use an --out on a larger disk, or fewer --stored-sides")


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _print_summary(manifest: dict, out: str) -> None:
    for table, shards in manifest["tables"].items():
        images, size = sum(shard["rows"] for shard in shards), sum(shard["bytes"] for shard in shards)
        print(f"{table:>12}  {images:>9,} images  {len(shards):>4} shards  {_bytes(size):>10}")
    if skipped := sum(len(part["skipped"]) for part in manifest["parts"].values()):
        print(f"{skipped} bad images left out; manifest.json names them")
    print(f"next: python train.py --data-dir {out}")


# --- verifying -----------------------------------------------------------------------------------


def verify(index, workers: int) -> int:
    """Decode every stored copy of every image, and verify the checksums of packed shards."""
    from sources.packed import PackedSplit

    copies, bad = {"train": index.train, "val": index.val}, []
    if isinstance(index.train, PackedSplit):
        copies = {split.table: split for split in (*index.train.copies(), index.val)}
        for table, split in copies.items():
            bad += [{"part": table, "name": path, "reason": why} for path, why in split.damaged_shards()]
    for name, split in copies.items():
        found, ids = [], range(len(split))
        with Progress(len(ids), f"verify {name}", unit="images") as progress:
            parts = [ids[first : first + 256] for first in ids[::256]]
            for part, images in in_processes(partial(_bad_images, split), parts, workers):
                found += [{"part": name, **image} for image in images]
                progress.update(len(part))
        bad += sorted(found, key=lambda image: image["name"])
    _refuse_bad(bad)
    print(f"all {len(index.train) + len(index.val):,} images decode")
    return 0


def _bad_images(split, ids: range) -> list[dict]:
    from sources.images import BadImage, decode

    bad = []
    for i in ids:
        try:
            decode(split.read([i])[0], split.name(i), thorough=True)
        except BadImage as error:
            bad.append({"name": error.name, "reason": error.reason})
        except (OSError, DataError) as error:
            bad.append({"name": f"#{i}", "reason": getattr(error, "what", None) or str(error)})
    return bad


def _refuse_bad(bad: list[dict]) -> None:
    """Print all bad images, if any, and raise DataError."""
    for image in bad:
        print(errors.printable(f"{image['part']}: {image['name']}: {image['reason']}"))
    if bad:
        fix = "replace them (then pack into a new --out), or pack with --on-bad-image skip"
        raise DataError(f"{len(bad):,} bad images (listed above)", fix)


# --- worker processes ----------------------------------------------------------------------------


def in_processes(work: Callable, jobs: Iterable, workers: int) -> Iterator[tuple]:
    """Yield (job, work(job)) for all `jobs`, in the order in which `workers` processes finish them."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    # `work` refers to the whole dataset: a worker receives it once at its start (by fork on Linux).
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=(work, os.getpid()))
    again = "and run the same command again to continue"
    try:
        futures = {pool.submit(_run, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        what = "a worker process was killed; the machine may be out of memory"
        raise ResourceError(what, f"use fewer --workers {again}") from error
    except ResourceError as error:  # the disk is full
        raise ResourceError(error.what, f"make room {again}") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable  # what this worker process does with a job


def _init_worker(work: Callable, parent: int) -> None:
    """Prepare a worker process, which leaves Ctrl-C to its parent and ends with it."""
    import cv2

    from harness.interrupts import die_with_parent

    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:  # it has already died; this worker would hold the lock for ever
        os._exit(1)
    cv2.setNumThreads(0)


def _run(job: object) -> object:
    return _work(job)


if __name__ == "__main__":
    sys.exit(errors.run(main))
