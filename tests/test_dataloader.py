"""Batches are the same for any number of workers and from any start, and errors arrive unchanged."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import dataloader
from base import process
from base.device import Runtime
from base.errors import DataError, UserError
from base.flags import parse_augment
from dataloader import BatchDataset, Order, eval_loader, get_dataloaders, normalize, train_loader
from harness.batch_memory import BatchMemory
from harness.interrupts import STOP_SIGNALS, StopSignals, left_to_parent
from harness.workers import end_workers
from sources.images import TrainTransform
from sources.index import ArraySplit, Split, balanced_subset, take_subset
from sources.layouts import open_dataset


@pytest.fixture
def data(photos):
    return open_dataset("imagenet", photos)


def batches(data, workers: int, epoch: int = 1, start: int = 0, **options):
    loader = train_loader(
        data,
        image_size=24,
        batch_size=16,
        augment=parse_augment("full"),
        seed=5,
        num_workers=workers,
        **options,
    )
    loader.order.seek(epoch, start)
    return [(images.clone(), labels) for images, labels in loader]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_the_samples_do_not_depend_on_the_number_of_workers(data):
    alone = batches(data, 0)
    assert len(alone) == 72 // 16
    assert all(equal(alone, batches(data, workers)) for workers in (1, 2))


@pytest.mark.parametrize("workers, queue, ahead", [(1, 2**32, 4), (2, 2**32, 8), (2, 1, 2), (2, 1600, 4)])
def test_a_batch_keeps_its_pixels_while_the_next_one_is_used(data, monkeypatch, workers, queue, ahead):
    """Workers write into the same memory again and again, at most PREFETCH batches each ahead."""
    monkeypatch.setattr(dataloader, "QUEUE", queue)  # bytes; a batch has 2 x 8 x 8 x 3 = 384
    loader = eval_loader(data.train, data, image_size=8, batch_size=2, num_workers=workers)
    plain = eval_loader(data.train, data, image_size=8, batch_size=2)
    expected = [plain.dataset[batch][0] for batch in plain.order]
    assert len(expected) > 3 * workers * dataloader.PREFETCH
    if loader.uses_memory:
        loader.dataset.memory = BatchMemory(loader.ahead, loader.batch_shape)
    assert loader.ahead == ahead == loader.batches.prefetch_factor * workers
    assert not loader.uses_memory or len(loader.dataset.memory.slots) == ahead + 2
    before, seen = None, 0
    for images, _, _ in loader.batches:
        time.sleep(0.01)  # the workers are as far ahead as they can be
        assert torch.equal(images, expected[seen]) and (seen == 0 or torch.equal(before, expected[seen - 1]))
        before, seen = images, seen + 1
    assert seen == len(expected)


@pytest.mark.parametrize("batch_size, ranks, started", [(72, 1, 0), (36, 1, 2), (36, 2, 2)])
def test_there_are_no_more_workers_than_batches(data, batch_size, ranks, started):
    options = {
        "image_size": 16,
        "batch_size": batch_size,
        "runtime": Runtime(torch.device("cpu"), None, 0, ranks),
    }
    for loader, other in (
        (eval_loader(data.train, data, **options, num_workers=3), eval_loader(data.train, data, **options)),
        (train_loader(data, augment=(), **options, num_workers=3), train_loader(data, augment=(), **options)),
    ):
        assert loader.batches.num_workers == started == loader.ahead // dataloader.PREFETCH
        for _ in range(2):  # the second epoch of training is by the same workers
            copied = [(images.clone(), labels) for images, labels in loader]
            assert len(multiprocessing.active_children()) == (started if loader.order.shuffle else 0)
            assert equal(copied, list(other))
        del loader, copied


@pytest.mark.parametrize(("images", "size", "device", "ahead"), [
    (2048, 192, "cuda", 16), (144, 256, "cuda", 32),  # of recipes/overnight.yaml: see docs/how_it_works.md
    (2048, 160, "cpu", 24), (2048, 160, "cuda", 16),  # 150 MiB are pinned in 256
])  # fmt: skip
def test_the_queue_counts_what_is_pinned(images, size, device, ahead):
    order, dataset = Order(99 * images, images), SimpleNamespace(image_size=size)
    assert dataloader.Loader(dataset, order, (0.5,) * 3, (0.5,) * 3, 8, device).ahead == ahead


def test_two_iterations_at_once_do_not_disturb_each_other(data):
    loader = eval_loader(data.train, data, image_size=8, batch_size=4, num_workers=1)
    pairs = [(a.clone(), b.clone()) for (a, _), (b, _) in zip(loader, loader, strict=True)]
    assert len(pairs) == 18 and all(torch.equal(a, b) for a, b in pairs)


def test_an_abandoned_epoch_leaves_nothing_in_the_next(data):
    expected = batches(data, 0, epoch=2)
    loader = train_loader(
        data, image_size=24, batch_size=16, augment=parse_augment("full"), seed=5, num_workers=2
    )
    next(iter(loader))
    loader.order.seek(2)
    assert equal([(images.clone(), labels) for images, labels in loader], expected)


def test_every_epoch_augments_anew_and_a_loader_can_start_anywhere(data):
    first, second = batches(data, 0, epoch=1), batches(data, 0, epoch=2)
    assert not equal(first, second)
    assert equal(batches(data, 0, epoch=2, start=3), second[3:])


def test_a_sample_is_the_same_in_every_batch_it_could_be_in(data):
    """Augmentation depends on the sample and the epoch, not on batch, worker or rank."""
    dataset = BatchDataset(data.train, TrainTransform(parse_augment("full"), 24, data.mean), seed=5)
    order = Order(len(data.train), 8, seed=5)
    (first, *_) = iter(order)
    together = dataset[first][0]
    alone = [dataset[first._replace(ids=first.ids[k : k + 1])][0][0] for k in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_ranks_share_the_batches_of_one_rank(data):
    whole = batches(data, 0)
    halves = [
        batches(data, 0, runtime=Runtime(torch.device("cpu"), None, rank, world_size=2)) for rank in (0, 1)
    ]
    joined = [tuple(torch.cat(pair) for pair in zip(a, b, strict=True)) for a, b in zip(*halves, strict=True)]
    assert equal(whole, joined)


def test_get_dataloaders_refuses_a_batch_that_no_epoch_fills(photos):
    with pytest.raises(DataError, match="a batch of 999 is larger than the"):
        get_dataloaders(data_path=str(photos), batch_size=999, image_size=32, num_workers=0)


def test_get_dataloaders_gives_what_the_documents_show(photos):
    train, val = get_dataloaders(data_path=str(photos), batch_size=8, image_size=32, num_workers=0)
    images, labels = next(iter(train))
    assert images.shape == (8, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    seen = torch.cat([labels for _, labels in val])
    assert seen.tolist() == sorted([0, 1, 2] * 7)
    assert abs(images.mean()) < 3  # normalized


def test_normalization_is_torchvisions_formula(data):
    loader = eval_loader(data.val, data, image_size=32, batch_size=4)
    raw = loader.dataset[next(iter(loader.order))][0]
    images, _ = next(iter(loader))
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    expected = (raw.permute(0, 3, 1, 2).double() / 255 - mean) / std
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=2e-6)
    assert torch.equal(normalize(raw, data.mean, list(data.std), "cpu"), images)  # outside a loader too


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_or_replaced_and_counted(photos, tmp_path, workers):
    shutil.copytree(photos, tmp_path / "d")
    bad = min((tmp_path / "d" / "train" / "dog").iterdir())
    bad.write_bytes(bad.read_bytes()[:200])
    data = open_dataset("imagenet", tmp_path / "d")
    with pytest.raises(UserError, match=bad.name):
        batches(data, workers)
    loader = train_loader(
        data, image_size=24, batch_size=24, augment=(), seed=5, num_workers=workers, on_bad_image="skip"
    )
    labels = torch.cat([labels for _, labels in loader])
    assert [name.rpartition("/")[2] for name in loader.bad] == [bad.name]
    assert torch.bincount(labels).tolist() == [24, 24, 24]  # by an image of the same class


def test_validation_never_substitutes(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "d")
    bad = min((tmp_path / "d" / "val" / "owl").iterdir())
    bad.write_bytes(b"<html>not found</html>")
    data = open_dataset("imagenet", tmp_path / "d")
    with pytest.raises(DataError, match=bad.name):
        list(eval_loader(data.val, data, image_size=32, batch_size=8))


@pytest.mark.parametrize("workers", [0, 1])
def test_scoring_with_skip_leaves_bad_images_out_and_names_them(photos, tmp_path, workers):
    shutil.copytree(photos, tmp_path / "d")
    bad = sorted((tmp_path / "d" / "train" / "dog").iterdir())[:3]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    data = open_dataset("imagenet", tmp_path / "d")
    with pytest.raises(DataError, match=bad[0].name):
        list(eval_loader(data.train, data, image_size=16, batch_size=2))
    loader = eval_loader(
        data.train, data, image_size=16, batch_size=2, num_workers=workers, on_bad_image="skip"
    )
    found = list(loader)
    assert [name.rpartition("/")[2] for name in loader.bad] == [path.name for path in bad]
    assert (
        all(len(images) == len(labels) for images, labels in found)
        and min(len(labels) for _, labels in found) == 0
    )
    assert torch.bincount(torch.cat([labels for _, labels in found])).tolist() == [24, 21, 24]


@pytest.mark.parametrize("device, waits", [("cuda", False), ("mps", True), ("cpu", True)])
def test_only_cuda_copies_without_waiting(data, monkeypatch, device, waits):
    """On Metal, an asynchronous copy from unpinned memory would read the next batch."""
    loader, seen = eval_loader(data.val, data, image_size=16, batch_size=2), []

    class Pixels:
        def to(self, where, non_blocking=False):
            seen.append((where.type, non_blocking))
            return torch.zeros(2, 16, 16, 3)

    monkeypatch.setattr(dataloader, "normalize", lambda images, *_: images)
    loader.device = torch.device(device)
    loader._to_device((Pixels(), Pixels()))
    assert seen == [(device, not waits)] * 2


class Unreadable(Split):
    labels = np.zeros(8, np.int64)

    def read(self, ids):
        raise OSError(5, "Input/output error", "/data/x.jpg")


def test_a_large_batch_is_read_a_part_at_a_time(data, monkeypatch):
    whole = batches(data, 0)
    monkeypatch.setattr(dataloader, "READ_AT_ONCE", 5)
    read, sizes = data.train.read, []
    monkeypatch.setattr(data.train, "read", lambda ids: sizes.append(len(ids)) or read(ids))
    assert equal(batches(data, 0), whole)
    assert sizes == [5, 5, 5, 1] * len(whole)


def test_an_error_in_a_worker_arrives_as_it_was_raised(data):
    import dataclasses

    broken = dataclasses.replace(data, train=Unreadable())
    loader = train_loader(broken, image_size=16, batch_size=4, augment=(), num_workers=1)
    with pytest.raises(DataError, match=r"/data/x\.jpg"):
        list(loader)


def test_a_subset_is_balanced_and_the_same_on_every_call():
    labels = np.random.default_rng(0).integers(0, 7, 5000)
    first, again = balanced_subset(labels, 700, seed=0), balanced_subset(labels, 700, seed=0)
    assert np.array_equal(first, again)
    assert np.bincount(labels[first]).tolist() == [100] * 7
    assert not np.array_equal(first, balanced_subset(labels, 700, seed=1))
    assert len(np.unique(first)) == 700


def test_validation_of_a_subset_is_a_tenth(data):
    small = take_subset(data, 30)
    assert (len(small.train), len(small.val)) == (30, 3)
    assert np.bincount(small.train.labels).tolist() == [10, 10, 10]


def test_arrays_go_through_the_same_path_as_files():
    images = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3)).astype(np.uint8)
    split = ArraySplit(images, np.arange(12) % 3)
    dataset = BatchDataset(split, TrainTransform(parse_augment("basic"), 16, (0.5, 0.5, 0.5)))
    out, labels, replaced = dataset[next(iter(Order(12, 4)))]
    assert out.shape == (4, 16, 16, 3)
    assert len(labels) == 4
    assert replaced == []


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from dataloader import get_dataloaders
train, val = get_dataloaders(data_path=sys.argv[1], batch_size=8, image_size=16, num_workers=2)
first, second = iter(train), iter(val)
images, labels = next(first)
next(second)
print("ready", flush=True)
exec(sys.argv[2])
"""


