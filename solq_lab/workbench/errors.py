"""How a piece of work can end, and which of its errors are told in one message, without a traceback."""

from __future__ import annotations

from solq_lab.runs import RunError

# Mistakes of the user: one clear message and exit status 2, no traceback. By name, because naming them loads no torch.
REFUSALS = frozenset(
    [
        "ConfigError",
        "DataError",
        "ExtensionBuildError",
        "NotebookError",
        "RunError",
        "TrainingRefused",
        "WeightMismatch",
    ]
)
# What went wrong outside of this program, or diverged: the message says it all, no traceback. By name too.
EXPLAINED = frozenset(["DiskFull", "LoaderError", "NonFiniteError", "OutOfMemory", "ProcessLost", "SaveError"])


class NotebookFailed(RuntimeError):
    """A cell of an executed notebook raised.

    Attributes:
        refused: the cell named a mistake of the user's, such as a missing folder; nothing of ours broke.
    """

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class TrainingFailed(RuntimeError):
    """The training process ended without a trained model; the message holds how, and the last lines of its log."""


class TrainingRefused(RunError):
    """The training named a mistake of the user's before it began."""


class Interrupted(RuntimeError):
    """Ctrl-C, after the training was asked to save and to stop; the message says where it stands."""
