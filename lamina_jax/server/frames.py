"""Messages as bytes on a stream: four bytes of length, then msgpack. Typed on both ends, and bounded.

Knows the messages' types, and nothing of who speaks or what is said.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec

from lamina_jax.server.messages import Event, Message, Start

MOST_BYTES = 64 * 2**20
"""Of one message: more than the prompts of the largest body that the server takes, or the news of a step."""

STARTS = msgspec.msgpack.Decoder(Start)
MESSAGES: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

_LENGTH = struct.Struct("!I")


class FrameError(ValueError):
    """What cannot be sent, or was received and is no message. Nothing that follows can be read."""


def pack(message: Start | Message | Event) -> bytes:
    """A message with its length.

    Raises:
        FrameError: it holds what has no place in a message: an integer of more than 64 bits, half a
            surrogate pair, or too much.
    """
    try:
        data = msgspec.msgpack.encode(message)
    except (OverflowError, TypeError, UnicodeError) as error:
        raise FrameError(f"cannot be sent: {error}") from None
    _check_length(len(data))
    return _LENGTH.pack(len(data)) + data


async def read(stream: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """The next message.

    Raises:
        FrameError: it is none.
        EOFError: the stream has ended.
    """
    length = _length(await stream.readexactly(_LENGTH.size))
    return _decode(await stream.readexactly(length), decoder)


def receive(connection: socket.socket, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """The next message of a blocking socket, as long as it takes; errors as in `read`."""
    length = _length(_exactly(connection, _LENGTH.size))
    return _decode(_exactly(connection, length), decoder)


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        received = connection.recv_into(rest)
        if not received:
            raise EOFError("the stream has ended")
        rest = rest[received:]
    return data


def _length(data: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack(data)
    _check_length(length)
    return length


def _check_length(length: int) -> None:
    if length > MOST_BYTES:
        raise FrameError(f"a message of {length:,} bytes, at most {MOST_BYTES:,} are taken")


def _decode(data: bytes | bytearray, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise FrameError(f"no message: {error}") from None
