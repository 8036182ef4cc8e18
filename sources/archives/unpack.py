"""Read tar and zip archives without trusting them; unpack one into a new folder, completely or not at all.

Only regular files with expected names are written; an archive with any other name is refused. `tarfile` is
not used: its security holes were in links, devices and sparse files, which these archives do not contain.
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
from zipfile import BadZipFile

from base.errors import DataError, ResourceError
from base.progress import Progress

BLOCK = 512  # bytes; a tar file consists of blocks of this size
CHUNK = 1 << 20
MAX_FILES = 3_000_000
MAX_SIZE = 256 << 20  # bytes per unpacked file; the largest, CIFAR-100's training images, has 155 MB
FILE, FOLDER, REMARK = "file", "folder", "remark"
TAR_KINDS = {
    b"0": FILE, b"\0": FILE, b"5": FOLDER, b"x": REMARK, b"g": REMARK,
    b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"L": "long name",
}  # fmt: skip
PUBLISHED = "this is not the published archive: download that one"
# Raised by damaged archives; so is an OSError without a number, or with EINVAL (a seek before the start).
DAMAGE = (EOFError, ValueError, NotImplementedError, OverflowError, BadZipFile, zlib.error, struct.error)


@dataclass
class Member:
    """An entry of an archive. Read it before asking for the next one."""

    name: str
    kind: str  # FILE, FOLDER, REMARK (a pax header), or a description of something else
    size: int  # bytes
    stream: BinaryIO
    offset: int = 0  # of its content in a tar file, bytes
    position: int = 0  # bytes read so far

    def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, b"" at the end. Raises EOFError if the archive is truncated."""
        wanted = min(limit, self.size - self.position)
        data = self.stream.read(wanted)
        if len(data) < wanted:
            raise EOFError(f"the archive ends inside {self.name}")
        self.position += wanted
        return data


@contextmanager
def opened(path: Path) -> Iterator[Iterator[Member]]:
    """Open a .tar, .tar.gz or .zip file and yield its members. Raises DataError if it is damaged."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield zip_members(archive)
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
                yield tar_members(stream)
    except DataError as error:
        raise DataError(f"{path}: {error.what}", error.fix) from error
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{path} is damaged: {error}", "download the archive again") from error


def tar_members(stream: BinaryIO, outer: Member | None = None) -> Iterator[Member]:
    """Yield the members of a POSIX or GNU tar file, or of one that is itself a member (`outer`) of `stream`.

    Format: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html, "ustar Interchange Format".
    """
    position, end = (outer.offset, outer.offset + outer.size) if outer else (0, float("inf"))
    while position + BLOCK <= end:
        stream.seek(position)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            break
        if not header.strip(b"\0"):
            return
        member = _tar_header(header, stream, position + BLOCK)
        position = member.offset + member.size + -member.size % BLOCK
        yield member
    raise EOFError("the archive ends without its end mark")


def _tar_header(header: bytes, stream: BinaryIO, offset: int) -> Member:
    try:
        # The checksum is the sum of all bytes, its own eight taken as spaces.
        if int(header[148:156].strip(b" \0"), 8) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise ValueError
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        if size < 0:
            raise ValueError
    except ValueError:
        raise DataError("a header of the archive is damaged", "download the archive again") from None
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return Member(os.fsdecode(name), TAR_KINDS.get(header[156:157], "special file"), size, stream, offset)


def zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    """Yield the members of a zip file; zipfile verifies their checksums while they are read."""
    packings = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for info in archive.infolist():
        file_type = stat.S_IFMT(info.external_attr >> 16)
        plain = file_type in (0, stat.S_IFREG, stat.S_IFDIR) and info.compress_type in packings
        if not plain or info.flag_bits & 1:
            yield Member(info.filename, "link, device, encrypted or unusually packed file", 0, archive.fp)
        elif info.is_dir():
            yield Member(info.filename, FOLDER, 0, archive.fp)
        else:
            with archive.open(info) as stream:
                yield Member(info.filename, FILE, info.file_size, stream)


def unpack(
    archive: Path,
    folder: Path,
    place: Callable[[str], str | None],
    expected_files: int = 0,
    inside: Callable[[Iterator[Member]], Iterator[Member]] = iter,
) -> None:
    """Unpack the regular files of `archive` into `folder`, which appears only when all of them are there.

    place: maps a name to its path below `folder`, or to None to leave it out; raises `unexpected` otherwise.
    expected_files: total of the progress bar; 0 hides it.
    inside: maps the archive's members to those to unpack, for archives inside an archive.
    Raises DataError for a damaged or unexpected archive, and ResourceError if `folder` cannot be written.
    """
    name = f"unpacking {archive.name}"
    bar = Progress(expected_files, name, unit="files", enabled=expected_files > 0)
    with bar, complete_or_absent(folder) as partial, opened(archive) as members:
        for member in inside(members):
            if member.kind in (FOLDER, REMARK):
                continue  # folders are made for their files; remarks hold times and owners
            if member.kind != FILE:
                raise DataError(f"contains a {member.kind} ({member.name})", PUBLISHED)
            target = place(member.name)
            if target is None:
                continue
            if member.size > MAX_SIZE:
                raise DataError(f"{member.name} is too large ({member.size:,} bytes)", PUBLISHED)
            if bar.count >= MAX_FILES:
                raise DataError(f"contains more than {MAX_FILES:,} files", PUBLISHED)
            _write(partial / target, member)
            bar.update()


def _write(path: Path, member: Member) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        with open(os.open(path, flags, 0o644), "wb") as file:
            while chunk := member.read(CHUNK):
                file.write(chunk)
    except FileExistsError as error:
        raise DataError(f"contains {member.name} twice", PUBLISHED) from error


def unexpected(name: str) -> DataError:
    """Return the error for a name that should not be in the archive."""
    return DataError(f"contains an unexpected name ({name})", PUBLISHED)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill. It gets its final name at the end, or is deleted if anything fails."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():  # left by a killed run
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.sync()  # a power cut must not leave empty files under the final name
        os.rename(partial, folder)
    except OSError as error:
        problem = f"cannot write {folder}: {error.strerror or error}"
        raise ResourceError(problem, "free some space and run the same command again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it no longer exists after the rename
