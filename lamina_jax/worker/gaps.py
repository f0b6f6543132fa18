"""When pulled KV may be written: in the gaps that decoding leaves.

It knows nothing of what is written, nor of frames but that they come and go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_SECONDS = 0.02
"""Without a frame for so long, nothing decodes: then a pull need not wait for the end of one."""


class Gaps:
    """One at a time works on the pages: the frames of decoding as they come, pulls between them.

    A pull writes once after a frame has been dealt with, and the next frame waits for that one write at most.

    Attributes:
        pages: held by whoever works on them.
    """

    def __init__(self) -> None:
        self.pages = threading.Lock()
        self._one_pull = threading.Lock()
        self._begins = threading.Event()
        self._last_frame = 0.0

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Around what is done for one frame of decoding."""
        with self.pages:
            yield
        self._last_frame = time.monotonic()
        self._begins.set()

    @contextmanager
    def gap(self) -> Iterator[None]:
        """Around one write of a pull."""
        with self._one_pull:
            self.wait()
            with self.pages:
                yield

    def wait(self) -> None:
        """For the beginning of a gap, while there is decoding."""
        quiet_at = self._last_frame + QUIET_SECONDS
        left = quiet_at - time.monotonic()
        if left > 0:
            self._begins.wait(left)
        self._begins.clear()