def carrying(marker: str) -> list[str]:
    """Return the running processes whose environment contains `marker`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and marker.encode() in folder.joinpath("environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("ending, number, code", [
    ("", None, 0), ("del first, second", None, 0), ("raise SystemExit(7)", None, 7), ("1 / 0", None, 1),
    ("time.sleep(60)", signal.SIGINT, -signal.SIGINT), ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM),
])  # fmt: skip
def test_a_users_script_ends_without_delay_and_leaves_no_process(photos, tmp_path, ending, number, code):
    """The documents' snippet, with both iterators alive at its end; signals go to the group, like Ctrl-C."""
    marker = f"LOADER_TEST={tmp_path}"
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(photos), ending],
        env=os.environ | {"LOADER_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert script.stdout.readline() == "ready\n"
        assert len(carrying(marker)) > 1  # workers
        if number:
            os.killpg(script.pid, number)
        _, said = script.communicate(timeout=30)
        assert script.returncode == code, said
        assert said.count("Traceback") == (code == 1 or number == signal.SIGINT), said  # the script's own
        deadline = time.monotonic() + 5
        while carrying(marker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not carrying(marker)
    finally:
        for process in carrying(marker):
            os.kill(int(process), signal.SIGKILL)


def test_workers_ignore_stop_signals_only_while_a_run_is_in_charge_of_them():
    assert left_to_parent() == [signal.SIGINT]
    with StopSignals().installed():
        assert left_to_parent() == STOP_SIGNALS
    assert left_to_parent() == [signal.SIGINT]


def test_the_thread_that_pins_memory_ends_before_the_workers(data, monkeypatch):
    """If the workers were killed first, reading from them would fail with a traceback in the thread."""
    from torch.utils.data._utils import pin_memory

    alive_at_end = []

    def loop(in_queue, out_queue, device_id, done_event, *rest):  # pinning needs a GPU
        while not done_event.is_set():
            in_queue.get()
        alive_at_end.append(all(process.is_alive() for process in loader.batches._iterator._workers))

    monkeypatch.setattr(pin_memory, "_pin_memory_loop", loop)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    loader = train_loader(data, image_size=16, batch_size=8, augment=(), num_workers=2)
    loader.batches.pin_memory = True
    iterator = iter(loader)
    end_workers()
    assert alive_at_end == [True] and not any(
        process.is_alive() for process in loader.batches._iterator._workers
    )
    assert not loader.batches._iterator._pin_memory_thread.is_alive()
    del iterator


def test_more_workers_than_cores_are_capped_with_a_note(photos, monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: 3)
    with pytest.warns(UserWarning, match="8 loader workers requested, 3 cores: using 3"):
        loaders = get_dataloaders(data_path=str(photos), batch_size=8, image_size=16, num_workers=8)
    assert [loader.batches.num_workers for loader in loaders] == [3, 3]


def test_a_step_on_a_gpu_waits_for_its_own_copy_and_overlaps_the_next(data, monkeypatch):
    """The order of calls, with torch.cuda's streams replaced by a record of what is asked of them."""
    seen, made = [], []

    class Stream:
        def __init__(self, device):
            made.append(device)

        def __enter__(self):
            seen.append("side")

        def __exit__(self, *exception):
            seen.append("main")

        def record_event(self):
            return f"copy {sum(call.startswith('copy') for call in seen)}"

    class Main:
        def wait_event(self, event):
            seen.append(f"wait for {event}")

    class OnGpu:
        def record_stream(self, stream):
            seen.append("keep") if isinstance(stream, Main) else None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Main())
    dataloader._copy_stream.cache_clear()
    loaders = [eval_loader(data.val, data, image_size=8, batch_size=11) for _ in range(2)]
    for loader in loaders:
        loader.device = torch.device("cuda", 0)
        monkeypatch.setattr(loader, "_to_device", lambda batch: seen.append("copy") or (OnGpu(), OnGpu()))
        monkeypatch.setattr(
            loader, "_raw", lambda iterator: (seen.append("take") or pair for pair in iterator)
        )
        for _ in loader:
            seen.append("step")
    dataloader._copy_stream.cache_clear()
    one = ["take", "side", "copy", "main", "wait for copy {}", "keep", "keep", "step"]
    assert seen == [call.format(k) for k in (1, 2, 3, 4) for call in one]
    assert made == [torch.device("cuda", 0)]  # one stream for all loaders
