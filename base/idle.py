"""Flags that would have no effect under a config are refused; this module knows which and why."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from base import process
from base.errors import UsageError
from base.parser import dashed
from base.phases import used_epochs, used_phases

Reason = str | bool | None  # why a flag has no effect; false if it has one


class Given(frozenset):
    """The names of the flags that were given, on the command line (`by_hand`) or in a --config file."""

    by_hand: frozenset[str] = frozenset()
    unfit: tuple[str, ...] = ()  # lists of the file that do not fit the sizes of the command line
    finetunes: bool = False  # whether the defaults are those of --pretrained


def never(config: Any) -> Reason:
    return None


def refuse_idle(flags: Iterable[Any], config: Any, given: Given) -> list[str]:
    """Return notes about given flags that are unused. Raises UsageError for given flags that are idle.

    flags: the `Flag`s to check. A switch that is off by default and left off asks for nothing.
    """
    by_hand, by_file, notes = {}, {}, []
    for flag in flags:
        if flag.name not in given or (getattr(config, flag.name) is flag.default is False):
            continue
        if reason := flag.unused(config):
            notes.append(f"note: {dashed(flag.name)} is not used: {reason}")
        if reason := flag.idle(config):
            if flag.name in given.by_hand:
                by_hand[dashed(flag.name)] = reason
            else:
                by_file[dashed(flag.name).removeprefix("--")] = reason
    for found, where in ((by_hand, ""), (by_file, f"--config {getattr(config, 'config', '')}: ")):
        if found:
            what = "; ".join(f"{name} would do nothing: {reason}" for name, reason in found.items())
            raise UsageError(where + what, f"leave {', '.join(found)} out")
    return notes


# --- reasons used by several flags, or longer than a line --------------------------------------------

NO_FILES = ("digits", "synthetic", "hf")  # datasets that are not in --data-dir
WITH_CLASS_LIST = ("imagenet", "imagenet100", "tiny-imagenet")
NO_DROP_PATH = ("mobilenet_v3_large", "vit_b_16")  # in torchvision these have no stochastic depth
NO_BATCH_NORM = ("vit_b_16", "swin_t")


def scored_once(config: Any) -> Reason:
    return used_epochs(config)[-1] == 1 and "the last size has one epoch"


def too_patient(config: Any) -> Reason:
    epochs = used_epochs(config)[-1]
    return epochs <= (config.early_stop_patience or 0) and f"the last size has {epochs} epochs"


def dataset_kind(config: Any) -> str:
    """Return the name of the dataset without its options: "synthetic" for "synthetic:size=8"."""
    return config.dataset.partition(":")[0]


def packed(config: Any) -> Reason:
    on_disk = dataset_kind(config) not in NO_FILES
    found = on_disk and os.path.isfile(os.path.join(config.data_dir, "manifest.json"))
    return found and f"{config.data_dir} is a packed copy, which has the images it was packed with"


def classes_known(config: Any) -> Reason:
    known = dataset_kind(config) in ("cifar10", "cifar100", *NO_FILES)
    return packed(config) or (known and f"{config.dataset} has all its classes in train and val")


def no_split(config: Any) -> Reason:
    return packed(config) or (config.dataset != "tiny-imagenet" and "it needs --dataset tiny-imagenet")


def no_class_list(config: Any) -> Reason:
    needed = f"it needs --dataset {' or '.join(WITH_CLASS_LIST)}"
    return packed(config) or (config.dataset not in WITH_CLASS_LIST and needed)


def no_image_files(config: Any) -> Reason:
    kind = dataset_kind(config)
    unpacked_cifar = kind.startswith("cifar") and not packed(config)
    return (unpacked_cifar or kind in ("digits", "synthetic")) and f"{config.dataset} has no image files"


def torchvision_arch(config: Any) -> Reason:
    return "resnet" not in config.arch and f"{config.arch} is torchvision's and cannot be changed"


def weights_resumed(config: Any) -> Reason:
    return config.resume not in ("", "auto") and "--resume loads the weights"


def one_phase(config: Any) -> Reason:
    return len(config.resize_schedule) == 1 and "there is one phase"


def head_alone(config: Any) -> Reason:
    return config.freeze_epochs >= config.epochs and "--freeze-epochs trains the classifier alone"


def nothing_to_drop(config: Any) -> Reason:
    no_branches = config.arch in NO_DROP_PATH and f"{config.arch} has no branches to drop"
    return no_branches or head_alone(config)


def mix_off(config: Any) -> Reason:
    return not any(mix for _, mix in used_phases(config)) and "--phase-mix is off in every phase"


def single_images(config: Any) -> Reason:
    return max(batch for batch, _ in used_phases(config)) == 1 and "every batch is one image"


def one_batch_size(config: Any) -> Reason:
    batches = {batch for batch, _ in used_phases(config)}
    return len(batches) == 1 and "every phase has the same batch size"


def nothing_mixed(config: Any) -> Reason:
    return mix_off(config) or single_images(config)


def nothing_to_mix(config: Any) -> Reason:
    drop_path = config.drop_path_rate and not nothing_to_drop(config)
    used = config.mixup_alpha or config.cutmix_alpha or drop_path
    return not used and "there is no MixUp, CutMix or drop-path"


def targets_unmixed(config: Any) -> bool:
    return bool(nothing_mixed(config)) or not (config.mixup_alpha or config.cutmix_alpha)


def no_threshold(config: Any) -> Reason:
    if config.loss != "bce":
        return "it needs --loss bce"
    return targets_unmixed(config) and not config.label_smoothing and "all targets are 0 or 1"


def no_smoothing(config: Any) -> Reason:
    thresholded = config.bce_threshold is not None and targets_unmixed(config)
    return thresholded and "--bce-threshold makes all targets 0 or 1"


def no_plateau(config: Any) -> Reason:
    before_the_last_epoch = (config.epochs - 1) // config.eval_every
    needed = 2 + (config.plateau_patience or 0)  # one to compare with, and one more than tolerated
    return before_the_last_epoch < needed and f"a drop needs {needed} validations before the last epoch"


def no_ema(config: Any) -> Reason:
    return not config.ema and "EMA is off"


def decay_unread(config: Any) -> Reason:
    return no_ema(config) or (config.ema_half_life is not None and "--ema-half-life sets the decay")


def no_sync(config: Any) -> Reason:
    if config.arch in NO_BATCH_NORM:
        return f"{config.arch} has no BatchNorm"
    return process.world_size() == 1 and "there is one process (torchrun starts several)"
