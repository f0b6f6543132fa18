"""Aligned receive buffers that are written again only when nobody refers to them any more.

JAX does not copy an aligned numpy array that is given to `device_put` or to a compiled program on a CPU:
the array on the device *is* the buffer. It keeps a reference to the buffer's memory for as long as a
program, or an array, may still read it. So a buffer that the pool alone refers to is free, and nobody has
to say when they are done. Knows nothing of jax, frames or channels.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque

import numpy as np

ALIGNMENT = 64
"""Bytes: what JAX asks of a buffer that it does not copy on a CPU."""


class BufferPool:
    """Buffers of a few sizes, for the one thread that receives.

    Args:
        per_size: buffers kept of a size; when all of them are in use, one that is not kept is handed out.
        sizes: how many sizes are kept; a further one takes the place of the one longest unused.
    """

    def __init__(self, per_size: int = 16, sizes: int = 32) -> None:
        self._per_size, self._sizes = per_size, sizes
        self._kept: OrderedDict[int, deque[np.ndarray]] = OrderedDict()
        self._unused = _references(_aligned(0))

    def take(self, nbytes: int) -> np.ndarray:
        """uint8[nbytes] with arbitrary content, 64-byte aligned.

        It is not handed out again while it, a view of it, or a device array made of it exists, nor while
        a program that was given it runs.
        """
        kept = self._kept.get(nbytes)
        if kept is None:
            kept = self._kept[nbytes] = deque()
            if len(self._kept) > self._sizes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(nbytes)
        for _ in range(len(kept)):  # the one used longest ago first: it is free as a rule
            kept.rotate(-1)
            if _references(kept[-1]) == self._unused:
                return kept[-1][:]
        buffer = _aligned(nbytes)
        if len(kept) < self._per_size:
            kept.append(buffer)
        return buffer[:]


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def _references(buffer: np.ndarray) -> int:
    """How many refer to the memory of a kept buffer: numpy has no chains of bases, so that views of views
    count, too. What the interpreter itself adds is the same in every call."""
    return sys.getrefcount(buffer.base)
