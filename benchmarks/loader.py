"""How fast batches arrive: this project's loaders beside torchvision's and timm's, in one run.

`python -m benchmarks.loader --data-dir DIR --sizes 64 128 224 --workers 1 2 --json FILE` needs only
class folders in DIR/train; it packs what it measures into a temporary folder. Every loader reads
the same images from a warm page cache and is measured in steady state, three times, in turns;
machines are noisy, so only ratios within one run mean anything.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from base import errors, flags
from base.errors import DataError, UsageError

REPEATS = 3
BATCH = 128
AUGMENTATIONS = {"crop-flip": "basic", "full": "full"}
LOADERS = ("packed", "full-size", "torchvision", "timm")


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.loader", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    add(
        "--data-dir", required=True, metavar="DIR", help="holds train/<class>/*.JPEG of full-size photographs"
    )
    add("--sizes", type=positive, nargs="+", default=[64, 128, 224], metavar="PX", help="training sizes")
    add("--workers", type=positive, nargs="+", default=[1, 2], metavar="N", help="loader processes")
    add(
        "--augmentations",
        nargs="+",
        choices=tuple(AUGMENTATIONS),
        default=list(AUGMENTATIONS),
        help="what to measure",
    )
    add(
        "--stored-sides",
        type=flags.listing(flags.number(int, 8)),
        default=(96, 192, 320),
        metavar="LIST",
        help="short sides of the packed copies",
    )
    add(
        "--images",
        type=positive,
        default=2000,
        metavar="N",
        help="use at most so many, spread over the classes",
    )
    add(
        "--seconds",
        type=flags.number(float, 0, open_low=True),
        default=3.0,
        help="length of each measurement",
    )
    add("--json", default="loader.json", metavar="FILE", help="the rows; the picture lies beside it as .png")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not Path(args.json).resolve().parent.is_dir():
        raise UsageError(f"--json {args.json}: no such folder", "make it first")
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as scratch:
        source = gather(args.data_dir, args.images, Path(scratch))
        packed = pack(source, args.stored_sides, Path(scratch) / "packed")
        rows = []
        for size in args.sizes:
            for augmentation in args.augmentations:
                for workers in args.workers:
                    makers = loaders(source, packed, Path(scratch), size, augmentation, workers)
                    rows += compare(makers, size, augmentation, workers, args.seconds)
                    print(table(rows[-len(makers) :], header=len(rows) == len(makers)), flush=True)
    contract = [{key: value for key, value in row.items() if key != "cpu_us_per_image"} for row in rows]
    Path(args.json).write_text(json.dumps(contract, indent=1) + "\n")
    draw(rows, Path(args.json).with_suffix(".png"))
    return 0


# --- the data ------------------------------------------------------------------------------------


def gather(data_dir: str, limit: int, scratch: Path):
    """A DatasetIndex over links, in `scratch`/train, to at most `limit` images of `data_dir`/train."""
    from sources import folders
    from sources.index import DatasetIndex, SubsetSplit, balanced_subset

    if not os.path.isdir(os.path.join(data_dir, "train")):
        raise DataError(f"no folder train/ in {os.path.abspath(data_dir)}", "give class folders in DIR/train")
    listing = folders.list_classes(data_dir, "train")
    split = listing.split([name for name in listing.classes if listing.by_class[name]])
    if not len(split):
        raise DataError(f"no images in {os.path.abspath(data_dir)}/train", folders.ACCEPTED)
    for i in balanced_subset(split.labels, min(limit, len(split)), seed=0):
        link = scratch / split.name(int(i))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(split.path(int(i))))
    listing = folders.list_classes(scratch, "train")
    classes = [name for name in listing.classes if listing.by_class[name]]
    train = listing.split(classes)
    return DatasetIndex("benchmark", tuple(map(os.fsdecode, classes)), train, SubsetSplit(train, [0]))


def pack(source, sides: tuple[int, ...], out: Path):
    """The packed copy of `source`; what it took is printed."""
    from sources import packing
    from sources.packed import open_packed

    plan, started = packing.make_plan(source, sides, quality=90), time.perf_counter()
    out.mkdir()
    records = packing.start(str(out), plan)
    for group in packing.groups_of(plan):
        records[group.part, group.k] = packing.write_group(source, plan, group, str(out), "skip")
    manifest = packing.finish(str(out), source, plan, records)
    mean = {
        name: sum(s["bytes"] for s in shards) / len(source.train)
        for name, shards in manifest["tables"].items()
    }
    print(
        f"{len(source.train)} images packed in {time.perf_counter() - started:.0f} s: "
        + ", ".join(f"{size / 1e3:.1f} kB at {name}" for name, size in mean.items() if name != "val")
    )
    return open_packed(out)


# --- the loaders: each gives batches of BATCH images, over and over ---------------------------------


def loaders(source, packed, scratch: Path, size: int, augmentation: str, workers: int) -> dict[str, Callable]:
    makers = {
        "packed": lambda: _ours(packed, size, augmentation, workers),
        "full-size": lambda: _ours(source, size, augmentation, workers),
        "torchvision": lambda: _torchvision(scratch, size, augmentation, workers),
    }
    if augmentation == "crop-flip" and _installed("timm"):  # its recipes have no affine or coarse dropout
        makers["timm"] = lambda: _timm(scratch, size, workers)
    return makers


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _over_and_over(n: int) -> list[int]:
    return list(range(n)) * -(-2_000_000 // n)


def _ours(index, size: int, augmentation: str, workers: int) -> Iterator:
    """The project's own loader, as train.py builds it: uint8 batches, normalised later on the device."""
    import dataclasses

    from dataloader import train_loader
    from sources.index import SubsetSplit

    train = SubsetSplit(index.train, _over_and_over(len(index.train)))
    augment = flags.parse_augment(AUGMENTATIONS[augmentation])
    loader = train_loader(
        dataclasses.replace(index, train=train),
        image_size=size,
        batch_size=BATCH,
        augment=augment,
        num_workers=workers,
    )
    return iter(loader.batches)


