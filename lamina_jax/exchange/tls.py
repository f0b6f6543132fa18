"""Reading and writing one TLS connection from two threads.

OpenSSL wants one call at a time on a connection, also where one thread only reads and the other only
writes. So calls do not block and hold a lock, and waiting is done outside of it.
"""

from __future__ import annotations

import select
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any


class TlsStream:
    """`recv_into` and `sendmsg` as of a blocking socket with SO_RCVTIMEO and SO_SNDTIMEO.

    They raise BlockingIOError when no bytes went in a tick.

    Args:
        sock: past its handshake.
        tick_seconds: longest wait of one call.
    """

    def __init__(self, sock: ssl.SSLSocket, tick_seconds: float) -> None:
        sock.setblocking(False)
        self._sock, self._tick = sock, tick_seconds
        self._lock = threading.Lock()

    def recv_into(self, buffer: memoryview, nbytes: int, flags: int = 0, /) -> int:
        """Some of `nbytes`; flags are not for TLS, and disregarded."""
        return self._call(self._sock.recv_into, buffer[:nbytes])

    def sendmsg(self, buffers: Sequence[Any], /) -> int:
        """Some of the first one."""
        return self._call(self._sock.send, buffers[0])

    def _call(self, operation: Callable[[Any], int], buffer: Any) -> int:
        for _ in range(2):
            try:
                with self._lock:
                    return operation(buffer)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
        raise BlockingIOError  # the peer may send records bit by bit: the caller looks at the clock

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        poll.poll(1000 * self._tick)
