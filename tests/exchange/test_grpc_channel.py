"""Frames over a gRPC stream: whole, in order and in time, or an error, on both sides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.exchange.channel import Channel, ChannelClosed, Frame
from lamina_jax.exchange.frames import HEADER_BYTES, Header, Kind, ProtocolError
from lamina_jax.exchange.grpc import METHOD, GrpcChannel, encode, serve_stream, stream_options

MOST = 1 << 20
Handler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def room(header: Header) -> int:
    if header.length > MOST:
        raise ProtocolError(f"{header.length} bytes are too many")
    return header.length


@contextmanager
def calls_to(handler: Handler) -> Iterator[grpc.Channel]:
    """A channel to a server whose Exchange method is `handler`."""
    service, method = METHOD.lstrip("/").split("/")
    server = grpc.server(ThreadPoolExecutor(4), options=stream_options(MOST))
    handlers = {method: grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", stream_options(MOST)) as channel:
        yield channel
    server.stop(0).wait()


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for header, payload in serve_stream(requests, room):
        yield encode(header._replace(kind=Kind.ANSWER), [payload])


def silent(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Reads nothing and says nothing, until the call is over."""
    over = threading.Event()
    context.add_callback(over.set)
    over.wait(20)
    yield from ()


@pytest.fixture(scope="module")
def channel() -> Iterator[GrpcChannel]:
    """To a worker that echoes."""
    with calls_to(echo) as calls:
        channel = GrpcChannel(calls, (("session", "7"),), 5, idle_seconds=20)
        assert isinstance(channel, Channel)
        yield channel
        channel.close()


@settings(max_examples=40)
@given(st.lists(st.lists(st.binary(max_size=2000), max_size=3), max_size=4), st.integers(0, 2**16 - 1))
def test_frames_come_back_in_order(channel: GrpcChannel, frames: list[list[bytes]], layer: int) -> None:
    before = channel.bytes_sent, channel.bytes_received, channel.frames_sent, channel.frames_received
    size = 0
    for i, parts in enumerate(frames):
        buffers = [np.frombuffer(part, np.uint8) for part in parts]
        channel.send(Header(Kind.QUERY, sum(map(len, parts)), layer=layer, step=i), buffers)
        size += HEADER_BYTES + sum(map(len, parts))
    for i, parts in enumerate(frames):
        header, payload = channel.receive(room)
        assert (header.kind, header.layer, header.step) == (Kind.ANSWER, layer, i)
        assert payload.tobytes() == b"".join(parts)
        assert payload.ctypes.data % 64 == 0 or not payload.size
    assert channel.bytes_sent - before[0] == channel.bytes_received - before[1] == size
    assert channel.frames_sent - before[2] == channel.frames_received - before[3] == len(frames)


def test_the_largest_frame_and_one_more_byte() -> None:
    with calls_to(echo) as calls:
        channel = GrpcChannel(calls, (), 5)
        channel.send(Header(Kind.QUERY, MOST), [np.ones(MOST, np.uint8)])
        assert channel.receive(room).payload.sum() == MOST
        channel.send(Header(Kind.QUERY, MOST + 1), [np.ones(MOST + 1, np.uint8)])
        with pytest.raises(ChannelClosed, match="RESOURCE_EXHAUSTED"):
            channel.receive(room)


def test_encode_takes_any_dtype_and_checks_the_length() -> None:
    buffers = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 2), ml_dtypes.bfloat16)]
    message = encode(Header(Kind.KV, 32), buffers)
    (header, payload), *others = serve_stream(iter([message]), lambda header: 40)
    assert not others
    assert (header, payload.nbytes) == (Header(Kind.KV, 32), 40)
    assert payload[:32].tobytes() == buffers[0].tobytes() + buffers[1].tobytes()
    with pytest.raises(ValueError, match="speaks of 31 bytes, the buffers have 32"):
        encode(Header(Kind.KV, 31), buffers)


HEADERS = st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1)).map(lambda it: Header(*it))
MESSAGES = st.one_of(
    st.binary(max_size=100),
    st.tuples(HEADERS, st.binary(max_size=50)).map(lambda it: it[0].pack() + it[1]),
    st.binary(max_size=50).map(lambda data: Header(Kind.KV, len(data)).pack() + data),
)


