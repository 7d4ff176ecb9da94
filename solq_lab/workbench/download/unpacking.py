"""Zip archives from elsewhere: nothing lands outside the folder, every byte is checked, and it can be interrupted."""

from __future__ import annotations

import lzma
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from solq_lab.data.annotations import DataError
from solq_lab.workbench.download.transfer import Show, require_space

CHUNK = 1 << 20
FORBIDDEN = re.compile(
    r"[\x00-\x1f\\]|^/|^[A-Za-z]:|(^|/)\.{1,2}(/|$)|//"
)  # names that leave a folder, here or on Windows
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


def unpack(archive: Path, folder: Path, *, show: Show = lambda done, total: None) -> dict[str, int]:
    """Unpack every file of an archive into a folder; files that are there and right stay as they are.

    A file appears whole or not at all. Its bytes are compared with the archive's CRC-32. Links that lie in the folder
    already are the user's, and followed.

    Args:
        archive: zip file.
        folder: where to; made if it is missing.
        show: is told after every file how many bytes are unpacked, and of how many.

    Returns:
        Size in bytes of each file, by its name in the archive.

    Raises:
        DataError: no zip file, a damaged one, a member that leaves the folder or is no plain file, or a full disk.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = _checked_members(file, archive)
            folder.mkdir(parents=True, exist_ok=True)
            needed = sum(member.file_size for member in members if _size(folder / member.filename) != member.file_size)
            require_space(folder, needed, f"unpacking {archive.name}")
            done, total = 0, sum(member.file_size for member in members)
            for member in members:
                if not _is_there(folder / member.filename, member):
                    _unpack_one(file, member, folder / member.filename)
                done += member.file_size
                show(done, total)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; make room or remove what is in the way, "
            "and the same command goes on"
        ) from None
    except DAMAGE as error:
        raise DataError(f"{archive}: not a whole zip file: {error}; remove it and fetch it again") from None
    os.sync()  # one wait for all files: one for each would take longer than the unpacking
    return {member.filename: member.file_size for member in members}


def lacking(folder: Path, members: Mapping[str, int]) -> list[str]:
    """Names of the files that are not in the folder, or not of the given size in bytes."""
    return [name for name, size in members.items() if _size(folder / name) != size]


def _checked_members(file: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive, after a look at all names. Raises DataError for one that must not be unpacked."""
    members = [member for member in file.infolist() if not member.is_dir()]
    seen: set[str] = set()
    for member in file.infolist():
        fault = "comes twice" if member.orig_filename in seen else _fault(member)
        if fault:
            raise DataError(
                f"{archive}: member {member.orig_filename!r} {fault}; nothing was unpacked: images and annotations "
                "need no such thing, so do not trust this archive"
            )
        seen.add(member.orig_filename)
    return members


def _fault(member: zipfile.ZipInfo) -> str:
    """Why a member must not be unpacked; "" where it may."""
    name = member.orig_filename  # `filename` is cut at the first NUL
    if not name or FORBIDDEN.search(name):
        return "leaves the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if member.flag_bits & 1 else ""


def _is_there(path: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file has the bytes of a member, as an interrupted unpacking may have left it."""
    if _size(path) != member.file_size:
        return False
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum == member.CRC


def _unpack_one(file: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with file.open(member) as source, temporary.open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
