"""The time in which an attention worker is lost: what is known of it, and when to try to get it back.

It knows nothing of requests, of connections or of what was lost with the worker.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from lamina_jax.core import WorkerLost

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds before the first try and, doubling from try to try, at most before a later one."""


class Outage:
    """A lost worker, until a try to get it back succeeds.

    Args:
        lost: as the runner raised it.
        recover: one try; see `lamina_jax.engine.runner.RecoverableRunner`.

    Attributes:
        lost: the worker, and what was seen of it last.
    """

    def __init__(self, lost: WorkerLost, recover: Callable[[], bool]) -> None:
        self.lost = _bare(lost)
        self._recover, self._pause = recover, FIRST_PAUSE
        self._next_try = self._after_pause()

    @property
    def seconds_left(self) -> float:
        """Until the next try is due."""
        return max(0.0, self._next_try - time.monotonic())

    def ends(self) -> bool:
        """Try once, if that is due; whether the worker is back."""
        if self.seconds_left:
            return False
        try:
            if self._recover():
                return True
        except WorkerLost as lost:
            self.lost = _bare(lost)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._next_try = self._after_pause()
        return False

    def _after_pause(self) -> float:
        # Engines that lost the same worker must not come back to it all at once.
        return time.monotonic() + self._pause * random.uniform(0.5, 1)


def _bare(lost: WorkerLost) -> WorkerLost:
    """Without the traceback, whose frames hold a step's arrays."""
    return WorkerLost(lost.worker, lost.reason)
