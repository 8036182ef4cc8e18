"""From a dataset index to batches on the device: which samples, in what order, and how they get there.

Randomness is stateless: the order is a function of (seed, epoch), and the augmentation of a sample is a
function of (seed, epoch, sample id). Neither depends on batches, workers or ranks. So a loader that is
started at step k, with any number of workers, yields exactly the batches k, k + 1, ... of that epoch.
"""

from __future__ import annotations

import functools
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from base import process
from base.device import Runtime
from base.errors import DataError, UserError
from base.flags import parse_augment
from harness.batch_memory import BatchMemory, InMemory
from harness.interrupts import held_back, left_to_parent
from harness.workers import init_worker, started
from sources import crops, layouts, splits
from sources.decode import BadImage
from sources.images import EvalTransform, Steps, TrainTransform, default_crop
from sources.index import DatasetIndex, Split, read_samples

PREFETCH = 4  # batches that each worker keeps ready, unless they are large
QUEUE = 2**32  # bytes of prefetched batches per rank, or of their pinned copies, which are larger
READ_AT_ONCE = 64  # files at a time: those of a whole batch can be larger than its pixels
CPU = Runtime(torch.device("cpu"))


def train_loader(
    index: DatasetIndex,
    *,
    image_size: int,
    batch_size: int,
    augment: Steps,
    crop: float | None = None,
    seed: int = 0,
    on_bad_image: str = "fail",
    num_workers: int = 0,
    runtime: Runtime = CPU,
) -> Loader:
    """Return this rank's share of the training batches; `batch_size` is global, i.e. summed over ranks.

    crop: of images without a random crop, see `eval_loader`
    """
    split = index.train.for_size(image_size)
    crop = crop or default_crop(image_size, index.native_size)
    transform = TrainTransform(augment, image_size, index.mean, crop, index.exif)
    dataset = BatchDataset(split, transform, seed, on_bad_image)
    order = Order(len(split), batch_size, seed, rank=runtime.rank, world_size=runtime.world_size)
    return Loader(dataset, order, index.mean, index.std, num_workers, runtime.device)


def eval_loader(
    split: Split,
    index: DatasetIndex,
    *,
    image_size: int,
    batch_size: int,
    crop: float | None = None,
    on_bad_image: str = "fail",
    num_workers: int = 0,
    runtime: Runtime = CPU,
    crop_root: str = "",
) -> Loader:
    """Return this rank's share of `split`, a part of `index`, in order, through the evaluation transform.

    crop:      share of the resized image's short side, by default `sources.images.default_crop`
    crop_root: directory that may hold stored crops, besides the split's own
    """
    crop = crop or default_crop(image_size, index.native_size)
    dataset = eval_dataset(split, image_size, crop, on_bad_image, crop_root, index.exif)
    order = Order(len(split), batch_size, shuffle=False, rank=runtime.rank, world_size=runtime.world_size)
    return Loader(dataset, order, index.mean, index.std, num_workers, runtime.device)


def eval_dataset(
    split: Split,
    image_size: int,
    crop: float,
    on_bad_image: str = "fail",
    crop_root: str = "",
    exif: bool = False,
) -> StoredCrops | BatchDataset:
    """Return the dataset of evaluation batches: from stored crops if there are any, else by decoding."""
    for root in filter(None, (split.crop_root, crop_root)):
        if found := crops.find(root, split, image_size, crop, exif):
            return StoredCrops(found, image_size, split.labels, on_bad_image)
    return BatchDataset(split, EvalTransform(image_size, crop, exif), on_bad_image=on_bad_image)


def get_dataloaders(
    data_path: str,
    batch_size: int,
    image_size: int,
    num_workers: int = 8,
    *,
    dataset: str = "imagenet",
    augment: str = "full",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader]:
    """Return (train_loader, val_loader) of normalized images (N, 3, H, W) float32 and labels (N,) int64.

    Uses at most as many workers as cores. Raises DataError if `data_path` does not hold the dataset,
    or fewer training images than a batch.
    """
    index, cores = layouts.open_dataset(dataset, data_path), process.cores()
    splits.write_down(index)
    if num_workers > cores:
        warnings.warn(f"{num_workers} loader workers requested, {cores} cores: using {cores}", stacklevel=2)
    if len(index.train) < batch_size:
        what = f"a batch of {batch_size} is larger than the {len(index.train)} training images"
        raise DataError(what, "ask for smaller batches: the last partial one of an epoch is left out")
    common = {
        "image_size": image_size,
        "batch_size": batch_size,
        "num_workers": min(num_workers, cores),
        "runtime": Runtime(torch.device(device)),
    }
    train = train_loader(index, augment=parse_augment(augment), seed=seed, **common)
    return train, eval_loader(index.val, index, **common)


class Batch(NamedTuple):
    """What the sampler asks a worker for. Everything random follows from it."""

    epoch: int
    step: int  # within the epoch
    ids: np.ndarray  # (n,) sample ids of this rank


