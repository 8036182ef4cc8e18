"""Fetch, verify, unpack and arrange a dataset. Can be run again at any point: what is done is not done twice."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from base import errors, flags
from base.errors import DataError, UsageError

MEMBER_BYTES = 256 << 20  # no file we unpack is larger: CIFAR-100's training images are one of 155 MB
COUNTS = (1_281_167, 50_000, 1000)  # ImageNet's training images, validation images, classes
OVERVIEW = """\
ImageNet is given to registered people only, so there are three ways:

  --method manual   how to get the archives and where to put them; once they are there, arranges them
  --method auto     fetches the archives itself: --train-url and --val-url from your image-net.org account
  --method simple   what needs no account: --dataset tiny-imagenet | cifar100 | cifar10 | hf:<name>

Nothing to fetch at all: python train.py --dataset digits (real images), --dataset synthetic (generated ones)."""
MANUAL = """\
1. Register at https://image-net.org, accept the terms, and open "ILSVRC2012" under Download.
2. Put these into {where}, under these names:
     ILSVRC2012_img_train.tar        138 GB  "Training images (Task 1 & 2)"
     ILSVRC2012_img_val.tar          6.3 GB  "Validation images (all tasks)"
     ILSVRC2012_devkit_t12.tar.gz    2.5 MB  "Development kit (Task 1 & 2)": the labels of the validation images
