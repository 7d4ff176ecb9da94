"""One file over HTTP, however often the connection breaks: what has arrived is kept and asked for only once.

A transfer goes on by HTTP Range (RFC 9110, section 14). If-Range guards against a file that has changed meanwhile.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from solq_lab.data.annotations import DataError
from solq_lab.files import flush_to_disk, write_json

logger = logging.getLogger(__name__)

CHUNK = 1 << 18  # bytes between two looks at the progress
MAX_WAIT = 60.0  # seconds between two attempts, and at most what a server's Retry-After can ask for
TRY_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}  # and 5xx
Show = Callable[[int, int | None], None]  # bytes done with, and of how many (None: the server does not say)


class Broken(Exception):
    """An attempt that ended early; `wait` is how many seconds the server asked for, 0 where it did not."""

    def __init__(self, message: str, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Origin(NamedTuple):
    """Where the bytes of an unfinished file come from.

    url: the address.
    version: what the server tells versions of the file apart by, see `_version`; "" where it does not.
    total: bytes of the whole file; None where the server does not say.
    """

    url: str
    version: str
    total: int | None


class PartFile:
    """An unfinished file `<name>.part` beside its final place, and `<name>.part.json`, its origin."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def origin(self) -> Origin | None:
        """As noted before the first byte; None where nothing can be read."""
        try:
            return Origin(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, origin: Origin) -> None:
        """Forget what is there and note where the new bytes come from. Raises DataError where the disk is full."""
        with _writing(self.path):
            self.path.write_bytes(b"")
            write_json(self._note, origin._asdict())

    def append(self, file: io.RawIOBase, chunk: bytes) -> None:
        """Write to the part file, opened without a buffer: closing it must not fail again on what did not fit.

        Raises:
            DataError: the disk is full.
        """
        rest = memoryview(chunk)
        with _writing(self.path):
            while rest:
                rest = rest[file.write(rest) :]

    def finish(self) -> None:
        """Give the file its name, with all its bytes on the disk. Raises DataError where that fails."""
        with _writing(self.path):
            flush_to_disk(self.path)
            self.path.replace(self.target)
            self._note.unlink(missing_ok=True)
            flush_to_disk(self.target.parent)


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    show: Show = lambda done, total: None,
    retries: int = 8,
    backoff: float = 1.0,
    timeout: float = 60.0,
) -> None:
    """Copy what `url` serves to `target`, which appears when it is whole; an earlier attempt is taken up.

    Args:
        url: http or https.
        target: file to make.
        size: bytes that the file must have; None: as many as the server says.
        show: is told after every piece how many bytes are there, and of how many.
        retries: attempts in a row that may bring nothing new.
        backoff: seconds before the second attempt; they double with each one in vain, up to a minute.
        timeout: seconds without a byte after which an attempt is given up.

    Raises:
        DataError: the server refuses, offers a file of another size, the disk is full, or the retries are used up.
    """
    part = PartFile(target)
    farthest, in_vain = part.size, 0
    while True:
        try:
            _fetch_rest(url, part, size, show, timeout)
        except (Broken, http.client.HTTPException, OSError) as error:
            reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            in_vain = 0 if part.size > farthest else in_vain + 1
            farthest = max(farthest, part.size)
            if in_vain > retries or _is_final(error):
                attempts = f"after {in_vain} attempts that brought nothing new " if in_vain > 1 else ""
                kept = f"{describe_size(part.size)} are kept, and the same command goes on from there"
                nothing = "nothing has arrived: check the address (--base-url) and the network"
                raise DataError(f"{url}: given up {attempts}({reason}); {kept if part.size else nothing}") from None
            wait = max(min(backoff * 2**in_vain, MAX_WAIT), getattr(error, "wait", 0.0))
            logger.info("%s: %s; next attempt in %.1f s", target.name, reason, wait)
            time.sleep(wait)
        else:
            return part.finish()


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to begin what cannot end.

    Raises:
        DataError: the disk of `folder` has less than `needed` bytes left for `purpose`.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {purpose} needs {describe_size(needed)}, {describe_size(free)} are free; make room for "
            f"{describe_size(needed - free)} more or choose a folder on another disk"
        )


