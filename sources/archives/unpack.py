"""Archives, read without trust: plain files under expected names, into a fresh folder, complete or absent.

`tarfile` is not used: links, devices, sparse files and odd offsets are where its holes have been, and
the archives we read have none of them. A name that is not expected is refused, not cleaned up.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from base.errors import DataError, ResourceError

BLOCK = 512  # bytes; everything in a tar file begins at a multiple of it
CHUNK = 1 << 20
MAX_FILES = 3_000_000
PLAIN, FOLDER, REMARK = "file", "folder", "remark"
TAR_KINDS = {
    b"0": PLAIN,
    b"\0": PLAIN,
    b"5": FOLDER,
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"L": "long name",
    b"x": REMARK,
    b"g": REMARK,
}


@dataclass
class Member:
    """A file inside an archive; `read` gives its bytes once, before the next member is asked for."""

    name: str
    kind: str  # PLAIN, FOLDER, REMARK (pax headers), or what it is instead
    size: int  # bytes
    stream: BinaryIO
    left: int  # bytes of it that were not read yet

    def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes; b"" at the end. Raises EOFError where the archive ends too early."""
        n = self.left if n < 0 else min(n, self.left)
        data = self.stream.read(n)
        if len(data) < n:
            raise EOFError(f"the archive ends inside {self.name}")
        self.left -= n
        return data


def tar_members(stream: BinaryIO | Member) -> Iterator[Member]:
    """The members of a POSIX or GNU tar stream, in order (pubs.opengroup.org, pax, 'ustar Interchange Format')."""
    while True:
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise EOFError("the archive ends without its end mark")
        if not header.strip(b"\0"):
            return
        member = _tar_header(header, stream)
        padding = -member.size % BLOCK
        yield member
        while member.left:  # whoever took the member may have read only some of it
            member.read(CHUNK)
        stream.read(padding)


def _tar_header(header: bytes, stream: BinaryIO | Member) -> Member:
    try:
        # The sum counts its own eight bytes as spaces.
        if int(header[148:156].strip(b" \0"), 8) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise ValueError
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        if size < 0:
            raise ValueError
    except (ValueError, IndexError):
        raise DataError("a header of the archive is damaged", "fetch the archive again") from None
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return Member(os.fsdecode(name), TAR_KINDS.get(header[156:157], "special file"), size, stream, size)


def zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    """The members of a zip file; their checksums are compared as they are read."""
    for info in archive.infolist():
        mode = info.external_attr >> 16
        special = (
            stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
            or info.flag_bits & 1
            or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        )
        kind = (
            "link, device, encrypted or oddly packed file" if special else FOLDER if info.is_dir() else PLAIN
        )
        if kind != PLAIN:
            yield Member(info.filename, kind, 0, archive.fp, 0)
            continue
        with archive.open(info) as stream:
            yield Member(info.filename, kind, info.file_size, stream, info.file_size)


@contextmanager
def opened(path: Path) -> Iterator[Iterator[Member]]:
    """The members of a .tar, .tar.gz or .zip file; anything wrong inside it is a DataError naming it."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield zip_members(archive)
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
                yield tar_members(stream)
    except DataError as error:
        raise DataError(f"{path}: {error.what}", error.fix) from error
    except (
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        gzip.BadGzipFile,
        NotImplementedError,
        ValueError,
        struct.error,
        OverflowError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # that: sought before the start
            raise
        raise DataError(f"{path} is damaged: {error}", "fetch the archive again") from error


def unpack(
    members: Iterator[Member],
    into: Path,
    place: Callable[[str], str | None],
    *,
    max_size: int,
    report: Callable[[int], None] = lambda files: None,
) -> int:
    """Write the plain files among `members` into the new folder `into`; returns how many.

    place: where a member's name belongs below `into`, None to leave it out; raises DataError for a name
        that has no business there
    max_size: bytes; a larger file is refused
    """
    into.mkdir(parents=True)
    count, made = 0, set()
    for member in members:
        if member.kind in (FOLDER, REMARK):
            continue  # folders are made for the files in them; remarks hold times and owners
        if member.kind != PLAIN:
            raise DataError(
                f"holds a {member.kind} ({member.name})", "this is not the published archive: fetch that"
            )
        target = place(member.name)
        if target is None:
            continue
        if member.size > max_size or count >= MAX_FILES:
            raise DataError(
                f"{member.name} is too large ({member.size:,} bytes), or one file too many", "fetch it again"
            )
        path = into / target
        _write(path, member, new_folder=path.parent not in made)
        made.add(path.parent)
        count += 1
        report(count)
    return count


def _write(path: Path, member: Member, new_folder: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        if new_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, flags, 0o644), "wb") as file:
            while chunk := member.read(CHUNK):
                file.write(chunk)
    except FileExistsError as error:
        raise DataError(
            f"holds {member.name} twice", "this is not the published archive: fetch that"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}", "free some space and run it again"
        ) from error


def unexpected(name: str) -> DataError:
    """For a `place` function: this name should not be in the archive."""
    return DataError(f"holds an unexpected name ({name})", "this is not the published archive: fetch that")


@contextmanager
def complete_or_absent(final: Path) -> Iterator[Path]:
    """A fresh folder to fill, renamed to `final` at the end; after an error there is neither."""
    partial = final.with_name(final.name + ".partial")
    if partial.exists():  # a killed run's
        shutil.rmtree(partial)
    try:
        yield partial
        os.sync()  # a power cut after the rename must not find empty files under the final name
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