@settings(max_examples=150)
@given(st.lists(MESSAGES, max_size=5))
def test_any_messages_are_frames_or_errors(messages: list[bytes]) -> None:
    frames: list[Frame] = []
    try:
        for frame in serve_stream(iter(messages), room):
            frames.append(frame)
    except ProtocolError:
        assert len(frames) < len(messages)
    else:
        assert len(frames) == len(messages)
    for (header, payload), message in zip(frames, messages, strict=False):
        assert header.pack() + payload.tobytes() == message


def test_room_too_small() -> None:
    with pytest.raises(ProtocolError, match="KV has 4 bytes, there is room for 3"):
        next(serve_stream(iter([Header(Kind.KV, 4).pack() + bytes(4)]), lambda header: 3))


@pytest.mark.parametrize("message", [b"", b"\0" * 40, Header(Kind.ANSWER, 5).pack() + bytes(4)])
def test_a_worker_that_talks_nonsense(message: bytes) -> None:
    with calls_to(lambda requests, context: iter([message])) as calls:
        channel = GrpcChannel(calls, (), 5)
        with pytest.raises(ProtocolError):
            channel.receive(room)
        with pytest.raises(ChannelClosed):
            channel.send(Header(Kind.QUERY, 0), [])


def test_a_worker_that_ends_the_call() -> None:
    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no such session")
        yield b""

    for handler, why in ((refuse, "FAILED_PRECONDITION no such session"), (lambda *_: iter(()), "OK")):
        with calls_to(handler) as calls:
            channel = GrpcChannel(calls, (), 5)
            with pytest.raises(ChannelClosed, match=why):
                channel.receive(room)
            with pytest.raises(ChannelClosed, match=why):
                channel.send(Header(Kind.QUERY, 0), [])


def test_nobody_there() -> None:
    with grpc.insecure_channel("127.0.0.1:9") as calls, pytest.raises(ChannelClosed, match="UNAVAILABLE"):
        GrpcChannel(calls, (), 5).receive(room)


def test_a_silent_worker_is_noticed_where_that_is_asked_for() -> None:
    with calls_to(silent) as calls:
        channel, started = GrpcChannel(calls, (), 5, idle_seconds=0.4), time.monotonic()
        with pytest.raises(ChannelClosed, match=r"nothing in 0\.4 s"):
            channel.receive(room)
        assert time.monotonic() - started < 3


def test_a_worker_that_does_not_read() -> None:
    with calls_to(silent) as calls:
        channel, started = GrpcChannel(calls, (), 0.4), time.monotonic()
        with pytest.raises(ChannelClosed, match=r"not taken a frame in 0\.4 s"):
            send_until_it_fails(channel)
        assert time.monotonic() - started < 6
        assert channel.bytes_sent < 32 * MOST


def send_until_it_fails(channel: GrpcChannel) -> None:
    while True:
        channel.send(Header(Kind.QUERY, MOST), [np.ones(MOST, np.uint8)])


def test_closing_wakes_both_directions_and_ends_the_threads() -> None:
    with calls_to(silent) as calls:
        channel = GrpcChannel(calls, (), 20, idle_seconds=20)
        errors: list[ChannelClosed] = []

        def expect_closed(run: Callable[[], object]) -> None:
            try:
                run()
            except ChannelClosed as error:
                errors.append(error)

        waits = (lambda: channel.receive(room), lambda: send_until_it_fails(channel))
        threads = [threading.Thread(target=expect_closed, args=(wait,)) for wait in waits]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert not errors
        started = time.monotonic()
        channel.close()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - started < 2
        assert len(errors) == 2


def test_the_servers_half_ends_when_the_engine_is_gone() -> None:
    """gRPC tells it as an error or as the end of the requests, as it happens."""
    done = threading.Event()

    def handler(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            for frame in serve_stream(requests, room):
                yield encode(frame.header, [frame.payload])
        except ChannelClosed:
            pass
        finally:
            done.set()

    with calls_to(handler) as calls:
        channel = GrpcChannel(calls, (), 5)
        channel.send(Header(Kind.QUERY, 0), [])
        channel.receive(room)
        channel.close()
        assert done.wait(5)


def test_an_error_of_the_call_is_a_closed_channel() -> None:
    def requests() -> Iterator[bytes]:
        yield Header(Kind.QUERY, 0).pack()
        raise grpc.RpcError

    frames = serve_stream(requests(), room)
    assert next(frames).header.kind is Kind.QUERY
    with pytest.raises(ChannelClosed, match="the call is over"):
        next(frames)
