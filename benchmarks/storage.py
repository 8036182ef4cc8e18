"""What a stored side costs and loses: the same random crops from full-size and from packed images.

For each training size, stored side and JPEG quality, `python -m benchmarks.storage --data-dir DIR --out OUT`
measures the size and decoding time of an image, the PSNR of the crops, and the share of their power left at
each spatial frequency. The default `--stored-sides` of pack_dataset.py follow from this table.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from base import errors, flags
from base.errors import DataError

CROPS = 4  # per image
COLUMNS = {  # heading -> (column, format)
    "kB": ("kilobytes", ".1f"),
    "decode us": ("decode_us", ",.0f"),
    "PSNR dB": ("psnr", ".1f"),
    "worst tenth": ("psnr_worst_tenth", ".1f"),
    "power left: middle": ("power_mid", ".2f"),
    "upper": ("power_high", ".2f"),
}


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.storage", description=__doc__.split("\n\n")[0])
    add, positive, pixels = parser.add_argument, flags.number(int, 1), flags.number(int, 8)
    ratio, quality = flags.number(float, 0.5), flags.number(int, 1, 100)
    sides = "Stored sides as multiples of the training size, rounded to 8 px."
    add("--data-dir", required=True, metavar="DIR", help="Directory with train/<class>/*.JPEG, full size.")
    add("--images", type=positive, default=200, metavar="N", help="Images, spread over the classes.")
    add("--sizes", type=pixels, nargs="+", default=[64, 128, 224], metavar="PX", help="Training sizes.")
    add("--ratios", type=ratio, nargs="+", default=[1.15, 1.3, 1.43, 1.5, 2.0], metavar="R", help=sides)
    add("--qualities", type=quality, nargs="+", default=[90], metavar="Q", help="JPEG qualities.")
    add("--out", default="benchmark-results", metavar="DIR", help="Rows go to DIR/storage.jsonl.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    errors.doing(f"reading {args.images} images")
    import cv2

    from benchmarks import records

    cv2.setNumThreads(1)
    photographs = load(args.data_dir, args.images)
    spectra = {}
    print(records.table((), COLUMNS))
    for size, ratio, quality in itertools.product(args.sizes, args.ratios, args.qualities):
        side = round(size * ratio / 8) * 8
        row, spectra[size, side, quality] = measure(photographs, size, side, quality)
        row = {"benchmark": "storage", "row": f"{size} px, side {side}, quality {quality}"} | row
        records.append(args.out, row | records.environment())
        print(records.line(row, COLUMNS), flush=True)
    row = packing_cost(args.data_dir, args.images)
    records.append(args.out, {"benchmark": "packing", "row": "packing"} | row | records.environment())
    print(f"packing {row['sides']} px: {row['cpu_ms']} ms of CPU time an image")
    draw(spectra, Path(args.out) / "storage.png")
    return 0


def some_of(data_dir: str, count: int):
    """Return (the class names, a split of `count` photographs spread over the classes)."""
    from sources import folders
    from sources.index import SubsetSplit, balanced_subset

    listing = folders.list_classes(data_dir, "train")
    split = listing.split(listing.classes)
    if not len(split):
        raise DataError(f"no images in {os.path.abspath(data_dir)}/train", folders.ACCEPTED)
    ids = balanced_subset(split.labels, min(count, len(split)), seed=0)
    return tuple(map(os.fsdecode, listing.classes)), SubsetSplit(split, ids)


def load(data_dir: str, count: int) -> list[tuple[bytes, np.ndarray]]:
    """Return the (encoded file, pixels) of `count` photographs."""
    from sources.decode import decode

    _, split = some_of(data_dir, count)
    ids = range(len(split))
    return [(data, decode(data, split.name(i))) for i, data in zip(ids, split.read(ids), strict=True)]


def packing_cost(data_dir: str, count: int, sides: tuple[int, ...] = (96, 192, 320)) -> dict:
    """Return the columns of what pack_dataset.py computes for a training image: decoding, resizing, encoding.

    Writing is included, the start of processes is not; nor are the evaluation crops.
    """
    from sources import packing
    from sources.index import DatasetIndex, SubsetSplit

    classes, split = some_of(data_dir, count)
    index = DatasetIndex("benchmark", classes, split, SubsetSplit(split, [0]))
    plan = packing.make_plan(index, sides, quality=90)
    with tempfile.TemporaryDirectory(prefix="packing-benchmark-") as out:
        started = time.process_time()
        for group in packing.groups_of(plan):
            packing.write_group(index, plan, group, out, "skip")
        seconds = time.process_time() - started
    columns = {"sides": ",".join(map(str, sides)), "images": len(split)}
    return columns | {"cpu_ms": round(1000 * seconds / len(split), 2)}


def measure(photographs: list, size: int, side: int, quality: int) -> tuple[dict, np.ndarray]:
    """Return a row of the table, and the share of the crops' power left at each frequency, (size // 2,)."""
    from sources.decode import decode
    from sources.packing import stored

    packed = [stored(data, pixels, side, {"quality": quality}) for data, pixels in photographs]
    for data in packed:
        decode(data)  # warm up the cache
    started = time.process_time()
    decoded = [decode(data) for data in packed]
    seconds = time.process_time() - started
    scores, kept, whole = [], np.zeros(size // 2), np.zeros(size // 2)
    for i, ((_, full), small) in enumerate(zip(photographs, decoded, strict=True)):
        for crop in range(CROPS):
            a, b = (random_crop(image, size, key=(0, crop, i)) for image in (full, small))
            scores.append(psnr(a, b))
            whole += spectrum(a)
            kept += spectrum(b)
    middle, upper = slice(size // 6, 2 * (size // 6)), slice(2 * (size // 6), None)
    row = {
        "size": size,
        "side": side,
        "quality": quality,
        "kilobytes": round(np.mean([len(data) for data in packed]) / 1e3, 2),
        "decode_us": round(seconds / len(packed) * 1e6),
        "psnr": round(float(np.median(scores)), 2),
        "psnr_worst_tenth": round(float(np.quantile(scores, 0.1)), 2),
        "power_mid": round(float(kept[middle].sum() / whole[middle].sum()), 3),
        "power_high": round(float(kept[upper].sum() / whole[upper].sum()), 3),
    }
    return row, kept / whole


def random_crop(image: np.ndarray, size: int, key: tuple[int, int, int]) -> np.ndarray:
    """Return the random resized crop that training makes with `key`: (size, size, 3) uint8."""
    from sources.augment import cut_and_resize, random_resized_box
    from sources.randomness import KeyedRandom

    return cut_and_resize(image, random_resized_box(*image.shape[:2], KeyedRandom().rekey(key)), size)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images, in dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-2)))


