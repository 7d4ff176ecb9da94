"""Hooks of the documentation's build: the README is its first page, and every notebook a page of its own.

Links that lead to files of the repository are turned into links to the copies that the site holds. With
SOLQ_DOCS_EXECUTE=1 each notebook is executed first, as `solq-lab run NOTEBOOK` does; otherwise its page shows the code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")  # to another file

log = logging.getLogger("mkdocs")


def on_files(files, config):
    """Add the README, the notebooks' pages, and every file of the repository that a page links to."""
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "notebooks.md": _notebook_list()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for notebook in NOTEBOOKS:
        page = re.sub(r'(href="[^":]+)\.ipynb"', r'\1.html"', _page(notebook))  # to the pages of other notebooks
        files.append(File.generated(config, f"notebooks/{notebook.stem}.html", content=page))

    sources = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    linked = {_target(match[1], path) for path in sources for match in LINK.finditer(path.read_text(encoding="utf-8"))}
    for name in sorted(linked):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "notebooks/")):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page with its links to the repository turned into links within the site."""
    if page.file.src_uri == "notebooks.md":
        return markdown
    source = ROOT / "README.md" if page.file.src_uri == "index.md" else ROOT / "docs" / page.file.src_uri
    return LINK.sub(lambda match: f"]({_address(_target(match[1], source))}{match[2] or ''})", markdown)


def _target(link: str, source: Path) -> str:
    """The file of the repository that a link in a file leads to; for a run folder, its experiment."""
    path = Path(os.path.normpath(source.parent / link))
    experiment = path / "experiment.yaml"
    return (experiment if experiment.is_file() else path).relative_to(ROOT).as_posix()


def _address(name: str) -> str:
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return name.removesuffix(".ipynb") + ".html" if name.endswith(".ipynb") else name


def _notebook_list() -> str:
    rows = [f"- [{path.stem}](notebooks/{path.stem}.html): {_question(path)}" for path in NOTEBOOKS]
    return "\n".join(["# Notebooks", "", *rows, ""])


def _question(notebook: Path) -> str:
    """The first sentence below a notebook's title."""
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    text = " ".join(first.split("\n\n", 1)[1].split())
    return re.split(r"(?<=[.?])\s", text)[0]


def _page(notebook: Path) -> str:
    """A notebook as HTML, executed where that is asked for."""
    if os.environ.get("SOLQ_DOCS_EXECUTE") != "1":
        return HTMLExporter().from_filename(str(notebook))[0]
    log.info("executing %s", notebook.name)
    command = [sys.executable, "-m", "solq_lab", "run", str(notebook)]
    done = subprocess.run([*command, "--runs-dir", "build/docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{notebook.name} failed:\n{done.stdout}{done.stderr}")
    html = next(line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("HTML"))
    return (ROOT / html).read_text(encoding="utf-8")
