"""Train a run: `python -m solq_lab.training RUN_FOLDER`, or the same under torchrun for several processes.

Loads without torch, whose import takes seconds, so that signals are handled from the start.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from solq_lab.allocation import keep_freed_memory
from solq_lab.errors import ExplainedError, Interrupted, UserError
from solq_lab.runs import RunError, load_run
from solq_lab.training.signals import Stopped, StopRequest, adopt_orphans, end_children

log = logging.getLogger("solq_lab.training")

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def main(arguments: list[str]) -> int:
    """Train the run in the folder that `arguments` names.

    Returns:
        The exit status: 0 finished, or stopped by a signal after saving; 2 the run cannot be trained as it stands; 130
        a second Ctrl-C, which skips the saving; 1 anything else.
    """
    is_main = os.environ.get("RANK", "0") == "0"  # as torchrun numbers the processes
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format=LOG_FORMAT, stream=sys.stderr)
    if len(arguments) != 1:
        log.error("usage: python -m solq_lab.training RUN_FOLDER")
        return UserError.exit_status
    adopt_orphans()
    with StopRequest() as stop:
        try:
            run = load_run(arguments[0])
            if is_main:
                _log_to(run.log_file)
            with stop.at_once():  # importing torch takes seconds
                from solq_lab.training.trainer import train_run

            # Kept memory doubles a peak that gradient checkpointing is to make small.
            keep_freed_memory(keep=not run.experiment.train.gradient_checkpointing)
            with logging_redirect_tqdm():
                train_run(run, stop)
            return 0
        except Stopped as signal:
            if is_main:
                with contextlib.suppress(RunError), run.locked():  # unless another process trains here
                    run.write_status("preempted", step=run.status()["step"], message=str(signal))
            log.info("%s: stopped in start-up; re-running resumes", signal)
            return 0
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


def _log_to(path: Path) -> None:
    """Write log lines to the run's log file too, unless standard error goes there already."""
    if path.exists() and os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat()):
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    # Waiting OpenMP threads sleep instead of spinning: on a CPU that others use too, spinning makes a step several
    # times slower. OpenMP reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main(sys.argv[1:]))
