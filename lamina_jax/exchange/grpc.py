"""The data channel over one bidirectional gRPC stream of raw bytes: a message is a frame.

Owns both halves: `GrpcChannel` for the engine, `serve_stream` and `encode` for the worker's servicer. Knows
nothing of what frames mean, nor of connections: who makes a `grpc.Channel` secures it and keeps it alive.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import grpc
import numpy as np

from lamina_jax.exchange.buffers import BufferPool
from lamina_jax.exchange.channel import ChannelClosed, Frame, Room
from lamina_jax.exchange.frames import HEADER_BYTES, Header, ProtocolError, unpack_header

METHOD = "/lamina_jax.Pool/Exchange"

MOST_BYTES = 1 << 29
"""No frame of a data stream is larger; what a session has room for is less."""


def stream_options(max_bytes: int) -> list[tuple[str, int]]:
    """Options of a `grpc.Channel` or server whose frames have payloads of at most `max_bytes`."""
    most = max_bytes + HEADER_BYTES
    return [("grpc.max_send_message_length", most), ("grpc.max_receive_message_length", most)]


def encode(header: Header, buffers: Sequence[np.ndarray]) -> bytes:
    """A frame as one message: the header and the bytes of C-contiguous `buffers`, copied once.

    Raises:
        ValueError: `header.length` is not their sum.
    """
    # The buffer protocol knows only numpy's own dtypes, and no bfloat16.
    parts: list[Any] = [b if b.dtype.isbuiltin == 1 else b.view(np.uint8) for b in buffers]
    message = b"".join([header.pack(), *parts])
    if len(message) != HEADER_BYTES + header.length:
        given = len(message) - HEADER_BYTES
        raise ValueError(f"the header speaks of {header.length} bytes, the buffers have {given}")
    return message


def decode(message: bytes, room: Room, pool: BufferPool) -> Frame:
    """The inverse: the payload is copied once, to where it is aligned.

    Raises:
        ProtocolError: the message is no frame, or `room` refuses it.
    """
    if len(message) < HEADER_BYTES:
        raise ProtocolError(f"a message of {len(message)} bytes is no frame: a header has {HEADER_BYTES}")
    view = memoryview(message)
    header = unpack_header(view[:HEADER_BYTES])
    if len(message) != HEADER_BYTES + header.length:
        came = len(message) - HEADER_BYTES
        raise ProtocolError(f"{header.kind.name} should have {header.length} bytes, and came with {came}")
    size = room(header)
    if size < header.length:
        raise ProtocolError(f"{header.kind.name} has {header.length} bytes, there is room for {size}")
    payload = pool.take(size)
    payload.data[: header.length] = view[HEADER_BYTES:]
    return Frame(header, payload)


def serve_stream(requests: Iterator[bytes], room: Room) -> Iterator[Frame]:
    """The frames of a call in its handler; they end when the engine has said all.

    Raises:
        ChannelClosed: the call is over.
        ProtocolError: a message is no frame, or `room` refuses it.
    """
    pool = BufferPool()
    try:
        for message in requests:
            yield decode(message, room, pool)
    except grpc.RpcError as error:
        raise ChannelClosed("the call is over") from error


class GrpcChannel:
    """Frames over a call of a worker's Exchange method; see `lamina_jax.exchange.channel.Channel`.

    gRPC sends in a thread of its own: `send` hands a frame over as soon as the one before is on its way.

    Args:
        channel: to the worker, made with `stream_options`; the caller owns it.
        metadata: of the call: what tells the worker who calls.
        deadline_seconds: how long `send` waits for the frame before to be on its way.
        idle_seconds: how long `receive` waits for a frame; None: for ever.

    Attributes:
        bytes_sent, bytes_received: of frames, with their headers.
        frames_sent, frames_received: likewise.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        metadata: Sequence[tuple[str, str | bytes]],
        deadline_seconds: float,
        idle_seconds: float | None = None,
    ) -> None:
        self._deadline, self._idle = deadline_seconds, idle_seconds
        self._pool = BufferPool()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._places: SimpleQueue[None] = SimpleQueue()
        self._places.put(None)
        self._over, self._why = threading.Event(), ""
        self._waiting_since: float | None = None
        self.bytes_sent = self.bytes_received = self.frames_sent = self.frames_received = 0
        self._call = channel.stream_stream(METHOD)(self._requests(), metadata=tuple(metadata))
        if not self._call.add_callback(self._end):
            self._end()
        if idle_seconds is not None:
            threading.Thread(target=self._watch, args=(idle_seconds,), daemon=True).start()

    def send(self, header: Header, buffers: Sequence[np.ndarray]) -> None:
        message = encode(header, buffers)
        try:
            self._places.get(timeout=self._deadline)
        except Empty:
            raise self._closed(f"the worker has not taken a frame in {self._deadline:g} s") from None
        if self._over.is_set():
            self._places.put(None)  # for the next one who asks
            raise self._closed(_status(self._call))
        self._outbox.put(message)
        self.bytes_sent += len(message)
        self.frames_sent += 1

    def receive(self, room: Room) -> Frame:
        self._waiting_since = monotonic()
        try:
            message = next(self._call)
        except (StopIteration, grpc.RpcError) as error:
            raise self._closed(_status(self._call)) from error
        self._waiting_since = None
        try:
            frame = decode(message, room, self._pool)
        except BaseException:
            self.close()
            raise
        self.bytes_received += len(message)
        self.frames_received += 1
        return frame

    def close(self) -> None:
        self._over.set()
        self._call.cancel()

    def _requests(self) -> Iterator[bytes]:
        while (message := self._outbox.get()) is not None:
            yield message
            self._places.put(None)  # gRPC asks for the next one: this one is on its way

    def _end(self) -> None:
        """The call is over: let go whoever waits."""
        self._over.set()
        self._outbox.put(None)
        self._places.put(None)

    def _watch(self, idle_seconds: float) -> None:
        while not self._over.wait(idle_seconds / 4):
            since = self._waiting_since
            if since is not None and monotonic() - since > idle_seconds:
                self._closed(f"the worker has sent nothing in {idle_seconds:g} s")

    def _closed(self, why: str) -> ChannelClosed:
        """The first reason is the one that counts."""
        self._why = self._why or why
        self.close()
        return ChannelClosed(self._why)


def _status(call: grpc.Call) -> str:
    return f"the call has ended: {call.code().name} {call.details()}"
