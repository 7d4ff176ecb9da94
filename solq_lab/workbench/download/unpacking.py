"""Zip archives unpacked safely: nothing lands outside the folder, every byte is checked."""

import lzma
import os
import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from solq_lab.bars import progress_bar
from solq_lab.errors import DataError
from solq_lab.workbench.download.transfer import require_space

CHUNK = 1 << 20
# Names that leave a folder, here or on Windows.
FORBIDDEN = re.compile(r"[\x00-\x1f\\]|^$|^/|^[A-Za-z]:|(^|/)\.{1,2}(/|$)|//")
PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)  # kinds of file; 0 from tools that record none
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack every file of an archive into a folder.

    A file appears complete or not at all, and its bytes are compared with the archive's CRC-32. Links that lie in the
    folder already belong to the user and are followed.

    Returns:
        Size in bytes of each file, by its name in the archive.

    Raises:
        DataError: not a zip file, a damaged one, a member that leaves the folder or is no plain file, or a full disk.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            _check_members(file, archive)
            folder.mkdir(parents=True, exist_ok=True)
            members = [member for member in file.infolist() if not member.is_dir()]
            sizes = {member.filename: member.file_size for member in members}
            require_space(folder, sum(sizes[name] for name in lacking(folder, sizes)), f"unpacking {archive.name}")

            total = sum(sizes.values())
            with progress_bar(desc=f"unpacking {archive.name}", unit="B", unit_scale=True, total=total) as bar:
                for member in members:
                    path = folder / member.filename
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary = path.with_name(f".{path.name}.part")
                    try:
                        with file.open(member) as source, temporary.open("wb") as target:
                            shutil.copyfileobj(source, target, CHUNK)
                        temporary.replace(path)
                    finally:
                        temporary.unlink(missing_ok=True)
                    bar.update(member.file_size)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; make room or remove what is in the way, "
            "and run it again"
        ) from None
    except DAMAGE as error:
        raise DataError(f"{archive}: not a whole zip file: {error}; remove it and fetch it again") from None
    os.sync()  # once for all files: once for each would take longer than the unpacking
    return sizes


def lacking(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Names of the files that are not in the folder, or not of the given size in bytes."""
    found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
    return [name for name, size in sizes.items() if found.get(name) != size]


def _check_members(file: zipfile.ZipFile, archive: Path) -> None:
    """Raise DataError for a member that must not be unpacked."""
    seen: set[str] = set()
    for member in file.infolist():
        name = member.orig_filename  # `filename` is cut at the first NUL
        fault = None
        if FORBIDDEN.search(name):
            fault = "leaves the folder"
        elif stat.S_IFMT(member.external_attr >> 16) not in PLAIN:
            fault = "is a link or a device"
        elif name in seen:
            fault = "comes twice"

        if fault:
            raise DataError(
                f"{archive}: member {name!r} {fault}; nothing was unpacked: images and annotations need no such "
                "thing, so do not trust this archive"
            )
        seen.add(name)
