"""Files that are replaced as a whole, so that a reader or a power cut never leaves half of one; JSON and hashes."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solq_lab.errors import DataError, UserError


class FileError(UserError):
    """A file that cannot be read as what it should be."""


_KINDS = {"d": "a folder", "p": "a named pipe", "s": "a socket", "c": "a device", "b": "a device"}  # as `ls` marks them


def other_than_file(path: str | Path) -> str | None:
    """What lies at a path, such as "a named pipe", whose reader may wait for ever; None: a file, or nothing."""
    try:
        return _KINDS.get(stat.filemode(os.stat(path).st_mode)[0])
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def require_file(path: str | Path, wanted: str, name: str = "") -> None:
    """Raise DataError where something else than a file lies at a path, whose `name` in the message may be another."""
    if what := other_than_file(path):
        raise DataError(f"{name or path}: {what}, no {wanted}")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileError, DataError: the file cannot be read or is not JSON.
    """
    require_file(path, "JSON file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: not readable as JSON: {error}") from None


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file that are not blank; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and its folders, those that are links too, but each folder once: links may form circles."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def write_json(path: str | Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | Path, text: str, *, errors: str = "strict") -> None:
    """Replace a text file; `errors` as in `str.encode`."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is made, to write to; without an error it then replaces `path`."""
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a longer one has no room for the rest: 255 bytes are allowed
    temporary = path.with_name(f".{name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # safetensors makes files that only their owner may read: note the usual mode, and restore it.
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        temporary.unlink()

        yield temporary
        temporary.chmod(usual_mode)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write: a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; on leaving without an error it takes the place of `path`, on disk.

    An error removes it. A kill leaves it behind; the next call in the same parent folder removes it.
    """
    for abandoned in path.parent.glob(".*.part"):
        shutil.rmtree(abandoned)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*sorted(temporary.iterdir()), temporary):
            flush_to_disk(written)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        flush_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
