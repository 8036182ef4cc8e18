"""One file over the network: resumed where it stopped, and under its name only when it is whole and right.

Nothing here knows a dataset. While it grows the file is `<name>.part`, with `<name>.part.json` saying
of what; resuming asks the server for the rest of exactly that version, and checks run over the whole.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from base.errors import DataError, ResourceError, UsageError

CHUNK = 1 << 20
MAX_REDIRECTS = 5
HEAD = 512  # bytes that show what a file is
TIMEOUT = 60  # seconds without a single byte
SLOWEST, WINDOW = 1000, 120  # bytes a second, over so many seconds: slower is as good as stalled
MAGIC = {".tar": (257, b"ustar"), ".gz": (0, b"\x1f\x8b"), ".zip": (0, b"PK\x03\x04")}
Report = Callable[[str, int, int], None]  # "fetching" or "checking", bytes done, bytes in all


def silent(stage: str, done: int, total: int) -> None:
    """A `Report` for nobody."""


class Interrupted(Exception):
    """The transfer ended early; what came is kept and trying again goes on from there."""


@dataclass(frozen=True)
class Wanted:
    """A file to fetch, and what is known of it beforehand."""

    url: str
    path: Path
    size: int | None = None  # bytes
    md5: str | None = None
    allow_loopback: bool = False  # plain http to this machine: for tests, no flag sets it

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".part.json")

    @property
    def shown(self) -> str:
        """The URL for messages: its query may hold a token."""
        url = urlsplit(self.url)
        return f"{url.scheme}://{url.hostname}{url.path}"


def download(
    wanted: Wanted, report: Report = silent, *, tries: int = 5, pause: Callable[[float], None] = time.sleep
) -> Path:
    """Fetch `wanted.path`, or go on fetching it, and verify it.

    A transfer that breaks off is tried again, with growing pauses: `tries` times without lasting progress,
    and from the start at most as often. Raises UsageError for a URL that is not allowed, DataError for what
    the server sends, ResourceError for a full disk.
    """
    check_url(wanted.url, wanted)
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot make {wanted.path.parent}: {error.strerror}", "choose another --data-dir"
        ) from error
    reached, whole, failures, restarts = _have(wanted), 0, 0, 0

    def watched(stage: str, done: int, total: int) -> None:
        nonlocal reached, whole, restarts
        restarts += done < reached  # what had been kept was given up
        reached, whole = done, total
        report(stage, done, total)

    while True:
        before = reached
        try:
            _transfer(wanted, watched)
            break
        except Interrupted as error:
            lasting = reached - before > min(
                CHUNK, max(0, whole - before) // 100
            )  # a byte at a time never ends
            failures = 1 if lasting else failures + 1
            if failures >= tries or restarts >= tries:
                again = f", and began anew {restarts} times" if restarts else ""
                raise DataError(
                    f"{wanted.shown}: {error}{again} ({_have(wanted):,} bytes are kept in {wanted.part})",
                    "this server does not resume transfers as it should: try later, or another address"
                    if restarts >= tries
                    else "run the same command again: it goes on from there",
                ) from error
            pause(2.0**failures)
    verify(wanted.part, size=wanted.size, md5=wanted.md5, report=report)
    os.replace(wanted.part, wanted.path)
    wanted.note.unlink(missing_ok=True)
    return wanted.path


def check_url(url: str, wanted: Wanted, redirected_from: str | None = None) -> None:
    """https; or http for a file whose published checksum is known; nothing else, and no step down from https."""
    fix = "give the https:// address of the archive"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"not an address to download from: {error}", fix) from error
    if parts.username or parts.password:
        raise UsageError("the URL holds a user name or password", "remove it: it would end up in logs")
    if not parts.hostname or parts.scheme not in ("https", "http"):
        raise UsageError(
            f"not an address to download from: {parts.scheme or 'no scheme'}://{parts.hostname or ''}", fix
        )
    if parts.scheme == "https" or (
        wanted.allow_loopback and parts.hostname in ("127.0.0.1", "localhost", "::1")
    ):
        return
    if redirected_from is not None and (wanted.md5 is None or urlsplit(redirected_from).scheme == "https"):
        raise DataError(f"{wanted.shown} redirects to plain http", fix)
    if wanted.md5 is None:
        raise UsageError(
            f"{wanted.shown} is plain http, and no official checksum is known for this file", fix
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, each held to the rules of the first address."""

    max_redirections = MAX_REDIRECTS

    def __init__(self, wanted: Wanted):
        self.wanted = wanted

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_url(newurl, self.wanted, redirected_from=req.full_url)
        fp.close()  # urllib would read the body, however long
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Watched(io.RawIOBase):
    """What a connection sends, headers and all; TimeoutError where it merely drips."""

    def __init__(self, raw: io.RawIOBase):
        self.raw, self.since, self.came = raw, time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        count = self.raw.readinto(buffer)
        self.came += count or 0
        seconds = time.monotonic() - self.since
        if seconds >= WINDOW:
            if self.came < SLOWEST * seconds:
                raise TimeoutError(f"fewer than {SLOWEST:,} bytes a second for {seconds:.0f} s")
            self.since, self.came = time.monotonic(), 0
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.fp = io.BufferedReader(_Watched(self.fp.detach()))


