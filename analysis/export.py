"""Export a trained model as a file for other programs, with a model card, and check the file.

Each function in EXPORTS writes the file and returns the logits of a model read back from it, which `export`
compares with those of the original.
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
from torch import Tensor

from analysis.predictions import Classifier
from base import files, flags
from base.errors import UsageError, UserError, optional, printable
from harness import checkpoint
from models import build_model
from models.convert import describe, to_torchvision

TOLERANCE = 1e-5  # of the largest logit, or of 1 if all are smaller
SHOWN = (
    "pretrained", "init_from", "freeze_epochs", "epochs", "resize_schedule", "phase_epochs", "batch_size",
    "phase_batch_sizes", "optimizer", "lr", "backbone_lr", "weight_decay", "schedule", "augment",
    "phase_augment", "loss", "mixup_alpha", "cutmix_alpha", "label_smoothing", "drop_path_rate", "ema",
    "ema_decay", "ema_half_life", "seed",
)  # fmt: skip


def export(kind: str, classifier: Classifier, out: Path) -> tuple[Path, Path]:
    """Write the model and its card to the directory `out`; return both paths.

    The file is read back by its own library and compared with the model on random images. Raises UsageError
    if the format does not support the model or its package is missing, UserError if the logits differ.
    """
    data, args = classifier.payload["eval"], classifier.payload["model_args"]
    ending, write = EXPORTS[kind]
    path = out / f"{args['arch']}_{data['dataset']}{ending}"
    classifier.model.to("cpu", memory_format=torch.contiguous_format)
    shape = (3, 3, data["image_size"], data["image_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with files.replacing(path) as partial, torch.no_grad():
        expected = classifier.model(images)
        logits = write(classifier, partial, images)
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise UserError(
                f"the {kind} file was deleted: its logits differ from the model's by {difference:.1e}",
                "report this, with the versions in env.json",
            )
    card = model_card(kind, path.name, classifier, difference)
    return path, files.write(path.with_name(path.name + ".md"), card)


def to_onnx(classifier: Classifier, path: Path, images: Tensor) -> Tensor:
    """images (n, 3, S, S) float32 normalized -> logits (n, K), for any n."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        runtime = optional(package, "--export onnx")
    options = {"input_names": ["images"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    any_size = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    # The exporter prints its progress and warns about its own dependencies.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(classifier.model, (images,), **options, **any_size)
    program.model.metadata_props.update(metadata(classifier))
    program.save(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = [{"images": part.numpy()} for part in images.split(2)]
    return torch.cat([torch.from_numpy(session.run(["logits"], batch)[0]) for batch in batches])


def to_safetensors(classifier: Classifier, path: Path, images: Tensor) -> Tensor:
    """Write the state dict, with metadata that rebuilds the model."""
    library = optional("safetensors.torch", "--export safetensors")
    state = {name: value.contiguous() for name, value in classifier.model.state_dict().items()}
    path.write_bytes(library.save(state, metadata(classifier)))
    loaded = build_model(**classifier.payload["model_args"])
    loaded.load_state_dict(library.load_file(path))
    return loaded.eval()(images)


def to_torchvision_file(classifier: Classifier, path: Path, images: Tensor) -> Tensor:
    """A plain state dict, which torchvision's model of the same name loads strictly."""
    import torchvision.models

    args = classifier.payload["model_args"]
    build = getattr(torchvision.models, args["arch"], None)
    if build is None:
        raise UsageError(f"torchvision has no {args['arch']}", "use --export onnx or --export safetensors")
    checkpoint.write(path, to_torchvision(classifier.model))
    size = {"image_size": images.shape[-1]} if args["arch"].startswith("vit") else {}
    loaded = build(num_classes=args["num_classes"], **size)
    loaded.load_state_dict(checkpoint.read(path))
    return loaded.eval()(images)


EXPORTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "onnx": (".onnx", to_onnx),
    "safetensors": (".safetensors", to_safetensors),
    "torchvision": ("_torchvision.pth", to_torchvision_file),
}


def metadata(classifier: Classifier) -> dict[str, str]:
    """Return the texts of a file's header: how to rebuild the model and preprocess its images."""
    values = {name: json.dumps(classifier.payload[name]) for name in ("model_args", "eval")}
    return values | {"weights": classifier.weights}


USE = {
    "onnx": """session = onnxruntime.InferenceSession("{name}")
logits, = session.run(["logits"], {{"images": images}})  # float32 (n, 3, {size}, {size})""",
    "safetensors": """with safetensors.safe_open("{name}", "pt") as file:
    model = models.build_model(**json.loads(file.metadata()["model_args"]))
model.load_state_dict(safetensors.torch.load_file("{name}"))
logits = model.eval()(images)  # float32 (n, 3, {size}, {size})""",
    "torchvision": """model = torchvision.models.{arch}(num_classes={num_classes}{more})
model.load_state_dict(torch.load("{name}", weights_only=True))
logits = model.eval()(images)  # float32 (n, 3, {size}, {size})""",
}
CARD = """# {name}

{model}, trained on {dataset} for {epochs} epochs; the {weights}.

## Use

```python
{use}
```

{exif}Resize the short side of an image to {resized} px (bilinear, antialiased), crop the central
{size} x {size} px, scale RGB to [0, 1], and normalize with (pixel - mean) / std:

- mean {mean}
- std {std}

The softmax of the logits gives probabilities over the {num_classes} classes below. When this file was
written, its logits differed from the model's by {difference:.1e} of the largest.

## Scores

{scores}

## Training

{flags}
- code: commit {commit}

## Limits

The model knows only the classes below and always predicts one of them. Its mistakes follow from its training
data; it was not tested on other data.
{license}
## Classes

| index | class | name |
|---|---|---|
{classes}
"""
BLURPOOL = (
    "\nIt was trained with antialiased-cnns, whose license (CC BY-NC-SA 4.0) excludes commercial use.\n"
)


def model_card(kind: str, name: str, classifier: Classifier, difference: float) -> str:
    """Return Markdown: what the model is, how to use it, its scores, and how it was trained."""
    payload, weights = classifier.payload, classifier.weights
    data, args = payload["eval"], payload["model_args"]
    size = data["image_size"]
    more = f", image_size={size}" if args["arch"].startswith("vit") else ""
    rows = enumerate(zip(data["classes"], data["class_names"], strict=True))
    return CARD.format(
        name=name,
        model=describe(classifier.model.state_dict()),
        dataset=data["dataset"],
        epochs=len(payload["rows"]),
        weights={"ema": "average of its weights (EMA)", "raw": "weights of its last step"}[weights],
        use=USE[kind].format(name=name, size=size, more=more, **args),
        exif="Turn an image as its EXIF orientation says. " if data.get("exif") else "",
        resized=round(size / data["crop"]),
        size=size,
        mean=", ".join(f"{value:.6g}" for value in data["mean"]),
        std=", ".join(f"{value:.6g}" for value in data["std"]),
        num_classes=len(data["classes"]),
        difference=difference,
        scores=_scores(payload, "ema_val" if weights == "ema" else "val"),
        flags="\n".join(
            f"- `{word.replace('=', ' ', 1)}`" for word in flags.to_argv(settings(payload["config"]))
        ),
        commit=payload.get("commit") or "unknown",
        license=BLURPOOL if args.get("use_blurpool") else "",
        classes="\n".join(f"| {k} | {_cell(folder)} | {_cell(human)} |" for k, (folder, human) in rows),
    )


def settings(saved: dict) -> dict:
    """Return those of the flags `SHOWN` that had an effect on the training."""
    config = flags.make_config(flags.defaults() | saved)
    return {name: getattr(config, name) for name in SHOWN if name not in flags.idle_flags(config)}


def _scores(payload: dict, column: str) -> str:
    row = payload["rows"][-1] if payload["rows"] else {}
    if row.get(f"{column}_top1") is None:
        return "Not validated."
    scored = f"{payload['config'].get('eval_size') or row['image_size']} px"
    scored += ", averaged with the mirror image" if payload["eval"].get("flip") else ""
    top1, top5, loss = (row[f"{column}_{name}"] for name in ("top1", "top5", "loss"))
    return f"Validation at {scored}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, cross-entropy {loss:.4f}."


def _cell(text: str) -> str:
    """Escape what could end a table cell, start HTML or control a terminal: class names come from disks."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
