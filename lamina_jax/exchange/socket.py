"""The data channel over a blocking TCP or Unix socket, plain or with TLS.

Owns how frames get in and out of a socket, in time. Knows nothing of what they mean; whether a peer that
has nothing to say is alive is somebody else's job.

Between two system calls that wait, Python runs with cold caches and takes several times as long as in a
loop: `send` before its call and `receive` behind its first one do as little as they can.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from lamina_jax.config import host_and_port
from lamina_jax.exchange.buffers import BufferPool
from lamina_jax.exchange.channel import ChannelClosed, Frame, Room
from lamina_jax.exchange.frames import HEADER_BYTES, Header, ProtocolError, unpack_header
from lamina_jax.exchange.tls import TlsStream

UNIX_BUFFER_BYTES = 4 << 20
"""What a Unix socket may hold: its buffer does not grow by itself, as TCP's do. The kernel gives at most its
net.core.wmem_max."""

CONNECT_SECONDS = 5.0

_MOST_BUFFERS = 512  # in one system call; Linux takes 1024


class SocketChannel:
    """Frames over a connected socket; see `lamina_jax.exchange.channel.Channel`.

    After an error the channel is closed. The descriptor is, when nobody refers to the channel any more:
    no thread can then be waiting on it.

    Args:
        sock: connected, and if it is an `ssl.SSLSocket` past its handshake; the channel owns it.
        deadline_seconds: how long a frame may take from its first byte to its last, either way.
        idle_seconds: how long `receive` waits for a frame to begin; None: for ever.

    Attributes:
        bytes_sent, bytes_received: of whole frames, with their headers.
        frames_sent, frames_received: likewise.
    """

    def __init__(
        self, sock: socket.socket, deadline_seconds: float, idle_seconds: float | None = None
    ) -> None:
        self._sock, self._peer = sock, _peer_name(sock)
        self._deadline = deadline_seconds
        self._idle = math.inf if idle_seconds is None else idle_seconds
        # How often a wait looks at the clock; to the kernel 0 would be never.
        tick = max(min(self._deadline, self._idle) / 4, 1e-3)
        _prepare(sock, tick)
        stream = TlsStream(sock, tick) if isinstance(sock, ssl.SSLSocket) else sock
        self._sendmsg, self._recv_into = stream.sendmsg, stream.recv_into
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._pool = BufferPool()
        self.bytes_sent = self.bytes_received = self.frames_sent = self.frames_received = 0
        weakref.finalize(self, sock.close)

    def send(self, header: Header, buffers: Sequence[np.ndarray]) -> None:
        # The buffer protocol knows only numpy's own dtypes, and no bfloat16.
        views = [b if b.dtype.isbuiltin == 1 else b.view(np.uint8) for b in buffers]
        frame: list[Any] = [header.pack(), *views]
        size = HEADER_BYTES + header.length
        try:
            sent = self._some(self._sendmsg, frame) if len(frame) < _MOST_BUFFERS else 0
            if sent != size:
                self._send_rest(frame, sent, size)
        except BaseException:
            self.close()  # a part of the frame may be out
            raise
        self.bytes_sent += size
        self.frames_sent += 1

    def receive(self, room: Room) -> Frame:
        try:
            self._fill(self._header, HEADER_BYTES, self._idle)
            header = unpack_header(self._header)
            size = room(header)
            if size < header.length:
                raise ProtocolError(f"{header.kind.name} has {header.length} bytes, there is room for {size}")
            payload = self._pool.take(size)
            if header.length:
                self._fill(payload.data, header.length, self._deadline)
        except BaseException:
            self.close()  # where the next frame begins is unknown
            raise
        self.bytes_received += HEADER_BYTES + header.length
        self.frames_received += 1
        return Frame(header, payload)

    def close(self) -> None:
        # Not SSLSocket.shutdown, after which another thread would read ciphertext as plain bytes.
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _fill(self, into: memoryview, size: int, seconds: float) -> None:
        """Receive `size` bytes: the first within `seconds`, the others within the deadline from there."""
        got = self._some(self._recv_into, into, size, socket.MSG_WAITALL)
        if got != size:
            self._fill_rest(into[got:size], got > 0, seconds)

    def _fill_rest(self, rest: memoryview, begun: bool, seconds: float) -> None:
        until = monotonic() + (self._deadline if begun else seconds)
        while rest:
            got = self._some(self._recv_into, rest, len(rest), socket.MSG_WAITALL)
            if got and not begun:
                until, begun = monotonic() + self._deadline, True
            rest = rest[got:]
            if rest and monotonic() > until:
                what = f"not all of a frame in {self._deadline:g} s" if begun else f"nothing in {seconds:g} s"
                raise self._closed(f"it has sent {what}")

    def _send_rest(self, frame: Sequence[Any], sent: int, size: int) -> None:
        rest = [memoryview(part).cast("B") for part in frame if memoryview(part).nbytes]
        if (given := sum(map(len, rest))) != size:
            raise ValueError(
                f"the header speaks of {size - HEADER_BYTES} bytes, the buffers have {given - HEADER_BYTES}"
            )
        until = monotonic() + self._deadline
        while rest := _behind(rest, sent):
            if monotonic() > until:
                raise self._closed(f"it has not taken all of a frame in {self._deadline:g} s")
            sent = self._some(self._sendmsg, rest[:_MOST_BUFFERS])

    def _some(self, call: Callable[..., int], *args: Any) -> int:
        """How many bytes a system call moves; 0: none in a tick."""
        try:
            if moved := call(*args):
                return moved
            raise ConnectionError("the connection has ended")
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._closed(error) from error

    def _closed(self, why: object) -> ChannelClosed:
        self.close()
        return ChannelClosed(f"{self._peer}: {why}")


def connect(
    address: str,
    deadline_seconds: float,
    ssl_context: ssl.SSLContext | None = None,
    idle_seconds: float | None = None,
) -> SocketChannel:
    """A channel to "host:port" or "unix:/path"; connecting and the handshake have the deadline, too, but at
    most `CONNECT_SECONDS` each.

    Raises:
        ConfigError: no such kind of address.
        ChannelClosed: nobody answers there, or not in TLS that `ssl_context` trusts.
    """
    seconds = min(deadline_seconds, CONNECT_SECONDS)
    try:
        if address.startswith("unix:"):
            if ssl_context is not None:
                raise ValueError(f"{address} stays on this machine: there is no TLS for it, leave it out")
            sock = _connected(socket.socket(socket.AF_UNIX), address.removeprefix("unix:"), seconds)
        else:
            host, port = host_and_port("address", address)
            sock = socket.create_connection((host, port), seconds)
            if ssl_context is not None:
                sock = ssl_context.wrap_socket(sock, server_hostname=host)
    except OSError as error:
        raise ChannelClosed(f"{address}: {error}") from error
    return SocketChannel(sock, deadline_seconds, idle_seconds)


def _connected(sock: socket.socket, path: str, seconds: float) -> socket.socket:
    try:
        sock.settimeout(seconds)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _prepare(sock: socket.socket, tick_seconds: float) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The kernel's own time limits: a timeout of Python's would cost a poll per call.
    sock.settimeout(None)
    limit = struct.pack("ll", int(tick_seconds), int(tick_seconds % 1 * 1e6))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


def _peer_name(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else f"unix:{name or '(a client)'}"


def _behind(views: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of them."""
    for i, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[i + 1 :]]
        sent -= len(view)
    return []
