"""Pulling the KV of prompts from prefill hosts into a session's pages.

A pull runs in the thread that asked for it, which receives; the session decides when it may write. Knows
nothing of gRPC, leases or how pages are stored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

import numpy as np

from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.pull import (
    PULL_TOKENS,
    PullOrder,
    chunks,
    positions_of,
    pull_frame,
    stored_bytes,
)
from lamina_jax.pool.geometry import CacheGeometry

AHEAD = 4
"""PULL frames that are under way: what has come and is not written yet waits in the connection."""

MOST_REASON_BYTES = 4096

LOOK_SECONDS, SETTLE_SECONDS = 0.1, 30.0
"""Between two looks whether a pull that waits for a step is still wanted; and how long it waits at most."""

Dial = Callable[[str], Channel]
"""A channel to the data listener at "host:port"."""


@runtime_checkable
class Pages(Protocol):
    """Where pulled KV goes.

    Attributes:
        geometry: over all devices of the worker.
    """

    geometry: CacheGeometry

    def is_settled(self, step: int, seconds: float) -> bool:
        """Whether within so many seconds nothing more is to be appended of a step, nor of any before it."""
        ...

    def keep_pulled(self, layer: int, slots: np.ndarray, payload: np.ndarray, tokens: int) -> None:
        """Keep `tokens` tokens of a layer, the payload of a STORED frame, in `slots` int32[PULL_TOKENS], in a
        gap; those behind them are out of range and dropped. When it returns, later frames read them."""
        ...


class Pulls:
    """The pulls of one session that have not ended. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[bytes, _Pull] = {}
        self._closed = False
        self.bytes = 0

    def run(self, order: PullOrder, pages: Pages, dial: Dial) -> int:
        """Pull what an order says; bytes of tensors.

        Raises:
            ChannelClosed: the prefill host cannot be reached, or gave up, or nobody wants it any more.
            ProtocolError: an order that cannot be followed, or an answer that is none.
        """
        pull = _Pull(order)
        with self._registered(order.ticket, pull):
            pulled = pull.run(pages, dial)
        self.bytes += pulled
        return pulled

    def drop(self, ticket: bytes) -> None:
        """End a pull; returns when it writes no more."""
        with self._changed:
            if ticket in self._running:
                self._running[ticket].close()
                self._changed.wait_for(lambda: ticket not in self._running)

    def close(self) -> None:
        """End all pulls, and take no more."""
        with self._changed:
            self._closed = True
            for pull in self._running.values():
                pull.close()

    def join(self) -> None:
        """Wait for all to have ended, once closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    @contextmanager
    def _registered(self, ticket: bytes, pull: _Pull) -> Iterator[None]:
        with self._changed:
            if self._closed or ticket in self._running:
                raise ProtocolError("the lease is over, or pulls for this ticket already")
            self._running[ticket] = pull
        try:
            yield
        finally:
            with self._changed:
                del self._running[ticket]
                self._changed.notify_all()


class _Pull:
    """One prompt's share of one worker, on its way."""

    def __init__(self, order: PullOrder) -> None:
        self._order, self._lock = order, threading.Lock()
        self._channel: Channel | None = None
        self._over = False

    def close(self) -> None:
        with self._lock:
            self._over = True
            if self._channel is not None:
                self._channel.close()

    def run(self, pages: Pages, dial: Dial) -> int:
        order, geometry = self._order, pages.geometry
        positions, slots = positions_of(order, geometry)
        padding = geometry.num_pages * geometry.page_size
        # Chunk by chunk, each with all layers: a chunk's layers are ready together.
        asked = [(chunk, layer) for chunk in chunks(len(positions)) for layer in range(geometry.num_layers)]
        channel = self._open(dial)
        try:
            channel.send(Header(Kind.HELLO, len(order.ticket)), [np.frombuffer(order.ticket, np.uint8)])
            pulled = 0
            for number in range(len(asked) + AHEAD):
                if number < len(asked):
                    chunk, layer = asked[number]
                    self._ask(channel, geometry, layer, positions[chunk], number)
                if number >= AHEAD:
                    chunk, layer = asked[number - AHEAD]
                    tokens = chunk.stop - chunk.start
                    payload = _answer(channel, geometry, layer, tokens, number - AHEAD)
                    into = np.full(PULL_TOKENS, padding, np.int32)
                    into[:tokens] = slots[chunk]
                    if number == AHEAD:
                        self._settle(pages)
                    if self._over:
                        raise ChannelClosed("nobody wants it any more")
                    pages.keep_pulled(layer, into, payload, tokens)
                    pulled += stored_bytes(geometry, tokens)
            return pulled
        finally:
            channel.close()

    def _settle(self, pages: Pages) -> None:
        """Wait for what the engine has still to append to pages that were others' before."""
        until = time.monotonic() + SETTLE_SECONDS
        while not self._over and not pages.is_settled(self._order.after, LOOK_SECONDS):
            if time.monotonic() > until:
                raise ChannelClosed(
                    f"step {self._order.after} has not come to its end in {SETTLE_SECONDS:g} s"
                )

    def _open(self, dial: Dial) -> Channel:
        channel = dial(self._order.address)
        with self._lock:
            self._channel = channel
            if self._over:
                channel.close()
        return channel

    def _ask(
        self, channel: Channel, geometry: CacheGeometry, layer: int, positions: np.ndarray, number: int
    ) -> None:
        start = self._order.kv_start
        payload = pull_frame(start, start + geometry.num_kv_heads, positions)
        with suppress(ChannelClosed):  # the answer that comes first says why
            channel.send(Header(Kind.PULL, payload.nbytes, layer=layer, step=number), [payload])


def _answer(channel: Channel, geometry: CacheGeometry, layer: int, tokens: int, number: int) -> np.ndarray:
    """The payload of the next STORED, with room for PULL_TOKENS."""
    wanted = Header(Kind.STORED, stored_bytes(geometry, tokens), layer=layer, step=number)

    def room(header: Header) -> int:
        if header == wanted:
            return stored_bytes(geometry, PULL_TOKENS)
        if header.kind == Kind.FAILED and header.length <= MOST_REASON_BYTES:
            return header.length
        raise ProtocolError(f"a prefill host answers {header}, where {wanted} was to come")

    header, payload = channel.receive(room)
    if header.kind == Kind.FAILED:
        raise ChannelClosed(payload[: header.length].tobytes().decode(errors="replace"))
    return payload
