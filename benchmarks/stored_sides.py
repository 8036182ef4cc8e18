"""What a stored side costs and loses: the same random crops from full-size and from packed images.

`python -m benchmarks.stored_sides --data-dir DIR --json FILE`. For each training size, stored side
and quality: PSNR of the crops, the share of their power that is left by frequency, bytes and
decoding time. The default `--stored-sides` follow from this table.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from base import errors, flags

CROPS = 4  # per image


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.stored_sides", description=__doc__.split("\n\n")[0])
    add, whole = parser.add_argument, flags.number(int, 8)
    add(
        "--data-dir", required=True, metavar="DIR", help="holds train/<class>/*.JPEG of full-size photographs"
    )
    add(
        "--images",
        type=flags.number(int, 1),
        default=200,
        metavar="N",
        help="how many, spread over the classes",
    )
    add("--sizes", type=whole, nargs="+", default=[64, 128, 224], metavar="PX", help="training sizes")
    add(
        "--ratios",
        type=flags.number(float, 0.5),
        nargs="+",
        default=[1.15, 1.3, 1.5, 2.0],
        metavar="R",
        help="stored sides as multiples of the size, rounded to 8 px",
    )
    add(
        "--qualities",
        type=flags.number(int, 1, 100),
        nargs="+",
        default=[90],
        metavar="Q",
        help="JPEG qualities",
    )
    add(
        "--json",
        default="stored_sides.json",
        metavar="FILE",
        help="the rows; the picture lies beside it as .png",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import cv2

    cv2.setNumThreads(1)
    photographs = load(args.data_dir, args.images)
    rows, spectra = [], {}
    print(
        f"{'size':>5} {'side':>5} {'quality':>7} {'kB':>6} {'decode us':>9} {'PSNR dB':>8} {'10 % worst':>10} "
        f"{'power left: mid':>15} {'high':>5}"
    )
    for size in args.sizes:
        for ratio in args.ratios:
            for quality in args.qualities:
                side = round(size * ratio / 8) * 8
                row, spectra[size, side, quality] = measure(photographs, size, side, quality)
                rows.append(row)
                print(
                    f"{size:>5} {side:>5} {quality:>7} {row['kilobytes']:>6.1f} {row['decode_us']:>9.0f} "
                    f"{row['psnr']:>8.1f} {row['psnr_worst_tenth']:>10.1f} {row['power_mid']:>15.2f} "
                    f"{row['power_high']:>5.2f}",
                    flush=True,
                )
    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    draw(spectra, Path(args.json).with_suffix(".png"))
    return 0


def load(data_dir: str, count: int) -> list[tuple[bytes, np.ndarray]]:
    """(file, pixels) of `count` photographs, spread over the classes."""
    from sources import folders
    from sources.images import decode
    from sources.index import balanced_subset

    listing = folders.list_classes(data_dir, "train")
    split = listing.split(listing.classes)
    ids = balanced_subset(split.labels, min(count, len(split)), seed=0)
    return [(data, decode(data, split.name(int(i)))) for i, data in zip(ids, split.read(ids), strict=True)]


def measure(photographs: list, size: int, side: int, quality: int) -> tuple[dict, np.ndarray]:
    """One row, and the share of the crops' power that is left at each frequency (size // 2,)."""
    from sources.images import decode
    from sources.packing import stored

    packed = [stored(data, pixels, side, quality) for data, pixels in photographs]
    for data in packed:
        decode(data)  # warm
    started = time.process_time()
    decoded = [decode(data) for data in packed]
    seconds = time.process_time() - started
    scores, kept, whole = [], np.zeros(size // 2), np.zeros(size // 2)
    for i, ((_, full), small) in enumerate(zip(photographs, decoded, strict=True)):
        for crop in range(CROPS):
            a, b = same_crop(full, small, size, key=(0, crop, i))
            scores.append(psnr(a, b))
            whole += spectrum(a)
            kept += spectrum(b)
    left, third = kept / whole, size // 6
    row = {
        "size": size,
        "side": side,
        "quality": quality,
        "kilobytes": round(np.mean([len(d) for d in packed]) / 1e3, 2),
        "decode_us": round(seconds / len(packed) * 1e6),
        "psnr": round(float(np.median(scores)), 2),
        "psnr_worst_tenth": round(float(np.quantile(scores, 0.1)), 2),
        "power_mid": round(float(kept[third : 2 * third].sum() / whole[third : 2 * third].sum()), 3),
        "power_high": round(float(kept[2 * third :].sum() / whole[2 * third :].sum()), 3),
    }
    return row, left


def same_crop(
    full: np.ndarray, small: np.ndarray, size: int, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The random resized crop of `key` from both images, as training makes it: (size, size, 3) uint8."""
    from sources.augment import KeyedRandom, cut_and_resize, random_resized_box

    boxes = [random_resized_box(*image.shape[:2], KeyedRandom().rekey(key)) for image in (full, small)]
    return cut_and_resize(full, boxes[0], size), cut_and_resize(small, boxes[1], size)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-2)))


def spectrum(image: np.ndarray) -> np.ndarray:
    """Power of the brightness by spatial frequency, 0 ... Nyquist: (size // 2,), rings summed."""
    grey = image.astype(np.float64).mean(2)
    size = len(grey)
    window = np.hanning(size)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window))) ** 2
    frequency = np.fft.fftfreq(size, 1 / size)
    ring = np.hypot(frequency[:, None], frequency[None]).astype(int)
    return np.bincount(ring.ravel(), power.ravel())[: size // 2]


def draw(spectra: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(size for size, _, _ in spectra))
    figure, axes = plt.subplots(1, len(sizes), figsize=(1 + 3 * len(sizes), 3), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for (s, side, quality), left in spectra.items():
            if s == size:
                axis.plot(
                    np.arange(1, len(left)) / len(left),
                    left[1:],
                    label=f"side {side}, quality {quality}",
                    lw=1,
                )
        axis.axhline(1, color="grey", lw=0.5)
        axis.set(title=f"training at {size} px", xlabel="frequency / Nyquist", ylim=(0, 1.2))
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("power left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