3. Run this command again. It checks the archives, and arranges
     train/<class>/*.JPEG            1,281,167 images
     val/<class>/*.JPEG              50,000 images
   (another 145 GB; the archives may be deleted afterwards.)
Kaggle's copy (imagenet-object-localization-challenge) needs none of this: unpack it, give its folder as --data-dir."""
TERMS = """\
ImageNet's images may be used for non-commercial research and education by those who registered and accepted
its terms; nobody may pass them on. So no address here can give them to you. What you can do:

  python download_imagenet.py --method manual                           with an account at image-net.org
  python download_imagenet.py --method simple --dataset hf:ILSVRC/imagenet-1k
                                                                        with an account at Hugging Face: accept the
                                                                        terms there, then `hf auth login`
  python download_imagenet.py --method simple --dataset tiny-imagenet   200 classes at 64 px, no account"""


@dataclass(frozen=True)
class Archive:
    """A published file: its name, length in bytes and checksum, and where it lies when that is no secret."""

    name: str
    size: int
    md5: str
    url: str = ""


# Sizes and checksums: image-net.org and torchvision.datasets (ARCHIVE_META); cs231n.stanford.edu; cs.toronto.edu.
TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e")
VAL = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = Archive(
    "ILSVRC2012_devkit_t12.tar.gz",
    2_568_634,
    "fa75699e90414af021442c21a62c3abf",
    "https://image-net.org/data/ILSVRC/2012/ILSVRC2012_devkit_t12.tar.gz",
)


@dataclass(frozen=True)
class Simple:
    """A dataset that is one archive: unpacked into `folder`, where `expected` names what may be in there."""

    archive: Archive
    folder: str
    expected: str  # regular expression of the names kept
    ignored: str = r"(?!)"  # and of those left out; anything else is refused
    images: tuple[int, int] = (50_000, 10_000)  # train, val


SIMPLE = {
    "tiny-imagenet": Simple(
        Archive("tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de",
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        "tiny-imagenet-200",
        r"train/n\d{8}/(images/n\d{8}_\d+\.JPEG|n\d{8}_boxes\.txt)|val/images/val_\d+\.JPEG|val/val_annotations\.txt"
        r"|wnids\.txt|words\.txt",
        r"test/.*",  # without labels
        (100_000, 10_000),
    ),
    "cifar100": Simple(
        Archive("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85",
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
        "cifar-100-python", r"meta|train|test", r"file\.txt~",
    ),
    "cifar10": Simple(
        Archive("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        "cifar-10-batches-py", r"data_batch_[1-5]|test_batch|batches\.meta", r"readme\.html",
    ),
}  # fmt: skip


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="download_imagenet.py", description=__doc__)
    add = parser.add_argument
    add("--method", choices=("manual", "auto", "simple"), help="how; without it: what there is")
    add("--dataset", default="imagenet", metavar="NAME", help=f"imagenet, {', '.join(SIMPLE)} or hf:<name>")
    add("--data-dir", metavar="DIR", help="where the dataset goes (default: ./data/<dataset>)")
    add("--train-url", metavar="URL", help=f"auto: https address of {TRAIN.name}")
    add("--val-url", metavar="URL", help=f"auto: https address of {VAL.name}")
    add("--devkit-url", metavar="URL", help=f"auto: address of {DEVKIT.name} (default: {DEVKIT.url})")
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.method is None:
        print(OVERVIEW)
        return 0
    urls = {"--train-url": args.train_url, "--val-url": args.val_url, "--devkit-url": args.devkit_url}
    check_usage(args.method, args.dataset, [name for name, url in urls.items() if url])
    data_dir = Path(args.data_dir or f"./data/{args.dataset}")
    if args.dataset != "imagenet":
        simple(args.dataset, data_dir)
    elif args.method == "simple":
        print(TERMS)
        raise UsageError("--method simple cannot fetch ImageNet itself", "choose one of the ways above")
    elif args.method == "auto":
        auto(data_dir, args.train_url, args.val_url, args.devkit_url or DEVKIT.url)
    else:
        manual(data_dir)
    return 0


def check_usage(method: str, dataset: str, url_flags: list[str]) -> None:
    """Refuse what cannot work together, before anything is fetched."""
    if dataset in ("digits", "synthetic"):
        raise UsageError(f"--dataset {dataset} needs no download", f"python train.py --dataset {dataset}")
    if dataset == "imagenet100":
        raise UsageError(
            "imagenet100 is a list of classes over ImageNet",
            "get ImageNet, then: python train.py --dataset imagenet100",
        )
    if dataset != "imagenet" and dataset not in SIMPLE and not dataset.startswith("hf:"):
        raise UsageError(
            f"--dataset {dataset}: not a dataset we know", f"one of imagenet, {', '.join(SIMPLE)}, hf:<name>"
        )
    if dataset != "imagenet" and method != "simple":
        raise UsageError(f"--method {method} is for ImageNet", f"--method simple fetches {dataset}")
    if url_flags and method != "auto":
        raise UsageError(f"{url_flags[0]} with --method {method}", "addresses are for --method auto")


def manual(data_dir: Path) -> None:
    """Say how to get ImageNet; arrange whatever of it is there already."""
    print(MANUAL.format(where=data_dir.resolve()))
    if any((data_dir / name).exists() for name in (TRAIN.name, VAL.name, "train", "val", "val.flat")):
        print("\nSomething is there already:")
        arrange_imagenet(data_dir, {})


def auto(data_dir: Path, train_url: str | None, val_url: str | None, devkit_url: str) -> None:
    """Fetch what is not there yet of the three archives, and arrange it."""
    from sources.archives.fetch import Wanted, check_url

    missing = []
    for folder, archive, url in (("train", TRAIN, train_url), ("val", VAL, val_url)):
        if not url and not any((data_dir / name).exists() for name in (folder, archive.name)):
            missing.append(f"--{folder}-url")
    if missing:
        raise UsageError(
            f"--method auto needs {' and '.join(missing)}",
            "log in at https://image-net.org and copy the addresses of the ILSVRC2012 archives; or see --method manual",
        )
    urls = {TRAIN: train_url, VAL: val_url, DEVKIT: devkit_url}
    for archive, url in urls.items():
        if url:  # a wrong address is said now, not after the first archive
            check_url(url, Wanted(url, data_dir / archive.name, archive.size, archive.md5))
    arrange_imagenet(data_dir, urls)


def fetch(archive: Archive, url: str | None, data_dir: Path) -> Path:
    """The archive, whole and verified, in `data_dir`."""
    from sources.archives.fetch import Wanted, download, verify

    path = data_dir / archive.name
    with shown(archive.name) as report:
        if path.exists():  # verified again: it may be a browser's half download
            verify(path, size=archive.size, md5=archive.md5, report=report)
        else:
            if not url:
                raise DataError(
                    f"no {archive.name} in {data_dir.resolve()}", "put it there; see --method manual"
                )
            download(Wanted(url, path, archive.size, archive.md5), report)
    print(f"{path}: {archive.size:,} bytes, checksum as published")
    return path


@contextmanager
def shown(desc: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar (or a line now and then) in megabytes for each stage that is reported."""
    from base.progress import Progress

    bars: dict[str, Progress] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = Progress(total >> 20, f"{stage} {desc}", unit="MB", initial=done >> 20)
        bars[stage].update(max(0, (done >> 20) - bars[stage].count))

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def arrange_imagenet(data_dir: Path, urls: dict[Archive, str | None]) -> None:
    """From the archives to train/<class>/ and val/<class>/ in `data_dir`, all there.

    An archive that is not there is fetched from its place in `urls`.
    """
    from sources import ilsvrc

    state = ilsvrc.val_state(data_dir)
    if state != "arranged":
        if not ilsvrc.has_val_labels(data_dir):
            unpack_to(
                data_dir / ilsvrc.DEVKIT_FOLDER,
                fetch(DEVKIT, urls.get(DEVKIT), data_dir),
                ilsvrc.devkit_place,
            )
        labels = ilsvrc.val_labels(data_dir)
    if state == "flat":
        print(f"filing the images of {data_dir / 'val'} into class folders")
        ilsvrc.file_flat_val(data_dir, labels)
    elif state == "absent":
        unpack_to(data_dir / "val", fetch(VAL, urls.get(VAL), data_dir), ilsvrc.val_place(labels), COUNTS[1])
    if not (data_dir / "train").exists():
        archive = fetch(TRAIN, urls.get(TRAIN), data_dir)
        unpack_to(data_dir / "train", archive, ilsvrc.train_place, COUNTS[0], inside=ilsvrc.train_members)
    ilsvrc.check_counts(data_dir, *COUNTS)
    print(
        f"{COUNTS[0]:,} + {COUNTS[1]:,} images of {COUNTS[2]:,} classes. Next: python train.py --data-dir {data_dir}"
    )


def unpack_to(
    folder: Path,
    archive: Path,
    place: Callable[[str], str | None],
    files: int = 0,
    inside: Callable[[Iterator], Iterator] = iter,
) -> None:
    """Make `folder` from the archive: all of it or none. `files` is how many are expected, for the ETA."""
    from base.progress import Progress
    from sources.archives.unpack import complete_or_absent, opened, unpack

    bar = Progress(files, f"unpacking {archive.name}", unit="files", enabled=files > 0)
    with bar, complete_or_absent(folder) as partial, opened(archive) as members:
        unpack(inside(members), partial, place, max_size=MEMBER_BYTES, report=lambda count: bar.update())


def simple(dataset: str, data_dir: Path) -> None:
    """A dataset that needs no account (or, for hf:, the account of `hf auth login`)."""
    from sources.layouts import open_dataset

    if dataset.startswith("hf:"):
        found = open_dataset(dataset, data_dir)
        where = ""
    else:
        what = SIMPLE[dataset]
        if not (data_dir / what.folder).exists():
            unpack_simple(what, fetch(what.archive, what.archive.url, data_dir), data_dir)
        found, where = open_dataset(dataset, data_dir), f" --data-dir {data_dir}"
        check_simple(what, (len(found.train), len(found.val)), data_dir)
    print(
        f"{len(found.train):,} + {len(found.val):,} images of {len(found.classes):,} classes. "
        f"Next: python train.py --dataset {dataset}{where}"
    )


def unpack_simple(what: Simple, archive: Path, data_dir: Path) -> None:
    from sources.archives.unpack import unexpected

    def place(name: str) -> str | None:
        inside = name.removeprefix(what.folder + "/")
        if inside != name and re.fullmatch(what.expected, inside):
            return inside
        if inside != name and re.fullmatch(what.ignored, inside):
            return None
        raise unexpected(name)

    unpack_to(data_dir / what.folder, archive, place, sum(what.images))


def check_simple(what: Simple, images: tuple[int, int], data_dir: Path) -> None:
    if images != what.images:
        found, expected = (f"{train:,} + {val:,}" for train, val in (images, what.images))
        raise DataError(
            f"{data_dir / what.folder} has {found} images, not {expected}",
            f"remove {data_dir / what.folder} and run this again",
        )


if __name__ == "__main__":
    sys.exit(errors.run(main))
