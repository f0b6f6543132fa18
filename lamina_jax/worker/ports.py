"""Binding the ports of a worker or a prefill host, with errors that say which one and what to change."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from lamina_jax.config import address_of
from lamina_jax.exchange.security import add_port


class ListenError(Exception):
    """A port cannot be listened on; the text says which, why, and what to change."""


def bind_grpc(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Have a gRPC server listen, with TLS if there are `credentials`; its port.

    Raises:
        ListenError: it cannot.
    """
    with naming("listen", host, port):
        # gRPC writes its own lines about a port that it cannot have, and does not say why in its error.
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
        address = address_of(host, port)
        try:
            return add_port(server, address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from None


@contextmanager
def naming(setting: str, host: str, port: int) -> Iterator[None]:
    """Around what binds a port: an OSError becomes a ListenError that names the setting."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be listened on ({error.strerror or error})"
        if error.errno == errno.EADDRINUSE:
            reason = "is in use: end what listens there, or choose another (0 takes any free one)"
        raise ListenError(f"{setting}: port {port} on {host} {reason}") from None
