"""From a dataset index to batches on the device: which samples, in what order, and how they get there.

Randomness is stateless. The order is a function of (seed, epoch), a sample's augmentation of (seed,
epoch, sample id): it knows no batch, worker or rank, so a loader can be started at any step, with
any number of workers, and gives what it would have given.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from base.errors import DataError, ResourceError, UserError
from harness.interrupts import die_with_parent, left_to_parent
from sources.images import BadImage, EvalTransform, TrainTransform
from sources.index import DatasetIndex, Split

PREFETCH = 4  # batches that each worker keeps ready


class Batch(NamedTuple):
    """What a worker is asked for. Everything that changes rides here; the dataset never does."""

    epoch: int
    step: int  # within the epoch
    ids: np.ndarray  # (n,) sample ids of this rank


class Order(Sampler):
    """The batches of an epoch: the same for any number of workers, and from any step on.

    Training: a permutation drawn from (seed, epoch), in whole global batches; each rank takes its
    slice of every batch. Evaluation (`shuffle=False`): every sample once over all ranks.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_samples, self.batch_size, self.seed, self.shuffle = num_samples, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 1, 0

    def __len__(self) -> int:
        """Batches in a whole epoch: training drops the last partial one, evaluation never does."""
        if self.shuffle:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration yield the batches of `epoch` from step `start` on."""
        self.epoch, self.start = epoch, start

    def ids(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
        return np.random.Generator(bits).permutation(self.num_samples)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0  # used without positions, a loader advances by itself
        ids = self.ids(epoch)
        for step in range(start, len(self)):
            whole = ids[step * self.batch_size : (step + 1) * self.batch_size]
            yield Batch(epoch, step, np.array_split(whole, self.world_size)[self.rank])


class BatchDataset(Dataset):
    """Maps a `Batch` to (images (n, H, W, 3) uint8, labels (n,) int64, names of bad images).

    With 'skip' a bad image is replaced in training and left out in scoring. An error about the data
    is returned, not raised: it crosses the process boundary unchanged.
    """

    def __init__(
        self,
        split: Split,
        transform: TrainTransform | EvalTransform,
        seed: int = 0,
        on_bad_image: str = "fail",
    ):
        self.split, self.transform, self.seed, self.on_bad_image = split, transform, seed, on_bad_image
        self.augments = isinstance(transform, TrainTransform)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor, list[str]] | UserError:
        side = self.transform.image_size
        images = np.empty((len(batch.ids), side, side, 3), np.uint8)
        kept, bad = [], []
        try:
            for i, data in zip(batch.ids, self._read(batch.ids), strict=True):
                image = self._image(int(i), data, batch.epoch, bad)
                if image is not None:
                    images[len(kept)] = image
                    kept.append(i)
        except UserError as error:
            return error
        return torch.from_numpy(images[: len(kept)]), torch.from_numpy(self.split.labels[kept]), bad

    def _read(self, ids: Sequence[int]) -> list:
        try:
            return self.split.read(ids)
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename or 'the data'}: {error.strerror}",
                "check the disk and the permissions; then --resume auto goes on",
            ) from error

    def _image(self, i: int, data: bytes | np.ndarray, epoch: int, bad: list[str]) -> np.ndarray | None:
        """The transformed image; with 'skip' that of another sample of its class, or None in scoring."""
        try:
            return self._transformed(i, data, epoch)
        except BadImage:
            if self.on_bad_image == "fail":
                raise
        bad.append(self.split.name(i))
        if not self.augments:
            return None
        same_class = np.flatnonzero(self.split.labels == self.split.labels[i])
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch, i))))
        for other in draw.permutation(same_class[same_class != i])[:20]:
            try:
                return self._transformed(int(other), self._read([other])[0], epoch)
            except BadImage:
                continue
        raise DataError(
            f"{self.split.name(i)} is bad and so is every other image tried of its class",
            "list them all with pack_dataset.py --verify",
        )

    def _transformed(self, i: int, data: bytes | np.ndarray, epoch: int) -> np.ndarray:
        try:
            if self.augments:
                return self.transform(data, (self.seed, epoch, i))
            return self.transform(data)
        except BadImage as error:  # looking the name up costs as much as decoding: only where it is needed
            raise BadImage(self.split.name(i), error.reason) from error


def _init_worker(ignored: list[int], worker: int) -> None:
    import cv2

    die_with_parent()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)


_started: weakref.WeakSet = weakref.WeakSet()  # torch's iterators that have workers


def end_workers() -> None:
    """End the workers that are left. In training they ignore SIGTERM, so one that hangs would keep the exit waiting."""
    for iterator in list(_started):
        if hasattr(
            iterator, "_pin_memory_thread"
        ):  # it reads from the workers: it goes first, as in torch's own shutdown
            iterator._pin_memory_thread_done_event.set()
            iterator._worker_result_queue.put((None, None))
            iterator._pin_memory_thread.join(5)
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    reaper = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report each of them as an error
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, reaper or signal.SIG_DFL)


class Normalize:
    """Turn pixels (n, H, W, 3) uint8 into (pixel / 255 - mean) / std, (n, 3, H, W) float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self.scale = 1 / (torch.tensor(std, device=device).view(1, 3, 1, 1) * 255)

    def __call__(self, pixels: Tensor) -> Tensor:
        # (n, H, W, 3) in memory is (n, 3, H, W) in channels_last: the permutation costs nothing.
        return pixels.permute(0, 3, 1, 2).float().sub_(self.mean).mul_(self.scale)


