"""Make the packed copy that progressive training reads: every image resized once per training size.

`python pack_dataset.py --data-dir data/imagenet --out data/imagenet-packed`, then
`python train.py --data-dir data/imagenet-packed`. A killed run goes on when it is started again.
`--verify` packs nothing: it decodes every image there is and lists the bad ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from base import errors, flags, process
from base.errors import DataError, ResourceError, UsageError

NO_SPACE = (28, 122, 27)  # ENOSPC, EDQUOT, EFBIG


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="pack_dataset.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--data-dir",
        default="./data/imagenet",
        metavar="DIR",
        help="the dataset on disk, or the ILSVRC2012 tars",
    )
    add("--dataset", default="imagenet", metavar="NAME", help="as for train.py; hf:<name> packs from the hub")
    add(
        "--split",
        default="official",
        choices=("official", "70-30"),
        help="70-30 pools tiny-imagenet's train and val",
    )
    add("--class-list", default="", metavar="FILE", help="pack only these classes")
    add(
        "--allow-class-mismatch", action="store_true", help="accept a val/ that lacks some of train's classes"
    )
    add("--out", default="", metavar="DIR", help="where the packed copy goes (needed unless --verify)")
    add(
        "--stored-sides",
        type=flags.listing(flags.number(int, 8, 4096)),
        default=(96, 192, 320),
        metavar="LIST",
        help="short sides in px, one training copy each; 96,192,320 are for training at 64, 128, 224",
    )
    add(
        "--quality",
        type=flags.number(int, 1, 100),
        default=90,
        metavar="Q",
        help="JPEG quality of the resized copies",
    )
    add(
        "--on-bad-image",
        default="fail",
        choices=("fail", "skip"),
        help="fail: pack the rest, list the bad ones, exit 3; skip: leave them out of the copy",
    )
    add("--workers", type=flags.number(int, 1, 1024), default=process.cores(), metavar="N", help="processes")
    add(
        "--verify",
        action="store_true",
        help="decode every image of --data-dir (packed copies too, with checksums)",
    )
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.verify == bool(args.out):
        raise UsageError("give either --out or --verify", "--out DIR packs; --verify checks --data-dir")
    source = _source(args)
    for note in source.notes:
        print(note)
    if args.verify:
        return verify(source, args.workers)
    return pack(source, args.out, args.stored_sides, args.quality, args.workers, args.on_bad_image)


def _source(args):
    """The DatasetIndex to pack: the ILSVRC tars are read in place, all else as train.py reads it."""
    from sources.archives import tars
    from sources.layouts import index

    if args.dataset == "imagenet" and tars.present(args.data_dir):
        return tars.imagenet_tars(args.data_dir)
    return index(
        args.dataset,
        args.data_dir,
        split=args.split,
        class_list=args.class_list or None,
        allow_class_mismatch=args.allow_class_mismatch,
    )


def pack(
    source, out: str, sides: tuple[int, ...], quality: int, workers: int, on_bad_image: str = "fail"
) -> int:
    """Pack `source` (a DatasetIndex) into `out`. Returns the exit code."""
    from sources import packing

    plan = packing.make_plan(source, sides, quality)
    os.makedirs(out, exist_ok=True)
    with _locked(out):
        records = packing.start(out, plan)
        groups = [g for g in packing.groups_of(plan) if (g.part, g.k) not in records]
        if groups:
            _check_disk(packing.estimate(source, plan, groups), out)
        bad = _write_groups(source, plan, groups, records, out, workers, on_bad_image)
        if bad:
            return _report_bad(bad)
        manifest = packing.finish(out, source, plan, records)
    _summary(manifest, out)
    return 0


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """One packing per directory; the kernel drops the lock with the last of its processes."""
    import fcntl

    descriptor = os.open(out, os.O_RDONLY)
    try:
        for attempt in range(20):  # the workers of a killed packing take a moment to follow it
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 19:
                    raise UsageError(
                        f"another packing is at work in {os.path.abspath(out)}", "wait for it"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _check_disk(needed: dict[str, int], out: str) -> None:
    """Say what it will take; refuse when there is less."""
    total, free = sum(needed.values()), shutil.disk_usage(out).free
    for table, size in needed.items():
        print(f"{table:>12}  about {_bytes(size)}")
    print(f"{'together':>12}  about {_bytes(total)}, {_bytes(free)} free", flush=True)
    if total * 1.02 > free:  # an estimate from a sample
        raise ResourceError(
            f"packing needs about {_bytes(total)} in {os.path.abspath(out)}, which has {_bytes(free)}",
            "give an --out on a larger disk, or fewer --stored-sides",
        )


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _write_groups(
    source, plan: dict, groups: list, records: dict, out: str, workers: int, on_bad: str
) -> list[dict]:
    """Write what is missing, noting each group as it is done; returns the bad images (none with 'skip')."""
    from base.progress import Progress
    from sources import packing

    total = sum(g.stop - g.start for g in packing.groups_of(plan))
    bad = []
    with Progress(
        total, "packing", unit="images", initial=total - sum(g.stop - g.start for g in groups)
    ) as progress:
        jobs = ((g, (getattr(source, g.part), plan, g, out, on_bad)) for g in groups)
        for group, record in _in_processes(packing.write_group, jobs, workers, out):
            if "bad" in record:
                bad += [{"part": group.part, **image} for image in record["bad"]]
            else:
                packing.add_record(out, record)
                records[group.part, group.k] = record
            progress.update(group.stop - group.start)
    return bad


def _in_processes(work: Callable, jobs: Iterable[tuple], workers: int, out: str) -> Iterator[tuple]:
    """(tag, work(*arguments)) for each job (tag, arguments), as they are done."""
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_init_worker)
    pending, jobs = {}, iter(jobs)
    try:
        while True:
            for tag, arguments in jobs:
                pending[pool.submit(work, *arguments)] = tag
                if len(pending) > workers:  # one waits, so that nobody idles; not a million at once
                    break
            if not pending:
                return
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(done), done.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a packing process was killed; the machine may be out of memory",
            "run the same command again with fewer --workers: it goes on where it was",
        ) from error
    except OSError as error:
        raise _from_os(error, out) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _from_os(error: OSError, out: str) -> errors.UserError:
    if error.errno in NO_SPACE:
        return ResourceError(
            f"the disk that holds {os.path.abspath(out)} is full ({error.strerror})",
            "make room and run the same command again: it goes on where it was",
        )
    return DataError(
        f"{error.filename or 'the data'}: {error.strerror or error}",
        "the source must not change while it is packed; mend it and run the same command again",
    )


def _init_worker() -> None:
    """A worker leaves Ctrl-C to its parent and does not outlive it."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _summary(manifest: dict, out: str) -> None:
    for table, shards in manifest["tables"].items():
        count, size = sum(s["rows"] for s in shards), sum(s["bytes"] for s in shards)
        print(f"{table:>12}  {count:>9,} images  {len(shards):>4} shards  {_bytes(size):>10}")
    skipped = sum(len(part["skipped"]) for part in manifest["parts"].values())
    if skipped:
        print(f"{skipped} bad images left out; manifest.json names them")
    print(f"next: python train.py --data-dir {out}")


