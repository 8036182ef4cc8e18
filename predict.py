"""The five likeliest classes of images, in files and folders; or the model as a file for other programs.

Images go through the transform that validation uses, so an image here gets the logits it gets there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from base import flags, process
from base.errors import DataError, UsageError, printable, run

EPILOG = """examples:
  python predict.py checkpoints/best_resnet50_imagenet_1k.pt cat.jpg photos/
  python predict.py CHECKPOINT photos/ --csv answers.csv       '-' writes to standard output
  python predict.py CHECKPOINT --export onnx --out exported"""


IDLE = (
    *(flags.Flag(name, "output", idle=lambda c: not c.images and "no image is named")
      for name in ("top", "json", "csv", "batch_size", "num_workers")),
    flags.Flag("out", "files", idle=lambda c: not c.export and "it needs --export"),
)  # fmt: skip


def build_parser() -> flags.Parser:
    parser = flags.build_parser("predict.py", "Name what is in images.", EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a best_*.pt or last_*.pt that train.py wrote"
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, and folders of them")
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--weights", default="ema", choices=("ema", "raw"), help="which; ema: raw ones where there is no EMA"
    )
    group.add_argument("--top", type=flags.positive, default=5, metavar="K", help="classes an image")
    group.add_argument(
        "--json", default="", metavar="FILE", help="write them as JSON; '-' is standard output"
    )
    group.add_argument("--csv", default="", metavar="FILE", help="write them as CSV; '-' is standard output")
    group = parser.add_argument_group("export")
    group.add_argument(
        "--export",
        default="",
        choices=("", "onnx", "safetensors", "torchvision"),
        metavar="FORMAT",
        help="onnx, safetensors or torchvision: write the model, checked, with a card",
    )
    group.add_argument("--out", default="", metavar="DIR", help="where to; empty: beside the checkpoint")
    flags.add_asking_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = flags.parse(build_parser(), argv)
    from harness import rundir

    if not (config.images or config.export):
        raise UsageError("no image to look at", "name image files or folders, or --export FORMAT")
    flags.refuse_idle(IDLE, config, typed)
    if config.json == config.csv == "-":
        raise UsageError("--json - and --csv - both want standard output", "give one of them a file name")
    rundir.check_checkpoint(config.checkpoint)
    paths, bad = gather(config.images or ())
    from analysis.predictions import open_models
    from base.device import init_runtime, memory_for

    runtime = init_runtime(config.device, config.amp)
    models, payload = open_models(config.checkpoint, config.weights, runtime)
    ((weights, model),) = models.items()
    found: list = []
    if paths:
        with memory_for(f"batch {config.batch_size}", "give a smaller --batch-size", runtime.device):
            found, unreadable = predict(config, model, payload["eval"], paths, runtime)
        bad += unreadable
        deliver(config, weights, payload["eval"], found, bad)
    if config.export:
        from analysis.export import export

        written = export(
            config.export, model, payload, weights, Path(config.out or Path(config.checkpoint).parent)
        )
        say(config, f"written and checked: {written[0]}, described in {written[1]}")
    if bad:
        for path, reason in bad:
            print(printable(f"bad image {path}: {reason}"), file=sys.stderr)
        raise DataError(
            f"{len(bad)} of {len(found) + len(bad)} images could not be used, see above",
            "replace or leave out what is named there; the others were answered",
        )
    return 0


def say(config, text: str) -> None:
    """Print for people: not where a program reads."""
    print(printable(text), file=sys.stderr if "-" in (config.json, config.csv) else sys.stdout, flush=True)


def gather(names: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """Image files, those of folders in order of their names; and what is neither, with the reason."""
    from sources.folders import is_image

    paths, bad = [], []
    for name in names:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        before = len(paths)
        for folder, subfolders, files in os.walk(name):
            subfolders.sort()
            paths += [os.path.join(folder, file) for file in sorted(files) if is_image(os.fsencode(file))]
        if len(paths) == before:
            bad.append((name, "no images in this folder"))
    return paths, bad


class Pictures:
    """Maps a `dataloader.Batch` to (images (n, S, S, 3) uint8, ids (n,), what is bad), as training's dataset does.

    A bad image leaves a black one in its place: the others of its batch are still answered.
    """

    def __init__(self, paths: list[str], transform):
        from sources.index import Names

        self.paths, self.transform = Names(paths), transform

    def __getitem__(self, batch):
        import numpy as np
        import torch

        from sources.images import BadImage

        side, bad = self.transform.image_size, []
        images = np.zeros((len(batch.ids), side, side, 3), np.uint8)
        for k, i in enumerate(batch.ids):
            try:
                images[k] = self.transform(Path(self.paths[i]).read_bytes(), self.paths[i])
            except BadImage as error:
                bad.append((int(i), error.reason))
            except OSError as error:
                bad.append((int(i), str(error.strerror)))
        return torch.from_numpy(images), torch.from_numpy(batch.ids), bad


def predict(config, model, facts: dict, paths: list[str], runtime):
    """([(path, probabilities (k,), classes (k,))], [(bad path, reason)]), in the order given."""
    from analysis.predictions import logits_of
    from base.progress import Progress
    from dataloader import Loader, Order
    from sources.images import EvalTransform

    workers = min(config.num_workers, process.cores()) if len(paths) > config.batch_size else 0
    if workers and (note := flags.workers_note(config.num_workers)):
        say(config, note)
    dataset = Pictures(paths, EvalTransform(facts["image_size"], facts["crop"]))
    loader = Loader(
        dataset,
        Order(len(paths), config.batch_size, shuffle=False),
        mean=facts["mean"],
        std=facts["std"],
        num_workers=workers,
        device=runtime.device,
    )
    found = []
    with Progress(len(loader), f"{len(paths)} images", unit="batches") as bar:
        for images, ids in bar.over(loader):
            best = logits_of(model, images, runtime).softmax(1).topk(min(config.top, len(facts["classes"])))
            rows = zip(ids.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
            found += [(paths[i], probabilities, classes) for i, probabilities, classes in rows]
    reasons = dict(loader.bad)
    return (
        [row for i, row in enumerate(found) if i not in reasons],
        [(paths[i], why) for i, why in reasons.items()],
    )


def deliver(config, weights: str, facts: dict, found, bad) -> None:
    """The answers as a table, unless a file was asked for."""
    from base import files

    classes, names = facts["classes"], [str(name) for name in facts["class_names"]]
    texts = {}
    if config.json:
        images = [
            {
                "file": path,
                "predictions": [
                    {"class": classes[c], "name": names[c], "probability": p}
                    for p, c in zip(ps, cs, strict=True)
                ],
            }
            for path, ps, cs in found
        ]
        texts[config.json] = files.json_text(
            {
                "checkpoint": Path(config.checkpoint).name,
                "weights": weights,
                "image_size": facts["image_size"],
                "images": images,
                "bad": [{"file": path, "reason": reason} for path, reason in bad],
            }
        )
    if config.csv:
        texts[config.csv] = files.csv_text(
            ("file", "rank", "class", "name", "probability"),
            (
                (path, rank, classes[c], names[c], f"{p:.6f}")
                for path, ps, cs in found
                for rank, (p, c) in enumerate(zip(ps, cs, strict=True), 1)
            ),
        )
    for target, text in texts.items():
        if target == "-":
            sys.stdout.write(printable(text))
        else:
            say(config, f"written: {files.write(target, text)}")
    if not texts:
        width = max((len(printable(path)) for path, *_ in found), default=0)
        for path, probabilities, guesses in found:
            for k, (p, c) in enumerate(zip(probabilities, guesses, strict=True)):
                alias = "" if names[c] == classes[c] else f"  ({classes[c]})"
                say(
                    config,
                    f"{printable(path) if k == 0 else '':<{width}}  {100 * p:>6.2f} %  {names[c]}{alias}",
                )


if __name__ == "__main__":
    sys.exit(run(main))
