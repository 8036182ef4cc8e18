"""Show a model on a local page: drop a photo on it, see the five likeliest classes and the evidence for each.

Only programs on this machine can reach the page, and it loads nothing from anywhere else. Photos stay in
memory: they are gone with the answer.
"""

from __future__ import annotations

import sys

from analysis import arguments
from base import flags
from base.errors import ResourceError, run

EPILOG = """examples:
  python -m analysis.demo checkpoints/best_resnet50_imagenet_1k.pt
  python -m analysis.demo CHECKPOINT --data-dir data/imagenet    with examples from the validation set
Over ssh: start it with --port 8000, on your own machine run ssh -L 8000:127.0.0.1:8000 HOST, and open
http://127.0.0.1:8000 there. Ctrl-C ends it."""


def build_parser() -> flags.Parser:
    parser = arguments.checkpoint_parser("demo", "Show a model on a local page.", EPILOG, writes=False)
    port = "Port on 127.0.0.1; by default a free one."
    parser.add_argument("--port", type=flags.number(int, 0, 65535), default=0, metavar="N", help=port)
    layer = "Module to draw evidence from; by default the last one with a spatial map."
    parser.add_argument("--layer", default="", metavar="NAME", help=layer)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = arguments.parse(build_parser(), argv)
    from analysis.demo_page import Demo
    from analysis.demo_server import Server
    from analysis.predictions import load_with_data

    with_data = not given.isdisjoint(flag.name for flag in flags.DATASET)
    demo = Demo(load_with_data(config, given, needs_data=with_data), config.layer)
    try:
        server = Server(config.port, demo.page(), demo.answer)
    except OSError as error:
        what = f"cannot listen on 127.0.0.1:{config.port}: {error.strerror}"
        raise ResourceError(what, "name another --port, or none for a free one") from None
    with server:
        print(f"open {server.address} in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
