"""The progress of a run in one line of text, the same in a terminal, a notebook and a log file. Loads without torch."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from solq_lab.bars import SECONDS_BETWEEN_LINES
from solq_lab.runs import Run

SECONDS_BETWEEN_DRAWINGS = 30.0
STEPS_BEFORE_ESTIMATE = 30  # the first steps are slower: they build operators and fill caches


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
def live_output(draw: Callable[[], Any] | None) -> Iterator[Callable[[], None]]:
    """A function that shows what `draw` gives in a notebook, at most every half minute; at the end it is taken away.

    Without `draw`, and outside of a notebook, the function does nothing.
    """
    from IPython import get_ipython
    from IPython.display import display

    if draw is None or get_ipython() is None:
        yield lambda: None
        return
    handle = display({"text/plain": ""}, raw=True, display_id=True)
    when = -SECONDS_BETWEEN_DRAWINGS

    def show() -> None:
        nonlocal when
        if time.monotonic() - when >= SECONDS_BETWEEN_DRAWINGS:
            when = time.monotonic()
            handle.update(draw())

    try:
        yield show
    finally:
        handle.update({"text/plain": ""}, raw=True)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A function that shows a text in place of the previous one.

    In a notebook one output is updated, so that the executed notebook keeps only the last text; a terminal's line is
    overwritten; a log file gets a line every `SECONDS_BETWEEN_LINES`, and the last text.
    """
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is not None:
        handle = display({"text/plain": ""}, raw=True, display_id=True)
        yield lambda text: handle.update({"text/plain": text}, raw=True)
        return

    terminal = sys.stderr.isatty()
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")  # back to the start, erase the line
    written = latest = ""
    when = -SECONDS_BETWEEN_LINES

    def write() -> None:
        nonlocal written
        if latest != written:
            written = latest
            sys.stderr.write(f"{start}{latest}{end}")
            sys.stderr.flush()

    def show(text: str) -> None:
        nonlocal latest, when
        latest = text
        if terminal or time.monotonic() - when >= SECONDS_BETWEEN_LINES:
            when = time.monotonic()
            write()

    try:
        yield show
    finally:
        write()
        if terminal:
            sys.stderr.write("\n")
