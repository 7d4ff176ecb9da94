"""Notebooks of a few lines, for tests that execute one."""

from pathlib import Path

import nbformat

SHARED = 'experiment: str = "none.yaml"\noverrides: list[str] = []\nruns_dir: str = "runs"'


def write_notebook(path: Path, *cells: str, parameters: str | None = SHARED) -> Path:
    """Write a notebook of code cells behind a tagged one; `parameters` None leaves the tagged one out."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    if parameters is not None:
        tagged = nbformat.v4.new_code_cell(parameters)
        tagged.metadata["tags"] = ["parameters"]
        notebook.cells.append(tagged)
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, path)
    return path
