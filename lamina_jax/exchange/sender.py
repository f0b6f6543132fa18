"""Sends frames in the order in which they were given, each as soon as its arrays have been computed.

The decode loop must not wait for an array while the compute mesh has nothing else queued: one thread waits
for it. What has been computed already, with nothing before it, is sent without that thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic_ns

import jax
import numpy as np

from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.frames import Header
from lamina_jax.exchange.timings import Stamps


@dataclass(frozen=True)
class Outgoing:
    """A frame to be sent: `header` but for its length, and its payload.

    Attributes:
        arrays: of the compute mesh, or of the host; their bytes in turn are the payload.
        tokens: where only some of the tokens of [B, Q, heads, H] are sent, their flat indices.
        stamps: of its worker, where its times are noted; None: they are not.
        given_ns: when it was given to the sender, where its times are noted.
    """

    channel: Channel
    header: Header
    arrays: Sequence[jax.Array | np.ndarray]
    tokens: np.ndarray | None = None
    stamps: Stamps | None = None
    given_ns: int = 0

    @property
    def ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(isinstance(array, np.ndarray) or array.is_ready() for array in self.arrays)  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        if self.tokens is None:
            return sum([array.nbytes for array in self.arrays])
        return sum(
            [array.nbytes * len(self.tokens) // (array.shape[0] * array.shape[1]) for array in self.arrays]
        )

    def send(self) -> None:
        """Wait for the arrays and send them. Raises `ChannelClosed`."""
        computed = self.stamps is not None and self.ready
        buffers = [_bytes(np.asarray(array), self.tokens) for array in self.arrays]
        ready_ns = self.given_ns if computed else monotonic_ns()
        length = sum([buffer.nbytes for buffer in buffers])
        self.channel.send(self.header._replace(length=length), buffers)
        if self.stamps is not None:
            self.stamps.sent(self.header, ready_ns)


class Sender:
    """One thread for all channels. When a channel fails, it is closed: who receives from it finds out."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._given, self._sent = 0, 0
        self._thread = threading.Thread(target=self._run, name="exchange sender", daemon=True)
        self._thread.start()

    def send(self, frame: Outgoing, *, at_once: bool) -> None:
        """Send a frame, after all those given before; from one thread. Never waits for an array.

        `at_once`: the caller may be held up until the worker reads. It must not be while the worker waits
        for the caller to take a long answer.
        """
        if at_once and self._sent == self._given and frame.ready:
            _send(frame)
            return
        self._given += 1
        self._waiting.put(frame)

    def cpu_ns(self) -> int:
        """CPU time that the thread has used; to be asked before it is closed."""
        assert self._thread.ident is not None
        return time.clock_gettime_ns(time.pthread_getcpuclockid(self._thread.ident))

    def close(self, seconds: float) -> None:
        """End the thread, once its channels are closed."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (frame := self._waiting.get()) is not None:
            _send(frame)
            del frame  # its arrays are not to be held while the thread waits
            self._sent += 1


def _send(frame: Outgoing) -> None:
    try:
        frame.send()
    except ChannelClosed:
        frame.channel.close()
    except RuntimeError:  # the arrays were never computed: the program before them failed
        frame.channel.close()


def _bytes(array: np.ndarray, tokens: np.ndarray | None) -> np.ndarray:
    if tokens is not None:
        array = array.reshape(-1, *array.shape[2:])[tokens]
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
