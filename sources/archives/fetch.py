"""Download a file so that it can be resumed; it gets its final name when it is complete and verified.

Until then it is called `<name>.part`, and `<name>.part.json` keeps the ETag (or Last-Modified) of its
version, so that a resumed download asks for the rest of exactly that version.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from base import files
from base.errors import DataError, ResourceError, UsageError
from base.process import say
from base.progress import Progress

CHUNK = 1 << 20
HEAD = 512  # bytes that identify the type of a file
MAGIC = {".tar": (257, b"ustar"), ".gz": (0, b"\x1f\x8b"), ".zip": (0, b"PK\x03\x04")}  # offset, bytes
MAX_REDIRECTS = 5
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "resnet50-trainer"}
TIMEOUT = 60  # seconds without any byte


class Interrupted(Exception):
    """The transfer ended early; a retry continues it."""


@dataclass
class RemoteFile:
    """A file to download whose size and checksum are published."""

    url: str
    path: Path
    size: int  # bytes
    checksum: str  # MD5; or "sha256:" and its first digits
    restarts: int = field(default=0, init=False)  # how often the bytes received had to be discarded

    def __post_init__(self):
        self.part = self.path.with_name(self.path.name + ".part")
        self.note = self.path.with_name(self.path.name + ".part.json")

    @property
    def received(self) -> int:
        """Bytes downloaded so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def address(self) -> str:
        """The URL without its query, which may hold a token: for messages."""
        url = urlsplit(self.url)
        return f"{url.scheme}://{url.hostname}{url.path}"

    def discard(self) -> None:
        """Delete the bytes received so far."""
        self.restarts += self.received > 0
        # The part first: beside the note of another version, it would be joined to that version.
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def validator(self) -> str | None:
        """Return the validator of the version that the part belongs to, or None if it is unknown."""
        try:
            note = json.loads(self.note.read_text())
            validator = note["validator"] if note["url"] == self.url else None
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            return None
        return validator if isinstance(validator, str) and validator.isprintable() else None


def download(file: RemoteFile, *, tries: int = 5, pause: Callable[[float], None] = time.sleep) -> Path:
    """Download `file`, or resume its download, verify it, and return its path.

    A broken transfer is retried after growing pauses (`pause` waits for seconds). It is given up after
    `tries` failures in a row without real progress, or when the server has made it start over `tries` times.
    Raises UsageError for a URL that is not allowed, DataError for a wrong answer or a file that is not the
    published one, and ResourceError for a full disk.
    """
    check_url(file.url)
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file) as waited:
        return file.path if waited and file.path.exists() else _download(file, tries, pause)


