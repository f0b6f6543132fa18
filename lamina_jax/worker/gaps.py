"""When pulled KV may be written: behind what the engine has still to append, in the gaps of decoding.

It knows nothing of what is written, nor of frames but that they come and go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_SECONDS = 0.02
"""Without a frame for so long, nothing decodes: then a pull need not wait for the end of one."""

_STEPS = 1 << 32
"""Steps are counted so far, and begin anew."""


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


class Appends:
    """How far the steps are whose frames come.

    An engine has read a step before its last k and v have come, and may have pages of that step filled anew.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._owed: dict[int, int] = {}

    def begin(self, microbatch: int, step: int, *, appends: bool) -> None:
        """A microbatch's step begins; `appends`: k and v will come."""
        with self._changed:
            self._begun = step
            if appends:
                self._owed[microbatch] = step
            self._changed.notify_all()

    def end(self, microbatch: int) -> None:
        """The last k and v of its step have come."""
        with self._changed:
            self._owed.pop(microbatch, None)
            self._changed.notify_all()

    def wait(self, step: int, seconds: float) -> bool:
        """Whether within so many seconds nothing more is to come of a step, and of those before it."""
        with self._changed:
            return self._changed.wait_for(lambda: self._are_over(step), seconds)

    def _are_over(self, step: int) -> bool:
        return _reaches(self._begun, step) and not any(_reaches(step, owed) for owed in self._owed.values())


def _reaches(step: int, other: int) -> bool:
    return (step - other) % _STEPS < _STEPS // 2
