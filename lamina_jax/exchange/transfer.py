"""Device arrays between two processes by `jax.experimental.transfer`, and the end of waits for them.

Either side offers arrays under a number, and pulls what the other offers; both know the numbers before, so
that a pull may stand before its offer and programs be queued behind it. Nothing here waits for an array.
Knows nothing of workers, leases or what the arrays mean.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from typing import Any

import jax
from jax.experimental.transfer import start_transfer_server

from lamina_jax.config import address_of, host_and_port
from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.frames import Header

CONNECT_SECONDS = 5.0

_NUMBERED = struct.Struct("<IHHB")


class TransferLink:
    """A transfer server of this process, and a connection to one of another.

    The server goes when nobody refers to the link any more, and with it what was offered and never pulled.

    Args:
        device: one of those whose arrays cross.
        host: the IP address to listen on; JAX would take a name for all addresses.
        key: a secret of both sides: who does not know it cannot name an array.

    Attributes:
        address: "ip:port", which the other side connects to.

    Raises:
        RuntimeError: the address cannot be listened on.
    """

    def __init__(self, device: jax.Device, host: str, key: bytes) -> None:
        local = address_of(host, 0)
        # Without addresses of its own for the data, JAX's server crashes at the first pull.
        self._server = start_transfer_server(device.client, local, [local])
        self.address: str = self._server.address()
        self._key, self._peer = key, ""
        self._over = threading.Event()
        self._connection: Any = None

    def connect(self, address: str) -> None:
        """Connect with the other side's server.

        Raises:
            ChannelClosed: nobody listens there; JAX itself would wait for ever.
        """
        try:
            socket.create_connection(host_and_port("transfer", address), CONNECT_SECONDS).close()
        except OSError as error:
            raise ChannelClosed(f"{address}, for device arrays: {error}") from error
        self._peer = address
        self._connection = self._server.connect(address)

    def offer(self, header: Header, arrays: Sequence[jax.Array]) -> None:
        """Let the other side pull what belongs to `header`; computed or not."""
        self._server.await_pull(self._number(header), list(arrays))

    def pull(self, header: Header, structs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """Arrays of these shapes on these devices, which the other side offers now or later. Where it never
        does, or offers others, they raise when they are waited for.

        Raises:
            ChannelClosed: the link has been cut.
        """
        if self._over.is_set():
            raise ChannelClosed(f"{self._peer}: cut off")
        arrays: list[jax.Array] = self._connection.pull(self._number(header), list(structs))
        if self._over.is_set():  # meanwhile
            self.cut()
        return arrays

    @property
    def connected(self) -> bool:
        """Whether the connection stands: it was not cut, and the kernel knows of it."""
        if self._over.is_set():
            return False
        with _connections(self._peer) as found:
            return bool(found)

    def cut(self) -> None:
        """End the connection; from any thread. All that was pulled and has not come raises."""
        self._over.set()
        # JAX has no call that ends a connection, nor a deadline that has an effect. The kernel has, and JAX
        # then fails every pull at once.
        with _connections(self._peer) as found, suppress(OSError):
            for connection in found:
                connection.shutdown(socket.SHUT_RDWR)

    def _number(self, header: Header) -> int:
        """64 bits, another for each tensor of a session."""
        place = _NUMBERED.pack(header.step, header.microbatch, header.layer, header.kind)
        return int.from_bytes(blake2b(place, key=self._key, digest_size=8).digest())


def own_and_peer_ip(host: str, port: int) -> tuple[str, str]:
    """The IP address by which this machine reaches `host`, and that of `host`; sends nothing.

    Raises:
        ChannelClosed: there is no way to it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(address)
            return way.getsockname()[0], way.getpeername()[0]
    except OSError as error:
        raise ChannelClosed(f"{host}: {error}") from error


@contextmanager
def _connections(address: str) -> Iterator[list[socket.socket]]:
    """This process's TCP connections to `address`, as sockets that are closed again."""
    with ExitStack() as opened:
        found = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # one that has been closed meanwhile, or is not connected
                number = int(name)
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    sock = opened.enter_context(socket.socket(fileno=os.dup(number)))
                    if sock.family != socket.AF_UNIX and address_of(*sock.getpeername()[:2]) == address:
                        found.append(sock)
        yield found
