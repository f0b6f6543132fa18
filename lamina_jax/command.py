"""What commands that serve have in common: what they say on stderr, and how signals end them. No jax here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

SAME_SIGNAL_SECONDS = 0.3
"""In which a signal counts once: a terminal and a program like `timeout` may both pass on the same."""


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def refuse(error: Exception) -> int:
    """Say what is wrong; the exit code."""
    say(f"error: {error}")
    return 1


def end_by_signal(ended: threading.Event) -> None:
    """Have SIGTERM or Ctrl-C set `ended`, and a second one end this process at once. In the main thread."""
    first: float | None = None

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            ended.set()
        elif time.monotonic() > first + SAME_SIGNAL_SECONDS:
            os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, take)
