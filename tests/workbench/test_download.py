"""COCO from an unreliable server: resumed, verified, and unpacked inside its folder only."""

import hashlib
import json
import multiprocessing
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from server import PIECE, Server, archive_of

from solq_lab.data.annotations import DataError
from solq_lab.workbench.download import coco as download
from solq_lab.workbench.download import transfer
from solq_lab.workbench.download.coco import WORKSHOP, download_coco, read_sums
from solq_lab.workbench.download.transfer import fetch, part_of
from solq_lab.workbench.download.unpacking import lacking, unpack

BODY = np.random.default_rng(0).bytes(300_000)
QUICK = {"backoff": 0.0, "timeout": 2.0}


@pytest.fixture
def target(tmp_path, server):
    server.files["/a"] = BODY
    return tmp_path / "a"


def start_of(target: Path, server: Server, count: int) -> None:
    """Fetch only the first `count` bytes: the attempt breaks off, the next one brings nothing, and that is enough."""
    server.breaks += [count, 0]
    with pytest.raises(DataError, match="given up"):
        fetch(f"{server.url}/a", target, retries=0, **QUICK)
    server.ranges.clear()


# ---- one file over HTTP


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server, target):
    fetch(f"{server.url}/a", target)
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_an_empty_file_arrives_too(server, target):
    server.files["/a"] = b""
    fetch(f"{server.url}/a", target, retries=0)
    assert target.read_bytes() == b""


def test_a_connection_that_breaks_again_and_again_costs_no_byte_twice(server, target):
    server.breaks = [10_000, 50_000, 0, 100_000]
    fetch(f"{server.url}/a", target, retries=1, **QUICK)
    assert target.read_bytes() == BODY
    assert server.ranges == [None, "bytes=10000-", "bytes=60000-", "bytes=60000-", "bytes=160000-"]


def test_a_later_call_resumes_where_the_first_one_broke_off(server, target):
    start_of(target, server, 123_456)
    assert part_of(target).stat().st_size == 123_456
    assert not target.exists()
    fetch(f"{server.url}/a", target, **QUICK)
    assert target.read_bytes() == BODY
    assert server.ranges == ["bytes=123456-"]


def test_a_server_that_ignores_ranges_is_read_past_what_is_there(server, target):
    server.knows_ranges = False
    server.breaks = [100_000, 50_000, None]
    fetch(f"{server.url}/a", target, retries=2, **QUICK)
    assert target.read_bytes() == BODY


def test_a_file_that_has_shrunk_below_what_is_there_is_fetched_from_the_start(server, target):
    start_of(target, server, 100_000)
    server.files["/a"] = BODY[:5_000]
    fetch(f"{server.url}/a", target, **QUICK)
    assert target.read_bytes() == BODY[:5_000]


def test_a_file_that_was_whole_but_not_named_yet_is_only_named(server, target):
    part_of(target).write_bytes(BODY)
    fetch(f"{server.url}/a", target, size=len(BODY), retries=0, **QUICK)
    assert target.read_bytes() == BODY
    assert server.ranges == []


def test_more_bytes_than_the_file_has_are_thrown_away(server, target):
    part_of(target).write_bytes(BODY + b"more")
    fetch(f"{server.url}/a", target, size=len(BODY), **QUICK)
    assert target.read_bytes() == BODY


def test_a_server_that_always_breaks_is_given_up_with_what_is_kept_and_how_to_resume(server, target):
    server.breaks = [20_000, 0, 0, 0]
    with pytest.raises(DataError) as caught:
        fetch(f"{server.url}/a", target, retries=2, **QUICK)
    message = str(caught.value)
    assert "given up after 3 attempts without progress" in message
    assert "ended at 20.0 kB of 300.0 kB" in message
    assert "20.0 kB are kept, re-running resumes from there" in message


