"""Comparisons of two ways of doing the same, timed in turn."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Timer = Callable[[Callable[[], Any]], tuple[float, Any]]  # runs a way: milliseconds, and its result

REPEATS = 9  # timed runs of each way, at most
SECONDS = 12.0  # that the timed runs of a pair may take together; the first run of each is never cut short


class Row(NamedTuple):
    """One comparison."""

    part: str  # name of the benchmark part
    what: str  # what was done, with its sizes
    # baseline, ours: median times or peaks of memory, in `unit`
    baseline: float
    ours: float
    equal: bool  # whether both gave the same result, by the part's own measure
    unit: Literal["ms", "GiB"] = "ms"

    @property
    def ratio(self) -> float:
        """How many times less ours takes."""
        return self.baseline / self.ours

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types: the two numbers with the unit in their names, and their ratio."""
        unit = self.unit.lower()
        measured = {f"baseline_{unit}": self.baseline, f"ours_{unit}": self.ours, "ratio": self.ratio}
        return {"part": self.part, "what": self.what, **measured, "equal": self.equal}


def compare(
    part: str,
    what: str,
    baseline: Callable[[], Any],
    ours: Callable[[], Any],
    equal: Callable[[Any, Any], bool],
    *,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
    settle: bool = False,
    timed: Timer | None = None,
) -> Row:
    """Times both ways in turn, so that a busy moment of the machine affects both, and compares their first results.

    The first run of each warms caches and builds what is built lazily; it counts only where it alone took more than
    `seconds`, because such a run leaves nothing to warm.

    Args:
        part, what: name the row.
        baseline: the plain way.
        ours: this library's way.
        equal: whether the two results are the same.
        repeats: timed runs of each way, at most.
        seconds: after which no further pair of runs is started.
        settle: whether each timed run follows an untimed one of the same way, because each leaves the process in
            a state that slows the other down.
        timed: runs a way; its milliseconds and its result. None: by wall-clock time.
    """
    timed = timed or timed_by_wall
    baseline_ms, expected = timed(baseline)
    ours_ms, found = timed(ours)
    same = equal(expected, found)
    times = ([baseline_ms], [ours_ms]) if baseline_ms + ours_ms > 1000 * seconds else ([], [])
    del expected, found

    started = time.perf_counter()
    while not times[0] or (len(times[0]) < repeats and time.perf_counter() - started < seconds):
        for measured, way in zip(times, (baseline, ours), strict=True):
            if settle:
                way()
            measured.append(timed(way)[0])
    return Row(part, what, statistics.median(times[0]), statistics.median(times[1]), bool(same))


def are_near(expected: Iterable[Tensor], found: Iterable[Tensor], *, tolerance: float) -> bool:
    """Whether each pair of tensors differs by at most `tolerance` of the expected one's largest number, in float32."""
    pairs = [(theirs.float(), ours.float()) for theirs, ours in zip(expected, found, strict=True)]
    return all(bool((theirs - ours).abs().max() <= tolerance * theirs.abs().max()) for theirs, ours in pairs)


def timed_by_wall(way: Callable[[], Any]) -> tuple[float, Any]:
    """Run a way: milliseconds of wall-clock time, and its result."""
    started = time.perf_counter()
    result = way()
    return 1000 * (time.perf_counter() - started), result


def timer(device: torch.device, calls: int = 1) -> Timer:
    """A timer for `compare`, of the mean of several calls: on a GPU by its own clock, from idle until all is done."""

    def repeated(way: Callable[[], Any]) -> Any:
        for _ in range(calls):
            result = way()
        return result

    def by_events(way: Callable[[], Any]) -> tuple[float, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            start.record()
            result = repeated(way)
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls, result

    def by_wall(way: Callable[[], Any]) -> tuple[float, Any]:
        milliseconds, result = timed_by_wall(lambda: repeated(way))
        return milliseconds / calls, result

    return by_events if device.type == "cuda" else by_wall
