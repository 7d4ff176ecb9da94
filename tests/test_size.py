"""Ceilings of size: growth is a decision, made in the commit that raises one."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "solq_lab"
MAX_LINES = 33_260  # of the whole package
MAX_TEST_LINES = 24_880
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_WITHOUT_PAUSE = 15  # lines of a function without a blank line or a comment


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def functions(path: Path) -> list[tuple[str, list[str]]]:
    """Name and body of every function of a file, the body without its docstring."""
    rows, found = lines_of(path), []
    for node in ast.walk(ast.parse("\n".join(rows))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            start = first.end_lineno if documented else first.lineno - 1
            found.append((f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}", rows[start : node.end_lineno]))
    return found


@pytest.fixture(scope="module")
def bodies() -> list[tuple[str, list[str]]]:
    return [one for path in PACKAGE.rglob("*.py") for one in functions(path)]


@pytest.mark.parametrize(("folder", "ceiling"), [("solq_lab", MAX_LINES), ("tests", MAX_TEST_LINES)])
def test_the_code_is_no_longer_than_its_ceiling(folder, ceiling):
    assert sum(len(lines_of(path)) for path in (REPOSITORY / folder).rglob("*.py")) <= ceiling


def test_files_and_functions_fit_their_ceilings(bodies):
    files = {str(path): len(lines_of(path)) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in files.items() if lines > MAX_FILE_LINES} == {}
    assert [name for name, body in bodies if len(body) > MAX_FUNCTION_LINES] == []


def test_long_functions_have_paragraphs(bodies):
    walls = [
        name
        for name, body in bodies
        if len(body) >= MAX_WITHOUT_PAUSE
        and not any(not row.strip() or row.strip().startswith("#") for row in body[1 if not body[0].strip() else 0 :])
    ]
    assert walls == []
