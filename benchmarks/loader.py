"""How fast batches arrive: this project's loader beside torchvision's and timm's, in one run.

`python -m benchmarks.loader --data-dir DIR` reads class folders in DIR/train and packs them into a temporary
directory. All loaders read the same images from a warm page cache; they are timed in turns, three times each,
once their queues are full. Machines are noisy: only ratios within one run mean anything.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from base import errors, files, flags
from base.errors import DataError

REPEATS = 3
BATCH = 128
ENDLESS = 2_000_000  # samples in an epoch: more than any measurement reads
AUGMENTATIONS = {"crop-flip": "basic", "full": "full"}


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.loader", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    sides = flags.listing(flags.number(int, 8))
    seconds = flags.number(float, 0, open_low=True)
    names = tuple(AUGMENTATIONS)
    add("--data-dir", required=True, metavar="DIR", help="Directory with train/<class>/*.JPEG, full size.")
    add("--sizes", type=positive, nargs="+", default=[64, 128, 224], metavar="PX", help="Training sizes.")
    add("--workers", type=positive, nargs="+", default=[1, 2], metavar="N", help="Loader processes.")
    add("--augmentations", nargs="+", choices=names, default=list(names), help="Augmentations.")
    add("--stored-sides", type=sides, default=(96, 192, 320), metavar="LIST", help="Packed sides in px.")
    add("--images", type=positive, default=2000, metavar="N", help="Maximum images, spread over the classes.")
    add("--seconds", type=seconds, default=3.0, metavar="S", help="Seconds per measurement.")
    add("--json", default="loader.json", metavar="FILE", help="Output file; the picture is saved beside it.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as scratch:
        source = gather(args.data_dir, args.images, Path(scratch))
        packed = pack(source, args.stored_sides, Path(scratch) / "packed")
        print(HEADER)
        for size, augmentation, workers in itertools.product(args.sizes, args.augmentations, args.workers):
            makers = loaders(source, packed, Path(scratch), size, augmentation, workers)
            setting = {"size": size, "augmentation": augmentation, "workers": workers}
            compared = [setting | row for row in compare(makers, workers, args.seconds)]
            print(table(compared), flush=True)
            rows += compared
            files.write_json(args.json, rows)
    draw(rows, Path(args.json).with_suffix(".png"))
    return 0


def gather(data_dir: str, limit: int, scratch: Path):
    """Link at most `limit` images of `data_dir`/train into `scratch`/train; return their DatasetIndex."""
    from sources import folders
    from sources.index import DatasetIndex, SubsetSplit, balanced_subset

    listing = folders.list_classes(data_dir, "train")
    split = listing.split([name for name in listing.classes if listing.by_class[name]])
    if not len(split):
        raise DataError(f"no images in {os.path.abspath(data_dir)}/train", folders.ACCEPTED)
    for i in balanced_subset(split.labels, min(limit, len(split)), seed=0):
        link = scratch / split.name(int(i))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(split.path(int(i))))
    listing = folders.list_classes(scratch, "train")
    train = listing.split(listing.classes)
    return DatasetIndex("benchmark", tuple(map(os.fsdecode, listing.classes)), train, SubsetSplit(train, [0]))


def pack(source, sides: tuple[int, ...], out: Path):
    """Pack `source` into `out` and return the packed DatasetIndex."""
    from sources import packing
    from sources.packed import open_packed

    plan, started = packing.make_plan(source, sides, quality=90), time.perf_counter()
    out.mkdir()
    records = packing.start(str(out), plan)
    for group in packing.groups_of(plan):
        records[group.part, group.k] = packing.write_group(source, plan, group, str(out), "skip")
    packing.finish(str(out), source, plan, records)
    print(f"{len(source.train)} images packed in {time.perf_counter() - started:.0f} s")
    return open_packed(out)


# --- the loaders: each yields batches of BATCH images, endlessly ------------------------------------


def loaders(source, packed, scratch: Path, size: int, augmentation: str, workers: int) -> dict[str, Callable]:
    """Return {name: function that starts the loader}."""
    found = {
        "packed": lambda: ours(packed, size, augmentation, workers),
        "full-size": lambda: ours(source, size, augmentation, workers),
        "torchvision": lambda: torchvisions(scratch, size, augmentation, workers),
    }
    # timm's transforms have no affine and no coarse dropout.
    if augmentation == "crop-flip" and importlib.util.find_spec("timm"):
        found["timm"] = lambda: timms(scratch, size, workers)
    return found


def ours(index, size: int, augmentation: str, workers: int) -> Iterator:
    """Start this project's loader as train.py does: uint8 batches, to be normalised on the device."""
    from dataloader import train_loader
    from sources.index import SubsetSplit

    n = len(index.train)
    index = replace(index, train=SubsetSplit(index.train, list(range(n)) * -(-ENDLESS // n)))
    augment = flags.parse_augment(AUGMENTATIONS[augmentation])
    options = {"image_size": size, "batch_size": BATCH, "augment": augment, "num_workers": workers}
    return iter(train_loader(index, **options).batches)


def torchvisions(folder: Path, size: int, augmentation: str, workers: int) -> Iterator:
    """Start torchvision's ImageFolder, as in its reference training: float32, normalised in the workers."""
    from torchvision import datasets
    from torchvision import transforms as T

    from sources.augment import JITTER
    from sources.index import IMAGENET_MEAN, IMAGENET_STD

    steps = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
    last = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if augmentation == "full":
        bilinear = T.InterpolationMode.BILINEAR
        affine = T.RandomAffine(15, translate=(1 / 16, 1 / 16), scale=(0.9, 1.1), interpolation=bilinear)
        steps += [T.RandomApply([affine]), T.RandomApply([T.ColorJitter(*JITTER)])]
        last += [T.RandomErasing(0.5, scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0))]  # a quarter of the side
    return peer(datasets.ImageFolder(str(folder / "train"), T.Compose([*steps, *last])), workers)


def timms(folder: Path, size: int, workers: int) -> Iterator:
    """Start timm's ImageDataset with crop and flip: uint8 batches, as in its prefetching loader."""
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(size, is_training=True, use_prefetcher=True, color_jitter=None)
    return peer(ImageDataset(str(folder / "train"), transform=transform), workers, collate_fn=fast_collate)


def peer(dataset, workers: int, **options) -> Iterator:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    options |= {"num_workers": workers, "prefetch_factor": 4}
    return iter(DataLoader(dataset, BATCH, sampler=sampler, **options))


# --- measuring -------------------------------------------------------------------------------------


def compare(makers: dict[str, Callable], workers: int, seconds: float) -> list[dict]:
    """Measure the loaders in turns; return a row for each, with medians of REPEATS measurements."""
    measured = {name: [] for name in makers}
    for _ in range(REPEATS):
        for name, start in makers.items():
            measured[name].append(measure(start(), workers, seconds))
    rates = {name: statistics.median(rate for rate, _ in measured[name]) for name in makers}
    costs = {name: statistics.median(cost for _, cost in measured[name]) for name in makers}
    return [
        {
            "loader": name,
            "images_per_second": round(rates[name], 1),
            "ratio_to_torchvision": round(rates[name] / rates["torchvision"], 2),
            "cpu_us_per_image": round(costs[name]),
        }
        for name in makers
    ]


def measure(batches: Iterator, workers: int, seconds: float) -> tuple[float, float]:
    """Return images per second, and CPU microseconds of the workers per image.

    The clock starts when the workers have delivered two batches each. CPU time is comparable even on a busy
    machine.
    """
    for _ in range(2 * workers):
        next(batches)
    cpu, started, count = worker_cpu(batches), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        count += len(next(batches)[1])
    return count / elapsed, (worker_cpu(batches) - cpu) / count * 1e6


def worker_cpu(batches: Iterator) -> float:
    """Return the CPU seconds that the loader's workers have used; 0 except on Linux."""
    ticks = 0
    for process in getattr(batches, "_workers", ()) if sys.platform.startswith("linux") else ():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


HEADER = " size augmentation workers loader        images/s x torchvision CPU us/image x torchvision"


def table(rows: list[dict]) -> str:
    base = next(row["cpu_us_per_image"] for row in rows if row["loader"] == "torchvision")
    return "\n".join(
        f"{row['size']:>5} {row['augmentation']:<12} {row['workers']:>7} {row['loader']:<12} "
        f"{row['images_per_second']:>9,.0f} {row['ratio_to_torchvision']:>13.2f} "
        f"{row['cpu_us_per_image']:>12,.0f} {base / max(1, row['cpu_us_per_image']):>13.2f}"
        for row in rows
    )


def draw(rows: list[dict], path: Path) -> None:
    """Draw images per second by training size: a panel per augmentation and number of workers."""
    from analysis import figures

    panels = list(dict.fromkeys((row["augmentation"], row["workers"]) for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = list(dict.fromkeys(row["loader"] for row in rows))
    figure = figures.figure(1.2 + 2.8 * len(panels), 3.2)
    axes = figures.axes(figure, 1, len(panels), sharey=True)[0]
    width = 0.8 / len(names)
    for axis, panel in zip(axes, panels, strict=True):
        for k, name in enumerate(names):
            shown = [r for r in rows if (r["augmentation"], r["workers"], r["loader"]) == (*panel, name)]
            places = [sizes.index(r["size"]) + (k - (len(names) - 1) / 2) * width for r in shown]
            bars = axis.bar(places, [r["images_per_second"] for r in shown], width, color=f"C{k}", label=name)
            axis.bar_label(bars, [f"{r['ratio_to_torchvision']:.1f}x" for r in shown], fontsize=7)
        axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axis.set_title(f"{panel[0]}, {panel[1]} worker{'s' * (panel[1] > 1)}", fontsize=9)
    axes[0].set_ylabel("images per second")
    axes[0].legend(fontsize=8)
    print(f"picture: {figures.save(figure, path)}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
