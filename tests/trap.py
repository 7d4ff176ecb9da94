"""A value whose unpickling leaves a trace, for tests that no file runs code."""

import os
from pathlib import Path
from typing import Any


class Trap:
    """Unpickling it makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
