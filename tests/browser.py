"""JupyterLab on a free port, driven by Chromium: for tests of the explorers as a user meets them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import REPOSITORY
from playwright.sync_api import ConsoleMessage, Locator, Page, sync_playwright

from solq_lab.workbench.workspace import WORKSPACE

TOKEN = "t"
STARTING_SECONDS = 90
# What a first-time user would be asked, and what would keep cells out of sight from being in the page.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


def find_chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def artifacts() -> Path:
    """The folder for screenshots; the environment variable SOLQ_BROWSER_ARTIFACTS names another."""
    folder = Path(os.environ.get("SOLQ_BROWSER_ARTIFACTS", REPOSITORY / "artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Notebook:
    """A notebook open in JupyterLab.

    Attributes:
        page: the browser's page.
        errors: what the browser's console called an error since it was opened.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def run_all(self, *, seconds: float) -> None:
        """Run All Cells, and wait until the last one has its number.

        Raises:
            AssertionError: a cell raised; the message is its output.
        """
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        deadline = time.monotonic() + seconds
        numbers = [""]
        while not all(number.isdigit() for number in numbers):
            assert time.monotonic() < deadline, f"cells still run after {seconds} s: {numbers}"
            if not any(numbers):  # JupyterLab forgets what is asked before the kernel is ready
                self._click_run_all()
            self.page.wait_for_timeout(500)
            self._refuse_tracebacks()
            numbers = [text.strip("[]: ") for text in prompts.all_inner_texts()]

    def control(self, description: str) -> Locator:
        """The ipywidgets control with this description."""
        label = self.page.locator(".widget-label", has_text=description).filter(visible=True)
        return self.page.locator(".widget-inline-hbox").filter(has=label).first

    def choose(self, description: str, option: str) -> None:
        """Choose an option of a drop-down list by its text."""
        self.control(description).locator("select").select_option(label=option)

    def options(self, description: str) -> list[str]:
        """The texts of a drop-down list."""
        return self.control(description).locator("option").all_inner_texts()

    def move_slider(self, description: str, key: str, times: int = 1) -> None:
        """Press an arrow key on a slider's handle."""
        handle = self.control(description).locator(".noUi-handle")
        handle.focus()
        for _ in range(times):
            handle.press(key)

    def wait_for_change(self, element: Locator, before: bytes, *, seconds: float = 20) -> bytes:
        """The screenshot of an element, once it differs from `before`."""
        deadline = time.monotonic() + seconds
        while (now := element.screenshot()) == before:
            assert time.monotonic() < deadline, f"the image is the same after {seconds} s"
            self.page.wait_for_timeout(100)
        return now

    def wait_for_text(self, element: Locator, before: str, *, seconds: float = 20) -> str:
        """The text of an element, once it differs from `before`."""
        deadline = time.monotonic() + seconds
        while (now := element.inner_text()) == before:
            assert time.monotonic() < deadline, f"the text is the same after {seconds} s: {before}"
            self.page.wait_for_timeout(100)
        return now

    def screenshot(self, name: str) -> Path:
        """Keep an image of the page among the artifacts, once the kernel has nothing more to do."""
        self.page.get_by_text("| Idle").wait_for()
        path = artifacts() / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def _click_run_all(self) -> None:
        question = self.page.locator(".jp-Dialog .jp-mod-accept")  # which kernel, where JupyterLab has lost its own
        if question.count():
            question.first.click()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_timeout(2000)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def _refuse_tracebacks(self) -> None:
        found = self.page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']")
        raised = [text for text in found.all_inner_texts() if "Traceback" in text]
        raised += self.page.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
        ).all_inner_texts()
        assert not raised, raised[0]


@contextmanager
def open_notebook(name: str, folder: Path, *, width: int = 1400, height: int = 1000) -> Iterator[Notebook]:
    """A copy of one of the repository's notebooks, in a JupyterLab of its own whose workspace is an empty folder.

    Args:
        name: file name of the notebook.
        folder: temporary folder.
        width, height: of the browser's window, pixels.
    """
    (folder / "notebooks").mkdir()
    shutil.copy(REPOSITORY / "notebooks" / name, folder / "notebooks")
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    with _jupyterlab(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            notebook = Notebook(page)
            page.goto(f"{address}/lab/tree/{name}?token={TOKEN}")
            page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=1000 * STARTING_SECONDS)
            page.get_by_text("| Idle").wait_for(timeout=1000 * STARTING_SECONDS)  # the kernel, in the status bar
            yield notebook
        finally:
            browser.close()


@contextmanager
def _jupyterlab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab that serves folder/notebooks and keeps all it writes in the folder."""
    for key, value in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{key}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    places = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data_dir",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        WORKSPACE: ".",
    }
    environment = os.environ | {key: str((folder / place).absolute()) for key, place in places.items()}
    port = _free_port()
    command = [sys.executable, "-m", "jupyterlab", str(folder / "notebooks"), "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    with (folder / "jupyterlab.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://localhost:{port}"
            _wait_until_it_answers(f"{address}/api/status?token={TOKEN}", server, folder / "jupyterlab.log")
            yield address
        finally:
            server.send_signal(signal.SIGTERM)  # it shuts its kernels down
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _wait_until_it_answers(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"JupyterLab does not answer: {log.read_text()[-2000:]}"
            time.sleep(0.2)
