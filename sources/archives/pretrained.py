"""torchvision's published weights by name: which file they are, where it is, and its download.

The file's name ends with the first 8 digits of its SHA-256, which every run checks. It lies where torch.hub
keeps it too, so weights that another program has downloaded are found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from base import process
from base.errors import CheckpointError, DataError, UsageError, nearest_path
from sources.archives import fetch
from sources.index import IMAGENET_MEAN, IMAGENET_STD, DatasetIndex

URL = "https://download.pytorch.org/models/"
# architecture -> names and files, torchvision's default first
FILES = {
    "resnet50": {"IMAGENET1K_V2": "resnet50-11ad3fa6.pth", "IMAGENET1K_V1": "resnet50-0676ba61.pth"},
    "resnet34": {"IMAGENET1K_V1": "resnet34-b627a593.pth"},
    "resnet18": {"IMAGENET1K_V1": "resnet18-f37072fd.pth"},
    "efficientnet_b0": {"IMAGENET1K_V1": "efficientnet_b0_rwightman-7f5810bc.pth"},
    "mobilenet_v3_large": {
        "IMAGENET1K_V2": "mobilenet_v3_large-5c1a4163.pth",
        "IMAGENET1K_V1": "mobilenet_v3_large-8738ca79.pth",
    },
    "vit_b_16": {
        "IMAGENET1K_V1": "vit_b_16-c867db91.pth",
        "IMAGENET1K_SWAG_E2E_V1": "vit_b_16_swag-9ac1b537.pth",
        "IMAGENET1K_SWAG_LINEAR_V1": "vit_b_16_lc_swag-4e70ced5.pth",
    },
    "swin_t": {"IMAGENET1K_V1": "swin_t-704ceda3.pth"},
}
# px: the position embedding of ViT has an entry for each patch
VIT_SIZES = {
    "vit_b_16-c867db91.pth": 224,
    "vit_b_16_swag-9ac1b537.pth": 384,
    "vit_b_16_lc_swag-4e70ced5.pth": 224,
}


def prepare(
    index: DatasetIndex, *, arch: str, pretrained: str, init_from: str, sizes: Sequence[int]
) -> DatasetIndex:
    """Check that the weights of a new run are here, and download torchvision's if they are not.

    pretrained: "DEFAULT", a name such as IMAGENET1K_V2 or ResNet50_Weights.IMAGENET1K_V2, a file, or ""
    init_from:  a file of weights, or ""
    sizes:      the image sizes of the run, in px

    Return `index`; with torchvision's weights, normalized as their training images were: as ImageNet.
    Raises UsageError for an unknown name, and CheckpointError if the weights are missing or damaged.
    """
    if init_from and not Path(init_from).is_file():
        fix = "give a file of weights; --pretrained takes torchvision's for ImageNet"
        raise CheckpointError(f"--init-from: no checkpoint at {init_from}", nearest_path(init_from) or fix)
    if not pretrained:
        return index
    path = find_path(arch, pretrained)
    size = VIT_SIZES.get(path.name)
    if size and set(sizes) != {size}:
        what = f"the weights {path.name} are for images of {size} px, not {', '.join(map(str, sizes))}"
        raise UsageError(what, f"give --resize-schedule {size}")
    if process.local_rank() == 0:
        if not (path.is_file() or is_path(pretrained)):
            _download(path)
        find(arch, pretrained)
    return replace(index, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def find(arch: str, name: str) -> Path:
    """Return the file of the weights. Raises CheckpointError if it is not the one its name promises."""
    path = find_path(arch, name)
    if not path.is_file():
        fix = nearest_path(path) or "give the path of an existing .pth file"
        raise CheckpointError(f"no weights at {path}", fix)
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if digits and not (found := fetch.checksum(path, "sha256")).startswith(digits[1]):
        what = f"{path} is damaged: its SHA-256 starts with {found[:8]}, not with {digits[1]}"
        again = "download it again" if is_path(name) else "delete it and run this again to download it"
        raise CheckpointError(what, again)
    return path


def is_path(name: str) -> bool:
    """Return whether `name` is the path of a file, not torchvision's name of weights."""
    return os.sep in name or name.endswith((".pth", ".pt"))


def find_path(arch: str, name: str) -> Path:
    """Return where the weights are, or will be after their download."""
    if is_path(name):
        return Path(name).expanduser()
    if arch not in FILES:
        what = f"--pretrained: torchvision has no weights for --arch {arch}"
        raise UsageError(what, f"choose from {', '.join(FILES)}, or leave it out")
    owner, _, short = name.rpartition(".")
    names = {"DEFAULT": next(iter(FILES[arch].values()))} | FILES[arch]
    if short.upper() not in names or owner.lower() not in ("", f"{arch}_weights"):
        what = f"--pretrained {name}: torchvision has no such weights for {arch}"
        raise UsageError(what, f"choose from {', '.join(FILES[arch])}, or give a file")
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    return Path(home).expanduser() / "hub/checkpoints" / names[short.upper()]  # where torch.hub keeps it


def _download(path: Path) -> None:
    url = URL + path.name
    try:
        digits = path.stem.rpartition("-")[2]
        fetch.download(fetch.RemoteFile(url, path, fetch.size_of(url), f"sha256:{digits}"))
    except (DataError, fetch.Interrupted) as error:
        reason = getattr(error, "what", f"{url}: {error}")
        what = f"{path.name} is not in {path.parent}, and cannot be downloaded: {reason}"
        raise CheckpointError(
            what, f"get {url} on another machine, then put it there or give its path: --pretrained FILE"
        ) from error
