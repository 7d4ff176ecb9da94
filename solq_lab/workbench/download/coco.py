"""COCO 2017 from its server into the folder that the experiments expect: fetched, verified and unpacked once.

Sizes and MD5 sums are those of the files that the COCO server gives out. The server lists none itself; these are the
ones that the download scripts of many public projects agree on.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from solq_lab.bars import progress_bar
from solq_lab.errors import DataError
from solq_lab.files import write_json
from solq_lab.workbench.download.transfer import describe_size, fetch, require_space
from solq_lab.workbench.download.unpacking import lacking, unpack

logger = logging.getLogger(__name__)

BASE_URL = "http://images.cocodataset.org"  # its certificate does not fit its name, so no https; the sums protect
WORKSHOP = ".download"  # folder inside the data folder: unfinished files, the lock, what is complete
CHUNK = 1 << 20
ALGORITHMS = {32: "md5", 64: "sha256"}  # by the number of hexadecimal digits


class Archive(NamedTuple):
    """A zip file of COCO 2017."""

    path: str  # below the base URL
    size: int | None  # bytes; None where it is not known
    digest: str  # MD5 or SHA-256, hexadecimal
    growth: float = 1.0  # about how many bytes one byte unpacks to; JSON packs well, JPEG not at all

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.path).name


ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c", growth=3.5
)
TEST_INFO = Archive("annotations/image_info_test2017.zip", None, "85da7065e5e600ebfee8af1edb634eb5", growth=10.0)
TRAIN = Archive("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2")
VAL = Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80")
TEST = Archive("zips/test2017.zip", 6_646_970_404, "77ad2c53ac5d0aea611d422c0938fb35")
SPLITS = {"train": (ANNOTATIONS, TRAIN), "val": (ANNOTATIONS, VAL), "test": (TEST_INFO, TEST)}


def download_coco(
    folder: Path | str,
    splits: Sequence[str] = ("train", "val"),
    *,
    base_url: str = BASE_URL,
    sums: Mapping[str, str] | None = None,
    keep_archives: bool = False,
    retries: int = 8,
    backoff: float = 1.0,
    timeout: float = 60.0,
) -> None:
    """Fill a folder with `annotations/`, `train2017/`, `val2017/`, `test2017/`; what is complete is not touched.

    One archive after the other, small ones first: fetched into `.download/`, its sum compared, unpacked, removed. It
    may be interrupted at any time; re-running resumes.

    Args:
        folder: data folder, made if it is missing.
        splits: of "train", "val", "test".
        base_url: server, http or https, that has the archives under COCO's own paths.
        sums: MD5 or SHA-256 by file name, for a server with other archives under these names; None: COCO's own.
        keep_archives: leave the zip files in `.download/`.
        retries, backoff, timeout: see `transfer.fetch`.

    Raises:
        DataError: an argument cannot be used, another process downloads into the folder, the disk is too small, the
            server rejects the request or is not reached, or an archive is damaged or unsafe.
    """
    if not base_url.startswith(("http://", "https://")):
        raise DataError(f"base URL {base_url!r}: allowed are http:// and https:// addresses")
    archives = _archives_of(splits, sums)
    workshop = Path(folder) / WORKSHOP
    workshop.mkdir(parents=True, exist_ok=True)

    with _locked(workshop):
        missing = [archive for archive in archives if not _is_complete(archive, workshop)]
        _require_space(missing, workshop, keep_archives=keep_archives)

        for archive in missing:
            file = workshop / archive.name
            _fetch_verified(archive, file, base_url, retries=retries, backoff=backoff, timeout=timeout)
            sizes = unpack(file, Path(folder))
            # Written last: an archive with a stamp is complete.
            write_json(workshop / f"{archive.name}.json", {"digest": archive.digest, "members": sizes})
            total = describe_size(sum(sizes.values()))
            logger.info("%s: %d files, %s, in %s", archive.name, len(sizes), total, folder)
            if not keep_archives:
                file.unlink()


def read_sums(path: Path | str) -> dict[str, str]:
    """Sums by file name from a file as `md5sum` or `sha256sum` write it.

    Raises:
        DataError: it cannot be read, or a line is something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

    sums = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *]?(.*[^/ ])", line)
        if match is None:
            raise DataError(f"{path}: line {number}: found {line!r}; allowed is an MD5 or SHA-256 sum and a file name")
        sums[PurePosixPath(match[2]).name] = match[1].lower()
    return sums


