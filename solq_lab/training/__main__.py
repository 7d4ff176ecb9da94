"""Train a run: `python -m solq_lab.training RUN_FOLDER`, or the same under torchrun for several processes.

Loads without torch, whose import takes seconds, so that signals are handled from the start.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from solq_lab.allocation import keep_freed_memory
from solq_lab.errors import ExplainedError, Interrupted, UserError
from solq_lab.runs import Run, load_run
from solq_lab.training.signals import Stopped, StopRequest, adopt_orphans, end_children

log = logging.getLogger("solq_lab.training")


def main(arguments: list[str]) -> int:
    """Train the run in the folder that `arguments` names.

    Returns:
        The exit status: 0 finished, or stopped by a signal after saving; 2 the run cannot be trained as it stands; 130
        a second Ctrl-C, which skips the saving; 1 anything else.
    """
    level = logging.INFO if _is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if len(arguments) != 1:
        log.error("usage: python -m solq_lab.training RUN_FOLDER")
        return UserError.exit_status
    adopt_orphans()
    with StopRequest() as stop:
        try:
            run = load_run(arguments[0])
            _log_to(run.log_file)
            return _train(run, stop)
        except KeyboardInterrupt:
            log.error("a second Ctrl-C: ended without saving; re-running resumes from the last checkpoint")
            return Interrupted.exit_status
        except ExplainedError as error:
            log.error("%s", error)
            return error.exit_status
        except Exception:
            log.exception("the training failed")
            return 1
        finally:
            end_children()


def _train(run: Run, stop: StopRequest) -> int:
    try:
        with stop.at_once():
            from solq_lab.training.trainer import train_run
    except Stopped as signal:
        if _is_main():
            with run.locked():
                run.write_status("preempted", step=run.status()["step"], message=str(signal))
            log.info("%s: stopped in start-up; re-running resumes", signal)
        return 0
    keep_freed_memory(keep=not run.experiment.train.gradient_checkpointing)  # it doubles a peak that is to be small
    with logging_redirect_tqdm():
        train_run(run, stop)
    return 0


def _is_main() -> bool:
    """Whether this is rank 0, as torchrun numbers the processes."""
    return os.environ.get("RANK", "0") == "0"


def _log_to(path: Path) -> None:
    """Write log lines to the run's log file too, unless standard error goes there already."""
    if not _is_main():
        return
    if path.exists() and os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat()):
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    # Waiting OpenMP threads sleep instead of spinning: on a CPU that others use too, spinning makes a step several
    # times slower. OpenMP reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main(sys.argv[1:]))
