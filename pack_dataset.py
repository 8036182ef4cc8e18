"""Pack a dataset for progressive training: store a resized copy of every image for each training size.
ILSVRC2012 tar files in --data-dir are read directly.

Run `python pack_dataset.py --data-dir data/imagenet --out data/imagenet-packed`, then
`python train.py --data-dir data/imagenet-packed`. The same command continues an interrupted run.
With --out equal to a packed --data-dir, only evaluation crops are added to it.
`--verify` packs nothing: it decodes every image of --data-dir and lists the bad ones.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from base import errors, files, flags, idle, process
from base.errors import DataError, ResourceError, UsageError, doing
from base.flags import Flag
from base.progress import Progress

REPLACE = "replace them (then pack into a new --out), or pack with --on-bad-image skip"


def eval_sizes(text: str) -> tuple[int, ...]:
    return () if text == "none" else flags.listing(flags.pixels)(text)


def adds_crops(args) -> bool:
    """Return whether --out is the packed --data-dir, to which only evaluation crops are added."""
    manifest = os.path.join(args.data_dir, "manifest.json")
    same = os.path.realpath(args.data_dir) == os.path.realpath(args.out or ".")
    on_disk = idle.dataset_kind(args) not in idle.NO_FILES
    return bool(args.out) and same and on_disk and os.path.isfile(manifest)


def verifies(args) -> flags.Reason:
    return args.verify and "--verify packs nothing"


def packs_nothing(args) -> flags.Reason:
    adding = f"{args.out} is packed already, and only evaluation crops are added to it"
    return verifies(args) or (adds_crops(args) and adding)


def resizes_nothing(args) -> flags.Reason:
    all_raw = {*args.stored_sides} <= {*args.raw_sides}
    return packs_nothing(args) or (all_raw and "every side is stored as pixels")


def stores_no_crops(args) -> flags.Reason:
    return verifies(args) or (args.eval_sizes == () and "--eval-sizes none stores no crops")


def adds_nothing(args) -> flags.Reason:
    nothing = adds_crops(args) and args.eval_sizes == ()
    return verifies(args) or (nothing and f"{args.out} is packed already, and only crops can be added to it")


# fmt: off
PACKING = (
    Flag("out", "Output directory; required unless --verify is given.", str, "", "DIR"),
    Flag("stored_sides", "Short sides in px of the stored training images; the default suits "
         "training at 64, 128 and 224 px.",
         flags.listing(flags.pixels), (96, 192, 320), "PX,PX,...", idle=packs_nothing),
    Flag("raw_sides", "Short sides that are stored as pixels, not as JPEG: several times as large, "
         "several times as fast. For ImageNet, 96 takes 49 GB.",
         flags.listing(flags.pixels), (), "PX,PX,...", idle=packs_nothing),
    Flag("quality", "JPEG quality of the resized images.", flags.number(int, 1, 100), 90, "Q",
         idle=resizes_nothing),
    Flag("eval_sizes", "Sizes in px of the evaluation crops to store, of validation images and of the "
         "training images that train_top1 scores; or none. By default 0.7 times each stored side, rounded "
         "down to a multiple of 32 (64,128,224); none if all images have one small size.",
         eval_sizes, None, "PX,PX,...",
         idle=adds_nothing),
    Flag("eval_crop", "Share of the resized image in these crops, like --eval-crop of train.py; by "
         "default 0.875.",
         flags.number(float, 0, 1, open_low=True), None, "F", idle=stores_no_crops),
    Flag("on_bad_image", "fail lists bad images, leaves their shards unwritten and exits with 3; "
         "skip leaves only these images out.", ("fail", "skip"), "fail", "ACTION",
         idle=packs_nothing),
    Flag("workers", "Number of processes.", flags.number(int, 1, 1024), process.cores(), "N"),
    Flag("verify", "Decode all images, check packed shards, and write nothing."),
    flags.DEBUG,
)
# fmt: on


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="pack_dataset.py", description=__doc__.split("\n\n")[0])
    flags.add_flags(parser, "data", flags.SOURCE)
    flags.add_flags(parser, "packing", PACKING)
    return parser


def main(argv: list[str] | None = None) -> int:
    args, given = flags.parse(build_parser(), argv)
    if args.verify == bool(args.out):
        raise UsageError("give either --out or --verify", "--out DIR packs the dataset, --verify checks it")
    notes, adding = check(args, given), adds_crops(args)
    generated = idle.dataset_kind(args) in idle.NO_FILES
    doing(f"reading the list of images {'of ' + args.dataset if generated else 'in ' + args.data_dir}")
    index = open_index(args)
    for note in (*notes, *index.notes):
        print(note)
    if args.verify:
        return verify(index, args.workers)
    from sources import folders, packing

    folders.check_outside(index, args.out, "--out")

    sides = index.train.manifest["sides"] if adding else (*args.stored_sides, *args.raw_sides)
    if note := small_copies(index, sides):
        print(f"note: {args.data_dir} {note}")
    crops = crop_settings(index, args, sides)
    if args.eval_crop and not crops:
        what = "--eval-crop would do nothing: by default, data of one small size gets no evaluation crops"
        raise UsageError(what, "name their sizes: --eval-sizes PX,PX")
    if adding:
        with _locked(args.out):
            add_crops(args.out, crops, args.workers)
        return 0
    index = packing.as_begun(index, args.out)
    plan = packing.make_plan(index, args.stored_sides, args.quality, args.raw_sides)
    return pack(index, args.out, plan, args.workers, args.on_bad_image, crops)


def check(args, given: flags.Given) -> list[str]:
    """Return notes about flags. Raises UsageError for those that would do nothing."""
    from sources.archives import tars

    notes = flags.refuse_idle((*flags.SOURCE, *PACKING), args, given)
    if not (args.stored_sides or args.raw_sides):
        raise UsageError("no sides to store", "give --stored-sides, --raw-sides, or both")
    whole = {"class_list", "allow_class_mismatch"} & given
    if whole and args.dataset == "imagenet" and tars.present(args.data_dir):
        found = ", ".join(map(flags.dashed, sorted(whole)))
        raise UsageError(
            f"{found} would do nothing: tar files are packed with all classes", f"leave {found} out"
        )
    return notes


def open_index(args):
    """Return the DatasetIndex to pack: of the ILSVRC tar files, or of what train.py would read."""
    from sources.archives import tars
    from sources.layouts import open_dataset

    if args.dataset == "imagenet" and tars.present(args.data_dir):
        return tars.imagenet_tars(args.data_dir)
    options = {"class_list": args.class_list, "allow_class_mismatch": args.allow_class_mismatch}
    return open_dataset(args.dataset, args.data_dir, split=args.split, **options)


def small_copies(index, sides: Iterable[int]) -> str:
    """Return what to say if `index` is a packed copy with smaller images than `sides` px, or ''."""
    packed = getattr(index.train, "manifest", {}).get("sides", ())
    larger = [str(side) for side in sides if packed and side > max(packed) and not index.native_size]
    what = (
        f"holds images of {max(packed, default=0)} px at most; they are not enlarged to {','.join(larger)} px"
    )
    return what if larger else ""


def crop_settings(index, args, stored_sides: Iterable[int]) -> dict[int, float]:
    """Return {size: crop} of the evaluation crops to store, the crop as a share of the resized image."""
    from sources.images import default_crop

    sizes = args.eval_sizes
    if sizes is None:
        sizes = map(default_eval_size, () if index.native_size else stored_sides)
    return {size: args.eval_crop or default_crop(size, index.native_size) for size in sorted({*sizes})}


def default_eval_size(side: int) -> int:
    """Return the training size that a stored side is for: 64, 128, 224 for 96, 192, 320."""
    size = 7 * side // 10
    return max(8, size - size % (32 if size >= 32 else 8))


# --- packing -------------------------------------------------------------------------------------


def pack(index, out: str, plan: dict, workers: int, on_bad_image: str, crops: dict[int, float]) -> int:
    """Pack the DatasetIndex `index` into `out` as `packing.make_plan` says; return the exit code.

    crops: {size: crop} of the evaluation crops to store
    """
    from harness.pool import in_processes
    from sources import packing, splits
    from sources.packed import MANIFEST

    files.make_directory(Path(out))
    with _locked(out):
        if note := splits.write_down(index):
            print(note)
        records, groups = packing.start(out, plan), packing.groups_of(plan)
        missing, packed = [group for group in groups if (group.part, group.k) not in records], False
        if missing:
            needed = packing.estimate(index, plan, missing)
            packed = os.path.isfile(os.path.join(out, MANIFEST))  # and lacks a shard
            _check_disk(needed | ({} if packed else crops_bytes(index, crops)), out)
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
        _refuse(bad, "bad image", REPLACE)
        manifest = packing.finish(out, index, plan, records)
        _print_summary(manifest)
        add_crops(out, crops, workers, announced=bool(missing) and not packed)
    print(f"next: python train.py --data-dir {shlex.quote(out)}")
    return 0


def crops_bytes(index, sizes: Iterable[int]) -> dict[str, int]:
    """Return the bytes of the evaluation crops of all validation images and of the training sample."""
    from sources.index import training_sample

    images = len(index.val) + len(training_sample(index))
    return {f"eval-{size}": images * size**2 * 3 for size in sizes}


def add_crops(out: str, sizes: dict[int, float], workers: int, *, announced: bool = False) -> None:
    """Store the evaluation crops of the packed dataset `out` that are missing; `sizes` is {size: crop}.

    announced: their disk space has been printed and checked
    """
    from harness.pool import in_processes
    from sources import crops
    from sources.index import training_sample
    from sources.packed import open_packed

    index = open_packed(out)
    splits = (index.val, training_sample(index))
    sets = [[crops.Crops(out, split, *size, index.exif) for size in sizes.items()] for split in splits]
    jobs = crops.missing(sets)
    if jobs and not announced:
        _check_disk(crops.missing_bytes(sets), out)
    with Progress(len(jobs), "evaluation crops", unit="shards") as progress:
        for _ in progress.over(in_processes(partial(crops.write, sets), jobs, workers)):
            pass
    for of_size in zip(*sets, strict=True):
        images, total = sum(len(found.split) for found in of_size), sum(found.bytes() for found in of_size)
        print(f"{f'eval-{of_size[0].image_size}':>12}  {images:>9,} images  {_bytes(total):>22}")


@contextmanager
def _locked(out: str) -> Iterator[None]:
    """Lock `out` against a second packing; the kernel drops the lock with the last process that holds it."""
    import fcntl

    descriptor = os.open(out, os.O_RDONLY)
    try:
        for _ in range(20):  # the workers of a killed process take a moment to end
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in files.NO_LOCKS:
                    raise
                break  # on a cluster filesystem without locks, pack without one
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
        fix = "use an --out on a larger disk, or fewer --stored-sides, --raw-sides or --eval-sizes"
        raise ResourceError(what, fix)


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _print_summary(manifest: dict) -> None:
    for table, shards in manifest["tables"].items():
        images, size = sum(shard["rows"] for shard in shards), sum(shard["bytes"] for shard in shards)
        print(f"{table:>12}  {images:>9,} images  {len(shards):>4} shards  {_bytes(size):>10}")
    if skipped := sum(len(part["skipped"]) for part in manifest["parts"].values()):
        print(f"{skipped} bad image{'s' * (skipped > 1)} left out; manifest.json names them")


# --- verifying -----------------------------------------------------------------------------------


def verify(index, workers: int) -> int:
    """Decode every stored copy of every image, and verify the checksums of packed shards."""
    from harness.pool import in_processes
    from sources import crops
    from sources.packed import REPAIR, PackedSplit

    copies, bad = {"train": index.train, "val": index.val}, []
    if isinstance(index.train, PackedSplit):
        copies = {split.table: split for split in (*index.train.copies(), index.val)}
        for table, split in copies.items():
            bad += [{"part": table, "name": path, "reason": why} for path, why in split.damaged_shards()]
        damaged = crops.damaged(index.train.root)
        bad += [{"part": "evaluation crops", "name": path, "reason": why} for path, why in damaged]
        _refuse(bad, "damaged file", REPAIR)
    for name, split in copies.items():
        found, ids = [], range(len(split))
        with Progress(len(ids), f"verify {name}", unit="images") as progress:
            parts = [ids[first : first + 256] for first in ids[::256]]
            for part, images in in_processes(partial(_bad_images, split), parts, workers):
                found += [{"part": name, **image} for image in images]
                progress.update(len(part))
        bad += sorted(found, key=lambda image: image["name"])
    _refuse(bad, "bad image", REPLACE)
    print(f"all {len(index.train) + len(index.val):,} images decode")
    return 0


def _bad_images(split, ids: range) -> list[dict]:
    from sources.decode import BadImage, decode
    from sources.index import read_samples

    bad = []
    for i in ids:
        try:
            decode(read_samples(split, [i])[0], split.name(i), thorough=True)
        except BadImage as error:
            bad.append({"name": error.name, "reason": error.reason})
        except DataError as error:
            bad.append({"name": f"#{i}", "reason": error.what})
    return bad


def _refuse(bad: list[dict], what: str, fix: str) -> None:
    """Print all bad images or files, if any, and raise DataError."""
    for found in bad:
        print(errors.printable(f"{found['part']}: {found['name']}: {found['reason']}"))
    if bad:
        raise DataError(f"{len(bad):,} {what}{'s' * (len(bad) > 1)} (listed above)", fix)


if __name__ == "__main__":
    sys.exit(errors.run(main))
