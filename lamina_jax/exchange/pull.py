"""How attention workers pull KV from prefill hosts: what the engine orders, and what crosses the channel.

A worker shows the prompt's ticket in a HELLO, then asks in PULL frames for the KV of one layer, some heads
and some positions, and gets each in a STORED frame, in the order in which it has asked: bit for bit what
the prefill host's pages hold. Knows nothing of sockets, jax or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from lamina_jax.config import ConfigError, host_and_port
from lamina_jax.exchange.frames import ProtocolError
from lamina_jax.pool.geometry import CacheGeometry

TICKET_BYTES = 16
"""Random bytes that name a prompt, and that only its engine, its prefill host and its workers know."""

PULL_TOKENS = 128
"""Of one layer that a worker asks for and appends at once: what a frame of decoding may have to wait for."""

MOST_ORDER_BYTES = 1 << 20

_PULL_INTS = 2

Message = TypeVar("Message")


class PullOrder(Struct, frozen=True, kw_only=True):
    """An engine's word to a worker on the KV of one prompt.

    Attributes:
        group: of the leases that the engine's compute hosts have on the worker.
        ticket: of the prompt.
        address: "host:port" of the prefill host's data listener.
        length: tokens of the prompt that are prefilled there.
        pages: the worker's own pages that keep what it holds of them, in order of position.
        first, stride: the places in the request of the first of `pages`, and between one and the next.
        after: the number of the last step that the worker was told of: the pages may have had a part in it.
        kv_start: the first KV head, among the model's, of the lease whose pages these are.
    """

    group: str
    ticket: bytes
    address: str
    length: int
    pages: list[int]
    first: int
    stride: int
    after: int
    kv_start: int


class Pulled(Struct, frozen=True):
    """All of it is in the worker's pages: bytes of tensors that were pulled."""

    bytes: int


class DropOrder(Struct, frozen=True):
    """Undo a PullOrder, by what names it; answered when nothing is written for it any more."""

    group: str
    kv_start: int
    ticket: bytes


def drop_of(order: PullOrder) -> DropOrder:
    """What undoes an order."""
    return DropOrder(order.group, order.kv_start, order.ticket)


encode = msgspec.msgpack.encode
decode_pulled = msgspec.msgpack.Decoder(Pulled).decode
_ORDER = msgspec.msgpack.Decoder(PullOrder)
_DROP = msgspec.msgpack.Decoder(DropOrder)


def decode_order(data: bytes) -> PullOrder:
    """Raises `ConfigError` for what no engine sends; the text names the field."""
    order = _decoded(_ORDER, data)
    host_and_port("address", order.address)
    _check(bool(order.group), "group", order.group)
    _check(len(order.ticket) == TICKET_BYTES, "ticket", order.ticket)
    _check(0 < order.length < 1 << 31, "length", order.length)
    _check(bool(order.pages), "pages", order.pages)
    _check(0 <= order.after < 1 << 32, "after", order.after)
    for name in ("first", "stride", "kv_start"):
        _check(0 <= getattr(order, name) < 1 << 31, name, getattr(order, name))
    return order


def decode_drop(data: bytes) -> DropOrder:
    """Raises `ConfigError` for what no engine sends."""
    return _decoded(_DROP, data)


def positions_of(order: PullOrder, geometry: CacheGeometry) -> tuple[np.ndarray, np.ndarray]:
    """int32[N]: the positions that the worker keeps, and the slot of each.

    Raises:
        ProtocolError: pages, heads or places that the worker's `geometry` does not have.
    """
    pages, size = np.asarray(order.pages, np.int64), geometry.page_size
    if len(pages) > geometry.num_pages or pages.min() < 0 or pages.max() >= geometry.num_pages:
        raise ProtocolError(f"pages {order.pages} of {geometry.num_pages}")
    places = order.first + order.stride * np.arange(len(pages))
    positions = (places[:, None] * size + np.arange(size)).reshape(-1)
    slots = (pages[:, None] * size + np.arange(size)).reshape(-1)
    kept = positions < order.length
    return positions[kept].astype(np.int32), slots[kept].astype(np.int32)


def pull_frame(kv_start: int, kv_stop: int, positions: np.ndarray) -> np.ndarray:
    """The payload of a PULL: int32[2 + T]."""
    return np.concatenate([np.array([kv_start, kv_stop], np.int32), positions])


def read_pull(payload: np.ndarray, *, length: int, num_kv_heads: int) -> tuple[slice, np.ndarray]:
    """The inverse, for a prompt of `length` tokens.

    Raises:
        ProtocolError: no heads or positions of that prompt, or more than are asked for at once.
    """
    if payload.nbytes % 4 or not _PULL_INTS < payload.nbytes // 4 <= most_pull_bytes() // 4:
        raise ProtocolError(f"a PULL of {payload.nbytes} bytes")
    numbers = payload.view(np.int32)
    (start, stop), positions = numbers[:_PULL_INTS].tolist(), numbers[_PULL_INTS:]
    if not 0 <= start < stop <= num_kv_heads or positions.min() < 0 or positions.max() >= length:
        raise ProtocolError(
            f"KV heads {start} .. {stop} of {num_kv_heads} at positions {positions.min()} .. "
            f"{positions.max()} of {length} are asked for"
        )
    return slice(start, stop), positions


def most_pull_bytes() -> int:
    """Of a PULL's payload."""
    return 4 * (_PULL_INTS + PULL_TOKENS)


def stored_bytes(geometry: CacheGeometry, tokens: int) -> int:
    """Of a STORED's payload, for the heads of `geometry`."""
    return tokens * geometry.bytes_per_token_and_layer


def read_stored(
    payload: np.ndarray, geometry: CacheGeometry, dtypes: Sequence[np.dtype], tokens: int
) -> tuple[np.ndarray, ...]:
    """The arrays [PULL_TOKENS, 2, K, ...] of a STORED of `tokens` tokens, whatever behind them.

    Args:
        payload: of as many bytes as PULL_TOKENS take, of which those of `tokens` have come.
        dtypes: of the values and, where pages are quantised, of their scales.
    """
    leaves, start = [], 0
    for dtype, shape in zip(dtypes, _shapes(geometry), strict=True):
        size = int(np.prod(shape)) * dtype.itemsize
        came = payload[start : start + tokens * size].view(dtype).reshape(tokens, *shape)
        start += tokens * size
        if tokens < PULL_TOKENS:
            whole = np.zeros((PULL_TOKENS, *shape), dtype)
            whole[:tokens] = came
            came = whole
        leaves.append(came)
    return tuple(leaves)


def chunks(count: int) -> Iterator[slice]:
    """`count` tokens, so many at once as are pulled together."""
    for start in range(0, count, PULL_TOKENS):
        yield slice(start, min(start + PULL_TOKENS, count))


def _shapes(g: CacheGeometry) -> list[tuple[int, ...]]:
    values = (2, g.num_kv_heads, g.head_dim)
    return [values, values[:-1]] if g.is_quantized else [values]


def _decoded(decoder: msgspec.msgpack.Decoder[Message], data: bytes) -> Message:
    if len(data) > MOST_ORDER_BYTES:
        raise ConfigError(f"a message of {len(data)} bytes, {MOST_ORDER_BYTES} are allowed")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"no order to pull: {error}") from None


def _check(right: bool, name: str, value: object) -> None:
    if not right:
        raise ConfigError(f"an order to pull: {name}={value!r} cannot be")
