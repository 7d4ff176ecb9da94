"""Folders that tests may read where they exist: tensors of the released implementation, and a few real COCO images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def golden_folder() -> Path:
    """Root of the golden fixtures; the environment variable SOLQ_GOLDEN names another."""
    return Path(os.environ.get("SOLQ_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


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
