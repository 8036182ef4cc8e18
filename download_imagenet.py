"""Download, verify, unpack and arrange a dataset. Run it again to continue; finished steps are skipped."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from base import errors, flags
from base.errors import DataError, UsageError, did_you_mean

COUNTS = (1_281_167, 50_000, 1000)  # ImageNet's training images, validation images, classes
OVERVIEW = """\
Datasets can be obtained in three ways (ImageNet itself is available to registered users only):

  --method manual   explains how to get the archives and where to put them, and arranges those already there
  --method auto     downloads the archives: --train-url and --val-url from your image-net.org account
  --method simple   downloads --dataset tiny-imagenet, cifar100, cifar10 or hf:<name> without an account;
                    this is what --dataset alone does

No download needed: python train.py --dataset digits (real images) or --dataset synthetic (generated ones)."""
MANUAL = """\
1. Register at https://image-net.org, accept the terms, and open "ILSVRC2012" under Download.
2. Put these files into {data_dir}, with these names:
     ILSVRC2012_img_train.tar        148 GB  "Training images (Task 1 & 2)"
     ILSVRC2012_img_val.tar          6.7 GB  "Validation images (all tasks)"
     ILSVRC2012_devkit_t12.tar.gz    2.5 MB  "Development kit (Task 1 & 2)": the validation labels
