"""The progress bar of long captures, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

_AFTER = 3.0  # seconds of work before a bar is worth its line


class Progress:
    """Counts steps on standard error; see `capture` for when.

    Args:
      show: `True` at once, `False` never, `None` on a terminal, after some seconds.
      total: number of steps, if known.
      what: text in front of the bar.
    """

    def __init__(self, show: bool | None, total: int | None, what: str = "capture") -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._from = time.monotonic() + (_AFTER if show is None else 0.0)
        self._total, self._done, self._what = total, 0, what
        self._bar: Any = None
        self._task: Any = None

    def step(self) -> None:
        """Counts one step as done."""
        self._done += 1
        self._update()

    def say(self, what: str) -> None:
        """Sets the text for the next step."""
        self._what = what
        self._update()

    def _update(self) -> None:
        if not self._show or time.monotonic() < self._from:
            return
        if self._bar is None:
            self._open()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._what)

    def _open(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import Progress as Bar
        except ImportError:
            self._show = False
            return
        self._bar = Bar(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._what, total=self._total)
        self._bar.start()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
