"""What analysis.demo shows: the model's card, examples, and the likeliest classes of an image."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import torch

from analysis.demo_server import LARGEST_BODY
from analysis.feature_maps import as_map, last_map, module_named, recorded
from analysis.gradcam_figures import grad_cam, overlay
from analysis.page import CSS, Markup, document, facts, join, tag
from analysis.predictions import Classifier
from base.errors import UsageError, UserError
from models.convert import describe
from models.summary import count_params
from sources.decode import BadImage

STYLE, SCRIPT = (Path(__file__).with_name(name).read_text("utf-8") for name in ("demo.css", "demo.js"))
TOP, EXAMPLES = 5, 8

BODY = Markup("""
<label id="drop"><input type="file" accept="image/*"><b>Choose an image</b>, drop it anywhere, or paste it.
<span class="soft">It goes to this machine's own model only, and is kept nowhere.</span></label>
<p id="error" role="alert"></p>
<section id="answer" aria-live="polite" hidden><h2></h2>
<div class="seen"><figure><img id="seen" alt="The part of the image that the model sees">
<figcaption id="size"></figcaption></figure>
<figure><img id="map" alt=""><figcaption id="evidence"></figcaption></figure></div>
<fieldset><legend>Likeliest classes; choose one to see the evidence for it</legend>
<div id="classes"></div></fieldset>
</section>
""")


class Demo:
    """A classifier, and the validation images to try it on, if its data are at hand."""

    def __init__(self, classifier: Classifier, layer: str = ""):
        """layer: a module's name; by default the last one with a spatial map."""
        self.classifier, self.layer = classifier, layer
        self.examples = classifier.spread_ids(EXAMPLES) if classifier.index else []

    def page(self) -> str:
        """Return the page, which asks `answer` about images."""
        model, size = self.classifier.title, tag("data", value=LARGEST_BODY, id="largest")
        card = tag("section", tag("h2", "The model"), facts(self.card()))
        title = f"What is in this picture? {self.classifier.payload['model_args']['arch']} answers"
        body = join([tag("p", model, class_="soft"), BODY, self._examples(), card, size])
        return document(title, body, CSS + STYLE, SCRIPT, connect="'self'")

    def card(self) -> dict[str, object]:
        """Return what one should know about the model, by name."""
        payload, classifier = self.classifier.payload, self.classifier
        data, rows = payload["eval"], payload["rows"]
        column = "ema_val_top1" if classifier.weights == "ema" else "val_top1"
        top1 = rows[-1].get(column) if rows else None
        return {
            "architecture": describe(classifier.model.state_dict()).rpartition(",")[0],
            "parameters": f"{count_params(classifier.model):,}",
            "trained on": data["dataset"],
            "classes": f"{len(classifier.classes):,}",
            "input": f"{classifier.image_size} px, central {100 * classifier.crop:.3g} %",
            "top-1 in validation": "not validated" if top1 is None else f"{top1:.2f} %",
            "epochs": f"{len(rows)} of {payload['config']['epochs']}",
            "weights": "average (EMA)" if classifier.weights == "ema" else "of the last step",
            "code": f"commit {payload.get('commit') or 'unknown'}",
        }

    def _examples(self) -> Markup:
        """Return buttons with validation images, which demo.js asks about by their number."""
        if not len(self.examples):
            return Markup("")
        pixels = self.classifier.val_pixels(self.examples)
        names = [self.classifier.names[k] for k in self.classifier.index.val.labels[self.examples]]
        buttons = (
            tag("button", Markup(f'<img src="{data_url(image)}" alt="">'), name, data_example=k)
            for k, (image, name) in enumerate(zip(pixels, names, strict=True))
        )
        return tag("section", tag("h2", "From the validation set"), tag("div", *buttons, class_="examples"))

    def answer(self, image: bytes, query: dict[str, str]) -> dict:
        """Return what demo.js shows about an uploaded image, or about the example that `query` names."""
        number, truth = query.get("example"), ""
        if number is not None:
            if number not in map(str, range(len(self.examples))):
                raise UserError(f"there is no example {number[:20]!r}", "reload the page")
            i, split = int(self.examples[int(number)]), self.classifier.index.val
            (image,), truth = split.read([i]), self.classifier.names[split.labels[i]]
        try:
            pixels = self.classifier.pixels([image], [""])
        except BadImage as error:
            raise UserError(f"This file cannot be used: {error.reason}", "choose an image") from None
        return {"seen": data_url(pixels[0]), "truth": truth, **self._likeliest(pixels)}

    def _likeliest(self, pixels: np.ndarray) -> dict:
        """pixels (1, S, S, 3) uint8 -> the likeliest classes, each with its Grad-CAM map over the image."""
        classifier, images = self.classifier, self.classifier.batch(pixels)
        best = classifier.logits(images).softmax(1)[0].topk(min(TOP, len(classifier.classes)))
        try:
            name = self.layer or last_map(classifier.model, images)
            layer = module_named(classifier.model, name)
            found = grad_cam(
                classifier.model, layer, images.expand(len(best.indices), -1, -1, -1), best.indices
            )
            with torch.no_grad(), recorded({"layer": layer}) as outputs:
                classifier.model(images)
            height, width = as_map(outputs["layer"]).shape[2:]
            evidence = f"Grad-CAM of {name}, a map of {height} × {width}"
            maps = [data_url(image) for image in overlay(pixels, found)]
        except UsageError as error:
            maps, evidence = [""] * len(best.indices), f"No map of the evidence: {error.what}"
        columns = zip(best.indices.tolist(), best.values.tolist(), maps, strict=True)
        classes = [{"name": classifier.names[k], "percent": 100 * p, "map": drawn} for k, p, drawn in columns]
        size = f"What the model sees: {classifier.image_size} × {classifier.image_size} px"
        return {"classes": classes, "evidence": evidence, "size": size}


def data_url(pixels: np.ndarray) -> str:
    """Return an image (H, W, 3) uint8 RGB as the address of a PNG that holds itself."""
    _, png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode()}"