@contextmanager
def _alone(file: RemoteFile) -> Iterator[bool]:
    """Hold a lock on the download: two processes that append to one part would spoil it.

    Yield whether another process held it before.
    """
    from filelock import FileLock, Timeout  # the kernel drops it with the process

    lock = FileLock(file.path.with_name(f".{file.path.name}.lock"), fallback_to_soft=False)
    waited = False
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waited = True
        say(f"waiting for another process, which downloads {file.path.name}")
        lock.acquire()
    except OSError as error:
        if error.errno not in files.NO_LOCKS:
            raise
    try:
        yield waited
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _download(file: RemoteFile, tries: int, pause: Callable[[float], None]) -> Path:
    if file.received > file.size:
        file.discard()
    failures = 0
    name = f"downloading {file.path.name}"
    with Progress(file.size >> 20, name, unit="MB", initial=file.received >> 20) as bar:
        while file.received != file.size:
            before = file.received
            try:
                _request_rest(file, bar)
            except Interrupted as error:
                # A server that sends one byte at a time would never finish.
                lasting = file.received - before > min(CHUNK, (file.size - before) // 100)
                failures = 1 if lasting else failures + 1
                if max(failures, file.restarts) >= tries:
                    raise _give_up(file, error, resumes=file.restarts < tries) from error
                pause(2.0**failures)
    verify(file.part, file.size, file.checksum)
    os.replace(file.part, file.path)
    file.note.unlink(missing_ok=True)
    return file.path


def size_of(url: str) -> int:
    """Ask the server for the size of a file in bytes. Raises DataError, or Interrupted without a network."""
    check_url(url)
    file = RemoteFile(url, Path("unknown"), 0, "")  # for its messages
    try:
        request = urllib.request.Request(url, headers=HEADERS, method="HEAD")
        with _opener().open(request, timeout=TIMEOUT) as response:
            return int(response.headers["Content-Length"])
    except urllib.error.HTTPError as error:
        raise _http_error(file, error, 0) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{file.address}: the server names no size", "use another URL") from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(file, error) from error


def check_url(url: str, redirected_from: str = "") -> None:
    """Refuse all URLs but https and http (checksums protect the files), and redirects from https to http."""
    fix = "give the http(s):// address of the archive"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"invalid URL: {error}", fix) from error
    if parts.username or parts.password:
        raise UsageError("the URL contains a user name or password", "remove it: it would end up in logs")
    if not parts.hostname or parts.scheme not in ("https", "http"):
        raise UsageError(f"invalid URL: {parts.scheme or 'no scheme'}://{parts.hostname or ''}", fix)
    if parts.scheme == "http" and redirected_from.startswith("https:"):
        raise DataError(f"https://{urlsplit(redirected_from).hostname} redirects to plain http", fix)


def _give_up(file: RemoteFile, error: Interrupted, resumes: bool) -> DataError:
    restarts = f", and it started over {file.restarts} times" if file.restarts else ""
    kept = f"{file.received:,} bytes are kept in {file.part}"
    fix = "run the same command again to resume" if resumes else "this server cannot resume: use another URL"
    return DataError(f"{file.address}: {error}{restarts} ({kept})", fix)


def _request_rest(file: RemoteFile, bar: Progress) -> None:
    """Request the missing bytes and append them; start over if the server sends the whole file."""
    validator = file.validator()
    start = file.received if validator else 0
    headers = HEADERS | ({"Range": f"bytes={start}-", "If-Range": validator} if start else {})
    try:
        request = urllib.request.Request(file.url, headers=headers)
        with _opener().open(request, timeout=TIMEOUT) as response:
            _receive(file, response, start, bar)
    except urllib.error.HTTPError as error:
        raise _http_error(file, error, start) from error
    except (ValueError, http.client.InvalidURL) as error:  # also an invalid header
        raise DataError(f"{file.address}: {error}", "check the URL, or use another one") from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(file, error) from error


def _broken(file: RemoteFile, error: Exception) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        fix = "do not trust this server: it may not be the one it claims to be"
        return DataError(f"{file.address}: {reason.verify_message}", fix)
    return Interrupted(str(reason) or type(error).__name__)


def _http_error(file: RemoteFile, error: urllib.error.HTTPError, start: int) -> Exception:
    answer = f"the server answered {error.code} {error.reason.partition(chr(10))[0]}"
    if error.code == 416 and start:  # Range Not Satisfiable
        file.discard()
        return Interrupted("the server has another version of the file")
    if error.code == 429 or error.code >= 500:
        return Interrupted(answer)
    fix = "check the URL; links from image-net.org require a login, and they expire"
    return DataError(f"{file.address}: {answer}", fix)


def _receive(file: RemoteFile, response: http.client.HTTPResponse, start: int, bar: Progress) -> None:
    sent = response.headers.get("Content-Range", "")
    if response.status != 206:  # the whole file: the server ignores ranges or has a new version
        start = 0
    elif not re.fullmatch(rf"bytes {start}-\d+/{file.size}", sent):
        file.discard()
        raise Interrupted("the server sent another range than the one requested")
    first = b"" if start else _first_bytes(file, response)
    free = shutil.disk_usage(file.path.parent).free
    if free + (0 if start else file.received) < file.size - start:  # what cannot be continued makes way
        problem = f"{free:,} bytes are free in {file.path.parent}; {file.size - start:,} are still to come"
        raise ResourceError(problem, "free some space, or choose another --data-dir")
    if start == 0:
        file.discard()
        etag = response.headers.get("ETag", "W/")  # a weak one does not promise the same bytes
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        files.write_json(file.note, {"url": file.url, "validator": validator})
    _append(file, response, first, bar)


