"""What commands that serve have in common: what they say on stderr, and how signals end them. No jax here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What a terminal or a supervisor sends."""

SAME_SIGNAL_SECONDS = 0.3
"""In which a signal counts once: a terminal and a program like `timeout` may both pass on the same."""


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def refuse(error: Exception) -> int:
    """Say what is wrong; the exit code."""
    say(f"error: {error}")
    return 1


def end_by_signal(end: Callable[[int], object]) -> None:
    """Have SIGTERM or Ctrl-C call `end(number)`, and a second one end this process. In the main thread."""
    first: float | None = None

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            end(number)
        elif time.monotonic() > first + SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, take)
