"""The numbers of metrics.jsonl in TensorBoard as well; metrics.jsonl is the record."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from solq_lab.config import ConfigError
from solq_lab.runs import Run
from solq_lab.schema import TrainSection

log = logging.getLogger(__name__)

FOLDER = "tensorboard"  # in the run folder; `tensorboard --logdir runs` finds those of all runs
AXIS = ("kind", "step")  # of a line: what it is and where it stands, no numbers to draw


def check_tracking(train: TrainSection) -> None:
    """Check that what is to track the training is installed.

    Raises:
        ConfigError: TensorBoard is asked for and missing.
    """
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.tensorboard=true needs TensorBoard; install it with: pip install 'solq-lab[tracking]', or leave it "
            "out: metrics.jsonl has the same numbers"
        )


class TensorBoard:
    """Scalars of a run in its folder `tensorboard`; where they cannot be written, the training continues without.

    What an earlier process wrote of steps later than `step` is purged: they will be repeated.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._writer = folder, None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        except Exception as error:
            self._give_up(error)

    def write(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of metrics.jsonl, under its kind and its keys, at its step."""
        if self._writer is None:
            return
        try:
            for tag, value in scalars(line, line["kind"]):
                self._writer.add_scalar(tag, value, line["step"])
            self._writer.flush()  # what is written up to a checkpoint is there after a kill, and is not repeated
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Continue without: an error of a plotting library must not end a training of days."""
        log.warning("%s: no longer written, the training goes on: %s: %s", self._folder, type(error).__name__, error)
        self._writer = None


def open_tensorboard(run: Run, *, step: int) -> TensorBoard | None:
    """The run's TensorBoard folder, continued after `step`; None where train.tensorboard is off."""
    return TensorBoard(run.folder / FOLDER, step=step) if run.experiment.train.tensorboard else None


def scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Tag and value of every number in a line: `train/losses/vector`, `evaluation/metrics/segm.AP`, ..."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}/{key}")
        elif key not in AXIS and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", float(value)
