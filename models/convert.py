"""State dicts of ours, of torchvision and of the public earlier code, each turned into the others' form.

Only tensors in memory: reading and writing files belongs to `checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from base.errors import CheckpointError, UsageError

from .layers import has_blur

WRAPPERS = (
    "model_state_dict",
    "model",
    "state_dict",
)  # the earlier code, ours and torchvision's references, timm
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
HEADS = (
    "fc",
    "classifier.3",
    "classifier.1",
    "heads.head",
    "head",
)  # of a ResNet, MobileNet, EfficientNet, ViT, Swin
RESNETS = {
    (False, (1, 1, 1, 1)): "resnet_tiny",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
STEMS = {(7,): "imagenet", (3,): "small"}


def adapt_state_dict(
    state: Mapping[str, Any], model: nn.Module, reset_head: bool = False
) -> dict[str, Tensor]:
    """`state` as `model.load_state_dict(..., strict=True)` wants it.

    state:      a state dict, or a checkpoint that holds one, of ours, torchvision's or the earlier
                code's; prefixes of DDP and compile, blur filters and 1x1-conv heads are seen to
    reset_head: keep the model's own classifier, for another number of classes

    Raises CheckpointError where a tensor is missing, left over or of another shape. Neither argument
    is changed.
    """
    state = find_weights(state)
    wanted = model.state_dict()
    head = head_of(wanted)
    adapted = {}
    for key, like in wanted.items():
        if reset_head and key.startswith(f"{head}."):
            adapted[key] = like
        elif key in state:
            adapted[key] = _reshape_head(state[key], like) if key == f"{head}.weight" else state[key]
        elif key.endswith("num_batches_tracked"):
            adapted[key] = like  # older than torch 0.4.1; nothing reads it when BatchNorm has a momentum
    wrong = [key for key in adapted if adapted[key].shape != wanted[key].shape]
    wrong += sorted(key for key in wanted.keys() ^ state.keys() if key not in adapted)
    if wrong:
        raise _mismatch(state, wanted, wrong, head)
    return adapted


def find_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under torchvision's keys: no wrapper, no prefix, no blur filter."""
    held = state if isinstance(state, Mapping) else {type(state).__name__: state}
    weights = next((held[name] for name in WRAPPERS if isinstance(held.get(name), Mapping)), held)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"no model weights in this checkpoint (it holds {', '.join(map(str, list(held)[:8])) or 'nothing'})",
            f"give a state dict, or a file that keeps one as {' or '.join(WRAPPERS)}",
        )
    return _without_blur({_without_prefix(key): value for key, value in weights.items()})


def describe(state: Mapping[str, Tensor]) -> str:
    """What a state dict is of, read from its keys and shapes: "resnet50, 1000 classes"."""
    head = head_of(state)
    classes = f"{state[f'{head}.weight'].shape[0]} classes" if head else "no classifier"
    stem = _stem_of(state)
    return ", ".join([_arch_of(state), *([f"{stem} stem"] if stem not in ("imagenet", "") else []), classes])


def head_of(state: Mapping[str, Tensor]) -> str:
    """The name of the classifier in a state dict, "" where there is none."""
    return next((head for head in HEADS if f"{head}.weight" in state), "")


def to_torchvision(model_or_state: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict that torchvision's model of the same name loads strictly, on the CPU.

    Raises UsageError for a network that torchvision does not have: pre-activation, another stem, or
    antialiased (which would load there and compute something else; only a model can tell).
    """
    state = model_or_state
    if isinstance(model_or_state, nn.Module):
        state = model_or_state.state_dict()
        if has_blur(model_or_state):
            raise UsageError(
                "torchvision has no antialiased ResNet: the weights would load there and score badly",
                "export a model trained without --use-blurpool",
            )
    state = find_weights(state)
    if _arch_of(state).startswith(("preact", "unknown")) or _stem_of(state) not in ("imagenet", ""):
        raise UsageError(
            f"torchvision has no such model: {describe(state)}",
            "export a plain resnet18, resnet34 or resnet50, or one of torchvision's own",
        )
    head = f"{head_of(state)}.weight"
    state = {**state, head: state[head].flatten(1)}
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _without_prefix(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _without_blur(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop antialiased-cnns' filters and close the gaps they leave in numbered Sequentials.

    {"conv3.0.filt", "conv3.1.weight"} -> {"conv3.weight"}; "downsample.0.filt" makes "downsample.1.weight"
    "downsample.0.weight".
    """
    gaps = [match.groups() for key in state if (match := re.fullmatch(r"(.+)\.(\d+)\.filt", key))]
    kept = {key: value for key, value in state.items() if not key.endswith(".filt")}
    for parent, gap in gaps:
        pattern = re.compile(rf"{re.escape(parent)}\.(\d+)\.(.+)")
        renamed = {}
        for key, value in kept.items():
            match = pattern.fullmatch(key)
            if match and int(match[1]) > int(gap):
                key = (
                    f"{parent}.{match[2]}" if "conv" in parent else f"{parent}.{int(match[1]) - 1}.{match[2]}"
                )
            renamed[key] = value
        kept = renamed
    return kept


def _reshape_head(weight: Tensor, like: Tensor) -> Tensor:
    """(K, C) <-> (K, C, 1, 1); a weight that is neither stays as it is."""
    same = weight.shape[:2] == like.shape[:2] and weight.numel() == like.numel()
    return weight.reshape(like.shape) if same else weight


def _arch_of(state: Mapping[str, Tensor]) -> str:
    if "layer1.0.conv1.weight" in state:
        depths = tuple(
            len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in range(1, 5)
        )
        name = RESNETS.get(("layer1.0.conv3.weight" in state, depths), f"a ResNet of {depths} blocks")
        return f"preact_{name}" if "bn_out.weight" in state else name
    marks = {
        "conv_proj.weight": "vit_b_16",
        "head.weight": "swin_t",
        "classifier.3.weight": "mobilenet_v3_large",
        "classifier.1.weight": "efficientnet_b0",
    }
    return next((arch for key, arch in marks.items() if key in state), "unknown architecture")


def _stem_of(state: Mapping[str, Tensor]) -> str:
    """imagenet, small, d, or "" for a network that is no ResNet."""
    if "layer1.0.conv1.weight" not in state:
        return ""
    return STEMS.get(tuple(state["conv1.weight"].shape[3:]), "other") if "conv1.weight" in state else "d"


def _mismatch(state: dict, wanted: dict, wrong: list[str], head: str) -> CheckpointError:
    old, new = describe(state), describe(wanted)
    if all(key.startswith(f"{head}.") for key in wrong):
        fix = "--reset-head starts a new classifier and keeps all other weights"
        return CheckpointError(f"checkpoint: {old}; now: {new}", fix)
    fix = "choose the checkpoint's --arch, --stem and image size; --reset-head is enough where only the classes differ"
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return CheckpointError(f"checkpoint: {old}; now: {new} (differ in {shown})", fix)