class Loader:
    """Iterates float32 normalised images (n, 3, H, W) and int64 labels (n,) on `device`.

    Workers send uint8, a quarter of the bytes; on a GPU the copy and the normalisation of the next
    batch run on a side stream during the current step. After an epoch, `waited` holds the seconds
    the loop spent waiting for data and `bad` the names of bad images that were replaced or left out.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        order: Order,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.order, self.device = dataset, order, torch.device(device)
        self.normalize = Normalize(mean, std, self.device)
        self.waited, self.bad = 0.0, []
        self.batches = DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0 and order.shuffle,
            prefetch_factor=PREFETCH if num_workers else None,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited, self.bad = 0.0, []
        self.batches.worker_init_fn = partial(_init_worker, left_to_parent())
        iterator = iter(self.batches)  # workers start here, not at the first batch
        if self.batches.num_workers:
            _started.add(iterator)
        raw = self._raw(iterator)
        return self._prefetched(raw) if self.device.type == "cuda" else map(self._to_device, raw)

    def _raw(self, iterator: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 batches on the CPU, with the waiting timed and the workers' errors raised here."""
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ResourceError(
                    f"a loader worker died: {str(error).splitlines()[0]}",
                    "give it memory (and /dev/shm), or lower --num-workers; then --resume auto",
                ) from error
            self.waited += time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, UserError):
                raise item
            images, labels, bad = item
            self.bad += bad
            yield images, labels

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # Only CUDA's copies are pinned; Metal's, not waited for, read memory that is already used anew.
        images, labels = (tensor.to(self.device, non_blocking=self.device.type == "cuda") for tensor in batch)
        return self.normalize(images), labels

    def _prefetched(self, raw: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in raw:
            with torch.cuda.stream(stream):
                following = self._to_device(batch)
            if ahead is not None:
                yield self._handed_over(ahead, stream)
            ahead = following
        if ahead is not None:
            yield self._handed_over(ahead, stream)

    def _handed_over(self, batch: tuple[Tensor, Tensor], stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(stream)
        for tensor in batch:  # the allocator must not hand this memory out while the step still reads it
            tensor.record_stream(current)
        return batch


def train_loader(
    index: DatasetIndex,
    *,
    image_size: int,
    batch_size: int,
    augment: tuple,
    seed: int = 0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: str = "fail",
) -> Loader:
    """The training batches of one phase; `batch_size` is global, i.e. summed over ranks."""
    split = index.train.for_size(image_size)
    dataset = BatchDataset(split, TrainTransform(augment, image_size, index.mean), seed, on_bad_image)
    order = Order(len(split), batch_size, seed=seed, rank=rank, world_size=world_size)
    return Loader(dataset, order, mean=index.mean, std=index.std, num_workers=num_workers, device=device)


def eval_loader(
    split: Split,
    index: DatasetIndex,
    *,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    crop: float = 0.875,
    on_bad_image: str = "fail",
) -> Loader:
    """Every sample of `split` once over all ranks, through the evaluation transform."""
    dataset = BatchDataset(split, EvalTransform(image_size, crop), on_bad_image=on_bad_image)
    order = Order(len(split), batch_size, shuffle=False, rank=rank, world_size=world_size)
    return Loader(dataset, order, mean=index.mean, std=index.std, num_workers=num_workers, device=device)


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
    """(train_loader, val_loader) of float32 normalised images (N, 3, H, W) and int64 labels (N,).

    No more workers than cores. Raises DataError where `data_path` does not hold the dataset.
    """
    from base.flags import parse_augment
    from base.process import cores
    from sources.layouts import open_dataset

    index = open_dataset(dataset, data_path)
    if num_workers > cores():
        warnings.warn(
            f"{num_workers} loader workers asked for, {cores()} cores: using {cores()}", stacklevel=2
        )
        num_workers = cores()
    shared = {
        "image_size": image_size,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
    }
    train = train_loader(index, augment=parse_augment(augment), seed=seed, **shared)
    return train, eval_loader(index.val, index, **shared)
