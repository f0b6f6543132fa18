"""What a data channel between the engine and one attention worker does, whatever carries the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from lamina_jax.exchange.frames import Header

FRAME_SECONDS = 30.0
"""What a frame may take from its first byte to its last, on either side; that the other side lives is the
lease's concern."""


class ChannelClosed(ConnectionError):
    """The other side is gone, or this side has closed the channel, or a deadline has passed."""


class Frame(NamedTuple):
    """A frame that was received: its payload uint8[size], of which `header.length` bytes have come."""

    header: Header
    payload: np.ndarray


Room = Callable[[Header], int]
"""How many bytes the buffer for a frame's payload has: at least `header.length`. It refuses a frame by a
`ProtocolError`; no buffer is made before it was asked."""


@runtime_checkable
class Channel(Protocol):
    """Frames both ways, in order. One thread may send while another receives; `close` is for any thread."""

    bytes_sent: int
    bytes_received: int

    def send(self, header: Header, buffers: Sequence[np.ndarray]) -> None:
        """Send a frame whose payload is the bytes of C-contiguous `buffers` in turn; `header.length` is
        their sum. When it returns the buffers may change.

        Raises:
            ChannelClosed: it cannot be sent.
        """
        ...

    def receive(self, room: Room) -> Frame:
        """Wait for the next frame. The payload is 64-byte aligned where the transport allows it, and is
        not written to as long as anybody refers to it.

        Raises:
            ChannelClosed: there will be none.
            ProtocolError: what came is no frame, or `room` refused it.
        """
        ...

    def close(self) -> None:
        """End it; whoever waits in `send` or `receive` gets `ChannelClosed`."""
        ...
