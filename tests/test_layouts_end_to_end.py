"""train.py on a small copy of every layout: what `open_dataset` finds can be read and learned from."""

import json
import pickle

import pytest
import test_layouts as small
from test_layouts import IDS, TRAIN, VAL, put

import train
from sources.cifar import CIFAR10, CIFAR100


def kaggle_100(root):
    for part, images in (("train.X1", TRAIN), ("val.X", VAL)):
        for name, wnid in images.items():
            put(root / part / wnid / name)


def listed(root):
    small.make_folders(root)
    put(root / "list.txt", "\n".join(IDS[:2]).encode())


def hub(root):
    small.make_hub(pytest.importorskip("datasets"), root / "pets")


CASES = {
    **{make.__name__: (make, "imagenet", 6, 6) for make in small.LAYOUTS},
    "imagenet100_of_kaggle": (kaggle_100, "imagenet100", 6, 6),
    "imagenet100_by_a_list": (listed, "imagenet100 --class-list {root}/list.txt", 4, 4),
    "tiny_imagenet": (small.make_tiny, "tiny-imagenet", 6, 4),
    "tiny_imagenet_70_30": (small.make_tiny, "tiny-imagenet --split 70-30", 6, 4),
    "cifar10": (lambda root: small.make_cifar(root, CIFAR10, pickle.dumps), "cifar10", 20, 4),
    "cifar100": (lambda root: small.make_cifar(root, CIFAR100, pickle.dumps), "cifar100", 4, 4),
    "hub": (hub, "hf:{root}/pets", 3, 2),
    "digits": (lambda root: None, "digits --subset --subset-size 20", 20, 2),
    "synthetic": (lambda root: None, "synthetic:classes=3,train=9,val=6,size=24", 9, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_every_layout(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    make, dataset, num_train, num_val = CASES[case]
    make(tmp_path / "data")
    arguments = [
        "--data-dir",
        tmp_path / "data",
        "--dataset",
        *dataset.format(root=tmp_path / "data").split(),
    ]
    arguments += ["--arch", "resnet_tiny", "--epochs", "1", "--batch-size", "2", "--resize-schedule", "16"]
    arguments += ["--num-workers", "0"]
    arguments += ["--device", "cpu", "--amp", "off", "--save-dir", tmp_path / "run"]
    assert train.main([str(a) for a in arguments]) == 0
    assert f"{num_train} + {num_val} images" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and 0 <= rows[0]["val_top1"] <= 100
