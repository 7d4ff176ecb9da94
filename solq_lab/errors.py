"""Errors that are reported by their message alone, without a traceback. Loads without torch.

Subclasses stand where they are raised. Any other exception is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ExplainedError(Exception):
    """A failure of the machine, of another process or of the training: the message says what happened and what helps.

    Attributes:
        exit_status: of the command that ends with it.
    """

    exit_status = 1


class UserError(ExplainedError, ValueError):
    """A mistake of the user: the message names what was found, what is allowed and the cure."""

    exit_status = 2


class Interrupted(ExplainedError):
    """Ctrl-C, after the work was stopped properly; the message says how to resume it."""

    exit_status = 130


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "allowed are", *, folder: Path | None = None) -> str:
    """A hint for an unknown name: the nearest known one, as a path in `folder` if given, or all of them."""
    names = list(known)
    for nearest in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {nearest if folder is None else folder / nearest}?"
    return f"{otherwise} {', '.join(names) or 'none'}"