def verify(source, workers: int) -> int:
    """Decode every stored copy of every image; for packed data check the shards' checksums first."""
    bad = []
    for split, label in _copies(source):
        for path, problem in getattr(split, "damaged_shards", lambda: ())():
            bad.append({"part": label, "name": path, "reason": problem})
        bad += _verify_split(split, label, workers)
    if bad:
        return _report_bad(bad)
    print(f"all {len(source.train) + len(source.val):,} images decode")
    return 0


def _copies(source) -> Iterator[tuple]:
    for split in source.train.copies() if hasattr(source.train, "copies") else [source.train]:
        yield split, getattr(split, "table", "train")
    yield source.val, "val"


def _verify_split(split, label: str, workers: int) -> list[dict]:
    from base.progress import Progress

    bad, step = [], 256
    jobs = ((i, (split, i, min(i + step, len(split)))) for i in range(0, len(split), step))
    with Progress(len(split), f"verify {label}", unit="images") as progress:
        for first, found in _in_processes(_bad_images, jobs, workers, "."):
            bad += [{"part": label, **image} for image in found]
            progress.update(min(step, len(split) - first))
    return sorted(bad, key=lambda image: image["name"])


def _bad_images(split, start: int, stop: int) -> list[dict]:
    from sources.images import BadImage, decode

    bad = []
    for i in range(start, stop):
        try:
            decode(split.read([i])[0], split.name(i), thorough=True)
        except BadImage as error:
            bad.append({"name": error.name, "reason": error.reason})
        except (OSError, DataError) as error:
            bad.append({"name": f"#{i}", "reason": getattr(error, "what", None) or str(error)})
    return bad


def _report_bad(bad: list[dict]) -> int:
    for image in bad:
        print(errors.printable(f"{image['part']}: {image['name']}: {image['reason']}"))
    raise DataError(
        f"{len(bad):,} bad images (listed above)",
        "replace them (then pack into a new --out), or pack with --on-bad-image skip",
    )


if __name__ == "__main__":
    sys.exit(errors.run(main))
