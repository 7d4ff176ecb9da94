"""A notebook's parameters are typed, and rejected before any work with the nearest name or the allowed type."""

import json

import pytest
from notebook import write_notebook

from solq_lab.workbench.parameters import NotebookError, Parameter, check_parameters, read_parameters

DECLARED = """# what to look at
images: int = 6
score: float = 0.3
title: str = "a"
names: list[str] = []
first: int | None = None
loud: bool = False"""


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "look.ipynb", "print(images)", parameters=DECLARED)


def rejection(notebook, given=()) -> str:
    with pytest.raises(NotebookError) as caught:
        check_parameters(notebook, dict(given))
    message = str(caught.value)
    assert str(notebook) in message
    return message


def test_parameters_are_read_with_type_and_default(notebook):
    found = read_parameters(notebook)
    assert list(found) == ["images", "score", "title", "names", "first", "loud"]
    assert found["names"] == Parameter("list[str]", [])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("images", "3", 3),
        ("score", "0.5", 0.5),
        ("score", "1", 1.0),
        ("title", "007", "007"),
        ("names", "[a, b]", ["a", "b"]),
        ("first", "null", None),
        ("first", "2", 2),
        ("loud", "true", True),
    ],
)
def test_text_becomes_the_declared_type(notebook, name, text, value):
    found = check_parameters(notebook, {name: text})[name]
    assert (found, type(found)) == (value, type(value))


def test_an_unknown_parameter_is_rejected_with_the_nearest_or_with_all(notebook):
    assert "unknown parameter image; did you mean images?" in rejection(notebook, {"image": 3})
    assert "allowed are images, score, title, names, first, loud" in rejection(notebook, {"zzz": 3})


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [("images", "many", "int"), ("images", "2.5", "int"), ("names", "a", "list[str]"), ("loud", "1", "bool")],
)
def test_a_value_of_another_type_is_rejected_with_both(notebook, name, text, allowed):
    message = rejection(notebook, {name: text})
    assert f"parameter {name}: found" in message
    assert f"allowed is {allowed}" in message


def test_a_notebook_without_a_tagged_cell_or_with_two_is_rejected_with_the_cure(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", "x = 1", parameters=None)
    message = rejection(notebook)
    assert "found 0 cells tagged 'parameters', allowed is exactly one" in message
    assert "property inspector" in message
    document = json.loads(notebook.read_text())
    document["cells"][0]["metadata"]["tags"] = ["parameters"]
    notebook.write_text(json.dumps(document | {"cells": document["cells"][:1] * 2}))
    assert "found 2 cells" in rejection(notebook)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("x = 3", "`name: type = default`; found: x = 3"),
        ("x: int", "`name: type = default`; found: x: int"),
        ("x: Path = 3", "type Path, allowed are str, int"),
        ("x: int = open('a')", "plain value: x: int = open('a')"),
        ("x: int = = 3", "not Python: line 1"),
    ],
)
def test_a_line_that_is_no_typed_parameter_is_rejected(tmp_path, cell, said):
    assert said in rejection(write_notebook(tmp_path / "a.ipynb", parameters=cell))


def test_a_missing_notebook_is_rejected_with_the_nearest_name(notebook):
    missing = notebook.with_name("lok.ipynb")
    assert f"did you mean {notebook}?" in rejection(missing)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"cells": 3}', '{"a": 1}'])
def test_a_file_that_is_no_notebook_is_rejected(tmp_path, text):
    path = tmp_path / "a.ipynb"
    path.write_text(text)
    assert "not a Jupyter notebook" in rejection(path)