def _archives_of(splits: Sequence[str], sums: Mapping[str, str] | None) -> list[Archive]:
    """The archives of some splits, small ones first; `sums` replaces COCO's own."""
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or not splits:
        raise DataError(f"split {', '.join(unknown) or 'none'}: allowed are {', '.join(SPLITS)}")
    archives = sorted({archive for split in splits for archive in SPLITS[split]}, key=lambda archive: archive.size or 0)
    if sums is None:
        return archives

    for archive in archives:
        if archive.name not in sums:
            raise DataError(f"no sum of {archive.name}; found are those of {', '.join(sorted(sums)) or 'no file'}")
    return [archive._replace(size=None, digest=sums[archive.name]) for archive in archives]


@contextlib.contextmanager
def _locked(workshop: Path) -> Iterator[None]:
    """Lock a folder against other processes; the kernel frees the lock however this one ends."""
    owner = workshop / "owner"
    try:
        with FileLock(workshop / "lock", timeout=0):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except Timeout:
        other = owner.read_text() if owner.exists() else "another process"
        raise DataError(f"{workshop.parent}: {other} downloads into this folder; wait for it or stop it") from None


def _is_complete(archive: Archive, workshop: Path) -> bool:
    """Whether an archive was unpacked here and all its files are still there."""
    try:
        stamp = json.loads((workshop / f"{archive.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if stamp.get("digest") != archive.digest:
        return False

    name, sizes = archive.name, stamp["members"]
    gone = lacking(workshop.parent, sizes)
    if gone:
        message = "%s: %d of %d files are missing or changed, the first is %s; fetched again"
        logger.info(message, name, len(gone), len(sizes), gone[0])
        return False
    logger.info("%s: complete, %d files", name, len(sizes))
    return True


def _require_space(archives: Sequence[Archive], workshop: Path, *, keep_archives: bool) -> None:
    """Check the fullest moment of the whole download, by the published sizes, before it begins."""
    held, peak = 0, 0
    for archive in archives:
        size = archive.size or 0
        arrived = sum(path.stat().st_size for path in workshop.glob(f"{archive.name}*") if path.suffix != ".json")
        unpacked = int(size * archive.growth)
        peak = max(peak, held + size - min(arrived, size) + unpacked)
        held += unpacked + (size if keep_archives else -min(arrived, size))
    require_space(workshop, peak, f"fetching and unpacking {', '.join(archive.name for archive in archives)}")


def _fetch_verified(archive: Archive, file: Path, base_url: str, **patience: Any) -> None:
    """Fetch an archive and compare its sum; a wrong one is fetched once more from the start."""
    url = f"{base_url.rstrip('/')}/{archive.path}"
    for _ in range(2):
        if not file.exists():
            fetch(url, file, size=archive.size, **patience)
        digest = hashlib.new(ALGORITHMS[len(archive.digest)], usedforsecurity=False)
        bar = progress_bar(desc=f"verifying {file.name}", unit="B", unit_scale=True, total=file.stat().st_size)
        with file.open("rb") as opened, bar:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))

        found = digest.hexdigest()
        if found == archive.digest:
            return
        file.unlink()
        logger.warning("%s: its sum is %s instead of %s; removed", archive.name, found, archive.digest)
    raise DataError(
        f"{url}: the sum is {found}, {archive.digest} is expected; the server has another file, or it is changed on "
        "the way: check the address (--base-url), and for other archives give their --sums"
    )