@dataclass(eq=False)
class Order(Sampler):
    """The sampler: yields one rank's part of every global batch of an epoch, from any step on.

    Training: the samples in an order drawn from (seed, epoch), without the last partial batch.
    Evaluation (`shuffle=False`): every sample once, in order; the last batch may be short, and a
    rank's part of it empty.
    """

    num_samples: int
    batch_size: int  # global, i.e. summed over ranks
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    epoch: int = 1  # of the next iteration
    start: int = 0  # its first step within that epoch

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        if self.shuffle:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration yield the batches of `epoch` from step `start` on."""
        self.epoch, self.start = epoch, start

    def ids(self, epoch: int) -> np.ndarray:
        """Return the sample ids of an epoch in order, over all ranks: (num_samples,)."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        return _generator(self.seed, epoch).permutation(self.num_samples)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0  # without a seek, the next iteration is the next epoch
        ids = self.ids(epoch)
        for step in range(start, len(self)):
            whole = ids[step * self.batch_size : (step + 1) * self.batch_size]
            yield Batch(epoch, step, np.array_split(whole, self.world_size)[self.rank])


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Batches(Dataset):
    """Maps a `Batch` to (images (n, S, S, 3) uint8, labels (n,) int64, names of bad images).

    A UserError is returned, not raised: DataLoader would wrap what a worker raises.
    """

    image_size: int
    labels: np.ndarray  # of all samples
    memory: BatchMemory | None = None  # what workers write into

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor, list[str]] | InMemory | UserError:
        shared = self.memory is not None and get_worker_info() is not None
        n, side = len(batch.ids), self.image_size
        images = self.memory.slot(batch.step) if shared else np.empty((n, side, side, 3), np.uint8)
        try:
            kept, bad = self.fill(images[:n], batch)
        except UserError as error:
            return error
        labels = self.labels[kept]
        if shared:
            return InMemory(self.memory, batch.step, labels, bad)
        return torch.from_numpy(images[: len(kept)]), torch.from_numpy(labels), bad

    def fill(self, images: np.ndarray, batch: Batch) -> tuple[Sequence[int], list[str]]:
        """Write the images of `batch`; return their ids and the names of bad images.

        These are fewer than in `batch` if bad images are left out. Raises UserError.
        """
        raise NotImplementedError


SKIP = (
    "replace it with an intact image, or add --on-bad-image skip to the command (and, if a training began, "
    "--resume auto --allow-change on_bad_image instead of --overwrite); "
    "pack_dataset.py --verify lists all bad images"
)


@dataclass(eq=False)
class BatchDataset(Batches):
    """Decodes and transforms the images of a batch.

    With `on_bad_image="skip"`, training replaces a bad image by another of its class, and evaluation
    leaves it out.
    """

    split: Split
    transform: TrainTransform | EvalTransform
    seed: int = 0  # of the augmentation
    on_bad_image: str = "fail"  # or "skip"

    def __post_init__(self):
        self.image_size, self.labels = self.transform.image_size, self.split.labels

    def fill(self, images: np.ndarray, batch: Batch) -> tuple[Sequence[int], list[str]]:
        kept, bad = [], []
        for first in range(0, len(batch.ids), READ_AT_ONCE):
            ids = batch.ids[first : first + READ_AT_ONCE]
            for i, data in zip(ids.tolist(), read_samples(self.split, ids), strict=True):
                image = self._image(i, data, batch.epoch, bad)
                if image is not None:
                    images[len(kept)] = image
                    kept.append(i)
        return kept, bad

    @property
    def augments(self) -> bool:
        return isinstance(self.transform, TrainTransform)

    def _image(self, i: int, data: bytes | np.ndarray, epoch: int, bad: list[str]) -> np.ndarray | None:
        """Return image `i`, transformed. If it is bad and may be skipped: a substitute, or None."""
        try:
            return self._transformed(i, data, epoch)
        except BadImage as error:  # the name is looked up only here: that can take as long as decoding
            name = self.split.name(i)
            if self.on_bad_image == "fail":
                raise BadImage(name, error.reason, SKIP if self.augments else error.fix) from error
        bad.append(name)
        return self._substitute(i, epoch) if self.augments else None

    def _transformed(self, i: int, data: bytes | np.ndarray, epoch: int) -> np.ndarray:
        return self.transform(data, (self.seed, epoch, i)) if self.augments else self.transform(data)

    def _substitute(self, i: int, epoch: int) -> np.ndarray:
        """Return another image of the same class as image `i`, drawn from (seed, epoch, i)."""
        same_class = np.flatnonzero(self.split.labels == self.split.labels[i])
        for other in _generator(self.seed, epoch, i).permutation(same_class[same_class != i])[:20]:
            try:
                return self._transformed(int(other), read_samples(self.split, [other])[0], epoch)
            except BadImage:
                continue
        raise DataError(
            f"{self.split.name(i)} is bad, and so is every other image of its class that was tried",
            "list all bad images with pack_dataset.py --verify",
        )


