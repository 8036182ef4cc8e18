"""A trained model as a file for other programs, checked on the spot, with a card that says what it is.

EXPORTS names the formats. Each function writes the file and returns what a fresh reader of that file
answers, so that `export` can compare it with the model.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from base import files
from base.errors import ResourceError, UsageError, UserError, optional, printable
from harness import checkpoint
from models import build_model, describe_args
from models.convert import to_torchvision

TOLERANCE = 1e-5  # of the largest logit, or of 1


def export(kind: str, model: nn.Module, payload: dict, weights: str, out: Path) -> tuple[Path, Path]:
    """Write `model` to `out` as `kind`, and its card; return both paths.

    The file is read back by its own library and asked about images. Raises UsageError where the
    format has no such model or its package is missing, UserError where the answers differ.
    """
    model = model.to("cpu", memory_format=torch.contiguous_format).eval()
    facts = payload["eval"]
    ending, write = EXPORTS[kind]
    if kind == "torchvision":
        check_torchvision_has(payload["model_args"]["arch"])
    path = out / f"{payload['model_args']['arch']}_{facts['dataset']}{ending}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write to {out}: {error.strerror}", "name a writable directory: --out"
        ) from None
    side = facts["image_size"]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            wanted = model(images)
            answers = write(model, payload, weights, path, images)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}", "name a writable directory: --out"
        ) from None
    off = float((answers - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not off <= TOLERANCE:
        path.unlink(missing_ok=True)
        raise UserError(
            f"the {kind} file answers otherwise than the model: logits differ by {off:.1e}; it is deleted",
            "report this, with the versions in env.json",
        )
    return path, files.write(path.with_name(path.name + ".md"), card(kind, path.name, payload, weights, off))


def to_onnx(model: nn.Module, payload: dict, weights: str, path: Path, images: Tensor) -> Tensor:
    """images (N, 3, S, S) float32 normalised -> logits (N, K), for any N."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        runtime = optional(package, "--export onnx")
    # The exporter prints its progress and warns about its own dependencies.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    program.model.metadata_props.update(metadata(payload, weights))
    program.save(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.cat(
        [torch.from_numpy(session.run(["logits"], {"images": part.numpy()})[0]) for part in images.split(2)]
    )


def to_safetensors(model: nn.Module, payload: dict, weights: str, path: Path, images: Tensor) -> Tensor:
    """The state dict under torchvision's names; what rebuilds the model is in the file's metadata."""
    library = optional("safetensors.torch", "--export safetensors")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(library.save(state, metadata(payload, weights)))
    again = build_model(**payload["model_args"])
    again.load_state_dict(library.load_file(path))
    return again.eval()(images)


def to_torchvision_file(model: nn.Module, payload: dict, weights: str, path: Path, images: Tensor) -> Tensor:
    """A plain state dict that torchvision's model of the same name loads strictly."""
    import torchvision.models

    args = payload["model_args"]
    checkpoint.save_weights(path, to_torchvision(model))
    size = {"image_size": images.shape[-1]} if args["arch"].startswith("vit") else {}
    again = getattr(torchvision.models, args["arch"])(num_classes=args["num_classes"], **size)
    again.load_state_dict(checkpoint.read(path))
    return again.eval()(images)


def check_torchvision_has(arch: str) -> None:
    import torchvision.models

    if not hasattr(torchvision.models, arch):
        raise UsageError(f"torchvision has no {arch}", "use --export onnx or --export safetensors")


EXPORTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "onnx": (".onnx", to_onnx),
    "safetensors": (".safetensors", to_safetensors),
    "torchvision": ("_torchvision.pth", to_torchvision_file),
}


def metadata(payload: dict, weights: str) -> dict[str, str]:
    """Text for a file's header: how to rebuild and how to feed the model."""
    return {
        "model_args": json.dumps(payload["model_args"]),
        "eval": json.dumps(payload["eval"]),
        "weights": weights,
    }


