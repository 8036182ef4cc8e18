"""The loaders that `benchmarks.loader` compares: this project's, torchvision's, timm's, FFCV's and DALI's.

Each function starts a loader. Iterating over the result takes one pass: `setting.batches` batches of BATCH
random images, each a tuple with the labels as its second item. The workers stay for the next pass and are
idle in between, so the CPU time of a pass is that of its own batches. Raises ImportError for a package
that is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, RandomSampler

from base import flags
from base.config_file import RECIPES
from dataloader import PREFETCH, eval_loader, train_loader
from sources.augment import JITTER
from sources.index import IMAGENET_MEAN, IMAGENET_STD, DatasetIndex, SubsetSplit

BATCH = 128
PIPELINE = RECIPES / "augment" / "full.yaml"


@dataclass(frozen=True)
class Setting:
    """What all loaders of a comparison do."""

    size: int  # px
    augmentation: str  # basic (crop and flip), full, or evaluation (resize and centre crop)
    workers: int  # processes, or threads of FFCV and DALI
    batches: int  # of a pass

    @property
    def images(self) -> int:
        return self.batches * BATCH


@dataclass(frozen=True)
class Data:
    """The same images, stored in several ways."""

    folder: Path  # with train/<class>/ and val/<class>/
    indices: dict[str, DatasetIndex]  # name of a row -> what this project reads for it
    sides: tuple[int, ...]  # stored short sides of the packed copies

    def side(self, size: int) -> int:
        return min((side for side in self.sides if side >= size), default=max(self.sides))


def loaders(data: Data, setting: Setting) -> dict[str, Callable[[], Iterable]]:
    """Return {row: function that starts its loader} of the loaders that can do what `setting` says."""
    found = {name: lambda i=i: ours(i, setting) for name, i in data.indices.items()}
    if setting.augmentation == "evaluation":  # packed data store these crops; raw sides are for training
        return {name: start for name, start in found.items() if name != "packed, raw"}
    if setting.augmentation == "full":
        found["packed, Albumentations"] = lambda: albumentations(data.indices["packed"], setting)
    found["torchvision, PIL"] = lambda: torchvision_pil(data.folder, setting)
    found["torchvision, decode_jpeg"] = lambda: torchvision_v2(data.folder, setting)
    if setting.augmentation == "basic":  # timm and FFCV have no affine, for instance
        small = data.side(setting.size) * 4 // 3  # FFCV limits the long side
        found["timm"] = lambda: timm(data.folder, setting)
        found["FFCV, side 500"] = lambda: ffcv(data.folder, setting, "jpg", 500)
        found["FFCV, stored small"] = lambda: ffcv(data.folder, setting, "jpg", small)
        found["FFCV, stored small, raw"] = lambda: ffcv(data.folder, setting, "raw", small)
        found["DALI"] = lambda: dali(data.folder, setting)
    return found


def ours(index: DatasetIndex, setting: Setting, augment: str = "") -> Iterable:
    """Start this project's loader as train.py does: uint8 batches, to be normalized on the device.

    augment: as --augment, instead of the augmentation of `setting`
    """
    # With workers, for which the loader makes the memory that they write into.
    options = {"image_size": setting.size, "batch_size": BATCH, "num_workers": setting.workers}
    if setting.augmentation == "evaluation":
        split = repeated(index.val, setting.images)
        loader = eval_loader(split, index, **options)
    else:
        index = replace(index, train=repeated(index.train, setting.images))
        loader = train_loader(index, augment=flags.parse_augment(augment or setting.augmentation), **options)
    return in_workers(loader.dataset, loader.order, setting, batch_size=None)


def albumentations(index: DatasetIndex, setting: Setting) -> Iterable:
    """Start this project's loader with the documents' pipeline as an Albumentations file."""
    import albumentations  # noqa: F401 - if it is missing, say so here: the workers could not

    return ours(index, setting, f"rrc,{PIPELINE}")


def repeated(split, count: int) -> SubsetSplit:
    return SubsetSplit(split, np.resize(np.arange(len(split)), count))


def torchvision_pil(folder: Path, setting: Setting) -> Iterable:
    """Start ImageFolder as torchvision's reference training does: PIL, float32 normalized in the workers."""
    from torchvision import datasets, transforms

    images, erasing = torchvision_steps(transforms, setting)
    last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    steps = transforms.Compose([*images, *last, *erasing])
    return sampled(datasets.ImageFolder(str(folder / "train"), steps), setting)


