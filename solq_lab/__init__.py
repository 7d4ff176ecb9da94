"""A workbench for SOLQ: segmenting objects by learning queries (NeurIPS 2021)."""

import importlib
from typing import Any

_HOMES = {
    "Predictor": "solq_lab.inference.predictor",
    "load_experiment": "solq_lab.config",
    "load_run": "solq_lab.runs",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the names that users type on first use: `import solq_lab` alone loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'solq_lab' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
