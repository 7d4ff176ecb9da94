"""Folders that tests may read where they exist: tensors of the released implementation, and a few real COCO images."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from server import Server, serve
from tiny import write_tiny_dataset

from solq_lab.codecs import autoencoder
from solq_lab.workbench import cli

REPOSITORY = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for every core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker per core, at most eight, and as far as memory reaches: the tests of one hold up to 4 GiB."""
    return max(1, min(os.cpu_count() or 1, 8, psutil.virtual_memory().total // (5 << 30)))


def golden_folder() -> Path:
    """Root of the golden fixtures; the environment variable SOLQ_GOLDEN names another."""
    return Path(os.environ.get("SOLQ_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


_golden_files_read: set[Path] = set()


def pytest_configure() -> None:
    """Hear Ctrl-C, and note which golden folders the tests really open, so that none can drop out unseen.

    A shell starts background jobs deaf to Ctrl-C, and their children inherit that: tests that send it would fail there.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(("fixture.json", "fixture.npz")):
            _golden_files_read.add(Path(arguments[0]).resolve())

    sys.addaudithook(note)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the golden folders that were compared, and those that were not."""
    if not _golden_files_read:
        return
    root = golden_folder().resolve()
    read = {path.parent for path in _golden_files_read}
    for title, folders in (("compared", read), ("not compared", {path.parent for path in root.glob("*/*")} - read)):
        names = ", ".join(sorted(folder.name for folder in folders))
        terminalreporter.write_line(f"golden folders {title}: {names or 'none'}")


@pytest.fixture
def command_line(capsys, monkeypatch, tmp_path) -> Callable[..., tuple[int, str]]:
    """Run `solq-lab ARGUMENTS` in this process, in a fresh folder: exit status and all it wrote, never a traceback."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["solq-lab", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        output = captured.out + captured.err
        assert "Traceback" not in output
        return status, output

    return run


@pytest.fixture(autouse=True, scope="session")
def _autoencoders_end_soon() -> Iterator[None]:
    """Their laws, files and figures do not depend on how well they have learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "STEPS", 20)
        yield


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as serving:
        yield serving


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """The tiny data set, which no test changes."""
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "images")


@pytest.fixture(scope="session")
def golden_root() -> Path:
    root = golden_folder()
    if not root.is_dir():
        pytest.skip(f"no golden fixtures at {root}; set SOLQ_GOLDEN to their folder")
    return root


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    root = REPOSITORY.parent / "shared" / "coco_tiny"
    if not root.is_dir():
        pytest.skip(f"no small COCO folder at {root}")
    return root