def torchvision_v2(folder: Path, setting: Setting) -> Iterable:
    """Start the fastest that torchvision has: libjpeg-turbo without PIL, transforms v2, uint8 batches."""
    from torchvision import datasets, io
    from torchvision.transforms import v2

    def decode(path: str):
        return io.decode_image(io.read_file(path), io.ImageReadMode.RGB)

    images, erasing = torchvision_steps(v2, setting)
    steps = v2.Compose([*images, *erasing])
    return sampled(datasets.ImageFolder(str(folder / "train"), steps, loader=decode), setting)


def torchvision_steps(transforms, setting: Setting) -> tuple[list, list]:
    """Return the operations of `setting` in torchvision's `transforms`, and those that need a tensor."""
    T, bilinear = transforms, transforms.InterpolationMode.BILINEAR
    steps = [T.RandomResizedCrop(setting.size), T.RandomHorizontalFlip()]
    if setting.augmentation == "basic":
        return steps, []
    affine = T.RandomAffine(15, translate=(1 / 16, 1 / 16), scale=(0.9, 1.1), interpolation=bilinear)
    steps += [T.RandomApply([affine]), T.RandomApply([T.ColorJitter(*JITTER)])]
    return steps, [T.RandomErasing(0.5, scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0))]  # a quarter of the side


def timm(folder: Path, setting: Setting) -> Iterable:
    """Start timm's ImageDataset with crop and flip: uint8 batches, as in its prefetching loader."""
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(setting.size, is_training=True, use_prefetcher=True, color_jitter=None)
    dataset = ImageDataset(str(folder / "train"), transform=transform)
    return sampled(dataset, setting, collate_fn=fast_collate)


def sampled(dataset, setting: Setting, **options) -> Iterable:
    sampler = RandomSampler(dataset, replacement=True, num_samples=setting.images)
    return in_workers(dataset, sampler, setting, batch_size=BATCH, **options)


def in_workers(dataset, sampler, setting: Setting, **options) -> Iterable:
    options |= {"num_workers": setting.workers, "prefetch_factor": PREFETCH, "persistent_workers": True}
    return DataLoader(dataset, sampler=sampler, multiprocessing_context="fork", **options)


def ffcv(folder: Path, setting: Setting, mode: str, max_side: int) -> Iterable:
    """Start FFCV's loader on a file written once: images of at most `max_side` px, as JPEG q90 or raw."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    dataset, path = ImageFolder(str(folder / "train")), folder / f"{mode}-{max_side}.beton"
    if not path.exists():
        image = RGBImageField(write_mode=mode, max_resolution=max_side, jpeg_quality=90)
        DatasetWriter(str(path), {"image": image, "label": IntField()}).from_indexed_dataset(dataset)
    crop = RandomResizedCropRGBImageDecoder((setting.size, setting.size))
    pipelines = {
        "image": [crop, RandomHorizontalFlip(), ToTensor()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    ids = np.resize(np.arange(len(dataset)), setting.images)
    options = {"num_workers": setting.workers, "order": OrderOption.RANDOM, "os_cache": True}
    return Loader(str(path), BATCH, indices=ids, pipelines=pipelines, drop_last=True, **options)


def dali(folder: Path, setting: Setting) -> Iterable:
    """Start DALI's pipeline on the CPU. It prefetches nothing, so a pass makes exactly its own batches."""
    from nvidia.dali import Pipeline, fn

    options = {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}
    pipeline = Pipeline(BATCH, num_threads=setting.workers, device_id=None, seed=0, **options)
    with pipeline:
        files, labels = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True)
        area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
        images = fn.decoders.image_random_crop(files, random_area=area, random_aspect_ratio=ratio)
        images = fn.resize(images, size=[setting.size, setting.size])
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()
    return Passes(pipeline.run, setting.batches)


@dataclass(frozen=True)
class Passes:
    """Passes of `batches` calls of `make`."""

    make: Callable[[], tuple]
    batches: int

    def __iter__(self) -> Iterator[tuple]:
        return (self.make() for _ in range(self.batches))
