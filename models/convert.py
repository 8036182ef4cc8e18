"""Convert weights between this project, torchvision, and the public earlier code.

Works on state dicts in memory; `harness.checkpoint` reads and writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from base.errors import CheckpointError, UsageError

from .layers import Blur

# Where a checkpoint keeps its weights: in the earlier code; this project and torchvision's references; timm.
WRAPPERS = ("model_state_dict", "model", "state_dict")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile
# (has bottlenecks, blocks in each stage) -> architecture
RESNETS = {
    (False, (1, 1, 1, 1)): "resnet_tiny",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
# kernel width of `conv1` -> stem; stem "d" has several convolutions and no `conv1.weight`
STEMS = {(7,): "imagenet", (3,): "small"}
# name of the classifier -> architecture
CLASSIFIERS = {
    "fc": "unknown architecture",  # unless it has the layers of a ResNet
    "classifier.3": "mobilenet_v3_large",
    "classifier.1": "efficientnet_b0",
    "heads.head": "vit_b_16",
    "head": "swin_t",
}


def adapt_state_dict(
    state: Mapping[str, Any], model: nn.Module, reset_head: bool = False
) -> dict[str, Tensor]:
    """Return the weights in `state` under the names and shapes that `model.load_state_dict` requires.

    state:      a state dict or a checkpoint that holds one, of this project, torchvision or the earlier
                code; with or without the prefixes of DDP and torch.compile, with or without blur
                filters, with a linear or a convolutional head
    reset_head: keep the model's own classifier, for another set of classes

    Raises CheckpointError if a tensor is missing, unknown or has another shape. Changes neither argument.
    """
    state, wanted = find_weights(state), model.state_dict()
    head = head_of(wanted)
    adapted = {}
    for key, own in wanted.items():
        if reset_head and key.startswith(f"{head}."):
            adapted[key] = own
        elif key in state:
            adapted[key] = _reshape_head(state[key], own) if key == f"{head}.weight" else state[key]
        elif key.endswith("num_batches_tracked"):
            adapted[key] = own  # files from before torch 0.4.1 lack it
    wrong = [key for key in adapted if adapted[key].shape != wanted[key].shape]
    wrong += sorted(key for key in wanted.keys() ^ state.keys() if key not in adapted)
    if wrong:
        raise _mismatch(state, wanted, wrong, head)
    return adapted


def find_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, under torchvision's keys, without prefixes or blur filters."""
    content = state if isinstance(state, Mapping) else {type(state).__name__: state}
    weights = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"no model weights in this checkpoint (it holds {found})",
            f"give a state dict, or a file that keeps one as {' or '.join(WRAPPERS)}",
        )
    return _without_blur({PREFIXES.sub("", key): value for key, value in weights.items()})


def describe(state: Mapping[str, Tensor]) -> str:
    """Describe the model of a state dict by its keys and shapes, for example "resnet50, 1000 classes"."""
    head, stem = head_of(state), _stem_of(state)
    stem = "" if stem == "imagenet" else f"{stem} stem"
    classes = f"{state[f'{head}.weight'].shape[0]} classes" if head else "no classifier"
    arch, first = _arch_of(state), state.get("layer1.0.conv1.weight")  # of a ResNet
    usual = first is None or first.shape[0] == (8 if arch == "resnet_tiny" else 64)
    width = "" if usual else f"width {first.shape[0]}"
    return ", ".join(filter(None, (arch, width, stem, classes)))


def head_of(state: Mapping[str, Tensor]) -> str:
    """Return the name of the classifier in a state dict, or "" if there is none."""
    return next((head for head in CLASSIFIERS if f"{head}.weight" in state), "")


def to_torchvision(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict, on the CPU, that torchvision's model of the same name loads strictly.

    Raises UsageError for a network that torchvision does not have: pre-activation, another stem or
    width, or antialiased.
    """
    state, blurred = model.state_dict(), any(isinstance(module, Blur) for module in model.modules())
    other = blurred or _arch_of(state).startswith(("preact", "unknown")) or _stem_of(state) != "imagenet"
    if other or len(state.get("layer1.0.conv1.weight", range(64))) != 64:
        why = ", antialiased: the weights would load there and score badly" * blurred
        raise UsageError(
            f"torchvision has no such model: {describe(state)}{why}",
            "export a plain resnet18, resnet34 or resnet50, or one of torchvision's own",
        )
    head = f"{head_of(state)}.weight"
    state = {**state, head: state[head].flatten(1)}
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _without_blur(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop antialiased-cnns' filters and close the gaps they leave in numbered Sequentials.

    "conv3.0.filt", "conv3.1.weight" -> "conv3.weight"
    "downsample.0.filt", "downsample.1.weight" -> "downsample.0.weight"
    """
    gaps = dict(match.groups() for key in state if (match := re.fullmatch(r"(.+)\.(\d+)\.filt", key)))
    kept = {}
    for key, value in state.items():
        if key.endswith(".filt"):
            continue
        match = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", key)
        if match and int(match[2]) > int(gaps.get(match[1], match[2])):
            parent, number, name = match.groups()
            key = f"{parent}.{name}" if "conv" in parent else f"{parent}.{int(number) - 1}.{name}"
        kept[key] = value
    return kept


def _reshape_head(weight: Tensor, own: Tensor) -> Tensor:
    """Reshape (K, C) <-> (K, C, 1, 1); leave any other weight as it is."""
    same = weight.shape[:2] == own.shape[:2] and weight.numel() == own.numel()
    return weight.reshape(own.shape) if same else weight


def _arch_of(state: Mapping[str, Tensor]) -> str:
    if "layer1.0.conv1.weight" not in state:
        return CLASSIFIERS.get(head_of(state), "unknown architecture")
    blocks = [{key.split(".")[1] for key in state if key.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    depths = tuple(map(len, blocks))
    name = RESNETS.get(("layer1.0.conv3.weight" in state, depths), f"a ResNet of {depths} blocks")
    return f"preact_{name}" if "bn_out.weight" in state else name


def _stem_of(state: Mapping[str, Tensor]) -> str:
    """Return the stem of a ResNet; "imagenet" for other networks, which have no choice."""
    if "layer1.0.conv1.weight" not in state:
        return "imagenet"
    return STEMS.get(tuple(state["conv1.weight"].shape[3:]), "other") if "conv1.weight" in state else "d"


def _mismatch(state: dict, wanted: dict, wrong: list[str], head: str) -> CheckpointError:
    what = f"checkpoint: {describe(state)}; now: {describe(wanted)}"
    if all(key.startswith(f"{head}.") for key in wrong):
        return CheckpointError(what, "--reset-head starts a new classifier and keeps all other weights")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return CheckpointError(
        f"{what} (differ in {', '.join(wrong[:3])}{more})",
        "use the checkpoint's --arch, --width, --stem and image size; if only the classes differ, add "
        "--reset-head",
    )
