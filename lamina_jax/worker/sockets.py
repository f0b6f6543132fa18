"""The socket way to a session: a TCP port and a Unix socket that take data streams.

Owns who may connect and how long that takes; what the frames mean is the session's.
"""

from __future__ import annotations

import logging
import selectors
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from lamina_jax.exchange.channel import FRAME_SECONDS, ChannelClosed, Frame, Room
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.socket import SocketChannel
from lamina_jax.worker.lease import SESSION_ID_BYTES, Refused
from lamina_jax.worker.leases import Leases

log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
MOST_CONNECTIONS = 64
"""One of each compute host; and those that have shown nothing yet, for `HELLO_SECONDS`."""

Serve = Callable[[SocketChannel, bytes], None]
"""It raises `Refused` or `ProtocolError` for what the other side is to be told."""


class DataListener:
    """Listens from when it is made; `start` takes connections.

    Args:
        port: 0: any free one.
        serve: deals with a connection, given what its HELLO shows; in a thread of its own.
        tls: of the TCP port. The Unix socket lies in a folder that only this user can enter.

    Raises:
        OSError: the port cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        serve: Serve,
        tls: ssl.SSLContext | None,
        most_connections: int = MOST_CONNECTIONS,
    ) -> None:
        self._serve_channel, self._tls = serve, tls
        self._free = threading.BoundedSemaphore(most_connections)
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        tcp = socket.create_server((host, port), family=family)
        self.port: int = tcp.getsockname()[1]
        self._folder = tempfile.mkdtemp(prefix="lamina-")  # mode 0700
        self.unix_path = str(Path(self._folder, "data"))
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(self.unix_path)
        unix.listen()
        self._listeners = (tcp, unix)
        self._closed = threading.Event()

    def start(self) -> None:
        """Take connections until `close`, in a thread."""
        threading.Thread(target=self._accept, name="data listener", daemon=True).start()

    def close(self) -> None:
        """Take no more; those there are stay."""
        self._closed.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    try:
                        connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                    except OSError:  # closed; or a peer that left already, or no descriptor to spare
                        if self._closed.wait(0.05):
                            return
                        continue
                    self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        if not self._free.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(target=self._serve, args=(connection,), name="data", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            channel, session_id = self._greet(connection)
            with closing(channel):
                self._answer(channel, session_id)
        except (OSError, ProtocolError) as error:  # also what ssl and a closed channel raise
            log.debug("data connection: %s", error)
        finally:
            self._free.release()

    def _greet(self, connection: socket.socket) -> tuple[SocketChannel, bytes]:
        """The handshake, then the HELLO, each within its time however slowly the bytes come."""
        try:
            connection.settimeout(HELLO_SECONDS)
            if self._tls is not None and connection.family != socket.AF_UNIX:
                connection = self._tls.wrap_socket(connection, server_side=True)
            channel = SocketChannel(connection, FRAME_SECONDS)
        except BaseException:
            connection.close()
            raise
        limit = threading.Timer(HELLO_SECONDS, channel.close)
        limit.daemon = True
        limit.start()
        try:
            hello = channel.receive(_room_of_hello)
        finally:
            limit.cancel()
        return channel, hello.payload[: hello.header.length].tobytes()

    def _answer(self, channel: SocketChannel, shown: bytes) -> None:
        try:
            self._serve_channel(channel, shown)
        except (Refused, ProtocolError) as error:
            _fail(channel, str(error))
        except Exception as error:
            log.exception("a session has failed")
            _fail(channel, str(error))


def serve_lease(leases: Leases, channel: SocketChannel, session_id: bytes) -> None:
    """The data stream of a lease."""
    lease = leases.find(session_id)
    with lease.stream(channel.close) as session:
        for header, buffers in lease.answers(session, _frames(channel, session.room)):
            channel.send(header, buffers)


def _frames(channel: SocketChannel, room: Room) -> Iterator[Frame]:
    while True:
        yield channel.receive(room)


def _room_of_hello(header: Header) -> int:
    if header.kind is not Kind.HELLO or header.length != SESSION_ID_BYTES:
        raise ProtocolError(
            f"a connection begins with {header.kind.name} of {header.length} bytes, not HELLO"
        )
    return header.length


def _fail(channel: SocketChannel, reason: str) -> None:
    text = np.frombuffer(reason.encode()[:4096], np.uint8)
    with suppress(ChannelClosed):
        channel.send(Header(Kind.FAILED, len(text)), [text])
