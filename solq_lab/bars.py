"""Progress bars of long work, all of one kind. Loads without torch."""

import sys
from collections.abc import Iterable
from typing import Any

SECONDS_BETWEEN_LINES = 30.0  # in a log file, where lines cannot be overwritten


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm that vanishes when it is done; in a log file, a line every half minute of long work.

    Args:
        iterable: what is counted while it is read; None: the caller counts by `update`.
        options: of tqdm: desc, total, unit and so on.
    """
    from tqdm.auto import tqdm  # not above: `solq-lab -q` turns bars off before it is imported

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    in_place = sys.stderr.isatty() or hasattr(shell, "kernel")  # a terminal or a notebook
    if not in_place:
        options |= {"miniters": 1} | dict.fromkeys(("delay", "mininterval"), SECONDS_BETWEEN_LINES)
    bar = tqdm(iterable, **{"leave": False, **options})
    if not in_place:
        tqdm._instances.discard(bar)  # tqdm.write, and log messages, would draw it again below each of their lines
    return bar