def test_a_busy_server_gets_another_request_after_the_time_it_names(server, target, monkeypatch):
    server.answers = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    waits = []
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    fetch(f"{server.url}/a", target, retries=3, backoff=1.0)
    assert target.read_bytes() == BODY
    assert waits == [2.0, 7.0, 8.0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_rejection_is_final(server, target, status):
    server.answers = [(status, {})]
    with pytest.raises(DataError, match=rf"/a: the server answers {status} .*check the address"):
        fetch(f"{server.url}/a", target, **QUICK)
    assert len(server.ranges) == 1


def test_a_file_of_another_size_is_rejected_before_its_first_byte(server, target):
    with pytest.raises(DataError, match="offers 300000 bytes, the file has 300001"):
        fetch(f"{server.url}/a", target, size=300_001, **QUICK)
    assert part_of(target).stat().st_size == 0


def test_a_server_that_falls_silent_gets_a_request_for_the_rest(server, target):
    server.files["/a"] = BODY[: 2 * PIECE + 1]
    server.pause = 0.6
    fetch(f"{server.url}/a", target, retries=0, backoff=0.0, timeout=0.3)
    assert target.read_bytes() == BODY[: 2 * PIECE + 1]
    assert server.ranges == [None, "bytes=4096-", "bytes=8192-"]


def test_a_server_that_is_not_there_is_named(target):
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/a: given up .*refused.*nothing has arrived: check"):
        fetch("http://127.0.0.1:1/a", target, retries=0, **QUICK)


def test_an_address_that_is_none_gets_no_second_request(target):
    with pytest.raises(DataError, match="given up"):
        fetch("http://a b/c", target, retries=100, backoff=100.0)


@pytest.mark.parametrize("limit", [{"max_bytes": 100}, {"max_seconds": 0.0}])
def test_a_file_that_is_too_large_or_too_slow_is_not_fetched_to_its_end(server, target, limit):
    with pytest.raises(DataError, match=r"/a: takes more than (100 bytes or inf|1000.0 GB or 0) s; fetch it yourself"):
        fetch(f"{server.url}/a", target, **limit)
    assert not target.exists()


def test_letters_of_any_script_and_spaces_stand_in_an_address(server, tmp_path):
    server.files["/%C3%BC%20a%20b.png?size=1"] = BODY
    fetch(f"{server.url}/ü a%20b.png?size=1", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_full_disk_keeps_what_has_arrived(server, target, monkeypatch):
    start_of(target, server, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(DataError, match=r"the rest of a needs 200\.0 kB, 10 bytes are free; make room for 200\.0 kB"):
        fetch(f"{server.url}/a", target, **QUICK)
    assert part_of(target).stat().st_size == 100_000


def test_a_disk_that_fills_up_while_writing_differs_from_a_broken_connection(server, target):
    part_of(target).symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=r"a\.part: cannot be written: No space left on device; what has arrived is kept"
    ):
        fetch(f"{server.url}/a", target, retries=100, backoff=100.0)
    assert len(server.ranges) == 1


# ---- zip files


def test_an_archive_is_unpacked_with_its_folders(tmp_path):
    (tmp_path / "a.zip").write_bytes(archive_of({"val2017/": "", "val2017/1.jpg": b"one", "notes/deep/2.txt": b""}))
    members = unpack(tmp_path / "a.zip", tmp_path / "data")
    assert members == {"val2017/1.jpg": 3, "notes/deep/2.txt": 0}
    assert (tmp_path / "data" / "val2017" / "1.jpg").read_bytes() == b"one"
    assert lacking(tmp_path / "data", members) == []
    (tmp_path / "data" / "val2017" / "1.jpg").write_bytes(b"on")
    assert lacking(tmp_path / "data", members | {"gone": 1}) == ["val2017/1.jpg", "gone"]


NAMES_THAT_LEAVE = [
    "../x.jpg",
    "a/../../x.jpg",
    "/etc/x.jpg",
    "C:/x.jpg",
    "c:x.jpg",
    "..\\x.jpg",
    "a/..",
    "./x.jpg",
    "//host/x.jpg",
    "a//x.jpg",
    "x\x00.jpg",
    "x\n.jpg",
]


@pytest.mark.parametrize("name", NAMES_THAT_LEAVE)
def test_a_member_that_leaves_the_folder_is_rejected_before_anything_is_written(tmp_path, name):
    inside = tmp_path / "deep" / "data"
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("good.jpg", b"good")
        file.writestr(info, b"bad")
    with pytest.raises(DataError, match=r"leaves the folder; nothing was unpacked") as caught:
        unpack(tmp_path / "a.zip", inside)
    assert repr(name) in str(caught.value)
    assert not inside.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


def test_a_link_in_an_archive_is_rejected(tmp_path):
    info = zipfile.ZipInfo("val2017")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc")
        file.writestr("val2017/passwd", "mine")
    with pytest.raises(DataError, match="member 'val2017' is a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "data")


def test_a_member_that_comes_twice_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("1.jpg", b"one")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("1.jpg", b"two")
    with pytest.raises(DataError, match=r"member '1\.jpg' comes twice"):
        unpack(tmp_path / "a.zip", tmp_path / "data")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(archive_of({"val2017/1.jpg": b"one"}))
    (tmp_path / "val2017").write_text("a file")
    with pytest.raises(DataError, match=r"val2017.* cannot be written: "):
        unpack(tmp_path / "a.zip", tmp_path)


@pytest.mark.parametrize("place", [60, -30, "half"])
def test_a_damaged_archive_is_rejected(tmp_path, place):
    content = bytearray(archive_of({"val2017/1.jpg": BODY[:1000]}))
    if place == "half":
        del content[len(content) // 2 :]
    else:
        content[place] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip: "):
        unpack(tmp_path / "a.zip", tmp_path / "data")
    assert not list(tmp_path.rglob("*.jpg*"))


def test_an_interrupted_unpacking_is_repeated_and_mends_what_is_wrong(tmp_path, monkeypatch):
    names = [f"{number}.jpg" for number in range(6)]
    (tmp_path / "a.zip").write_bytes(archive_of({name: name * 50 for name in names}))

    def stop_at_the_third(path: Path, target: Path) -> None:
        if target.name == "3.jpg":
            raise KeyboardInterrupt
        path.rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            unpack(tmp_path / "a.zip", tmp_path / "data")
    assert len(list((tmp_path / "data").iterdir())) == 3
    (tmp_path / "data" / "1.jpg").write_text("2.jpg" * 50)  # right size, wrong bytes: as after a loss of power
    unpack(tmp_path / "a.zip", tmp_path / "data")
    assert {path.name: path.read_text() for path in (tmp_path / "data").iterdir()} == {n: n * 50 for n in names}


def test_an_archive_that_unpacks_to_more_than_the_disk_holds_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(archive_of({"bomb": bytes(10**6)}))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 10**5))
    with pytest.raises(DataError, match=r"unpacking a\.zip needs 1\.0 MB, 100\.0 kB are free"):
        unpack(tmp_path / "a.zip", tmp_path / "data")


# ---- COCO


@pytest.fixture
def coco(server, tmp_path):
    """A server with a tiny COCO; arguments of `download_coco` that fit it."""
    contents = {
        "/annotations/annotations_trainval2017.zip": {
            "annotations/instances_train2017.json": "{}",
            "annotations/instances_val2017.json": "{ }",
        },
        "/annotations/image_info_test2017.zip": {"annotations/image_info_test2017.json": "{  }"},
        "/zips/train2017.zip": {f"train2017/{n}.jpg": BODY[n : 20_000 + n] for n in range(5)},
        "/zips/val2017.zip": {"val2017/9.jpg": BODY[:10_000]},
        "/zips/test2017.zip": {"test2017/7.jpg": BODY[:5_000]},
    }
    server.files = {path: archive_of(members) for path, members in contents.items()}
    sums = {path.rpartition("/")[2]: hashlib.md5(body).hexdigest() for path, body in server.files.items()}
    return {"folder": tmp_path / "coco", "base_url": server.url, "sums": sums, **QUICK}


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*") if WORKSHOP not in path.parts}


def test_train_and_val_appear_as_the_experiments_expect_them(coco, server):
    from solq_lab.config import Experiment

    server.breaks = [100, 3_000]
    download_coco(**coco)
    data = Experiment(name="any").data
    for path in (data.train_images, data.train_annotations, data.val_images, data.val_annotations):
        assert (coco["folder"] / path).exists()
    assert (coco["folder"] / "train2017" / "3.jpg").read_bytes() == BODY[3:20_003]
    assert not list(coco["folder"].rglob("*.zip"))
    assert not (coco["folder"] / "test2017").exists()


def test_a_second_run_requests_nothing_and_a_third_split_only_its_own(coco, server):
    download_coco(**coco)
    server.ranges.clear()
    download_coco(**coco)
    assert server.ranges == []
    download_coco(splits=["test", "val"], **coco)
    assert len(server.ranges) == 2
    assert "annotations/image_info_test2017.json" in names_in(coco["folder"])


def test_a_lost_file_brings_its_archive_back(coco, server):
    download_coco(**coco)
    (coco["folder"] / "train2017" / "3.jpg").unlink()
    server.ranges.clear()
    download_coco(**coco)
    assert len(server.ranges) == 1
    assert (coco["folder"] / "train2017" / "3.jpg").read_bytes() == BODY[3:20_003]


def test_a_kept_archive_mends_a_lost_file_without_the_server(coco, server):
    download_coco(keep_archives=True, **coco)
    (coco["folder"] / "train2017" / "3.jpg").unlink()
    server.ranges.clear()
    download_coco(keep_archives=True, **coco)
    assert server.ranges == []
    assert (coco["folder"] / "train2017" / "3.jpg").exists()


def test_a_wrong_sum_is_fetched_once_more_and_then_rejected(coco, server):
    coco["sums"]["val2017.zip"] = "0" * 32
    with pytest.raises(DataError, match=r"val2017\.zip: the sum is [0-9a-f]{32}, 0{32} is expected"):
        download_coco(splits=["val"], **coco)
    assert len(server.ranges) == 3  # annotations, and the images twice
    assert not (coco["folder"] / "val2017").exists()
    assert not (coco["folder"] / WORKSHOP / "val2017.zip").exists()


def test_bytes_of_two_versions_are_never_joined(coco, server):
    """The sum tells apart what the server does not."""
    path = coco["folder"] / WORKSHOP / "val2017.zip"
    path.parent.mkdir(parents=True)
    part_of(path).write_bytes(bytes(500))
    download_coco(splits=["val"], **coco)
    assert (coco["folder"] / "val2017" / "9.jpg").read_bytes() == BODY[:10_000]


def test_cocos_own_archives_are_known_by_their_published_size(coco, monkeypatch):
    """Without other sums a small archive under COCO's name is not COCO."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12))
    coco["sums"] = None
    with pytest.raises(DataError, match=r"the file has 252907541; it is another file"):
        download_coco(**coco)


def test_the_disk_is_measured_before_anything_is_fetched(coco, server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 30 * 10**9))
    coco["sums"] = None
    with pytest.raises(DataError) as caught:
        download_coco(**coco)
    assert server.ranges == []
    # both unpacked splits, the annotations, and the largest archive
    needed = (2 * 19_336_861_798 + 815_585_330 + int(3.5 * 252_907_541)) / 1e9
    assert f"needs {needed:.1f} GB, 30.0 GB are free" in str(caught.value)
    assert "make room for" in str(caught.value)


def test_two_at_once_are_rejected_with_the_name_of_the_first(coco):
    workshop = coco["folder"] / WORKSHOP
    workshop.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    other = fork.Process(target=_hold, args=(workshop, held))
    other.start()
    try:
        assert held.wait(20)
        with pytest.raises(DataError, match=rf"process {other.pid} on .* downloads into this folder"):
            download_coco(**coco)
    finally:
        other.kill()
        other.join()
    download_coco(**coco)  # a kill frees the lock


@pytest.mark.parametrize(("ending", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_kill_or_ctrl_c_in_the_middle_of_the_download_loses_nothing(coco, server, tmp_path, ending, status):
    server.pause = 0.05
    (tmp_path / "sums").write_text("".join(f"{digest}  {name}\n" for name, digest in coco["sums"].items()))
    program = "import sys; from solq_lab.workbench.cli import main; main()"
    command = [sys.executable, "-c", program, "download-coco", str(coco["folder"])]
    command += ["--base-url", server.url, "--sums", str(tmp_path / "sums")]
    part = part_of(coco["folder"] / WORKSHOP / "train2017.zip")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while (not part.exists() or part.stat().st_size < 20_000) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(ending)
    assert child.returncode == status
    arrived = part.stat().st_size
    assert arrived >= 20_000
    server.pause = 0.0
    server.ranges.clear()
    download_coco(**coco)
    assert f"bytes={arrived}-" in server.ranges
    assert len(list((coco["folder"] / "train2017").iterdir())) == 5


def _hold(workshop: Path, held: Event) -> None:
    with download._locked(workshop):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "file:///etc"}, "base URL 'file:///etc': allowed are http:// and https://"),
        ({"splits": ["training"]}, "split training: allowed are train, val, test"),
        ({"splits": []}, "split none: allowed are"),
        ({"sums": {"val2017.zip": "0" * 32}}, "no sum of annotations_trainval2017.zip; found are those of val2017.zip"),
    ],
)
def test_a_bad_argument_is_rejected_before_anything_is_written(coco, changes, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.").replace("(", r"\(")):
        download_coco(**coco | changes)
    assert not coco["folder"].exists()


def test_sums_are_read_as_the_tools_write_them(tmp_path):
    path = tmp_path / "sums"
    path.write_text(f"# made by hand\n{'a' * 32}  zips/val2017.zip\n{'B' * 64} *train2017.zip\n\n")
    assert read_sums(path) == {"val2017.zip": "a" * 32, "train2017.zip": "b" * 64}
    path.write_text("abc  val2017.zip\n")
    with pytest.raises(DataError, match=r"sums: line 1: found 'abc  val2017\.zip'; allowed is an MD5 or SHA-256"):
        read_sums(path)
    with pytest.raises(DataError, match="none: cannot be read"):
        read_sums(tmp_path / "none")


def test_published_sums_are_md5_and_every_archive_has_its_own():
    archives = {archive for split in download.SPLITS.values() for archive in split}
    assert len(archives) == 5
    assert len({archive.digest for archive in archives}) == 5
    assert all(len(archive.digest) == 32 for archive in archives)


def test_the_stamp_survives_nonsense(coco):
    download_coco(**coco)
    stamp = coco["folder"] / WORKSHOP / "val2017.zip.json"
    assert json.loads(stamp.read_text())["members"] == {"val2017/9.jpg": 10_000}
    stamp.write_text("[")
    download_coco(**coco)
    assert json.loads(stamp.read_text())["members"] == {"val2017/9.jpg": 10_000}
