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

STEPS_BEFORE_ESTIMATE = 30  # the first steps are slower: they build operators and fill caches
SECONDS_BETWEEN_LINES = 30.0  # where lines cannot be overwritten, in a log file


class Progress:
    """One line about a training, from the new lines of metrics.jsonl."""

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
        parts += [f"loss {train['total']:.2f}", f"{train['images_per_second']:.1f} images/s"]
        if total and train["step"] >= STEPS_BEFORE_ESTIMATE and train["images_per_second"] > 0:
            images = (total - train["step"]) * self._run.experiment.train.batch_size
            parts.append(f"{describe_duration(images / train['images_per_second'])} left")
        if evaluation is not None:
            aps = {kind: evaluation["metrics"].get(f"{kind}.AP") for kind in ("box", "segm")}
            parts += [f"{kind} AP {100 * ap:.1f}" for kind, ap in aps.items() if ap is not None]
        return f"{self._run.name}: " + ", ".join(parts)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self._run.metrics_file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # a resumed training has removed lines
                self._offset = 0
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):  # still being written
                    return
                self._offset += len(text)
                with contextlib.suppress(ValueError):
                    yield json.loads(text)


def describe_duration(seconds: float) -> str:
    """A duration in a readable unit: 40 s, 9 min, 5.2 h, 1.5 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A function that shows a text in place of the previous one.

    In a notebook one output is updated, so that the executed notebook keeps only the last text; a terminal's line is
    overwritten; a log file gets a line every `SECONDS_BETWEEN_LINES`, and the last text.
    """
    if _in_notebook():
        yield _notebook_output()
    elif sys.stderr.isatty():
        try:
            yield _overwriting
        finally:
            sys.stderr.write("\n")
    else:
        lines = _LogLines()
        try:
            yield lines.show
        finally:
            lines.close()


def _in_notebook() -> bool:
    import IPython

    return IPython.get_ipython() is not None


def _notebook_output() -> Callable[[str], None]:
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def _overwriting(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")  # back to the start, erase the line
    sys.stderr.flush()


class _LogLines:
    """Writes some of the texts as lines of standard error, and always the last one."""

    def __init__(self) -> None:
        self._shown = self._latest = ""
        self._when = -SECONDS_BETWEEN_LINES

    def show(self, text: str) -> None:
        self._latest = text
        if time.monotonic() - self._when >= SECONDS_BETWEEN_LINES:
            self._when = time.monotonic()
            self.close()

    def close(self) -> None:
        if self._latest != self._shown:
            self._shown = self._latest
            sys.stderr.write(f"{self._latest}\n")
            sys.stderr.flush()
