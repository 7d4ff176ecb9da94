"""The floors of the house hold: arrows point down, packages start empty, the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "solq_lab"


def test_import_contracts_are_kept():
    linter = Path(sys.executable).with_name("lint-imports")
    outcome = subprocess.run([linter, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/__init__.py")), ids=lambda path: path.parent.name)
def test_a_package_starts_with_a_docstring_and_nothing_else(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, [])) is not None


LIGHT = ["solq_lab", "solq_lab.workbench.cli", "solq_lab.workbench.notebooks", "solq_lab.config", "solq_lab.runs"]


@pytest.mark.parametrize("module", LIGHT)
def test_the_command_line_loads_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'tqdm' in sys.modules)"  # tqdm: `solq-lab -q`
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_module_opens_with_a_docstring():
    silent = [path.name for path in PACKAGE.rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_loading_never_runs_code():
    unsafe = []
    for path in PACKAGE.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            safe_load = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
            if function in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"} or (
                function == "torch.load" and not safe_load
            ):
                unsafe.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert unsafe == []
