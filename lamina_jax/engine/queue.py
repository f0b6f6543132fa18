"""How far the host runs ahead of the compute mesh: in bursts, and no further than XLA takes programs."""

from __future__ import annotations

from collections import deque

import jax


class Queue:
    """Slices that are queued and perhaps not done. When `most` are, waits until `fewest` are left.

    XLA on a CPU takes 32 programs a device and then blocks each call until one is done. What the host
    does between two such calls runs with cold caches, at several times its cost, and on cores that
    the model wants; a burst of many slices is warm.
    """

    def __init__(self, most: int, fewest: int) -> None:
        self._most, self._fewest = most, fewest
        self._outputs: deque[jax.Array] = deque()

    def clear(self) -> None:
        """Forget them all."""
        self._outputs.clear()

    def add(self, output: jax.Array) -> None:
        """Note a slice by one of its outputs; may wait for earlier ones."""
        self._outputs.append(output)
        if len(self._outputs) < self._most:
            return
        while len(self._outputs) > self._fewest:
            done = self._outputs.popleft()
        jax.block_until_ready(done)
