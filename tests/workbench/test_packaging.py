"""pyproject.toml, constraints.txt and environment.yml tell one story, and what is installed is whole."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALLED_EXTRAS = ("swin", "sparse", "slurm", "export", "tracking", "video", "dev")  # what the Makefile installs


def declared_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in INSTALLED_EXTRAS:
        lines += project["optional-dependencies"][extra]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pinned_versions() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pins}


def conda_pip_lines() -> list[str]:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    return next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))


def test_every_constraint_is_an_exact_pin():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    loose = [line for line in lines if line and not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)]
    assert loose == []


def test_every_declared_requirement_is_pinned_inside_its_range():
    pins = pinned_versions()
    outside = {
        name: pins.get(name)
        for name, requirement in declared_requirements().items()
        if name not in pins or not requirement.specifier.contains(pins[name])
    }
    assert outside == {}


def test_the_conda_environment_lists_the_same_packages():
    names = {canonicalize_name(line) for line in conda_pip_lines() if not line.startswith("-")}
    assert names == set(declared_requirements())


def test_the_conda_environment_takes_its_versions_from_the_constraints():
    assert "--constraint constraints.txt" in conda_pip_lines()


def test_the_makefile_installs_the_tested_extras_under_the_constraints():
    text = (REPOSITORY / "Makefile").read_text()
    assert f"'.[{','.join(INSTALLED_EXTRAS)}]'" in text
    assert "--constraint constraints.txt" in text


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as an installer would lay it down, out of the checkout's reach."""
    folder = tmp_path_factory.mktemp("installed")
    build = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=REPOSITORY, check=True, capture_output=True)
    return folder / "lib"


def test_an_installed_package_holds_every_module_of_the_checkout(installed):
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "solq_lab").rglob("*.py")}
    assert {str(path.relative_to(installed)) for path in installed.rglob("*.py")} == modules


def test_an_installed_package_carries_the_operators_sources_and_finds_them(installed):
    code = "from solq_lab.ops import extension; print(extension.SOURCES)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    sources = Path(found.stdout.strip())
    assert sources == installed / "solq_lab" / "cuda", found.stderr
    assert {path.name for path in sources.iterdir()} == {path.name for path in (REPOSITORY / "cuda").iterdir()}
