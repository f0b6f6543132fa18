"""The proxy is as slow, as narrow and as broken as it is told to be."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from lamina_jax.benchmarks.tcp_proxy import Proxy

pytestmark = pytest.mark.multi

SWALLOW = b"swallow"
Open = Callable[..., tuple[Proxy, socket.socket]]


@pytest.fixture
def through() -> Iterator[Open]:
    """`through(**network)`: a proxy, and a connection through it to where all comes back; or, from a
    piece that begins with SWALLOW, one byte at the end."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def send_back(sock: socket.socket) -> None:
            room = bytearray(1 << 20)
            with sock:
                try:
                    while (data := sock.recv(1 << 16)) and not data.startswith(SWALLOW):
                        sock.sendall(data)
                    while data and sock.recv_into(room):
                        pass
                    sock.sendall(b"." if data else b"")
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=send_back, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        stack.callback(listener.shutdown, socket.SHUT_RDWR)

        def start(**network: float) -> tuple[Proxy, socket.socket]:
            proxy = Proxy("127.0.0.1:0", f"127.0.0.1:{listener.getsockname()[1]}", **network)
            address = proxy.start()
            stack.enter_context(closing(proxy))
            sock = stack.enter_context(socket.create_connection(address, 10))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            assert round_trip(sock) > 0
            return proxy, sock

        yield start


def round_trip(sock: socket.socket) -> float:
    began = time.perf_counter()
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    return time.perf_counter() - began


def all_back(sock: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
    sender.start()
    received = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    sender.join()
    return received


@pytest.mark.parametrize("network", [{}, {"delay_seconds": 0.01}, {"bytes_per_second": 5e7}])
def test_every_byte_arrives_in_order(through: Open, network: dict[str, float]) -> None:
    data = os.urandom(8_000_000)
    _, sock = through(**network)
    assert hashlib.sha256(all_back(sock, data)).digest() == hashlib.sha256(data).digest()


def test_delay(through: Open) -> None:
    _, sock = through(delay_seconds=0.02)
    times = sorted(round_trip(sock) for _ in range(11))
    assert times[0] >= 0.04
    assert times[5] < 0.06


@pytest.mark.parametrize("rate", [1e6, 1e7, 1e8])
def test_rate(through: Open, rate: float) -> None:
    found = []
    for _ in range(3):  # a busy machine makes it slower, and nothing makes it faster
        _, sock = through(bytes_per_second=rate)
        size, began = int(rate / 2), time.perf_counter()
        assert all_back(sock, SWALLOW + bytes(size)) == b"."
        found.append(size / (time.perf_counter() - began))
        print(f"{rate:.0e}: {found[-1]:.2e} B/s")
        if found[-1] > 0.9 * rate:
            break
    assert 0.9 * rate < max(found) < 1.1 * rate


def test_stall_and_resume(through: Open) -> None:
    proxy, sock = through()
    proxy.stall()
    sock.sendall(b"later")
    sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        sock.recv(5)
    proxy.resume()
    sock.settimeout(5)
    assert sock.recv(5) == b"later"


def test_cut(through: Open) -> None:
    proxy, sock = through()
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    _, again = through()
    assert round_trip(again) > 0


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    proxy = Proxy("127.0.0.1:0", f"127.0.0.1:{port}")
    with closing(proxy), socket.create_connection(proxy.start(), 5) as sock:
        assert sock.recv(1) == b""
    with pytest.raises(RuntimeError, match="proxy has ended"):
        Proxy("203.0.113.1:0", f"127.0.0.1:{port}").start()
