"""The progress of a run in one line of text, the same in a terminal, a notebook and a log file. Loads without torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from solq_lab.runs import Run

STEPS_BEFORE_ESTIMATE = 30  # the first steps build operators and fill caches; they are no measure of the rest
SECONDS_BETWEEN_LINES = 30.0  # where lines cannot be overwritten, in a log file


class Progress:
    """One line about a training, from what is new in metrics.jsonl since the last look."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._offset = 0
        self._latest: dict[str, dict[str, Any]] = {}

    def read(self) -> str:
        """Steps done and to do, loss, speed, time left, the last AP."""
        for line in self._new_lines():
            self._latest[line.get("kind", "")] = line
        train, evaluation = self._latest.get("train"), self._latest.get("evaluation")
        if train is None:
            return f"{self._run.name}: starting"
        total = self._latest.get("start", {}).get("total_steps") or self._run.experiment.train.steps
        parts = [f"step {train['step']}" + (f" of {total} ({100 * train['step'] // total} %)" if total else "")]
        parts += [f"loss {train['total']:.2f}", f"{train['images_per_second']:.1f} pictures/s"]
        if total and train["step"] >= STEPS_BEFORE_ESTIMATE and train["images_per_second"] > 0:
            pictures = (total - train["step"]) * self._run.experiment.train.batch_size
            parts.append(f"{describe_duration(pictures / train['images_per_second'])} left")
        if evaluation is not None:
            metrics = evaluation["metrics"]
            parts += [
                f"{kind} AP {100 * metrics[f'{kind}.AP']:.1f}" for kind in ("box", "segm") if f"{kind}.AP" in metrics
            ]
        return f"{self._run.name}: " + ", ".join(parts)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self._run.metrics_file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # a resumed training took lines back
                self._offset = 0
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):  # still being written
                    return
                self._offset += len(text)
                with contextlib.suppress(ValueError):
                    yield json.loads(text)


def describe_duration(seconds: float) -> str:
    """A duration in the unit a person would choose: 40 s, 9 min, 5.2 h, 1.5 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A function that shows a text in place of the one before.

    In a notebook one output is updated, so that the executed notebook keeps only the last text; a terminal's line is
    overwritten; a log file gets a new line now and then.
    """
    if "ipykernel" in sys.modules:
        yield _notebook_output()
        return
    if not sys.stderr.isatty():
        yield _now_and_then()
        return
    try:
        yield _overwriting
    finally:
        sys.stderr.write("\n")


def _notebook_output() -> Callable[[str], None]:
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def _overwriting(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")  # back to the start, erase the line
    sys.stderr.flush()


def _now_and_then() -> Callable[[str], None]:
    last = -SECONDS_BETWEEN_LINES

    def show(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    return show