def spectrum(image: np.ndarray) -> np.ndarray:
    """Return the power of an image's brightness by spatial frequency, 0 to Nyquist: (size // 2,)."""
    grey = image.astype(np.float64).mean(2)
    size = len(grey)
    window = np.hanning(size)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window))) ** 2
    frequency = np.fft.fftfreq(size, 1 / size)
    ring = np.hypot(frequency[:, None], frequency[None]).astype(int)
    return np.bincount(ring.ravel(), power.ravel())[: size // 2]


def draw(spectra: dict[tuple[int, int, int], np.ndarray], path: Path) -> None:
    """Draw the power left by frequency: a panel per training size, a line per side and quality."""
    from analysis import figures

    sizes = list(dict.fromkeys(size for size, _, _ in spectra))
    figure = figures.figure(1 + 3 * len(sizes), 3)
    drawn = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    axes = dict(zip(sizes, drawn, strict=True))
    for (size, side, quality), left in spectra.items():
        frequency = np.arange(1, len(left)) / len(left)
        axes[size].plot(frequency, left[1:], label=f"side {side}, quality {quality}", lw=1)
    for size, axis in axes.items():
        axis.axhline(1, color="grey", lw=0.5)
        axis.set(title=f"training at {size} px", xlabel="frequency / Nyquist", ylim=(0, None))
        axis.legend(fontsize=6)
    axes[sizes[0]].set_ylabel("power left")
    print(f"picture: {figures.save(figure, path)}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
