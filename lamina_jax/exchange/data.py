"""Opens the data channel that a lease allows: which kind, and why."""

from __future__ import annotations

import logging
import os

import numpy as np

from lamina_jax.config import address_of
from lamina_jax.exchange.channel import FRAME_SECONDS, Channel, ChannelClosed
from lamina_jax.exchange.control import KEEPALIVE, Lease, WorkerClient, WorkerError
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.grpc import MOST_BYTES, GrpcChannel, stream_options
from lamina_jax.exchange.socket import connect

log = logging.getLogger(__name__)

ANSWER_SECONDS = 120.0
"""What a worker may take before an answer begins; that it lives is its lease's concern."""


def open_channel(client: WorkerClient, lease: Lease, kind: str) -> Channel:
    """The data channel of a lease: "socket", "grpc", or "auto": a Unix socket where there is one and the
    engine uses the very address that the worker listens on, else TCP, else gRPC, which passes where only the
    worker's one address can be reached.

    Raises:
        WorkerError: it cannot be opened.
    """
    if kind != "grpc":
        try:
            return _socket(client, lease)
        except ChannelClosed as error:
            if kind == "socket":
                raise WorkerError(client.address, f"no data connection: {error}", temporary=True) from None
            log.info("%s: gRPC, since its data port cannot be reached: %s", client.address, error)
    return _grpc(client, lease)


def _socket(client: WorkerClient, lease: Lease) -> Channel:
    described = client.describe()
    # Under another address it may be behind a proxy, or another host's.
    if client.address == described.listen and os.path.exists(described.unix_path):
        log.info("%s: Unix socket, since it runs on this host", client.address)
        channel = connect(f"unix:{described.unix_path}", FRAME_SECONDS, idle_seconds=ANSWER_SECONDS)
    else:
        address = address_of(client.host, described.data_port)
        log.info("%s: TCP socket to %s, the quickest way to another address", client.address, address)
        channel = connect(address, FRAME_SECONDS, client.ssl_context, idle_seconds=ANSWER_SECONDS)
    hello = np.frombuffer(lease.session_id, np.uint8)
    channel.send(Header(Kind.HELLO, len(hello)), [hello])
    return channel


def _grpc(client: WorkerClient, lease: Lease) -> Channel:
    stream = client.open_channel([*KEEPALIVE, *stream_options(MOST_BYTES)])
    return GrpcChannel(stream, lease.metadata, FRAME_SECONDS, idle_seconds=ANSWER_SECONDS)