USE = {
    "onnx": """session = onnxruntime.InferenceSession("{name}")
logits, = session.run(["logits"], {{"images": images}})  # float32 (N, 3, {size}, {size})""",
    "safetensors": """with safetensors.safe_open("{name}", "pt") as file:
    model = models.build_model(**json.loads(file.metadata()["model_args"]))
model.load_state_dict(safetensors.torch.load_file("{name}"))
logits = model.eval()(images)  # float32 (N, 3, {size}, {size})""",
    "torchvision": """model = torchvision.models.{arch}(num_classes={num_classes}{more})
model.load_state_dict(torch.load("{name}", weights_only=True))
logits = model.eval()(images)  # float32 (N, 3, {size}, {size})""",
}


def card(kind: str, name: str, payload: dict, weights: str, off: float) -> str:
    """The model card, Markdown: what it is, how to feed it, what it scores, how it was made."""
    facts, args, flags = payload["eval"], payload["model_args"], payload["config"]
    size = facts["image_size"]
    more = f", image_size={size}" if args["arch"].startswith("vit") else ""
    use = USE[kind].format(name=name, size=size, more=more, **args)
    lines = [
        f"# {name}",
        "",
        f"{describe_args(args)}, trained on {facts['dataset']} for {len(payload['rows'])} epochs; the {WEIGHTS[weights]}.",
        "",
        "## Use",
        "",
        "```python",
        use,
        "```",
        "",
        f"An image is resized to {round(size / facts['crop'])} px at its short side (bilinear, antialiased), the central "
        f"{size} x {size} px are cut out, pixels become RGB in [0, 1], then (pixel - mean) / std:",
        "",
        f"- mean {_numbers(facts['mean'])}",
        f"- std {_numbers(facts['std'])}",
        "",
        f"Answers are logits; their softmax is over {len(facts['classes'])} classes, listed below. When this file was written "
        f"its logits differed from the model's by {off:.1e} of the largest.",
        "",
        "## Scores",
        "",
        *_scores(payload, weights),
        "",
        "## How it was trained",
        "",
        *[f"- `--{key.replace('_', '-')} {_value(flags[key])}`" for key in SHOWN if key in flags],
        f"- code: commit {payload.get('commit') or 'unknown'}",
        "",
        "## Limits",
        "",
        "It knows the classes below and nothing else: whatever it is shown, it names one of them. Its mistakes follow its "
        "training data; no other data was looked at.",
    ]
    if args.get("use_blurpool"):
        lines += ["", "It was trained with antialiased-cnns (CC BY-NC-SA 4.0): not for commercial use."]
    rows = zip(facts["classes"], facts["class_names"], strict=True)
    table = [f"| {k} | {_cell(folder)} | {_cell(str(human))} |" for k, (folder, human) in enumerate(rows)]
    return "\n".join([*lines, "", "## Classes", "", "| index | class | name |", "|---|---|---|", *table, ""])


WEIGHTS = {"ema": "average of its weights (EMA)", "raw": "weights of its last step"}
SHOWN = (
    "dataset",
    "epochs",
    "resize_schedule",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "augment",
    "mixup_alpha",
    "cutmix_alpha",
    "label_smoothing",
    "drop_path_rate",
    "ema_decay",
    "seed",
)


def _scores(payload: dict, weights: str) -> list[str]:
    column = "ema_val" if weights == "ema" else "val"
    row = payload["rows"][-1] if payload["rows"] else {}
    if row.get(f"{column}_top1") is None:
        return ["Not validated."]
    return [
        f"On its validation images at {row['image_size']} px: top-1 {row[f'{column}_top1']:.2f} %, top-5 "
        f"{row[f'{column}_top5']:.2f} %, cross-entropy {row[f'{column}_loss']:.4f}."
    ]


def _numbers(values) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    """Class names come from disks: no table cell, HTML or control character of theirs gets through."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
