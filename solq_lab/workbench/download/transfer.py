"""One file over HTTP, resumed after every broken connection (HTTP Range: RFC 9110, section 14)."""

import http.client
import logging
import math
import re
import shutil
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from solq_lab.bars import progress_bar
from solq_lab.errors import DataError

logger = logging.getLogger(__name__)

CHUNK = 1 << 18  # bytes between two updates of the progress bar
MAX_WAIT = 60.0  # seconds between two attempts, and the most that a server's Retry-After can impose
TEMPORARY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}  # and 5xx


class TransferError(Exception):
    """An attempt that ended early."""

    def __init__(self, message: str, *, wait: float = 0.0, final: bool = False) -> None:
        super().__init__(message)
        self.wait = wait  # seconds before the next attempt, as the server's Retry-After says; 0 where it does not
        self.final = final  # another attempt would end the same way


def part_of(target: Path) -> Path:
    """The unfinished file beside its final place."""
    return target.with_name(f"{target.name}.part")


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    retries: int = 8,
    backoff: float = 1.0,
    timeout: float = 60.0,
    max_bytes: int = 10**12,
    max_seconds: float = math.inf,
) -> None:
    """Download `url` to `target`, which appears when it is complete; re-running resumes.

    A file that changes on the server between two attempts is not noticed here: compare a checksum.

    Args:
        url: http or https.
        target: file to make.
        size: bytes that the file must have; None: as many as the server announces.
        retries: attempts in a row that may bring no new byte.
        backoff: seconds before the second attempt; doubled after each attempt without a new byte, up to a minute.
        timeout: seconds without a byte after which an attempt is given up.
        max_bytes, max_seconds: of the whole file.

    Raises:
        DataError: the server rejects the request, offers a file of another size or a page in its place, the disk is
            full, the file is too large or too slow, or the retries are used up.
    """
    url, latest = urllib.parse.quote(url, safe=string.punctuation), time.monotonic() + max_seconds
    part = part_of(target)
    try:
        part.touch()
        farthest, failures = part.stat().st_size, 0
        with progress_bar(desc=target.name, unit="B", unit_scale=True, total=size) as bar:
            while part.stat().st_size != size:
                try:
                    for arrived in _fetch_rest(url, part, size, bar, timeout):
                        if arrived > max_bytes or time.monotonic() > latest:
                            limits = f"{describe_size(max_bytes)} or {max_seconds:g} s"
                            raise DataError(f"{url}: takes more than {limits}; fetch it yourself and name the file")
                    break
                except TransferError as error:
                    # Only attempts without progress count: a slow, shaky line may break a thousand times.
                    arrived = part.stat().st_size
                    failures = 0 if arrived > farthest else failures + 1
                    farthest = max(farthest, arrived)
                    if error.final or failures > retries:
                        raise _give_up(url, error, failures, arrived) from None
                    wait = max(min(backoff * 2**failures, MAX_WAIT), error.wait)
                    logger.info("%s: %s; next attempt in %.1f s", target.name, error, wait)
                    time.sleep(wait)
        part.replace(target)
    except OSError as error:  # of the disk: those of the network are TransferErrors
        raise DataError(
            f"{part}: cannot be written: {error.strerror}; what has arrived is kept: make room, re-running resumes"
        ) from None


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check that the disk of `folder` has `needed` bytes left for `purpose`.

    Raises:
        DataError: it has fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {purpose} needs {describe_size(needed)}, {describe_size(free)} are free; make room for "
            f"{describe_size(needed - free)} more or choose a folder on another disk"
        )


def describe_size(count: int) -> str:
    """A number of bytes in a readable unit: 512 bytes, 19.3 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _give_up(url: str, error: TransferError, failures: int, arrived: int) -> DataError:
    attempts = f"after {failures} attempts without progress " if failures > 1 else ""
    cure = "nothing has arrived: check the address and the network"
    if arrived:
        cure = f"{describe_size(arrived)} are kept, re-running resumes from there"
    return DataError(f"{url}: given up {attempts}({error}); {cure}")


def _fetch_rest(url: str, part: Path, size: int | None, bar: Any, timeout: float) -> Iterator[int]:
    """One attempt at the missing bytes: how many have arrived; raises TransferError where it ends early."""
    arrived = part.stat().st_size
    headers = {"User-Agent": "solq-lab", "Accept-Encoding": "identity"}
    if arrived:
        headers["Range"] = f"bytes={arrived}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _rejection(url, error) from None
        part.write_bytes(b"")
        raise TransferError("the server has no more bytes than have arrived; starting again") from None
    except (OSError, http.client.HTTPException) as error:
        raise _network_error(error) from None

    with response:
        start, total = _span(response)
        if start not in (0, arrived):  # 0: a server without ranges sends the whole file
            raise TransferError(f"the server sends byte {start} instead of byte {arrived}")
        if None not in (size, total) and total != size:
            raise DataError(
                f"{url}: the server offers {total} bytes, the file has {size}; it is another file, or a page in its "
                "place; check the address (--base-url), and for other archives give their --sums"
            )
        if total is not None:
            require_space(part.parent, total - start, f"the rest of {part.stem}")

        bar.total = total
        bar.update(start - bar.n)
        # Without a buffer: closing the file must not fail again on what did not fit.
        with part.open("ab" if start else "wb", buffering=0) as file:
            for chunk in _chunks(response, start, total):
                if file.tell() == 0 and chunk.lstrip()[:1] == b"<":  # a log-in or confirmation page
                    raise DataError(f"{url}: the host answers with a web page instead of the file")
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
                bar.update(len(chunk))
                yield file.tell()


def _chunks(response: http.client.HTTPResponse, start: int, total: int | None) -> Iterator[bytes]:
    """The pieces of a body that begins at byte `start`; raises TransferError where it ends before `total`."""
    done = start
    while total is None or done < total:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _network_error(error) from None
        if not chunk:
            break
        done += len(chunk)
        yield chunk
    if total is not None and done < total:
        raise TransferError(f"the connection ended at {describe_size(done)} of {describe_size(total)}")


def _span(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte of a body and the size of the whole file, None where the server does not announce it."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if span is None:
            raise TransferError(f"a part without its place (Content-Range {response.headers.get('Content-Range')!r})")
        return int(span[1]), None if span[2] == "*" else int(span[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _rejection(url: str, error: urllib.error.HTTPError) -> TransferError | DataError:
    """What to raise for an error status: temporary ones are worth another attempt."""
    answer = f"the server answers {error.code} {error.reason}"
    if error.code in TEMPORARY or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        seconds = error.headers.get("Retry-After", "")
        return TransferError(answer, wait=min(float(seconds), MAX_WAIT) if seconds.isdecimal() else 0.0)
    return DataError(f"{url}: {answer}; check the address")


def _network_error(error: Exception) -> TransferError:
    reason = getattr(error, "reason", None) or error
    final = isinstance(error, http.client.InvalidURL) or isinstance(reason, ssl.SSLCertVerificationError)
    return TransferError(str(reason) or type(error).__name__, final=final)
