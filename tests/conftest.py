"""What all tests share: one thread, because bit-exactness needs a fixed number; small images; a tiny run."""

import os
import shlex
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_runtest_setup(item) -> None:
    """Skip tests marked gpu where there is no GPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Put back what `errors.run` sets: after it, Ctrl-C would end pytest at once, without a summary."""
    from base import errors

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None:  # one that was not set by Python
            signal.signal(number, handler)
    errors.debug = False


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Class folders of small generated JPEGs: 3 classes, 24 training and 7 validation images each."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        for k, name in enumerate(("cat", "dog", "owl")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                side = 40 + int(rng.integers(0, 20))
                pixels = rng.integers(0, 90, (side, side + 8, 3)).astype(np.uint8)
                pixels[:, :, k] += 120
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", quality=90)
    return root


@pytest.fixture(scope="session")
def photo_run(photos, tmp_path_factory) -> Path:
    """The best checkpoint of two epochs on the photos at 24 px: some of its predictions are right."""
    import train

    folder = tmp_path_factory.mktemp("photo_run")
    options = shlex.split(
        "--arch resnet_tiny --epochs 2 --resize-schedule 24 --batch-size 8 --lr 3e-4 --augment none "
        "--ema-decay 0.9 --num-workers 0 --device cpu --amp off"
    )
    assert train.main([*options, "--data-dir", str(photos), "--save-dir", str(folder)]) == 0
    return next(folder.glob("best_*.pt"))
