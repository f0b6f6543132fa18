"""What the tests of a worker say to it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from echo_session import ROOM

from lamina_jax.exchange.control import WorkerClient
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.socket import SocketChannel
from lamina_jax.exchange.socket import connect as open_socket
from lamina_jax.worker.server import WorkerServer

StartWorker = Callable[..., tuple[WorkerServer, WorkerClient]]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `condition()` holds within the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def free(server: WorkerServer) -> bool:
    # A lease ends with a garbage collection, which takes seconds in a process that has run all other tests.
    return until(lambda: not server.leases.held, 12.0)


def room(header: Header) -> int:
    assert header.length <= ROOM
    return header.length


def data_channel(
    client: WorkerClient, session_id: bytes, kind: str = "tcp", idle_seconds: float = 5.0
) -> SocketChannel:
    found = client.describe()
    address = f"127.0.0.1:{found.data_port}" if kind == "tcp" else f"unix:{found.unix_path}"
    channel = open_socket(address, 5.0, client.ssl_context if kind == "tcp" else None, idle_seconds)
    channel.send(Header(Kind.HELLO, len(session_id)), [np.frombuffer(session_id, np.uint8)])
    return channel


def echo(channel: SocketChannel, text: bytes, step: int = 0) -> bytes:
    channel.send(Header(Kind.QUERY, len(text), step=step), [np.frombuffer(text, np.uint8)])
    header, payload = channel.receive(room)
    return payload[: header.length].tobytes()
