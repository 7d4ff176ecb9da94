"""Puts the operators' sources, the folder `cuda/`, into the installed package; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["solq_lab*"]), "solq_lab.cuda"],
    package_dir={"solq_lab.cuda": "cuda"},
    package_data={"solq_lab.cuda": ["*"]},
)
