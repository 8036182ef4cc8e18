"""A web server for one page and one question, which answers nobody but a browser on this machine."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from base.errors import UserError, resource_error

HOST = "127.0.0.1"
LARGEST_BODY = 32 << 20  # bytes
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Server(ThreadingHTTPServer):
    """Serves `page` at /, and answer(image, query) as JSON at /answer, one at a time.

    port:   0 for a free one
    answer: (bytes of the image, {name: value} of the query) -> what JSON can hold. Its UserErrors go to
            the page.
    Raises OSError if the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, page: str, answer: Callable[[bytes, dict[str, str]], dict]):
        self.page, self.answer, self.one_at_a_time = page.encode(), answer, threading.Lock()
        super().__init__((HOST, port), Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # which a closed tab causes
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds without a byte, after which a connection is dropped
    server: Server

    def do_GET(self) -> None:
        if self.is_ours():
            found = urlsplit(self.path).path == "/"
            self.reply(200, "text/html; charset=utf-8", self.server.page) if found else self.refuse(404)

    def do_POST(self) -> None:
        if not self.is_ours():
            return
        url, length = urlsplit(self.path), self.headers.get("Content-Length", "")
        if url.path != "/answer":
            self.refuse(404)
        elif not (length.isascii() and length.isdecimal()):
            self.refuse(411)
        elif len(length) > 12 or int(length) > LARGEST_BODY:
            self.refuse(413, f"the file is larger than {LARGEST_BODY >> 20} MiB")
        else:
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self.answer(self.rfile.read(int(length)), query)

    def is_ours(self) -> bool:
        """Refuse other sites: DNS rebinding (another Host), and their scripts (another Origin)."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        ours = host.partition(":")[0] in (HOST, "localhost") and origin in (None, f"http://{host}")
        if not ours:
            self.refuse(403)
        return ours

    def answer(self, image: bytes, query: dict[str, str]) -> None:
        try:
            with self.server.one_at_a_time:
                found = self.server.answer(image, query)
        except UserError as error:
            return self.refuse(400, error.what)
        except (OSError, RuntimeError, MemoryError) as error:  # a deleted example, too little memory
            known = resource_error(error)
            self.refuse(500, known.what if known else f"the server failed: {type(error).__name__}")
            if known is None:
                raise  # a bug: the terminal shows where
            return None
        return self.reply(200, "application/json", json.dumps(found).encode())

    def refuse(self, status: int, reason: str = "") -> None:
        reason = reason or self.responses[status][0]
        self.close_connection = True
        self.reply(status, "application/json", json.dumps({"error": reason}).encode())

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "demo"

    def log_message(self, *args: object) -> None:
        """Print nothing: what was asked stays between the page and the model."""
