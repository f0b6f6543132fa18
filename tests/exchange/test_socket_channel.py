"""Frames over TCP, Unix sockets and TLS: whole, in order and in time, or an error."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from certificates import make_certificates
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.frames import HEADER_BYTES, Header, Kind, ProtocolError
from lamina_jax.exchange.socket import SocketChannel, connect

Pair = tuple[socket.socket, socket.socket]
BIG = 12 << 20  # more than the kernel's buffers hold

U16 = st.integers(0, 2**16 - 1)
HEADERS = st.builds(
    lambda kind, microbatch, layer: Header(kind, 0, microbatch, layer), st.sampled_from(Kind), U16, U16
)
FRAMES = st.lists(st.tuples(HEADERS, st.lists(st.binary(max_size=100), max_size=3)), max_size=5)


def room(header: Header) -> int:
    if header.length > 2 * BIG:
        raise ProtocolError(f"{header.length} bytes are too many")
    return header.length


def frame(kind: Kind, *buffers: np.ndarray) -> tuple[Header, list[np.ndarray]]:
    return Header(kind, sum(buffer.nbytes for buffer in buffers)), list(buffers)


@contextmanager
def background(run: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
        assert not thread.is_alive()


def receive_all(channel: SocketChannel) -> None:
    while True:
        channel.receive(room)


def tcp() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


@pytest.fixture(scope="module")
def tls_contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the client and of the server."""
    folder = make_certificates(tmp_path_factory.mktemp("tls"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "worker.pem", folder / "worker.key")
    return ssl.create_default_context(cafile=str(folder / "ca.pem")), server


@pytest.fixture(params=["tcp", "unix", "tls"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Both ends of a connection."""
    if request.param == "unix":
        return socket.socketpair()
    if request.param == "tcp":
        return tcp()
    client, server = request.getfixturevalue("tls_contexts")
    near, far = tcp()
    ends: list[socket.socket] = []
    with background(lambda: ends.append(server.wrap_socket(far, server_side=True))):
        ends.insert(0, client.wrap_socket(near, server_hostname="127.0.0.1"))
    return ends[0], ends[1]


def test_is_a_channel() -> None:
    near, far = socket.socketpair()
    far.close()
    assert isinstance(SocketChannel(near, 1), Channel)


def test_dtypes_shapes_counts_and_alignment(pair: Pair) -> None:
    near, far = (SocketChannel(sock, 5) for sock in pair)
    rng = np.random.default_rng(0)
    buffers = [
        rng.normal(size=(3, 5, 7)).astype(np.float32),
        rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        np.zeros((0, 4), np.int32),
        np.arange(5, dtype=np.uint8),
    ]
    near.send(*frame(Kind.KV, *buffers))
    near.send(Header(Kind.QUERY, 0), [])
    got = far.receive(lambda header: header.length + 100)
    assert got.header == frame(Kind.KV, *buffers)[0]
    assert got.payload.nbytes == got.header.length + 100
    assert got.payload[: got.header.length].tobytes() == b"".join(buffer.tobytes() for buffer in buffers)
    assert got.payload.ctypes.data % 64 == 0
    assert far.receive(room).header == Header(Kind.QUERY, 0)
    assert near.bytes_sent == far.bytes_received == 2 * HEADER_BYTES + got.header.length
    assert near.frames_sent == far.frames_received == 2


def test_both_ways_at_once_beyond_what_the_kernel_holds(pair: Pair) -> None:
    near, far = (SocketChannel(sock, 20) for sock in pair)
    payload = np.random.default_rng(0).integers(0, 256, BIG, np.uint8)

    def send(channel: SocketChannel) -> None:
        for _ in range(2):
            channel.send(*frame(Kind.QKV, payload[: BIG // 3], payload[BIG // 3 :]))

    with background(lambda: send(near)), background(lambda: send(far)):
        for _ in range(2):
            with background(lambda: np.testing.assert_array_equal(far.receive(room).payload, payload)):
                np.testing.assert_array_equal(near.receive(room).payload, payload)


def test_many_buffers() -> None:
    near, far = (SocketChannel(sock, 5) for sock in socket.socketpair())
    buffers = [np.full(i % 3, i % 251, np.uint8) for i in range(3000)]
    near.send(*frame(Kind.KV, *buffers))
    np.testing.assert_array_equal(far.receive(room).payload, np.concatenate(buffers))


@settings(max_examples=40)
@given(FRAMES, st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_any_frames_survive_any_chunking(frames: list[tuple[Header, list[bytes]]], chunks: list[int]) -> None:
    near, far = socket.socketpair()
    channel = SocketChannel(far, 5)
    frames = [(header._replace(length=sum(map(len, parts))), parts) for header, parts in frames]
    data = b"".join(header.pack() + b"".join(parts) for header, parts in frames)

    def write() -> None:
        at = i = 0
        while at < len(data):
            at += near.send(data[at : at + chunks[i % len(chunks)]])
            i += 1

    with near, background(write):
        for header, parts in frames:
            got = channel.receive(room)
            assert (got.header, got.payload.tobytes()) == (header, b"".join(parts))
    with pytest.raises(ChannelClosed, match="has ended"):
        channel.receive(room)


@settings(max_examples=150)
@given(
    st.one_of(st.binary(max_size=200), st.tuples(HEADERS, st.binary(max_size=100), st.integers(0, 2**32 - 1)))
)
def test_any_bytes_end_in_an_error(data: bytes | tuple[Header, bytes, int]) -> None:
    """And nothing larger is asked of the pool than `room` allows."""
    near, far = socket.socketpair()
    channel = SocketChannel(far, 5)
    taken: list[int] = []
    take = channel._pool.take
    channel._pool.take = lambda nbytes: taken.append(nbytes) or take(nbytes)  # type: ignore[method-assign]
    with near:
        if isinstance(data, tuple):
            data = data[0]._replace(length=data[2]).pack() + data[1]
        near.sendall(data)
    with pytest.raises((ChannelClosed, ProtocolError)):
        receive_all(channel)
    assert sum(taken) <= 3 * BIG
    with pytest.raises((ChannelClosed, ProtocolError)):
        channel.receive(room)


def test_a_room_too_small_is_an_error_and_closes() -> None:
    near, far = (SocketChannel(sock, 5) for sock in socket.socketpair())
    near.send(*frame(Kind.KV, np.zeros(9, np.uint8)))
    with pytest.raises(ProtocolError, match="KV has 9 bytes, there is room for 8"):
        far.receive(lambda header: 8)
    with pytest.raises(ChannelClosed):
        near.receive(room)


@pytest.mark.parametrize("length", [3, 5])
def test_a_wrong_length_is_an_error_and_closes(length: int) -> None:
    near, far = (SocketChannel(sock, 5) for sock in socket.socketpair())
    with pytest.raises(ValueError, match=f"speaks of {length} bytes, the buffers have 4"):
        near.send(Header(Kind.KV, length), [np.zeros(4, np.uint8)])
    with pytest.raises(ChannelClosed):
        near.send(Header(Kind.KV, 0), [])
    del far


@pytest.mark.parametrize("sent", [1, HEADER_BYTES, HEADER_BYTES + 3])
def test_a_stall_within_a_frame_ends_in_time(pair: Pair, sent: int) -> None:
    near, channel = pair[0], SocketChannel(pair[1], 0.4)
    with near:
        near.sendall((Header(Kind.KV, 8).pack() + bytes(8))[:sent])
        started = time.monotonic()
        with pytest.raises(ChannelClosed, match=r"it has sent (nothing|not all of a frame) in 0\.4 s"):
            channel.receive(room)
        assert 0.3 < time.monotonic() - started < 2


def test_drops_of_bytes_do_not_stretch_the_deadline(pair: Pair) -> None:
    near, channel = pair[0], SocketChannel(pair[1], 0.4)
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            near.sendall(Header(Kind.KV, 10_000).pack())
            while not stop.wait(0.02):
                near.sendall(b"x")

    with background(drip):
        started = time.monotonic()
        with pytest.raises(ChannelClosed):
            channel.receive(room)
        assert time.monotonic() - started < 3
        stop.set()
    near.close()


def test_silence_between_frames_is_no_error_unless_it_is_bounded(pair: Pair) -> None:
    near, patient = SocketChannel(pair[0], 0.2, idle_seconds=0.3), SocketChannel(pair[1], 0.2)
    later = threading.Timer(1, lambda: near.send(*frame(Kind.KV, np.ones(3, np.uint8))))
    later.start()
    assert patient.receive(room).header.length == 3
    later.join()
    with pytest.raises(ChannelClosed, match=r"nothing in 0\.3 s"):
        near.receive(room)


def test_a_peer_that_does_not_read(pair: Pair) -> None:
    near, started = SocketChannel(pair[0], 0.3), time.monotonic()
    with pytest.raises(ChannelClosed, match="not taken all of a frame"):
        near.send(*frame(Kind.KV, np.zeros(2 * BIG, np.uint8)))
    assert time.monotonic() - started < 3
    pair[1].close()


@pytest.mark.parametrize("how", ["this side", "the peer"])
def test_closing_wakes_both_directions(pair: Pair, how: str) -> None:
    near, far = (SocketChannel(sock, 20) for sock in pair)
    errors: list[ChannelClosed] = []

    def expect_closed(run: Callable[[], object]) -> None:
        try:
            while True:
                run()
        except ChannelClosed as error:
            errors.append(error)

    big = frame(Kind.KV, np.zeros(BIG, np.uint8))
    receiving = background(lambda: expect_closed(lambda: near.receive(room)))
    with receiving, background(lambda: expect_closed(lambda: near.send(*big))):
        time.sleep(0.3)
        assert not errors
        started = time.monotonic()
        (near if how == "this side" else far).close()
    assert time.monotonic() - started < 2
    assert len(errors) == 2


def test_descriptors_are_given_back() -> None:
    near, far = socket.socketpair()
    numbers = near.fileno(), far.fileno()
    channels = [SocketChannel(near, 1), SocketChannel(far, 1)]
    channels[0].close()
    channels[0].close()
    with pytest.raises(ChannelClosed):
        channels[1].receive(room)
    del near, far, channels
    gc.collect()
    for number in numbers:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(number)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_connect(kind: str, tmp_path: Path) -> None:
    if kind == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        address = f"unix:{tmp_path}/s"
    with listener:
        near = connect(address, 5)
        far = SocketChannel(listener.accept()[0], 5)
        near.send(*frame(Kind.HELLO, np.arange(16, dtype=np.uint8)))
        assert far.receive(room).payload.sum() == 120
    with pytest.raises(ChannelClosed, match=address):
        connect(address, 1)


def test_connect_refuses_what_is_no_address() -> None:
    for address in ("127.0.0.1", "host:", ":80", "host:http"):
        with pytest.raises(ValueError, match=r"expected .host:port."):
            connect(address, 1)
    with pytest.raises(ValueError, match="no TLS"):
        connect("unix:/nowhere", 1, ssl.create_default_context())


def test_connect_with_tls(tls_contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    client, server = tls_contexts
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                try:
                    sock = server.wrap_socket(sock, server_side=True)
                except OSError:
                    sock.close()
                else:
                    SocketChannel(sock, 5).send(*frame(Kind.ANSWER, np.ones(4, np.uint8)))

        with background(serve):
            assert connect(address, 5, client).receive(room).header.length == 4
            with pytest.raises(ChannelClosed, match="certificate"):
                connect(address, 5, ssl.create_default_context())


def test_connect_with_tls_has_a_deadline(tls_contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ChannelClosed):
        connect(f"127.0.0.1:{listener.getsockname()[1]}", 0.3, tls_contexts[0])
