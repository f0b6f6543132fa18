"""Whatever bytes come at the ports: the worker stays as it was, and serves the next."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import grpc
import pytest
from echo_session import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_talk import StartWorker, data_channel, echo, until

from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.worker import sockets

HEADERS = st.builds(
    lambda kind, length: Header(kind, length).pack(), st.sampled_from(Kind), st.integers(0, 2**32 - 1)
)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ATTACKS = st.lists(st.binary(max_size=64) | HEADERS | st.just(HTTP2), max_size=4).map(b"".join)


def send(address: tuple[str, int] | str, data: bytes) -> None:
    """Connect, send, read what comes, and leave."""
    with socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX) as peer:
        peer.settimeout(2)
        peer.connect(address)
        with suppress(OSError):
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass


def data_threads() -> int:
    return sum(thread.name == "data" for thread in threading.enumerate())


def test_any_bytes_leave_the_worker_as_it_was(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease, found = client.lease(SPEC), client.describe()
    ports = [("127.0.0.1", found.data_port), found.unix_path, ("127.0.0.1", server.port)]

    @settings(max_examples=60)
    @given(st.sampled_from(ports), ATTACKS)
    def attack(address: tuple[str, int] | str, data: bytes) -> None:
        send(address, data)
        assert until(lambda: data_threads() == 0)
        assert client.describe().held_by != ""

    attack()
    assert echo(data_channel(client, lease.session_id), b"still here") == b"still here"


@pytest.mark.parametrize("session_id", [b"", bytes(15), bytes(16), bytes(17)])
def test_a_wrong_session_id_opens_nothing(start_worker: StartWorker, session_id: bytes) -> None:
    _, client = start_worker()
    lease = client.lease(SPEC)
    channel = data_channel(client, session_id)
    if len(session_id) == 16:
        header, payload = channel.receive(lambda header: header.length)
        assert header.kind is Kind.FAILED
        assert b"no lease has this session id" in payload.tobytes()
    with pytest.raises(ChannelClosed):
        channel.receive(lambda header: header.length)
    assert echo(data_channel(client, lease.session_id), b"still here") == b"still here"


def test_who_says_no_hello_in_time_is_hung_up_on(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "HELLO_SECONDS", 0.3)
    _, client = start_worker()
    hello = Header(Kind.HELLO, 16).pack() + bytes(16)
    with socket.create_connection(("127.0.0.1", client.describe().data_port), 5) as slow:
        began = time.monotonic()
        with suppress(OSError):
            for byte in hello:  # a byte now and then is not in time either
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        with suppress(OSError):
            assert slow.recv(1) == b""
        assert time.monotonic() - began < 3
    assert until(lambda: data_threads() == 0)


def test_connections_are_bounded(start_worker: StartWorker) -> None:
    _, client = start_worker()
    lease = client.lease(SPEC)
    address = ("127.0.0.1", client.describe().data_port)
    idle = [socket.create_connection(address, 5) for _ in range(sockets.MOST_CONNECTIONS)]
    assert until(lambda: data_threads() == sockets.MOST_CONNECTIONS)
    with socket.create_connection(address, 5) as one_more:
        assert one_more.recv(1) == b""
    for peer in idle:
        peer.close()
    assert until(lambda: data_threads() == 0)
    assert echo(data_channel(client, lease.session_id), b"x") == b"x"


def test_a_control_message_of_more_than_a_megabyte_is_refused(start_worker: StartWorker) -> None:
    _, client = start_worker()
    channel = client.open_channel((("grpc.max_send_message_length", 1 << 24),))
    lease = channel.unary_stream("/lamina_jax.Pool/Lease")
    with pytest.raises(grpc.RpcError, match="1048576 are allowed"):
        next(lease(b"\0" * ((1 << 20) + 1), timeout=5))
