"""Errors that are reported by their message alone, without a traceback. Loads without torch.

Subclasses stand where they are raised. Any other exception is a fault of the program and keeps its traceback.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FIRST_FEW = 5  # names in a message that concerns many


class ExplainedError(Exception):
    """A failure of the machine, of another process or of the training: the message says what happened and what helps.

    Attributes:
        exit_status: of the command that ends with it.
    """

    exit_status = 1


class UserError(ExplainedError, ValueError):
    """A mistake of the user: the message names what was found, what is allowed and the cure."""

    exit_status = 2


class DataError(UserError):
    """A data set that cannot be used: the message names the file, the id, what was found, what is allowed, the cure."""


class Interrupted(ExplainedError):
    """Ctrl-C, after the work was stopped properly; the message says how to resume it."""

    exit_status = 130


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "allowed are", *, folder: Path | None = None) -> str:
    """A hint for an unknown name: the nearest known one, as a path in `folder` if given, or all of them."""
    names = list(known)
    for nearest in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {nearest if folder is None else folder / nearest}?"
    return f"{otherwise} {', '.join(names) or 'none'}"


_repr = reprlib.Repr()  # of a nest of thousands of brackets too
_repr.maxlist = _repr.maxdict = _repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shorten(value: Any) -> str:
    """A value from an annotation file, in a few words, on one line."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_few(values: Sequence[Any]) -> str:
    """The first `FIRST_FEW` values, for messages that concern many."""
    return ", ".join(map(str, values[:FIRST_FEW])) + (", ..." if len(values) > FIRST_FEW else "")