def _first_bytes(file: RemoteFile, response: http.client.HTTPResponse) -> bytes:
    """Return the first bytes of a whole file. Raises DataError for what cannot be that file."""
    fix = "open the URL in a browser: is it a login page, or has the link expired?"
    content_type = response.headers.get("Content-Type", "").lower()
    encoding = response.headers.get("Content-Encoding", "identity")
    if content_type.startswith("text/html"):
        raise DataError(f"{file.address} is a web page ({content_type}), not an archive", fix)
    if encoding.lower() != "identity":
        raise DataError(f"{file.address} is sent re-encoded ({encoding})", fix)
    if response.length not in (None, file.size):
        problem = f"has {response.length:,} bytes; the published file has {file.size:,}"
        raise DataError(f"{file.address} {problem}", fix)
    first = response.read(min(HEAD, file.size))
    offset, magic = MAGIC.get(file.path.suffix, (0, b""))
    if first[offset : offset + len(magic)] != magic:
        raise DataError(f"{file.address} does not start like a {file.path.suffix} file", fix)
    return first


def _append(file: RemoteFile, response: http.client.HTTPResponse, chunk: bytes, bar: Progress) -> None:
    received = file.received
    chunk = chunk or response.read1(CHUNK)
    with open(file.part, "ab") as part:
        while chunk and received + len(chunk) <= file.size:
            try:
                part.write(chunk)
                part.flush()
            except OSError as error:
                problem = f"cannot write {file.part}: {error.strerror}"
                raise ResourceError(problem, "free some space and run the same command again") from error
            received += len(chunk)
            bar.update((received >> 20) - bar.count)
            chunk = response.read1(CHUNK)
    if chunk:
        file.discard()
        raise DataError(f"{file.address} sends more than the {file.size:,} bytes expected", "use another URL")
    if received < file.size:
        raise Interrupted(f"the transfer ended at {received:,} of {file.size:,} bytes")


def verify(path: Path, size: int, expected: str) -> None:
    """Check a file's size and checksum. If one is wrong, rename it to <name>.bad and raise DataError.

    expected: as `RemoteFile.checksum`
    """
    kind, _, digits = expected.rpartition(":")
    name, actual = path.name.removesuffix(".part"), path.stat().st_size
    if actual != size:
        problem = f"has {actual:,} bytes; the published file has {size:,}"
    elif (found := checksum(path, kind or "md5"))[: len(digits)] != digits:
        problem = f"has the checksum {found}; the published file has {digits}"
    else:
        return
    bad = path.with_name(name + ".bad")
    os.replace(path, bad)
    raise DataError(f"{name} {problem}; it was renamed to {bad}", "download it again")


def checksum(path: Path, kind: str) -> str:
    """Return the digits of a file's checksum of this `kind`: md5 or sha256."""
    digest = hashlib.new(kind, usedforsecurity=False)
    title = f"checking {path.name.removesuffix('.part')}"
    with open(path, "rb") as file, Progress(path.stat().st_size >> 20, title, unit="MB") as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update((file.tell() >> 20) - bar.count)
    return digest.hexdigest()


# --- connections: http and https only, few redirects ------------------------------------------------


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https; urllib's own also opens file:, ftp: and data: URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_url(newurl, redirected_from=req.full_url)
        fp.close()  # urllib would read the body, however long it is
        return super().redirect_request(req, fp, code, msg, headers, newurl)