class _Http(http.client.HTTPConnection):
    response_class = _Response


class _Https(http.client.HTTPSConnection):
    response_class = _Response


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(_Https, req)


def _opener(wanted: Wanted) -> urllib.request.OpenerDirector:
    """http and https only: urllib's default opener would also read file:, ftp: and data: addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _HttpHandler(),
        _HttpsHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(wanted),
    ):
        opener.add_handler(handler)
    return opener


def _have(wanted: Wanted) -> int:
    return wanted.part.stat().st_size if wanted.part.exists() else 0


def _transfer(wanted: Wanted, report: Report) -> None:
    """One request: what is missing is appended to the .part file, or everything written anew."""
    start = _have(wanted)
    validator = _resumable(wanted) if start else None
    if start and validator is None:
        start = 0
    request = urllib.request.Request(
        wanted.url, headers={"Accept-Encoding": "identity", "User-Agent": "resnet50-trainer"}
    )
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    try:
        with _opener(wanted).open(request, timeout=TIMEOUT) as response:
            _receive(wanted, response, start, report)
    except urllib.error.HTTPError as error:
        answer = f"the server answered {error.code} {error.reason.partition(chr(10))[0]}"
        if (
            error.code == 416 and start
        ):  # nothing after what we have: whole if the sizes agree, else of another version
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return
            _forget(wanted)
            raise Interrupted("the server has another version of the file") from error
        if error.code == 429 or error.code >= 500:
            raise Interrupted(answer) from error
        raise DataError(
            f"{wanted.shown}: {answer}",
            "check the address; links from image-net.org need you to be logged in, and expire",
        ) from error
    except (ValueError, http.client.InvalidURL) as error:  # a header or an address that is not one
        raise DataError(f"{wanted.shown}: {error}", "check the address, or use another") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DataError(
                f"{wanted.shown}: {reason.verify_message}", "this may not be the server it claims"
            ) from error
        raise Interrupted(str(reason) or type(error).__name__) from error


def _resumable(wanted: Wanted) -> str | None:
    """The validator of the version that .part is a piece of; None when nothing says it is the same file."""
    note = _note(wanted)
    validator = note.get("validator") if note.get("url") == wanted.url else None
    return validator if isinstance(validator, str) and validator.isprintable() else None


def _note(wanted: Wanted) -> dict:
    try:
        note = json.loads(wanted.note.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _forget(wanted: Wanted) -> None:
    # The part goes first: a note beside the wrong part would have two versions glued together.
    wanted.part.unlink(missing_ok=True)
    wanted.note.unlink(missing_ok=True)


def _receive(wanted: Wanted, response, start: int, report: Report) -> None:
    headers = response.headers
    if response.status == 206:
        found = re.fullmatch(
            r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", headers.get("Content-Range", "")
        )
        if not found or int(found[1]) != start or int(found[3]) != _note(wanted).get("size"):
            _forget(wanted)
            raise Interrupted("the server sent another part than the one asked for")
        total = int(found[3])
    else:  # 200: it ignores ranges, or has a new version; either way this is the whole file
        start, length = 0, headers.get("Content-Length", "")
        total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    head = _check_answer(wanted, response, total) if start == 0 else b""
    total = total or wanted.size
    _check_space(wanted, total - start)
    if start == 0:
        _forget(wanted)
        strong = headers.get("ETag", "")
        validator = strong if strong and not strong.startswith("W/") else headers.get("Last-Modified")
        _write_note(wanted, {"url": wanted.url, "validator": validator, "size": total})
    _append(wanted, response, head, start, total, report)


def _check_answer(wanted: Wanted, response, total: int | None) -> bytes:
    """Refuse what cannot be the file before a byte is kept; returns the first bytes."""
    kind = response.headers.get("Content-Type", "").lower()
    fix = "open the address in a browser: is it a log-in page, or has the link expired?"
    if kind.startswith("text/html"):
        raise DataError(f"{wanted.shown} is a web page ({kind}), not an archive", fix)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DataError(f"{wanted.shown} comes re-encoded ({response.headers['Content-Encoding']})", fix)
    if total is None and wanted.size is None:
        raise DataError(
            f"{wanted.shown}: the server does not say how long the file is", "use another address"
        )
    if None not in (total, wanted.size) and total != wanted.size:
        raise DataError(
            f"{wanted.shown} has {total:,} bytes; the published file has {wanted.size:,}",
            "use another address",
        )
    head = response.read(min(HEAD, total or HEAD))
    if not looks_like(wanted.path, head):
        raise DataError(f"{wanted.shown} does not begin like a {wanted.path.suffix} file", fix)
    return head


def looks_like(path: Path, head: bytes) -> bool:
    """Whether the first bytes of a file are those of its kind."""
    offset, magic = MAGIC.get(path.suffix, (0, b""))
    return head[offset : offset + len(magic)] == magic


def _check_space(wanted: Wanted, needed: int) -> None:
    free = shutil.disk_usage(wanted.path.parent).free
    if free < needed:
        raise ResourceError(
            f"{wanted.path.parent} has {free:,} bytes free; {needed:,} are still to come",
            "free some space or choose another --data-dir",
        )


def _write_note(wanted: Wanted, note: dict) -> None:
    partial = wanted.note.with_suffix(".tmp")
    partial.write_text(json.dumps(note))
    os.replace(partial, wanted.note)


def _append(wanted: Wanted, response, head: bytes, start: int, total: int, report: Report) -> None:
    done, chunk = start, head or response.read1(CHUNK)
    with open(wanted.part, "ab") as file:
        while chunk and done + len(chunk) <= total:
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise ResourceError(
                    f"cannot write {wanted.part}: {error.strerror}", "free some space and try again"
                ) from error
            done += len(chunk)
            report("fetching", done, total)
            chunk = response.read1(CHUNK)
    if chunk:
        _forget(wanted)
        raise DataError(
            f"{wanted.shown} sends more than the {total:,} bytes it announced", "use another address"
        )
    if done < total:
        raise Interrupted(f"the transfer ended at {done:,} of {total:,} bytes")


def verify(path: Path, *, size: int | None, md5: str | None, report: Report = silent) -> None:
    """Length, kind and checksum of a whole file. One that fails is moved aside as <name>.bad: DataError."""
    actual = path.stat().st_size
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        looks = looks_like(path.with_suffix("") if path.suffix == ".part" else path, file.read(HEAD))
        file.seek(0)
        while md5 is not None and (chunk := file.read(CHUNK)):
            digest.update(chunk)
            report("checking", file.tell(), actual)
    problem = (
        f"has {actual:,} bytes; the published file has {size:,}"
        if size is not None and actual != size
        else "is not an archive"
        if not looks
        else f"has the checksum {digest.hexdigest()}; the published file has {md5}"
        if md5 and digest.hexdigest() != md5
        else None
    )
    if problem:
        bad = path.with_name(path.name.removesuffix(".part") + ".bad")
        os.replace(path, bad)
        raise DataError(f"{bad.name.removesuffix('.bad')} {problem}; it is kept as {bad}", "fetch it again")
