"""The port, bound before anything is loaded: a wrong address shows at once."""

from __future__ import annotations

import errno
import socket

from lamina_jax.config import ConfigError, ServerConfig, address_of


def listen(config: ServerConfig) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigError: the port is in use, or the host is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        place = f"port {config.port} on {config.host}"
        if error.errno == errno.EADDRINUSE:
            reason = "is in use: end what listens there, or choose another with --port (0 takes any free one)"
        else:
            reason = f"cannot be listened on ({error.strerror or error}): change --host or --port"
        raise ConfigError(f"{place} {reason}") from None


def url(listener: socket.socket) -> str:
    """Where a client finds the listener."""
    return f"http://{address_of(*listener.getsockname()[:2])}"
