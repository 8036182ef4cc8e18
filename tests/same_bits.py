"""Train small runs in this checkout and in another, and compare them bit for bit.

    python tests/same_bits.py ../other-checkout

For changes that must not affect training: weights, EMA, optimizer state, schedule and rows must be the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runs import ROOT, exact

TINY = "--arch resnet_tiny --num-workers 0 --amp off --seed 3"
DIGITS = f"--dataset digits {TINY} --batch-size 256"
RECIPES = {
    "three sizes": f"{DIGITS} --epochs 3 --resize-schedule 10,16,24",
    "bf16, two workers": f"{DIGITS} --epochs 2 --resize-schedule 24,32 --num-workers 2 --amp bf16",
    "mixing": f"{DIGITS} --epochs 2 --resize-schedule 24 --mixup-alpha 0.8 --cutmix-alpha 0.5",
    "drop-path, accumulate": f"{DIGITS} --epochs 2 --resize-schedule 24 --drop-path-rate 0.5 --accumulate 3",
    "sgd, cosine, no EMA": f"{DIGITS} --epochs 3 --resize-schedule 16,24 --optimizer sgd --lr 0.1 --nesterov "
    "--schedule cosine --warmup-epochs 0.5 --no-ema",
    "lamb, step, bce, l1": f"{DIGITS} --epochs 2 --resize-schedule 24 --optimizer lamb --lr 5e-3 "
    "--schedule step --loss bce --l1 1e-5",
    "rmsprop, triangular2": f"{DIGITS} --epochs 3 --resize-schedule 16,24 --optimizer rmsprop "
    "--schedule triangular2 --cycles 2 --clip-mode value --clip-norm 0.5 --lr-scale sqrt",
    "resnet18, stem d, half-life": f"{DIGITS} --epochs 1 --resize-schedule 32 --arch resnet18 --stem d "
    "--ema-half-life 1 --augment rrc,flip,randaugment",
    "BlurPool, linear head": f"--dataset synthetic:classes=4,train=128,val=32,size=40 {TINY} --arch resnet18 "
    "--use-blurpool --head linear --epochs 1 --resize-schedule 64 --batch-size 32 --schedule plateau",
    "efficientnet": f"--dataset synthetic:classes=4,train=96,val=32,size=40 {TINY} --arch efficientnet_b0 "
    "--epochs 1 --resize-schedule 64 --batch-size 32",
    "packed": f"--data-dir {{packed}} {TINY} --num-workers 2 --epochs 3 --resize-schedule 16,24,32 "
    "--batch-size 64 --augment rrc,flip,jitter,dropout",
}
TIMES = {"seconds", "images_per_second", "data_wait_percent"}


def call(checkout: Path, *words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=checkout, check=True, stdout=subprocess.DEVNULL)


def photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for k in range(4):
            (folder / part / f"class{k}").mkdir(parents=True)
            for i in range(count):
                pixels = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize((60 + i, 50 + k))
                pixels.save(folder / part / f"class{k}" / f"{i}.jpg", quality=90)
    return folder


def parts(run: Path) -> dict[str, str]:
    (path,) = run.glob("last_*.pt")
    content = torch.load(path, weights_only=True)
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in content["rows"]]
    found = {name: content[name] for name in ("model", "ema", "schedule", "step")}
    found |= {"optimizer": content["optimizer"]["state"], "rows": rows}
    return {name: exact(value) for name, value in found.items()}


def main() -> int:
    other, different = Path(sys.argv[1]).resolve(), 0
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        source = photos(Path(scratch) / "photos")
        # By the other checkout, which may be older: it need not know what is packed now.
        call(other, "pack_dataset.py", "--data-dir", source, "--out", packed, "--stored-sides", "24,32")
        for k, (name, flags) in enumerate(RECIPES.items()):
            found = []
            for checkout in (ROOT, other):
                save_dir = Path(scratch) / f"{k}-{len(found)}"
                argv = flags.format(packed=packed).split()
                call(checkout, "train.py", *argv, "--device", "cpu", "--save-dir", save_dir)
                found.append(parts(save_dir))
            unlike = [part for part in found[0] if found[0][part] != found[1][part]]
            different += bool(unlike)
            print(f"{name:<30}{'DIFFERENT: ' + ', '.join(unlike) if unlike else 'the same bits'}", flush=True)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
