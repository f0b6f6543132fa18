"""What a person at the terminal sees of a start: a bar over compilation, or plain lines in a log."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 5.0
"""Between two lines of one phase, where there is no terminal."""

log = logging.getLogger(__name__)


class StartReport:
    """Follows a start from report to report.

    Args:
        console: where it is told; None: in the log.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._phase = ""

    def line(self, text: str) -> None:
        if self._console is None:
            log.info(text)
        else:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def progress(self, phase: str, done: int, total: int) -> None:
        """A step of the start; `total` is 0 where it is not known."""
        if self._console is not None and self._console.is_terminal and total:
            self._show_bar(self._console, phase, done, total)
            return
        now = time.monotonic()
        if phase != self._phase or done == total or now - self._last_line >= LINE_SECONDS:
            steps = f" {done}/{total}" if total else ""
            self.line(f"{phase}{steps}, {now - self._started:.0f} s")
            self._last_line, self._phase = now, phase

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _show_bar(self, console: Console, phase: str, done: int, total: int) -> None:
        if self._bar is None:
            phases = TextColumn("{task.description}")
            columns = phases, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=console)
            self._bar.add_task(phase, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=phase, completed=done, total=total)
