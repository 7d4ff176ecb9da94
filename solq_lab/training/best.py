"""The best weights of a training by validation AP, kept beside the last ones, and early stopping."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from solq_lab import distributed
from solq_lab.runs import Run

log = logging.getLogger(__name__)

NOTHING_LEARNT = 0.01  # AP below this is noise: it counts as 0, so that later weights are kept and nothing stops


class BestWeights:
    """Writes `best.safetensors` of a run whenever an evaluation is as good as all before it.

    Every process of a training holds one; the main one writes.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._scores: list[float] = []  # of the evaluations so far

    def resume(self, step: int) -> None:
        """Take up the evaluations that the run has until a step."""
        lines = [line for line in self._run.metrics("evaluation") if line["step"] <= step]
        self._scores = [score(line["metrics"]) for line in lines]

    def add(self, metrics: Mapping[str, float | None], write: Callable[[Path], None]) -> None:
        """Count an evaluation; `write` writes the weights that it is of.

        To be called before the evaluation's line is written: a training that is killed in between evaluates again.
        """
        found = score(metrics)
        if distributed.is_main() and found >= max(self._scores, default=0.0):
            write(self._run.best)
        self._scores.append(found)

    def should_stop(self, patience: int) -> bool:
        """Whether the last `patience` evaluations were all worse than one before them; never where it is 0."""
        if not patience or len(self._scores) <= patience:
            return False
        best, since = max(self._scores[:-patience]), max(self._scores[-patience:])
        if since >= best:
            return False
        log.info("no better AP than %.1f in the last %d evaluations: stopped early", 100 * best, patience)
        return True


def score(metrics: Mapping[str, float | None]) -> float:
    """The number by which evaluations are compared: mask AP, or box AP of a plain detector; 0 where it says nothing."""
    value = metrics.get("segm.AP", metrics["box.AP"])
    return value if value is not None and value >= NOTHING_LEARNT else 0.0  # not where it is nan, either


def describe_best(run: Run) -> str:
    """After which step a run's evaluation was the best, and its AP."""
    lines = run.metrics("evaluation")
    best = max(lines, key=lambda line: (score(line["metrics"]), line["step"]))
    return f"step {best['step']}, AP {100 * score(best['metrics']):.1f}"
