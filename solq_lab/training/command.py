"""The command behind `python -m solq_lab.training RUN_FOLDER`: log lines, and errors as exit statuses."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from solq_lab.allocation import keep_freed_memory
from solq_lab.config import ConfigError
from solq_lab.data.annotations import DataError
from solq_lab.models.weights import WeightMismatch
from solq_lab.ops.extension import ExtensionBuildError
from solq_lab.runs import RunError, load_run
from solq_lab.training.flight import NonFiniteError
from solq_lab.training.trainer import train_run

log = logging.getLogger("solq_lab.training")

FAILED, REFUSED = 1, 2


def main(arguments: list[str]) -> int:
    """Train the run in the folder that `arguments` names.

    Returns:
        The exit status: 0 finished, or stopped by a signal after saving; 2 the run cannot be trained as it stands; 1
        anything else.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if len(arguments) != 1:
        log.error("usage: python -m solq_lab.training RUN_FOLDER")
        return REFUSED
    keep_freed_memory()
    try:
        run = load_run(arguments[0])
        _log_to(run.log_file)
        with logging_redirect_tqdm():
            train_run(run)
    except (ConfigError, DataError, RunError, WeightMismatch, ExtensionBuildError) as error:
        log.error("%s", error)
        return REFUSED
    except NonFiniteError as error:
        log.error("the training diverged: %s", error)
        return FAILED
    except Exception:
        log.exception("the training failed")
        return FAILED
    return 0


def _log_to(path: Path) -> None:
    """Write log lines to the run's log file too, unless standard error goes there already."""
    if os.environ.get("RANK", "0") != "0":
        return
    if path.exists() and os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat()):
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)