def _torchvision(folder: Path, size: int, augmentation: str, workers: int) -> Iterator:
    """ImageFolder and Pillow as in torchvision's reference training: float32, normalised in the workers."""
    from torchvision import datasets
    from torchvision import transforms as T

    from sources.augment import JITTER
    from sources.index import IMAGENET_MEAN, IMAGENET_STD

    steps = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
    if augmentation == "full":
        affine = T.RandomAffine(
            15, translate=(0.0625, 0.0625), scale=(0.9, 1.1), interpolation=T.InterpolationMode.BILINEAR
        )
        steps += [T.RandomApply([affine]), T.RandomApply([T.ColorJitter(*JITTER)])]
    steps += [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if augmentation == "full":  # one hole of a quarter of the side
        steps += [T.RandomErasing(0.5, scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0))]
    return _peer(datasets.ImageFolder(str(folder / "train"), T.Compose(steps)), workers)


def _timm(folder: Path, size: int, workers: int) -> Iterator:
    """timm's ImageDataset, crop and flip; uint8 batches, as its prefetching loader has them."""
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(size, is_training=True, use_prefetcher=True, color_jitter=None)
    return _peer(ImageDataset(str(folder / "train"), transform=transform), workers, collate_fn=fast_collate)


def _peer(dataset, workers: int, **kwargs) -> Iterator:
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=2_000_000)
    return iter(
        DataLoader(
            dataset,
            BATCH,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=4,
            worker_init_fn=lambda _: torch.set_num_threads(1),
            **kwargs,
        )
    )


# --- measuring -----------------------------------------------------------------------------------


def measure(batches: Iterator, workers: int, seconds: float) -> tuple[float, float]:
    """(images per second, CPU microseconds of the workers per image), once the queue is filled.

    The clock starts when every worker has delivered twice. CPU time is what remains comparable on a
    machine that others use too.
    """
    for _ in range(2 * workers):
        next(batches)
    cpu, started, count = _worker_cpu(batches), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        count += len(next(batches)[1])
    return count / elapsed, (_worker_cpu(batches) - cpu) / count * 1e6


def _worker_cpu(batches: Iterator) -> float:
    """Seconds of CPU that the loader's processes have used (Linux; elsewhere nan)."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    ticks = 0
    for process in getattr(batches, "_workers", ()):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(
    makers: dict[str, Callable], size: int, augmentation: str, workers: int, seconds: float
) -> list[dict]:
    """One row per loader: the medians of REPEATS measurements, taken in turns."""
    rates: dict[str, list[float]] = {name: [] for name in makers}
    costs: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(REPEATS):
        for name, make in makers.items():
            batches = make()
            rate, cost = measure(batches, workers, seconds)
            rates[name].append(rate)
            costs[name].append(cost)
            del batches  # ends the workers
    median = {name: statistics.median(values) for name, values in rates.items()}
    return [
        {
            "size": size,
            "loader": name,
            "augmentation": augmentation,
            "workers": workers,
            "images_per_second": round(rate, 1),
            "ratio_to_torchvision": round(rate / median["torchvision"], 2),
            "cpu_us_per_image": round(statistics.median(costs[name])),
        }
        for name, rate in median.items()
    ]


def table(rows: list[dict], header: bool) -> str:
    lines = [
        f"{'size':>5} {'augmentation':<12} {'workers':>7} {'loader':<12} {'images/s':>9} {'x torchvision':>13} "
        f"{'CPU us/image':>12} {'x torchvision':>13}"
    ]
    lines = lines if header else []
    base = next(row for row in rows if row["loader"] == "torchvision")["cpu_us_per_image"]
    for row in rows:
        lines.append(
            f"{row['size']:>5} {row['augmentation']:<12} {row['workers']:>7} {row['loader']:<12} "
            f"{row['images_per_second']:>9,.0f} {row['ratio_to_torchvision']:>13.2f} "
            f"{row['cpu_us_per_image']:>12,.0f} {base / row['cpu_us_per_image']:>13.2f}"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """One panel per augmentation and number of workers: images/s by size, a bar per loader."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["augmentation"], row["workers"]) for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = [name for name in LOADERS if any(row["loader"] == name for row in rows)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 2.8 * len(panels), 3.2), sharey=True, squeeze=False
    )
    for axis, (augmentation, workers) in zip(axes[0], panels, strict=True):
        for k, name in enumerate(names):
            found = {
                r["size"]: r
                for r in rows
                if (r["augmentation"], r["workers"], r["loader"]) == (augmentation, workers, name)
            }
            at = [
                i + (k - (len(names) - 1) / 2) * 0.8 / len(names) for i, s in enumerate(sizes) if s in found
            ]
            heights = [found[s]["images_per_second"] for s in sizes if s in found]
            bars = axis.bar(at, heights, 0.8 / len(names), color=f"C{LOADERS.index(name)}", label=name)
            axis.bar_label(
                bars, [f"{found[s]['ratio_to_torchvision']:.1f}x" for s in sizes if s in found], fontsize=7
            )
        axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axis.set_title(f"{augmentation}, {workers} worker{'s' * (workers > 1)}", fontsize=9)
    axes[0][0].set_ylabel("images per second")
    axes[0][0].legend(fontsize=8)  # the first panel has every loader
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
