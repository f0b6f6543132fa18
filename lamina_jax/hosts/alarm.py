"""How a process ends whose peer is lost: everybody who can be told is told, then it ends at once.

A collective that waits for a dead host cannot be interrupted, and JAX's own barrier at exit waits for it,
too: so the process leaves without either. Knows nothing of who is lost, or of who is told.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

LAST_WORDS_SECONDS = 0.3
"""For messages on their way to others."""

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


def leave(code: int) -> None:
    """End this process now, with no barrier of JAX's and no thread waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Alarm:
    """Ends this process for the first reason that there is.

    Args:
        leave: ends it, with an exit code.

    Attributes:
        code: the exit code; 0 where the end is expected.
    """

    def __init__(self, leave: Callable[[int], None] = leave) -> None:
        self._leave, self._lock, self.code = leave, threading.Lock(), 1
        self._tells: list[Tell] = []
        self._over = False

    @property
    def armed(self) -> bool:
        """Whether there is anybody to be told."""
        return bool(self._tells)

    def tell(self, callback: Tell) -> None:
        """Have `callback(reason)` called first; it must not wait."""
        self._tells.append(callback)

    def ring(self, reason: str, *, heard: bool = True) -> None:
        """End, from any thread; later reasons do not count, nor any after `disarm`.

        Args:
            heard: others can still be told; if not, nothing is waited for: JAX's own client aborts a process
                whose host 0 is gone, and says less.
        """
        with self._lock:
            if self._over:
                return
            self._over = True
        log.error("ending: %s", reason)
        for callback in self._tells:
            try:
                callback(reason)
            except Exception:  # the others must hear of it all the same
                log.exception("cannot tell that %s", reason)
        if heard:
            time.sleep(LAST_WORDS_SECONDS)
        self._leave(self.code)

    def disarm(self) -> None:
        """From now on peers may go: this is the end."""
        with self._lock:
            self._over = True
