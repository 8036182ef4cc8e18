"""Load a model from a checkpoint and predict with it.

validate.py, predict.py and the commands of this folder all load models, preprocess images and predict
through this module, so they agree on every image.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base import files, flags, process
from base.device import Runtime, init_runtime, memory_for
from base.errors import CheckpointError, DataError, UsageError
from base.progress import Progress
from data_utils import hits
from dataloader import Batch, Batches, Loader, Order, eval_dataset, normalize
from harness import checkpoint, rundir
from sources import folders, layouts, splits
from sources.decode import BadImage
from sources.images import EvalTransform
from sources.index import DatasetIndex, Names, Split, short_names
from train_utils import flipped_logits, logits_of

Labelled = Iterable[tuple[Tensor, Tensor]]  # batches of images (n, 3, H, W) and labels (n,)


@dataclass(frozen=True)
class Classifier:
    """A checkpoint's model in eval mode, with its preprocessing and its classes."""

    models: dict[str, nn.Module]  # by weights: "raw", "ema" or both; or "average", of several checkpoints
    payload: dict  # the whole checkpoint
    runtime: Runtime
    image_size: int  # px
    crop: float  # see `EvalTransform`
    index: DatasetIndex | None = None  # the dataset, for commands that read one

    @property
    def weights(self) -> str:
        return next(name for name in ("average", "ema", "raw") if name in self.models)

    @property
    def model(self) -> nn.Module:
        return self.models[self.weights]

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def classes(self) -> list[str]:
        """The classes as the dataset calls them (folder names), in label order."""
        return self.payload["eval"]["classes"]

    @property
    def names(self) -> list[str]:
        """Short readable class names, in label order."""
        return short_names(self.payload["eval"]["class_names"])

    @property
    def flip(self) -> bool:
        """Whether training scored mirror images as well."""
        return self.payload["eval"].get("flip", False)

    @property
    def exif(self) -> bool:
        """Whether training turned images as their EXIF orientation says."""
        return self.payload["eval"].get("exif", False)

    @property
    def title(self) -> str:
        """A line for pictures, such as "resnet50, 1000 classes, EMA weights, 224 px"."""
        arch = self.payload["model_args"]["arch"]
        weights = {"ema": "EMA", "raw": "raw", "average": "averaged"}[self.weights]
        return f"{arch}, {len(self.classes)} classes, {weights} weights, {self.image_size} px"

    @property
    def transform(self) -> EvalTransform:
        return EvalTransform(self.image_size, self.crop, self.exif)

    def at_size(self, image_size: int) -> Classifier:
        """Return it for another image size (px). Raises UsageError if the architecture has only one."""
        if self.payload["model_args"]["arch"] == "vit_b_16" and image_size != self.image_size:
            what = f"vit_b_16 works at {self.image_size} px only, not at {image_size}"
            raise UsageError(what, "leave the image size out")
        return replace(self, image_size=image_size)

    def in_its_precision(self) -> Classifier:
        """Return it for scoring in the precision it was trained in, so that scores are those of training.

        Its runtime is that of --amp auto, which is kept if the device is not fast in this precision.
        """
        trained, dtype = self.payload["precision"], self.runtime.amp_dtype
        if trained == "fp32":
            dtype = None
        elif trained == "fp16" and self.device.type == "cuda":  # where auto may have chosen bf16
            dtype = torch.float16
        return replace(self, runtime=replace(self.runtime, amp_dtype=dtype))

    def pixels(self, images: Sequence[bytes | np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Return images as (n, S, S, 3) uint8, resized and cropped as in validation. Raises BadImage."""
        return np.stack([self.transform(image, name) for image, name in zip(images, names, strict=True)])

    def val_pixels(self, ids: Sequence[int]) -> np.ndarray:
        """Return the validation images at positions `ids`, (n, S, S, 3) uint8."""
        split = self.index.val
        return self.pixels(split.read(ids), [split.name(int(i)) for i in ids])

    def batch(self, pixels: np.ndarray) -> Tensor:
        """Return pixels (n, S, S, 3) uint8 as the model's input (n, 3, S, S), on the device."""
        mean, std = self.payload["eval"]["mean"], self.payload["eval"]["std"]
        return normalize(torch.from_numpy(pixels), mean, std, self.device)

    def loader(
        self,
        source: Split | Sequence[str],
        batch_size: int = 64,
        num_workers: int = 0,
        *,
        skips_bad: bool = False,
    ) -> Loader:
        """Return batches, in order: (images, labels) of a split, or (images, positions) of image files.

        skips_bad: leave bad images out if the run's training did
        """
        if isinstance(source, Split):
            on_bad = self.payload["config"].get("on_bad_image", "fail") if skips_bad else "fail"
            dataset = eval_dataset(source, self.image_size, self.crop, on_bad, exif=self.exif)
        else:
            dataset = ImageFiles(source, self.transform)
        return Loader(
            dataset,
            Order(len(source), batch_size, shuffle=False),
            mean=self.payload["eval"]["mean"],
            std=self.payload["eval"]["std"],
            num_workers=min(num_workers, process.cores()),
            device=self.device,
        )

    def batches(
        self, split: Split, title: str, batch_size: int = 64, num_workers: int = 0, *, skips_bad: bool = False
    ) -> Labelled:
        """Yield the batches of a split, with a progress bar."""
        loader = self.loader(split, batch_size, num_workers, skips_bad=skips_bad)
        with Progress(len(loader), title, unit="batches") as bar:
            yield from bar.over(loader)

    def predict_val(self) -> Predictions:
        """Predict every validation image."""
        batches = self.batches(self.index.val, "validation images", num_workers=process.cores())
        found = predict({self.weights: self.model}, batches, self.runtime, flip=self.flip)
        return found[f"{self.weights} flip" if self.flip else self.weights]

    def logits(self, images: Tensor) -> Tensor:
        """images (n, 3, S, S) -> (n, K) float32, with mirror images if training scored them."""
        logits = logits_of(self.model, images, self.runtime)
        return flipped_logits(self.model, images, logits, self.runtime) if self.flip else logits

    def predict_files(
        self, paths: Sequence[str], top: int, batch_size: int, num_workers: int
    ) -> tuple[list[dict], list[tuple[str, str]]]:
        """Return [{"file": path, "predictions": the `top` likeliest classes}] and [(bad path, reason)]."""
        names = self.payload["eval"]["class_names"]
        loader, found = self.loader(paths, batch_size, num_workers), []
        memory = memory_for(f"batch {batch_size}", "lower --batch-size", self.device)
        with memory, Progress(len(loader), f"{len(paths)} images", unit="batches") as bar:
            for images, positions in bar.over(loader):
                probabilities = self.logits(images).softmax(1)
                best = probabilities.topk(min(top, len(names)))
                rows = zip(positions.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
                for i, values, labels in rows:
                    likeliest = [
                        {"class": self.classes[k], "name": names[k], "probability": p}
                        for k, p in zip(labels, values, strict=True)
                    ]
                    found.append({"file": paths[i], "predictions": likeliest})
        reasons = dict(loader.bad)
        good = [image for i, image in enumerate(found) if i not in reasons]
        return good, [(paths[i], reason) for i, reason in reasons.items()]

    def spread_ids(self, count: int) -> np.ndarray:
        """Return `count` evenly spread validation images; sorted by class, they cover many classes."""
        last = len(self.index.val) - 1
        return np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int))

    def check_ids(self, ids: Sequence[int], flag: str) -> np.ndarray:
        """Return the validation images `ids`. Raises UsageError for one that does not exist."""
        total = len(self.index.val)
        for i in ids:
            if i >= total:
                raise UsageError(f"{flag} {i}: there are {total} images", f"use 0 to {total - 1}")
        return np.asarray(ids, int)


def load_with_data(config, given: flags.Given, needs_data: bool = True) -> Classifier:
    """Load the checkpoint and the dataset that a command of this folder names.

    Raises CheckpointError, and DataError if the dataset's classes are not the model's.
    """
    classifier = load(config.checkpoint, config.weights, init_runtime(config.device, "off"))
    if not needs_data:
        return classifier
    classifier = open_data(classifier, config, given)
    if out := getattr(config, "out", ""):
        folders.check_outside(classifier.index, out, "--out")
        files.make_directory(Path(out))
    known, found = list(classifier.classes), list(classifier.index.classes)
    if known != found:
        what = f"the data's {len(found)} classes are not the model's {len(known)}"
        raise DataError(what, "name the data it was trained on: --dataset NAME --data-dir DIR")
    return classifier


def open_data(classifier: Classifier, config, given: flags.Given, say=process.say) -> Classifier:
    """Return the classifier with the dataset; data flags that were not given come from the checkpoint."""
    data = rundir.with_saved_data(config, given, classifier.payload["config"])
    notes = flags.refuse_idle(flags.DATASET, data, given)
    index = layouts.open_dataset(**flags.data_args(data))
    elsewhere = data.data_dir != classifier.payload["config"]["data_dir"]
    if elsewhere and not (data.holdout or data.subset or has_own_data(replace(classifier, index=index))):
        index = splits.undivided(index)  # a folder of test images
    for note in (*notes, *index.notes):
        say(note)
    return replace(classifier, index=index)


def has_own_data(classifier: Classifier) -> bool:
    """Return whether the classifier's data has the images that its run was validated on."""
    return classifier.index.fingerprint()["val"] == classifier.payload["fingerprint"]["val"]


def load(path: str, weights: str, runtime: Runtime) -> Classifier:
    """Load the model of a checkpoint.

    weights: 'raw', 'ema' (raw if the run kept no average) or 'both'
    """
    model, payload = checkpoint.load_model(path, "raw")
    average = payload["ema"].get("shadow")
    models = {"raw": model} if weights != "ema" or not average else {}
    if average and weights != "raw":
        models["ema"] = copy.deepcopy(model)
        models["ema"].load_state_dict(average)
    return _classifier(models, payload, runtime)


def load_average(paths: Sequence[str], runtime: Runtime) -> Classifier:
    """Load the mean of the raw weights of several checkpoints, with their BatchNorm statistics, as "average".

    All else comes from the last one. Raises CheckpointError for checkpoints of different models or images.
    """

    def kind(payload: dict) -> list:
        images = [payload["eval"].get(name) for name in ("classes", "mean", "std", "exif")]
        return images + [payload["model_args"].get(name) for name in rundir.MODEL_ARGS]

    model, payload = checkpoint.load_model(paths[-1], "raw")
    sums = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    for path in paths[:-1]:
        other, its = checkpoint.load_model(path, "raw")
        if kind(its) != kind(payload):
            what = f"{path} and {paths[-1]} differ in their models, classes or normalization"
            raise CheckpointError(what, "average checkpoints of one run, or of runs with the same weights")
        for name, value in other.state_dict().items():
            if name in sums:
                sums[name] += value
    model.load_state_dict(model.state_dict() | {name: total / len(paths) for name, total in sums.items()})
    return _classifier({"average": model}, payload, runtime)


def _classifier(models: dict[str, nn.Module], payload: dict, runtime: Runtime) -> Classifier:
    for each in models.values():
        each.to(runtime.device, memory_format=torch.channels_last)
    return Classifier(models, payload, runtime, payload["eval"]["image_size"], payload["eval"]["crop"])


class ImageFiles(Batches):
    """Decodes image files; their labels are their positions, and `bad` lists (position, reason).

    A black image takes the place of a bad one, so that the others of its batch are still predicted.
    """

    def __init__(self, paths: Sequence[str], transform: EvalTransform):
        self.paths, self.transform = Names(paths), transform
        self.image_size, self.labels = transform.image_size, np.arange(len(paths))

    def fill(self, images: np.ndarray, batch: Batch) -> tuple[Sequence[int], list[tuple[int, str]]]:
        bad = []
        for k, i in enumerate(batch.ids.tolist()):
            images[k] = 0
            try:
                images[k] = self.transform(Path(self.paths[i]).read_bytes(), self.paths[i])
            except BadImage as error:
                bad.append((i, error.reason))
            except OSError as error:
                bad.append((i, str(error.strerror)))
        return batch.ids, bad


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for n images, in order."""

    labels: np.ndarray  # (n,)
    predicted: np.ndarray  # (n,) the class with the largest logit, the lowest of equal ones
    confidence: np.ndarray  # (n,) its probability
    losses: np.ndarray  # (n,) cross-entropy against the label
    hits: np.ndarray  # (n, 2) bool: the label is in the top 1, in the top 5

    def most_confident_errors(self) -> np.ndarray:
        """Positions of the misclassified images, the most confident prediction first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def predict(models: dict[str, nn.Module], batches: Labelled, runtime: Runtime, flip: bool = False) -> dict:
    """Predict every batch with every model, in one pass over the data: {name: Predictions}.

    With `flip`, add predictions of `flipped_logits`, under "<name> flip".
    """
    parts = defaultdict(list)
    for images, labels in batches:
        for name, model in models.items():
            logits = logits_of(model, images, runtime)
            parts[name].append(_predicted(logits, labels))
            if flip:
                logits = flipped_logits(model, images, logits, runtime)
                parts[f"{name} flip"].append(_predicted(logits, labels))
    columns = {name: zip(*rows, strict=True) for name, rows in parts.items()}
    return {name: Predictions(*(torch.cat(c).numpy() for c in given)) for name, given in columns.items()}


def _predicted(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """logits (n, K), labels (n,) -> the fields of `Predictions`, on the CPU."""
    predicted = logits.nan_to_num(-torch.inf).argmax(1)  # never NaN; of equal logits the first
    confidence = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return [column.cpu() for column in (labels, predicted, confidence, losses, hits(logits, labels))]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Labelled, runtime: Runtime) -> nn.Module:
    """Return a copy of `model` whose BatchNorm statistics are the mean over `batches`.

    Training collects them from augmented images at the training size; another test size may need others
    (https://arxiv.org/abs/1906.06423).
    """
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for images, _ in batches:
        logits_of(model, images, runtime)
    return model.eval()
