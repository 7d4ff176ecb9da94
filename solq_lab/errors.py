"""Errors that are reported by their message alone, without a traceback. Loads without torch.

Subclasses stand where they are raised. Any other exception is a fault of the program and keeps its traceback.
"""

from __future__ import annotations


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
