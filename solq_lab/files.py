"""Writing files so that a reader, or a machine that lost power, finds the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file in one piece: a reader, or a machine that lost power, has the old content or the new."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving without an error it takes the place of `path`, on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(usual_mode)  # safetensors makes files that nobody but their owner may read
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
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
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