3. Run this command again. It verifies the archives and unpacks them into
     train/<class>/*.JPEG            1,281,167 images
     val/<class>/*.JPEG              50,000 images
   (another 155 GB; you may delete the archives afterwards.)
For Kaggle's copy (imagenet-object-localization-challenge), unpack it and pass its folder as --data-dir."""
TERMS = """\
ImageNet is licensed to registered users for non-commercial research and education and may not be passed on,
so there is no public URL to download it from. Your options:

  python download_imagenet.py --method manual
      with an account at image-net.org
  python download_imagenet.py --method simple --dataset hf:ILSVRC/imagenet-1k
      with an account at Hugging Face: accept the terms there, then run `hf auth login`
  python download_imagenet.py --method simple --dataset tiny-imagenet
      200 classes at 64 px, no account"""


@dataclass(frozen=True)
class Archive:
    """A published file: its name, size in bytes, MD5 checksum, and its URL if it is public."""

    name: str
    size: int
    md5: str
    url: str = ""


# Sizes and checksums: image-net.org, torchvision.datasets (ARCHIVE_META), cs231n.stanford.edu, cs.toronto.edu
TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e")
VAL = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = Archive("ILSVRC2012_devkit_t12.tar.gz", 2_568_634, "fa75699e90414af021442c21a62c3abf",
                 "https://image-net.org/data/ILSVRC/2012/ILSVRC2012_devkit_t12.tar.gz")  # fmt: skip


@dataclass(frozen=True)
class SimpleDataset:
    """A dataset that is one archive with a single folder in it."""

    archive: Archive
    folder: str
    keep: str  # regular expression of the names to unpack, relative to `folder`
    ignore: str  # the same for names to leave out; any other name is refused
    images: tuple[int, int] = (50_000, 10_000)  # train, val


SIMPLE = {
    "tiny-imagenet": SimpleDataset(
        Archive("tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de",
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        "tiny-imagenet-200",
        r"train/n\d{8}/(images/n\d{8}_\d+\.JPEG|n\d{8}_boxes\.txt)"
        r"|val/images/val_\d+\.JPEG|val/val_annotations\.txt|wnids\.txt|words\.txt",
        r"test/.*",  # without labels
        (100_000, 10_000),
    ),
    "cifar100": SimpleDataset(
        Archive("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85",
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
        "cifar-100-python", r"meta|train|test", r"file\.txt~",
    ),
    "cifar10": SimpleDataset(
        Archive("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        "cifar-10-batches-py", r"data_batch_[1-5]|test_batch|batches\.meta", r"readme\.html",
    ),
}  # fmt: skip


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="download_imagenet.py", description=__doc__)
    add = parser.add_argument
    method = "Download method; by default simple. With imagenet, leaving it out lists the methods."
    add("--method", choices=("manual", "auto", "simple"), metavar="NAME", help=method)
    add("--dataset", default="imagenet", metavar="NAME", help=f"imagenet, {', '.join(SIMPLE)} or hf:<name>.")
    add("--data-dir", metavar="DIR", help="Dataset directory (default: ./data/<dataset>).")
    add("--train-url", metavar="URL", help=f"URL of {TRAIN.name}, for --method auto.")
    add("--val-url", metavar="URL", help=f"URL of {VAL.name}, for --method auto.")
    add("--devkit-url", metavar="URL", help=f"URL of {DEVKIT.name} (default: {DEVKIT.url}).")
    add("--debug", action="store_true", help="Show tracebacks of errors.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.method is None and args.dataset != "imagenet":
        args.method = "simple"
    if args.method is None:
        print(OVERVIEW)
        return 0
    urls = {"--train-url": args.train_url, "--val-url": args.val_url, "--devkit-url": args.devkit_url}
    check_usage(args.method, args.dataset, [flag for flag, url in urls.items() if url])
    if args.data_dir and args.dataset.startswith("hf:"):
        what = "--data-dir has no effect: the Hub's datasets go into its own cache"
        raise UsageError(what, "leave it out, or set HF_HOME")
    data_dir = Path(args.data_dir or f"./data/{args.dataset}")
    if args.dataset != "imagenet":
        download_simple(args.dataset, data_dir)
    elif args.method == "simple":
        print(TERMS)
        raise UsageError("--method simple cannot download ImageNet itself", "choose one of the options above")
    elif args.method == "auto":
        download_imagenet(data_dir, args.train_url, args.val_url, args.devkit_url or DEVKIT.url)
    else:
        print(MANUAL.format(data_dir=data_dir.resolve()))
        if any((data_dir / name).exists() for name in (TRAIN.name, VAL.name, "train", "val", "val.flat")):
            print("\nArranging the files that are there:")
            arrange_imagenet(data_dir, {})
    return 0


def check_usage(method: str, dataset: str, url_flags: list[str]) -> None:
    """Raise UsageError for an unknown dataset and for flags that contradict each other."""
    if dataset in ("digits", "synthetic"):
        raise UsageError(f"--dataset {dataset} needs no download", f"python train.py --dataset {dataset}")
    if dataset == "imagenet100":
        fix = "download ImageNet, then run python train.py --dataset imagenet100"
        raise UsageError("imagenet100 has no download: it is a subset of ImageNet's classes", fix)
    if dataset != "imagenet" and dataset not in SIMPLE and not dataset.startswith("hf:"):
        fix = did_you_mean(dataset, SIMPLE) + f"choose one of imagenet, {', '.join(SIMPLE)}, hf:<name>"
        raise UsageError(f"unknown --dataset {dataset}", fix)
    if dataset != "imagenet" and method != "simple":
        raise UsageError(f"--method {method} is only for ImageNet", f"use --method simple for {dataset}")
    if url_flags and method != "auto":
        raise UsageError(f"{url_flags[0]} has no effect with --method {method}", "use --method auto")


def download_imagenet(data_dir: Path, train_url: str | None, val_url: str | None, devkit_url: str) -> None:
    """Download what is missing of the three archives, and arrange them."""
    from sources.archives.fetch import check_url

    missing = []
    for folder, archive, url in (("train", TRAIN, train_url), ("val", VAL, val_url)):
        begun = (folder, f"{folder}.flat", archive.name)
        if not url and not any((data_dir / name).exists() for name in begun):
            missing.append(f"--{folder}-url")
    if missing:
        fix = "log in at https://image-net.org and copy the URLs of the ILSVRC2012 archives"
        raise UsageError(f"--method auto needs {' and '.join(missing)}", fix)
    urls = {TRAIN: train_url, VAL: val_url, DEVKIT: devkit_url}
    for url in filter(None, urls.values()):
        check_url(url)  # all of them first: a download takes hours
    arrange_imagenet(data_dir, urls)


def arrange_imagenet(data_dir: Path, urls: dict[Archive, str | None]) -> None:
    """Fill train/<class>/ and val/<class>/ from the archives in `data_dir`, or else from `urls`."""
    from sources.archives import ilsvrc
    from sources.archives.unpack import unpack

    train_images, val_images, classes = COUNTS
    val_state = ilsvrc.val_state(data_dir)
    if val_state != "filed":
        labels = val_labels(data_dir, urls.get(DEVKIT))
    if val_state == "flat":
        print(f"moving the images of {data_dir / 'val'} into class folders")
        ilsvrc.file_flat_val(data_dir, labels)
    elif val_state == "absent":
        archive = get_archive(VAL, urls.get(VAL), data_dir)
        unpack(archive, data_dir / "val", ilsvrc.val_place(labels), val_images)
    if not (data_dir / "train").exists():
        archive = get_archive(TRAIN, urls.get(TRAIN), data_dir)
        unpack(archive, data_dir / "train", ilsvrc.train_place, train_images, ilsvrc.train_members)
    ilsvrc.check_counts(data_dir, train_images, val_images, classes)
    print(f"{train_images:,} + {val_images:,} images of {classes:,} classes. ", end="")
    print(f"Next: python train.py --data-dir {shlex.quote(str(data_dir))}")


def val_labels(data_dir: Path, devkit_url: str | None) -> dict[bytes, bytes]:
    """Return {image name without extension: class}, unpacking the development kit if it is needed."""
    from sources.archives import ilsvrc
    from sources.archives.unpack import unpack
    from sources.imagenet import flat_val_labels

    try:
        return flat_val_labels(data_dir, data_dir)
    except DataError:
        archive = get_archive(DEVKIT, devkit_url, data_dir)
        unpack(archive, data_dir / ilsvrc.DEVKIT_FOLDER, ilsvrc.devkit_place)
        return flat_val_labels(data_dir, data_dir)


def get_archive(archive: Archive, url: str | None, data_dir: Path) -> Path:
    """Return the path of the verified archive in `data_dir`, after downloading it if it is missing."""
    from sources.archives.fetch import RemoteFile, download, verify

    path = data_dir / archive.name
    if path.exists():  # it may be an incomplete download of a browser
        verify(path, archive.size, archive.md5)
    elif url:
        download(RemoteFile(url, path, archive.size, archive.md5))
    else:
        raise DataError(f"no {archive.name} in {data_dir.resolve()}", "put it there; see --method manual")
    print(f"{path}: {archive.size:,} bytes, checksum correct")
    return path


def download_simple(dataset: str, data_dir: Path) -> None:
    """Download a dataset that needs no account, or, for hf:, at most the one of `hf auth login`."""
    from sources.layouts import open_dataset

    simple = SIMPLE.get(dataset)
    if simple and not (data_dir / simple.folder).exists():
        unpack_simple(simple, data_dir)
    found = open_dataset(dataset, data_dir)
    train, val = len(found.train), len(found.val)
    if simple and (train, val) != simple.images:
        folder, (all_train, all_val) = data_dir / simple.folder, simple.images
        problem = f"{folder} has {train:,} + {val:,} images, not {all_train:,} + {all_val:,}"
        raise DataError(problem, f"delete {folder} and run the same command again")
    where = f" --data-dir {shlex.quote(str(data_dir))}" if simple else ""
    print(f"{train:,} + {val:,} images of {len(found.classes):,} classes. ", end="")
    print(f"Next: python train.py --dataset {dataset}{where}")


def unpack_simple(simple: SimpleDataset, data_dir: Path) -> None:
    from sources.archives.unpack import unexpected, unpack

    def place(name: str) -> str | None:
        inside = name.removeprefix(simple.folder + "/")
        if inside != name and re.fullmatch(simple.keep, inside):
            return inside
        if inside != name and re.fullmatch(simple.ignore, inside):
            return None
        raise unexpected(name)

    archive = get_archive(simple.archive, simple.archive.url, data_dir)
    unpack(archive, data_dir / simple.folder, place, sum(simple.images))


if __name__ == "__main__":
    sys.exit(errors.run(main))