@dataclass(eq=False)
class StoredCrops(Batches):
    """Copies stored evaluation crops: the batches of `BatchDataset` with `EvalTransform`, to the bit."""

    crops: crops.Crops | crops.PartOfCrops
    image_size: int
    labels: np.ndarray
    on_bad_image: str = "fail"

    def __post_init__(self):
        self.bad = self.crops.bad()  # read here, once for all workers

    def fill(self, images: np.ndarray, batch: Batch) -> tuple[Sequence[int], list[str]]:
        ids = batch.ids.tolist()
        kept, bad = [i for i in ids if i not in self.bad], [self.bad[i] for i in ids if i in self.bad]
        if bad and self.on_bad_image == "fail":
            raise BadImage(bad[0]["name"], bad[0]["reason"])
        self.crops.read(kept, images)
        return kept, [image["name"] for image in bad]


class Loader:
    """Yields normalized images (n, 3, H, W) float32 and labels (n,) int64 on `device`.

    Workers send uint8, a quarter of the bytes of float32. On a GPU, a side stream copies and normalizes
    the next batch while the current step runs. Since the iteration began, `waited` counts the seconds
    spent waiting for data, and `bad` lists the names of bad images that were replaced or left out.

    num_workers: at most; there are no more than batches, and none for a single batch
    """

    def __init__(
        self,
        dataset: Batches,
        order: Order,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.order, self.device = dataset, order, torch.device(device)
        self.mean, self.std = mean, std
        self.waited, self.bad = 0.0, []
        num_workers = min(num_workers, len(order)) if len(order) > 1 else 0
        self.uses_memory = num_workers > 0 and sys.platform == "linux"  # where workers are forked
        rows, side = -(-order.batch_size // order.world_size), dataset.image_size
        self.batch_shape = (rows, side, side, 3)
        size, pinned = math.prod(self.batch_shape), self.device.type == "cuda"
        size = 1 << (size - 1).bit_length() if pinned else size  # torch pins powers of two
        each = max(1, min(PREFETCH, QUEUE // max(1, size * num_workers)))
        self.ahead = each * num_workers
        self.batches = DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0 and order.shuffle,
            prefetch_factor=each if num_workers else None,
            pin_memory=pinned,
            multiprocessing_context="fork" if self.uses_memory else None,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited, self.bad = 0.0, []
        ignored = left_to_parent()
        self.batches.worker_init_fn = functools.partial(init_worker, ignored)
        if self.uses_memory and not (self.batches.persistent_workers and self.dataset.memory):
            # New workers get new memory: an earlier iteration may still be running.
            self.dataset.memory = BatchMemory(self.ahead, self.batch_shape)
        with held_back(ignored):
            iterator = iter(self.batches)  # workers start here, not at the first batch
        if self.batches.num_workers:
            started.add(iterator)
            iterator.memory = self.dataset.memory  # lives as long as the iteration
        raw = self._raw(iterator)
        return self._prefetched(raw) if self.device.type == "cuda" else map(self._to_device, raw)

    def _raw(self, iterator: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 batches on the CPU; time the waiting and raise the workers' errors."""
        while True:
            started = time.perf_counter()
            item = next(iterator, None)
            self.waited += time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, UserError):
                raise item
            images, labels, bad = item
            self.bad += bad
            yield images, labels

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # Only for CUDA are batches pinned: an asynchronous copy to Metal may read memory after its reuse.
        cuda = self.device.type == "cuda"
        images, labels = (tensor.to(self.device, non_blocking=cuda) for tensor in batch)
        return normalize(images, self.mean, self.std, self.device), labels

    def _prefetched(self, raw: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on the GPU, each copied and normalized on a side stream.

        The host launches a step without waiting for it, then comes here for the next batch, whose copy
        overlaps that step. Copying one batch ahead would make a step wait for the workers' next batch.
        """
        side = _copy_stream(self.device)
        for batch in raw:
            with torch.cuda.stream(side):
                batch = self._to_device(batch)
                copied = side.record_event()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)  # of this copy only: the stream may be used by other loaders as well
            for tensor in batch:  # the allocator must not reuse this memory while the step still reads it
                tensor.record_stream(current)
            yield batch


@functools.cache  # one for all loaders: the allocator keeps the freed memory of each stream apart
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> Tensor:
    """Return images (N, H, W, 3) uint8 as (N, 3, H, W) float32 in channels_last on `device`, normalized.

    `mean` and `std` are per channel, of pixels in [0, 1]: the result is (pixel / 255 - mean) / std.
    """
    device = torch.device(device)
    offset, scale = _normalization(tuple(mean), tuple(std), device)
    # (N, H, W, 3) in memory is (N, 3, H, W) in channels_last, so permute copies nothing.
    return images.to(device).permute(0, 3, 1, 2).float().sub_(offset).mul_(scale)


@functools.cache  # copying them to a GPU for each batch would make the host wait
def _normalization(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (offset, scale), each (1, 3, 1, 1), such that (pixel - offset) * scale normalizes 0 ... 255."""
    offset, divisor = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return offset.to(device), (1 / divisor).to(device)
