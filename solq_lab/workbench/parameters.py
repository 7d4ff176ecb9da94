"""The typed parameters of a notebook, read from its tagged cell. Loads without torch.

A notebook has one code cell with the tag `parameters`; each of its lines is `name: type = default`.
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from solq_lab.errors import UserError, did_you_mean
from solq_lab.plain_yaml import load_yaml

TAG = "parameters"
NOTEBOOKS = Path("notebooks")  # where a notebook is found by its name

_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "str | None": str | None,
    "int | None": int | None,
    "float | None": float | None,
    "list[str]": list[str],
    "list[int]": list[int],
    "list[float]": list[float],
}


class NotebookError(UserError):
    """A notebook or parameter that is not valid: the message names the file, what was found, what is allowed."""


class Parameter(NamedTuple):
    """A parameter: its annotation as written, and its default."""

    annotation: str
    default: Any


def find_notebook(named: str | Path) -> Path:
    """The file of a notebook that is named by its path, or by the name of one in `NOTEBOOKS`."""
    named = Path(named)
    return named if named.suffix or named.exists() else NOTEBOOKS / f"{named}.ipynb"


def read_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name.

    Raises:
        NotebookError: no such file, not a notebook, no tagged cell or several, or a line that is no typed parameter.
    """
    notebook = Path(notebook)
    cells = [cell for cell in _read_cells(notebook) if TAG in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(
            f"{notebook}: found {len(cells)} cells tagged {TAG!r}, allowed is exactly one; "
            "tag the cell in JupyterLab's property inspector (the gears at the top right)"
        )

    source = "".join(cells[0]["source"])
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(
            f"{notebook}: the cell tagged {TAG!r} is not Python: line {error.lineno}: {error.msg}"
        ) from None
    return dict(_read_parameter(statement, notebook) for statement in statements)


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values in the types that the notebook declares.

    Args:
        notebook: path of the notebook.
        given: values by name; text is read as YAML unless the type is a string, so "3" is allowed for an int.

    Raises:
        NotebookError: the notebook has no such parameter, or a value does not fit its type.
    """
    declared = read_parameters(notebook)
    for name in given:
        if name not in declared:
            raise NotebookError(f"{notebook}: unknown parameter {name}; {did_you_mean(name, declared)}")
    return {
        name: _convert(value, declared[name].annotation, f"{notebook}: parameter {name}")
        for name, value in given.items()
    }


def _read_cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(notebook.read_text(encoding="utf-8"))
    except FileNotFoundError:
        neighbours = sorted(path.name for path in notebook.parent.glob("*.ipynb"))
        hint = did_you_mean(notebook.name, neighbours, "found there:", folder=notebook.parent)
        raise NotebookError(f"{notebook}: no such notebook; {hint}") from None
    except (OSError, ValueError):
        document = None

    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise NotebookError(f"{notebook}: not a Jupyter notebook (no JSON with a list of cells)")
    return document["cells"]


def _read_parameter(statement: ast.stmt, notebook: Path) -> tuple[str, Parameter]:
    text = ast.unparse(statement)
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
            written = ast.unparse(annotation)
            if written not in _TYPES:
                raise NotebookError(f"{notebook}: parameter {name}: type {written}, allowed are {', '.join(_TYPES)}")
            try:
                default = ast.literal_eval(value)
            except ValueError:
                raise NotebookError(
                    f"{notebook}: parameter {name}: the default has to be a plain value: {text}"
                ) from None
            return name, Parameter(written, default)

    raise NotebookError(
        f"{notebook}: the cell tagged {TAG!r} allows only lines like `name: type = default`; found: {text}"
    )


def _convert(value: Any, annotation: str, place: str) -> Any:
    if isinstance(value, str) and not annotation.startswith("str"):
        try:
            value = load_yaml(value)
        except yaml.YAMLError:
            raise NotebookError(f"{place}: found {value!r}, allowed is {annotation}") from None
    try:
        return TypeAdapter(_TYPES[annotation]).validate_python(value, strict=True)
    except ValidationError:
        raise NotebookError(f"{place}: found {value!r}, allowed is {annotation}") from None