def describe_size(count: int) -> str:
    """A number of bytes in the unit a person would choose: 512 bytes, 19.3 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell an error of the disk from one of the network, which another attempt may cure."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; what has arrived is kept: make room, and the same command "
            "goes on"
        ) from None


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end the same way: an address that is none, or a certificate that does not fit."""
    reason = getattr(error, "reason", None)
    return isinstance(error, http.client.InvalidURL) or isinstance(reason, ssl.SSLCertVerificationError)


def _fetch_rest(url: str, part: PartFile, size: int | None, show: Show, timeout: float) -> None:
    """One attempt at what is missing. Raises Broken, or an error of the network, where some still is."""
    if size is not None and part.size > size:
        part.begin(Origin(url, "", None))
    if part.size == size:
        return
    request = urllib.request.Request(url, headers=_headers(url, part))
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as refusal:
        with refusal:
            _check_refusal(refusal, url, part, size)
        return
    with response:
        start, total = _span(response)
        _check_size(url, size, total)
        skip = _align(part, Origin(url, _version(response), total), start)
        if total is not None:
            require_space(part.path.parent, total - part.size, f"the rest of {part.target.name}")
        _receive(response, part, skip, total, show)


def _headers(url: str, part: PartFile) -> dict[str, str]:
    headers = {"User-Agent": "solq-lab", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if part.origin is not None and part.origin.url == url and part.origin.version:
            headers["If-Range"] = part.origin.version
    return headers


def _align(part: PartFile, now: Origin, start: int) -> int:
    """Make a part file ready for a body that begins at byte `start`; how many bytes of the body it has already."""
    before, arrived = part.origin, part.size
    if start == arrived and (arrived == 0 or before is None or now.total == before.total):
        if arrived == 0:
            part.begin(now)
        return 0
    if start == 0 and before == now and now.version:  # the same file, from a server that knows no ranges
        return arrived
    logger.info("%s: the file has changed, or nothing says that it has not; from the start", now.url)
    part.begin(now)
    if start:
        raise Broken(f"asked for byte {arrived}, the server sends another file from byte {start}")
    return 0


def _receive(response: http.client.HTTPResponse, part: PartFile, skip: int, total: int | None, show: Show) -> None:
    """Append the body without its first `skip` bytes. Raises Broken where it ends before `total`."""
    done = part.size
    with part.path.open("ab", buffering=0) as file:
        while total is None or done < total:
            chunk = response.read1(CHUNK if total is None else min(CHUNK, total - done + skip))
            if not chunk:
                break
            dropped = min(skip, len(chunk))
            skip -= dropped
            part.append(file, chunk[dropped:])
            done += len(chunk) - dropped
            show(done, total)
    if total is not None and done < total:
        raise Broken(f"the connection ended at {describe_size(done)} of {describe_size(total)}")


def _check_refusal(refusal: urllib.error.HTTPError, url: str, part: PartFile, size: int | None) -> None:
    """Return where an error status only says that no byte is missing.

    Raises:
        Broken: another attempt may help.
        DataError: none will.
    """
    if refusal.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if refusal.headers.get("Content-Range", "") == f"bytes */{part.size}":
            _check_size(url, size, part.size)
            return
        part.begin(Origin(url, "", None))
        raise Broken("the server has fewer bytes than have arrived; from the start")
    if refusal.code in TRY_LATER or refusal.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        asked = refusal.headers.get("Retry-After", "")
        wait = min(float(asked), MAX_WAIT) if asked.isdecimal() else 0.0
        raise Broken(f"the server answers {refusal.code} {refusal.reason}", wait=wait)
    raise DataError(f"{url}: the server answers {refusal.code} {refusal.reason}; check the address (--base-url)")


def _check_size(url: str, size: int | None, offered: int | None) -> None:
    if None not in (size, offered) and offered != size:
        raise DataError(
            f"{url}: the server offers {offered} bytes, the file has {size}; it is another file, or a page in its "
            "place; check the address (--base-url), and for other archives give their --sums"
        )


def _span(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte of a body and the size of the whole file, None where the server does not say."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if span is None:
            raise Broken(f"a part without its place (Content-Range {response.headers.get('Content-Range')!r})")
        return int(span[1]), None if span[2] == "*" else int(span[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _version(response: http.client.HTTPResponse) -> str:
    """What If-Range may hold: the strong ETag, else the date of the last change, else nothing."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
