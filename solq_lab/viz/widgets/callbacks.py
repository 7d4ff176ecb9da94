"""Callbacks of controls whose exceptions are shown: Jupyter would only write them to a log that nobody opens."""

from __future__ import annotations

import logging
from collections.abc import Callable

import ipywidgets as widgets

logger = logging.getLogger(__name__)


class Callbacks:
    """Connects controls to actions and reports what an action raises.

    Args:
        report: shows a sentence beside the controls.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def on_change(self, action: Callable[[], None], *controls: widgets.Widget) -> None:
        """Run `action` whenever the value of one of the controls changes."""
        for control in controls:
            control.observe(lambda _: self.run(action), "value")

    def on_click(self, action: Callable[[], None], button: widgets.Button) -> None:
        """Run `action` whenever the button is clicked."""
        button.on_click(lambda _: self.run(action))

    def run(self, action: Callable[[], None]) -> None:
        """Run `action`; an exception becomes a visible sentence, with the traceback in the log."""
        try:
            action()
        except Exception as error:
            logger.exception("a control's action failed")
            self._report(f"{type(error).__name__}: {error}")
