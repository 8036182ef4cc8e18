"""Downloading, verifying, unpacking, arranging: every way a server, archive or killed run can go wrong."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import tarfile
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import download_imagenet
from base import errors
from base.errors import DataError, ResourceError, UsageError
from download_imagenet import Archive, main
from sources import folders
from sources.archives import fetch, ilsvrc, unpack
from sources.archives.fetch import RemoteFile, check_url, download
from sources.layouts import open_dataset

BODY = b"\x1f\x8b" + random.Random(0).randbytes(300_000)  # starts like a .gz file
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; the path's first part says how: /plain/x, /short/x, /html/x ..."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        how, _, name = self.path.lstrip("/").partition("/")
        body, etag = self.server.files[name], self.server.etag
        if how.isdigit():
            return self.send_error(int(how))
        if how in HOSTILE:
            return HOSTILE[how](self, body)
        if how == "to":  # /to/<address>
            return self.answer(302, {"Location": self.server.location}, b"")
        if how == "html":
            return self.answer(
                200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Please log in</html>"
            )
        if how == "login":
            page = b"<!doctype html>Please log in".ljust(len(body))
            return self.answer(200, {"Content-Type": "application/x-tar"}, page)
        if how == "unsaid":
            return self.answer(200, {"Content-Length": None}, body)
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        wants = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wants and how != "norange" and self.headers.get("If-Range") == etag:
            start, status = int(wants[1]), 206
            if start >= len(body):
                return self.answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            start -= how == "wrongpart"
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        if how == "gzip":
            headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(rest))
        self.answer(status, headers, rest[: (len(rest) + 1) // 2] if how == "short" else rest)

    def answer(self, status, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def cut_and_wrong(handler, body):
    """Cut the transfer, each time elsewhere, and answer Range with another part."""
    asked = len(handler.server.requests)
    if handler.headers.get("Range"):
        return handler.answer(206, {"Content-Range": f"bytes 7-{len(body) - 1}/{len(body)}"}, body[7:])
    handler.answer(
        200, {"ETag": '"v1"', "Content-Length": str(len(body))}, body[: len(body) // 2 + 5000 * asked]
    )


def other_total(handler, body):
    """Continue at the requested position, but of a file of another length."""
    start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
    headers = {"ETag": '"v1"', "Content-Length": str(len(body))}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{10**15}"
    handler.answer(206 if start else 200, headers, body[start:][:1000])


def a_byte_each_time(handler, body):
    start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
    headers = {"ETag": '"v1"', "Content-Length": str(len(body) - start)}
    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    handler.answer(206 if start else 200, headers, body[start : start + 1 if start else 512])


def endless(handler, body):
    """Send more than the published length without announcing it."""
    with contextlib.suppress(OSError):
        handler.answer(200, {"Content-Length": None}, body)
        while True:
            handler.wfile.write(bytes(1 << 16))
            handler.server.sent += 1 << 16


def endless_redirect(handler, body):
    with contextlib.suppress(OSError):
        handler.answer(302, {"Location": handler.server.location, "Content-Length": None}, b"")
        while True:
            handler.wfile.write(bytes(1 << 16))
            handler.server.sent += 1 << 16


HOSTILE = {
    "cutwrong": cut_and_wrong,
    "othertotal": other_total,
    "bytewise": a_byte_each_time,
    "endless": endless,
    "endlessredirect": endless_redirect,
    "oddlength": lambda handler, body: handler.answer(200, {"Content-Length": "\xb2"}, body),
    "hugerange": lambda handler, body: handler.answer(
        206, {"Content-Range": f"bytes 0-9/{'9' * 5000}"}, body
    ),
    "later": lambda handler, body: handler.answer(503, {"Retry-After": "99999999999"}, b""),
}


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.etag, server.location, server.requests = {"x.tar.gz": BODY}, '"v1"', "", []
    server.sent = 0
    server.at = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(
        download, "__kwdefaults__", {**download.__kwdefaults__, "pause": lambda seconds: None}
    )


@pytest.fixture
def want(server, tmp_path):
    def make(how="plain", **known):
        known = {"size": len(BODY), "checksum": MD5} | known
        return RemoteFile(f"{server.at}/{how}/x.tar.gz", tmp_path / "x.tar.gz", **known)

    return make


def write_note(file, validator='"v1"'):
    file.note.write_text(json.dumps({"url": file.url, "validator": validator}))


def refused(kind, *args, **options):
    with pytest.raises(kind) as caught:
        download(*args, **options)
    assert "\n" not in caught.value.what and "\n" not in caught.value.fix
    return caught.value


def test_a_download_leaves_the_complete_file_and_nothing_else(want, tmp_path, monkeypatch):
    shown = []
    bar = fetch.Progress
    monkeypatch.setattr(
        fetch, "Progress", lambda *args, **options: shown.append(args) or bar(*args, **options)
    )
    path = download(want())
    assert path.read_bytes() == BODY and os.listdir(tmp_path) == ["x.tar.gz"]
    assert [desc for _, desc in shown] == ["downloading x.tar.gz", "checking x.tar.gz"]


def test_a_short_read_is_kept_and_resumed(want, server, tmp_path):
    error = refused(DataError, want("short"), tries=1)
    assert "150,001 of 300,002 bytes" in error.what and "to resume" in error.fix
    assert not (tmp_path / "x.tar.gz").exists() and (tmp_path / "x.tar.gz.part").stat().st_size == 150_001
    note = (tmp_path / "x.tar.gz.part.json").read_text().replace("/short/", "/plain/")
    (tmp_path / "x.tar.gz.part.json").write_text(note)
    assert download(want()).read_bytes() == BODY
    assert server.requests[-1] == ("/plain/x.tar.gz", "bytes=150001-", '"v1"')


def test_a_download_over_a_breaking_connection_completes(want, server):
    assert download(want("short"), tries=2).read_bytes() == BODY  # each try brings half of the rest
    assert len(server.requests) > 10


def test_a_server_that_ignores_ranges_starts_over(want):
    wanted = want("norange")
    wanted.part.write_bytes(b"\x1f\x8bstale")
    write_note(wanted)
    assert download(wanted).read_bytes() == BODY


def test_a_file_that_changed_on_the_server_starts_over(want, server):
    wanted = want()
    wanted.part.write_bytes(b"\x1f\x8b" + bytes(1000))
    write_note(wanted, '"v0"')
    assert download(wanted).read_bytes() == BODY and server.requests[0][2] == '"v0"'


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": "http://elsewhere", "validator": "\\"v1\\""}'])
def test_a_part_of_unknown_origin_starts_over(note, want):
    wanted = want()
    wanted.part.write_bytes(b"\x1f\x8b of something else")
    wanted.note.write_text(note)
    assert download(wanted).read_bytes() == BODY


def test_a_complete_part_needs_no_request(want):
    wanted = want()
    wanted.part.write_bytes(BODY)
    write_note(wanted)
    assert download(wanted).read_bytes() == BODY
    wanted.path.rename(wanted.part)
    wanted.part.write_bytes(
        BODY + b"more"
    )  # longer than the file: of another version, whatever the note says
    write_note(wanted)
    assert download(wanted).read_bytes() == BODY


def test_another_range_than_the_one_requested_is_not_appended(want):
    wanted = want("wrongpart")
    wanted.part.write_bytes(BODY[:1000])
    write_note(wanted)
    assert download(wanted).read_bytes() == BODY


def test_a_second_process_waits_for_the_first_and_takes_its_file(want, server, tmp_path, capsys):
    """Both would append to one part otherwise."""
    path, said = tmp_path / "x.tar.gz", ""
    with ThreadPoolExecutor(1) as pool:
        with fetch._alone(want()) as waited:
            second = pool.submit(download, want())
            while "waiting for another process, which downloads x.tar.gz" not in said:
                assert not second.done()
                said += capsys.readouterr().out
                time.sleep(0.01)
            path.write_bytes(BODY)  # the first one is complete
            assert not waited and not second.done()
        assert second.result() == path and not server.requests
    assert os.listdir(tmp_path) == ["x.tar.gz"]


def test_a_file_with_a_wrong_checksum_is_renamed(want, tmp_path):
    assert "checksum" in refused(DataError, want(checksum="0" * 32)).what
    assert sorted(os.listdir(tmp_path)) == ["x.tar.gz.bad", "x.tar.gz.part.json"]
    assert download(want()).read_bytes() == BODY  # and does not affect the next attempt


def test_a_wrong_length_is_refused_before_the_transfer(want, tmp_path):
    assert "300,002 bytes; the published file has 7" in refused(DataError, want(size=7)).what
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how,words", [
    ("html", "web page"), ("login", "does not start like a .gz"), ("gzip", "re-encoded"),
    ("404", "404 Not Found"), ("403", "403 Forbidden"),
])  # fmt: skip
def test_what_is_not_the_requested_file_is_refused_and_not_kept(how, words, want, tmp_path, server):
    assert words in refused(DataError, want(how)).what
    assert os.listdir(tmp_path) == [] and len(server.requests) == 1


@pytest.mark.parametrize("how", ["500", "503", "429"])
def test_a_busy_server_is_retried_then_given_up(how, want, server):
    pauses = []
    assert how in refused(DataError, want(how), tries=3, pause=pauses.append).what
    assert len(server.requests) == 3 and pauses == [2.0, 4.0]


@pytest.mark.parametrize("how", ["cutwrong", "othertotal", "bytewise"])
def test_a_server_without_lasting_progress_is_given_up(how, want, server, tmp_path):
    error = refused(DataError, want(how))
    assert len(server.requests) <= 11  # five starts from zero after the first, each with one wrong answer
    assert "are kept in" in error.what and ("to resume" in error.fix or "another URL" in error.fix)


def test_bytes_received_are_kept_after_giving_up(want, tmp_path):
    refused(DataError, want("bytewise"))
    assert (tmp_path / "x.tar.gz.part").read_bytes() == BODY[: 512 + 4]


def test_a_body_without_end_is_cut_off(want, server, tmp_path):
    assert "more than the 300,002 bytes" in refused(DataError, want("endless")).what
    assert os.listdir(tmp_path) == [] and server.sent < 50 << 20


def test_the_body_of_a_redirect_is_not_read(want, server):
    server.location = f"{server.at}/plain/x.tar.gz"
    assert download(want("endlessredirect")).read_bytes() == BODY
    assert server.sent < 50 << 20


def test_an_invalid_content_range_has_no_traceback(want, server):
    refused(DataError, want("hugerange"))
    assert len(server.requests) <= 5


def test_the_server_cannot_choose_the_pause(want):
    pauses = []
    assert "503" in refused(DataError, want("later"), pause=pauses.append).what
    assert pauses == [2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    "address", ["http://[", "https://[::1", "https://a..b/x", "http://127.0.0.1:99999999/x"]
)
def test_an_invalid_url_has_no_traceback(address, tmp_path, server, want):
    wanted = RemoteFile(address, tmp_path / "x.zip", 10, MD5)
    refused((DataError, UsageError), wanted)
    server.location = address
    refused((DataError, UsageError), want("to"))


def test_an_unreachable_server_is_reported(tmp_path):
    file = RemoteFile("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", 10, MD5)
    assert "refused" in refused(DataError, file).what


@pytest.mark.parametrize("how", ["unsaid", "oddlength"])
def test_a_server_need_not_send_the_length(how, want):
    assert download(want(how)).read_bytes() == BODY


def test_redirects_are_followed_a_few_times_and_only_to_the_web(want, server, tmp_path):
    server.location = f"{server.at}/plain/x.tar.gz"
    assert download(want("to")).read_bytes() == BODY
    server.location = f"{server.at}/to/x.tar.gz"
    assert refused(DataError, want("to")) and len(server.requests) < 12
    for address in ("file:///etc/passwd", "ftp://example.invalid/x", "data:,x"):
        server.location = address
        error = refused((DataError, UsageError), want("to"))
        assert "invalid URL" in error.what or "302" in error.what


def test_a_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://image-net.org/x.tar")
    follow = fetch._Redirects().redirect_request
    address = "https://elsewhere.org/x.tar"
    assert follow(request, io.BytesIO(), 302, "Found", {}, address).full_url == address
    with pytest.raises(DataError, match="redirects to plain http"):
        follow(request, None, 302, "Found", {}, "http://elsewhere.org/x.tar")


def test_only_http_and_https_urls_are_allowed():
    check_url("https://image-net.org/x")
    check_url("http://image-net.org/x")  # its checksum is known
    for url in (
        "file:///etc/passwd",
        "ftp://a/b",
        "data:,x",
        "image-net.org/x",
        "https://user:secret@a.org/x",
        "",
    ):
        with pytest.raises(UsageError):
            check_url(url)


def test_messages_hide_secrets(want, server):
    wanted = replace(want("404"), url=f"{server.at}/404/x.tar.gz?token=SECRET")
    server.files["x.tar.gz?token=SECRET"] = b""
    assert "SECRET" not in str(refused(DataError, wanted))
    with pytest.raises(UsageError) as caught:
        check_url("https://me:SECRET@image-net.org/x")
    assert "SECRET" not in str(caught.value)


def test_a_disk_without_room_is_reported_before_the_transfer(want, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    assert "300,002 are still to come" in refused(ResourceError, want()).what
    assert os.listdir(tmp_path) == []


def test_bytes_that_cannot_be_continued_count_as_free(want, monkeypatch):
    wanted = want()
    wanted.part.write_bytes(b"of another version")
    for lacking in (1, 0):
        free = len(BODY) - wanted.received - lacking
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if lacking:
            assert "still to come" in refused(ResourceError, wanted).what and wanted.received
    assert download(wanted).read_bytes() == BODY


def test_a_disk_that_fills_up_keeps_the_bytes_received(want, monkeypatch, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert "cannot write" in refused(ResourceError, want()).what
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert download(want()).read_bytes() == BODY


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_download_killed_at_twenty_offsets_is_resumed_to_the_same_bytes(
    want, server, monkeypatch, tmp_path
):
    monkeypatch.setattr(fetch, "CHUNK", 4096)
    offsets = sorted(random.Random(1).sample(range(1, len(BODY) - 8192), 20))
    for offset in offsets:
        before = want().received
        child = os.fork()
        if child == 0:
            try:
                file = want()
                fetch.Progress.update = lambda bar, count, file=file, offset=offset: (
                    file.received < offset or die()
                )
                download(file)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (tmp_path / "x.tar.gz").exists()
        assert offset <= (tmp_path / "x.tar.gz.part").stat().st_size <= max(before, offset) + 4096
    assert download(want()).read_bytes() == BODY
    resumed = [asked for _, asked, _ in server.requests if asked]
    assert len(resumed) == 20  # all requests except the first asked for the rest only


# --- archives ---


def tar_of(members, name="x.tar", format=tarfile.USTAR_FORMAT):
    """A tar file's bytes: (name, content) or a prepared TarInfo."""
    file = io.BytesIO()
    with tarfile.open(mode="w:gz" if name.endswith("gz") else "w", fileobj=file, format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def anything(name):
    return name


def write_and_unpack(data, into, place=anything, name="x.tar"):
    """Unpack, and return the number of files."""
    path = into.parent / name
    path.write_bytes(data)
    unpack.unpack(path, into, place)
    return sum(file.is_file() for file in into.rglob("*"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_written_by_tarfile_is_read_back(format, name, tmp_path):
    rng = random.Random(0)
    files = {f"d{i}/{'f' * i}.bin": rng.randbytes(rng.randrange(2000)) for i in range(1, 40)} | {
        "empty": b"",
        "block": bytes(512),
    }
    folder = special("d1", tarfile.DIRTYPE)
    folder.uname = "Müller"  # makes a pax header in PAX_FORMAT
    data = tar_of([folder, *files.items()], name, format)
    assert write_and_unpack(data, tmp_path / "out", name=name) == len(files)
    out = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert out == files
    assert stat.S_IMODE((tmp_path / "out/empty").stat().st_mode) & 0o7133 == 0


EVIL = {
    "a symbolic link": [special("a", tarfile.SYMTYPE, "/etc/passwd")],
    "a hard link": [("b", b"1"), special("a", tarfile.LNKTYPE, "b")],
    "a link and a file through it": [special("d", tarfile.SYMTYPE, "/tmp"), ("d/evil", b"1")],
    "a device": [special("a", tarfile.CHRTYPE)],
    "a pipe": [special("a", tarfile.FIFOTYPE)],
    "a sparse file": [special("a", tarfile.GNUTYPE_SPARSE)],
    "the same name twice": [("a", b"1"), ("a", b"2")],
    "a long name": [("n" * 300, b"1")],
    "a file too large": [("a", bytes((1 << 20) + 1))],
}


@pytest.mark.parametrize("members", EVIL.values(), ids=EVIL.keys())
def test_a_tar_with_more_than_plain_files_is_refused(members, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_SIZE", 1 << 20)
    with pytest.raises(DataError) as caught:
        write_and_unpack(tar_of([("fine", b"1"), *members], format=tarfile.GNU_FORMAT), tmp_path / "out")
    assert str(tmp_path / "x.tar") in caught.value.what
    assert os.listdir(tmp_path) == ["x.tar"]


NAMES = ["../evil", "/tmp/evil", "n01440764/../../evil.JPEG", "n01440764\\..\\evil",
         "n01440764/n01440764_1.JPEG/x", "n01440764/n01443537_1.JPEG", "n01440764/n01440764_1.jpeg\n",
         "evil.py", "", "."]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_unexpected_names_are_refused_and_nothing_is_written_outside(name, tmp_path):
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    for place in (ilsvrc.train_place, ilsvrc.val_place({b"ILSVRC2012_val_00000001": b"n01440764"})):
        with pytest.raises(DataError):
            place(name)
        with pytest.raises(DataError, match="unexpected name"):
            write_and_unpack(
                tar_of([("n01440764/n01440764_1.JPEG", b"1"), (name, b"2")]),
                inside / "out",
                ilsvrc.train_place,
            )
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [inside / "x.tar"]


def test_a_label_cannot_lead_outside():
    with pytest.raises(DataError):
        ilsvrc.val_place({b"ILSVRC2012_val_00000001": b"../../evil"})("ILSVRC2012_val_00000001.JPEG")


def test_a_damaged_tar_is_refused_as_a_whole(tmp_path):
    data = tar_of([("a", b"1" * 3000), ("b", b"2" * 3000)])
    for cut in (0, 100, 512, 600, 4000, 4700, 7168):
        with pytest.raises(DataError, match=r"x\.tar"):
            write_and_unpack(data[:cut], tmp_path / "out")
    with pytest.raises(DataError, match="damaged"):  # not a multiple of 512
        write_and_unpack(data[: 512 + 3072 + 300], tmp_path / "out")
    for header in (0, 512 + 3072):
        for byte in (0, 124, 148, 156, 257):  # name, size, checksum, kind, magic
            flipped = bytearray(data)
            flipped[header + byte] ^= 0x11
            with pytest.raises(DataError, match="damaged"):
                write_and_unpack(bytes(flipped), tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 12, b"77777777777\0", b"1x\0"]
)
def test_odd_sizes_in_a_tar_header_are_refused(size, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_SIZE", 1 << 40)
    header = bytearray(tar_of([("a", b"1")])[:1024] + bytes(1024))
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    with pytest.raises(DataError):
        write_and_unpack(bytes(header), tmp_path / "out")


def zip_of(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_a_zip_is_read_and_its_checksums_compared(tmp_path):
    files = {"d/": b"", "d/a": b"1" * 5000, "b": b""}
    assert write_and_unpack(zip_of(files), tmp_path / "out", name="x.zip") == 2
    assert (tmp_path / "out/d/a").read_bytes() == b"1" * 5000
    content = random.Random(0).randbytes(5000)
    whole = zip_of({"a": content})
    damaged = bytearray(whole)
    damaged[2000] ^= 1
    for data in (bytes(damaged), whole[:3000], b"", b"PK\3\4"):
        with pytest.raises(DataError, match="damaged"):
            write_and_unpack(data, tmp_path / "out2", name="x.zip")
    assert not (tmp_path / "out2").exists()


def test_a_mutated_archive_is_read_or_refused(tmp_path):
    rng = random.Random(0)
    for name, data in (
        ("x.zip", zip_of({f"{k}": rng.randbytes(200) for k in range(5)})),
        ("x.tar", tar_of([(f"{k}", rng.randbytes(700)) for k in range(5)])),
    ):
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 2, 8))):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(DataError):
                write_and_unpack(
                    bytes(damaged[: rng.choice((None, rng.randrange(len(data))))]),
                    tmp_path / "out",
                    anything_plain,
                    name,
                )
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def anything_plain(name):
    return name if re.fullmatch(r"\w{1,9}", name) else None


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("a")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(DataError, match="link"):
        write_and_unpack(zip_of({link: "/etc/passwd"}), tmp_path / "out", name="x.zip")


def test_an_unpacked_folder_is_complete_or_absent(tmp_path):
    (tmp_path / "out.partial" / "half").mkdir(parents=True)  # a killed run's
    assert write_and_unpack(tar_of([("a", b"1")]), tmp_path / "out") == 1
    assert os.listdir(tmp_path / "out") == ["a"]
    with pytest.raises(KeyboardInterrupt), unpack.complete_or_absent(tmp_path / "other") as partial:
        (partial / "half").write_bytes(b"1")
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["out", "x.tar"]


# --- from end to end, in miniature ---

IDS = ["n01440764", "n01443537", "n01484850"]
LABELS = [1, 0, 2, 2, 0, 1]  # of the validation images, positions in IDS


def class_tar(wnid, count=3):
    return tar_of([(f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode()) for i in range(count)])


def small_imagenet():
    """{archive name: content} of an ImageNet of 9 + 6 images."""
    from scipy.io import savemat

    synsets = np.array(
        [(k + 1, wnid) for k, wnid in enumerate(IDS)], [("ILSVRC2012_ID", object), ("WNID", object)]
    )
    savemat(meta := io.BytesIO(), {"synsets": synsets.reshape(-1, 1)})
    kit, truth = ilsvrc.DEVKIT_FOLDER, "".join(f"{k + 1}\n" for k in LABELS).encode()
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", f"val {i}".encode()) for i in range(1, 7)]
    return {
        "ILSVRC2012_img_train.tar": tar_of([(f"{wnid}.tar", class_tar(wnid)) for wnid in IDS]),
        "ILSVRC2012_img_val.tar": tar_of(val),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of(
            [
                special(kit, tarfile.DIRTYPE),
                (f"{kit}/readme.txt", b"read me"),
                (f"{kit}/data/meta.mat", meta.getvalue()),
                (f"{kit}/data/ILSVRC2012_validation_ground_truth.txt", truth),
            ],
            "x.tar.gz",
        ),
    }


@pytest.fixture
def small(monkeypatch):
    """The archives of a small ImageNet, and download_imagenet made to expect them."""
    files = small_imagenet()
    for constant in ("TRAIN", "VAL", "DEVKIT"):
        archive = getattr(download_imagenet, constant)
        data = files[archive.name]
        known = replace(archive, size=len(data), md5=hashlib.md5(data).hexdigest())
        monkeypatch.setattr(download_imagenet, constant, known)
    monkeypatch.setattr(download_imagenet, "COUNTS", (9, 6, 3))
    return files


def is_arranged(data_dir):
    found = open_dataset("imagenet", data_dir)
    val = {found.val.name(i): found.val.labels[i] for i in range(6)}
    assert found.train.read([4]) == [b"n01443537 1"] and len(found.train) == 9
    return val == {f"val/{IDS[k]}/ILSVRC2012_val_{i:08d}.JPEG": k for i, k in enumerate(LABELS, start=1)}


def auto_args(server, data_dir):
    at = f"{server.at}/plain/ILSVRC2012_"
    return [
        "--method",
        "auto",
        "--data-dir",
        str(data_dir),
        "--train-url",
        f"{at}img_train.tar",
        "--val-url",
        f"{at}img_val.tar",
        "--devkit-url",
        f"{at}devkit_t12.tar.gz",
    ]


def test_auto_goes_from_two_addresses_to_class_folders_and_can_be_run_again(small, server, tmp_path, capsys):
    server.files |= small
    assert main(auto_args(server, tmp_path)) == 0
    assert is_arranged(tmp_path)
    assert f"python train.py --data-dir {tmp_path}" in capsys.readouterr().out
    asked = len(server.requests)
    assert asked == 3 and main(auto_args(server, tmp_path)) == 0 and len(server.requests) == asked
    shutil.rmtree(tmp_path / "val")  # the archive is there: nothing to fetch
    assert main(auto_args(server, tmp_path)) == 0 and is_arranged(tmp_path) and len(server.requests) == asked
    for path in tmp_path.glob("ILSVRC2012_*"):  # all arranged: the archives are no longer needed
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert main(["--method", "manual", "--data-dir", str(tmp_path)]) == 0 and is_arranged(tmp_path)


def test_auto_killed_anywhere_can_be_run_again(small, server, tmp_path, monkeypatch):
    server.files |= small
    steps = [
        (fetch, "_append"),
        (fetch, "verify"),
        (unpack, "_write"),
        (os, "sync"),
        (folders, "list_classes"),
    ]
    for k, (module, name) in enumerate(steps * 2):
        child = os.fork()
        if child == 0:
            calls, original = [], getattr(module, name)

            def dies(*args, calls=calls, original=original, after=1 + 2 * (k >= len(steps)), **options):
                calls.append(1)
                if len(calls) == after:
                    die()
                return original(*args, **options)

            setattr(module, name, dies)
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                main(auto_args(server, tmp_path))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        for part, count in (("train", 9), ("val", 6)):
            files = [p for p in (tmp_path / part).rglob("*") if p.is_file()]
            assert len(files) in (0, count)  # complete or absent
    assert main(auto_args(server, tmp_path)) == 0 and is_arranged(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.part"))


def test_manual_explains_what_to_do_and_arranges_existing_files(small, tmp_path, capsys):
    assert main(["--method", "manual", "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for words in (
        "image-net.org",
        "148 GB",
        "6.7 GB",
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        str(tmp_path),
    ):
        assert words in said
    assert os.listdir(tmp_path) == []
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
    assert main(["--method", "manual", "--data-dir", str(tmp_path)]) == 0 and is_arranged(tmp_path)


def test_manual_names_missing_files_and_refuses_a_partial_download(small, tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(small["ILSVRC2012_img_val.tar"][:2000])
    with pytest.raises(DataError, match=r"no ILSVRC2012_devkit_t12\.tar\.gz"):
        main(["--method", "manual", "--data-dir", str(tmp_path)])
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(small["ILSVRC2012_devkit_t12.tar.gz"])
    with pytest.raises(DataError, match="2,000 bytes"):
        main(["--method", "manual", "--data-dir", str(tmp_path)])
    assert not (tmp_path / "val").exists() and (tmp_path / "ILSVRC2012_img_val.tar.bad").exists()


@pytest.mark.parametrize("killed_after", [None, 1, 4, 6, 7])
def test_a_flat_val_is_filed_into_class_folders(killed_after, small, tmp_path, monkeypatch):
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        (tmp_path / name).write_bytes(small[name])
    (tmp_path / "val").mkdir()
    for i in range(1, 7):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(b"val")
    (tmp_path / "val" / ".DS_Store").write_bytes(b"")
    if killed_after is not None:
        real, calls = os.rename, []

        def rename(*args):
            calls.append(args)
            if len(calls) > 1 + 1 + killed_after:  # the devkit's and val's own renames come first
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", rename)
            main(["--method", "manual", "--data-dir", str(tmp_path)])
        assert (tmp_path / "val").exists() == (killed_after == 7)  # after the last move
    method = "auto" if killed_after else "manual"  # both find what was begun
    assert main(["--method", method, "--data-dir", str(tmp_path)]) == 0 and is_arranged(tmp_path)
    leftovers = "val.flat" if killed_after == 7 else "val.leftovers"
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["ILSVRC2012_devkit_t12", "train", "val", leftovers]


def test_a_data_dir_for_the_hubs_own_cache_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download_imagenet, "download_simple", lambda name, folder: asked.append(name))
    with pytest.raises(UsageError, match="--data-dir has no effect"):
        main(["--dataset", "hf:someone/pictures", "--data-dir", str(tmp_path)])
    assert main(["--dataset", "hf:someone/pictures"]) == 0 and asked == ["hf:someone/pictures"]


def test_a_train_archive_with_foreign_things_in_a_class_is_refused(small, tmp_path, monkeypatch):
    inner = tar_of([("n01440764_1.JPEG", b"1"), special("n01440764_2.JPEG", tarfile.SYMTYPE, "/etc/passwd")])
    cut = class_tar(IDS[0])[:1300] + bytes(700)
    for name, content in (
        ("n01440764.tar", inner),
        ("../n01440764.tar", class_tar(IDS[0])),
        ("n01440764.tar", class_tar(IDS[1])),
        ("n01440764.tar", cut),
    ):
        data = tar_of([(name, content)])
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(DataError):
            unpack.unpack(tmp_path / "x.tar", tmp_path / "train", ilsvrc.train_place, 1, ilsvrc.train_members)
        assert os.listdir(tmp_path) == ["x.tar"]


def real_counts():
    """Listings with ImageNet's real numbers of images: 732 to 1,300 for training, 50 for validation."""
    names = [b"n%08d" % k for k in range(1000)]
    counts = np.full(1000, 1300)
    counts[:105] = 1118  # 895 x 1300 + 105 x 1118 = 1,280,890
    counts[0] += 1_281_167 - counts.sum()
    train = {name: [b"x"] * count for name, count in zip(names, counts, strict=True)}
    return {
        "train": folders.Listing(b"/", train),
        "val": folders.Listing(b"/", {name: [b"x"] * 50 for name in names}),
    }


def test_the_counts_of_the_real_imagenet_are_checked_and_differences_named(monkeypatch):
    listings = real_counts()
    monkeypatch.setattr(folders, "list_classes", lambda data_dir, part: listings[part])
    ilsvrc.check_counts(Path("x"), 1_281_167, 50_000, 1000)

    def problem():
        with pytest.raises(DataError) as caught:
            ilsvrc.check_counts(Path("x"), 1_281_167, 50_000, 1000)
        return caught.value.what

    listings["train"].by_class[b"n00000007"].pop()
    assert "train/ has 1,281,166 images of 1,000 classes, 1,281,167 of 1,000 expected" in problem()
    listings.update(real_counts())
    listings["val"].by_class[b"n00000003"].append(listings["val"].by_class[b"n00000004"].pop())
    assert problem().endswith("val classes without exactly 50 images: n00000003, n00000004")
    listings.update(real_counts())
    listings["val"].by_class[b"n10000000"] = listings["val"].by_class.pop(b"n00000999")
    assert "classes in only one of train/ and val/: n00000999, n10000000" in problem()


def test_imagenets_archives_are_the_published_ones():
    archives = (download_imagenet.TRAIN, download_imagenet.VAL, download_imagenet.DEVKIT)
    assert [(archive.name, archive.size, archive.md5) for archive in archives] == [
        ("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
        ("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
        ("ILSVRC2012_devkit_t12.tar.gz", 2_568_634, "fa75699e90414af021442c21a62c3abf"),
    ]
    assert download_imagenet.COUNTS == (1_281_167, 50_000, 1000)


def small_simple(monkeypatch, server, dataset, data, images):
    what = download_imagenet.SIMPLE[dataset]
    archive = Archive(
        what.archive.name, len(data), hashlib.md5(data).hexdigest(), f"{server.at}/plain/{what.archive.name}"
    )
    server.files[what.archive.name] = data
    monkeypatch.setitem(download_imagenet.SIMPLE, dataset, replace(what, archive=archive, images=images))


def tiny_files():
    files = {"tiny-imagenet-200/": b"", "tiny-imagenet-200/test/images/test_0.JPEG": b"no label"}
    for wnid in IDS[:2]:
        files[f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt"] = b""
        files |= {f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG": b"x" for i in range(2)}
        files[f"tiny-imagenet-200/val/images/val_{wnid[-1]}.JPEG"] = b"y"
    rows = "".join(f"val_{wnid[-1]}.JPEG\t{wnid}\t0\t0\t9\t9\n" for wnid in IDS[:2])
    return files | {
        "tiny-imagenet-200/val/val_annotations.txt": rows.encode(),
        "tiny-imagenet-200/words.txt": b"",
    }


def test_simple_fetches_tiny_imagenet(server, tmp_path, monkeypatch, capsys):
    small_simple(monkeypatch, server, "tiny-imagenet", zip_of(tiny_files()), (4, 2))
    arguments = ["--method", "simple", "--dataset", "tiny-imagenet", "--data-dir", str(tmp_path)]
    assert main(arguments) == 0 and main(arguments) == 0 and len(server.requests) == 1
    found = open_dataset("tiny-imagenet", tmp_path)
    assert (len(found.train), len(found.val), len(found.classes)) == (4, 2, 2)
    assert not (tmp_path / "tiny-imagenet-200/test").exists()
    assert f"python train.py --dataset tiny-imagenet --data-dir {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["tiny-imagenet-200/../evil", "elsewhere/x", "tiny-imagenet-200/train/evil.py"]
)
def test_simple_refuses_a_zip_with_foreign_names(name, server, tmp_path, monkeypatch):
    small_simple(monkeypatch, server, "tiny-imagenet", zip_of(tiny_files() | {name: b"evil"}), (4, 2))
    with pytest.raises(DataError, match="unexpected name"):
        main(["--method", "simple", "--dataset", "tiny-imagenet", "--data-dir", str(tmp_path)])
    assert os.listdir(tmp_path) == ["tiny-imagenet-200.zip"]


def test_simple_names_a_wrong_count(server, tmp_path, monkeypatch):
    small_simple(monkeypatch, server, "tiny-imagenet", zip_of(tiny_files()), (5, 2))
    with pytest.raises(DataError, match=r"has 4 \+ 2 images, not 5 \+ 2"):
        main(["--method", "simple", "--dataset", "tiny-imagenet", "--data-dir", str(tmp_path)])


def test_simple_fetches_cifar(server, tmp_path, monkeypatch):
    import pickle

    rows = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}
    members = {"train": rows, "test": rows, "meta": {b"fine_label_names": [b"apple", b"bear"]}}
    files = [(f"cifar-100-python/{name}", pickle.dumps(content)) for name, content in members.items()]
    data = tar_of(
        [special("cifar-100-python", tarfile.DIRTYPE), *files, ("cifar-100-python/file.txt~", b"")], "x.gz"
    )
    small_simple(monkeypatch, server, "cifar100", data, (2, 2))
    assert main(["--method", "simple", "--dataset", "cifar100", "--data-dir", str(tmp_path)]) == 0
    assert open_dataset("cifar100", tmp_path).classes == ("apple", "bear")


def test_simple_explains_why_it_cannot_have_imagenet(capsys):
    with pytest.raises(UsageError):
        main(["--method", "simple"])
    said = capsys.readouterr().out
    assert "terms" in said and "tiny-imagenet" in said and "hf:" in said and "--method manual" in said


def test_without_a_method_the_options_are_listed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--method manual", "--method auto", "--method simple", "digits"))


@pytest.mark.parametrize("arguments", [
    ["--method", "auto"], ["--method", "auto", "--train-url", "https://a.org/x"],
    ["--method", "fast"], ["--meth", "auto"],
    ["--method", "manual", "--val-url", "https://a.org/x"], ["--method", "auto", "--dataset", "cifar10"],
    ["--method", "simple", "--dataset", "digits"], ["--method", "simple", "--dataset", "mnist"],
    ["--method", "simple", "--dataset", "imagenet100"],
    ["--method", "auto", "--train-url", "file:///etc/passwd", "--val-url", "https://a.org/x"],
    ["--method", "auto", "--train-url", "https://me:pw@a.org/x", "--val-url", "https://a.org/x"],
])  # fmt: skip
def test_usage_errors_come_before_any_work(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["download_imagenet.py", *arguments])
    with pytest.raises(UsageError):
        main(arguments)
    assert errors.run(lambda argv: main(arguments)) == 2
    assert os.listdir(tmp_path) == []
