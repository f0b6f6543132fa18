"""Pulls beside a prefill host that answers at once: when they write, and how they end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from echo_session import GEOMETRY
from worker_talk import until

from lamina_jax.exchange.channel import Channel, ChannelClosed, Frame, Room
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.pull import TICKET_BYTES, PullOrder, stored_bytes
from lamina_jax.worker import pull
from lamina_jax.worker.gaps import Appends
from lamina_jax.worker.pull import Pulls

ORDER = PullOrder(
    group="ours",
    ticket=bytes(TICKET_BYTES),
    address="127.0.0.1:1",
    length=10,
    pages=[5, 0, 2],
    first=0,
    stride=1,
    after=7,
    kv_start=0,
)


class Host:
    """A channel to it."""

    bytes_sent = bytes_received = 0

    def __init__(self) -> None:
        self._asked: deque[Header] = deque()

    def send(self, header: Header, buffers: Sequence[np.ndarray]) -> None:
        if header.kind is Kind.PULL:
            self._asked.append(header)

    def receive(self, room: Room) -> Frame:
        size = stored_bytes(GEOMETRY, ORDER.length)
        header = self._asked.popleft()._replace(kind=Kind.STORED, length=size)
        return Frame(header, np.zeros(room(header), np.uint8))

    def close(self) -> None:
        """Nobody waits."""


class Written:
    """Pages that note which layers are written."""

    geometry = GEOMETRY

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.appends = Appends()

    def is_settled(self, step: int, seconds: float) -> bool:
        return self.appends.wait(step, seconds)

    def keep_pulled(self, layer: int, slots: np.ndarray, payload: np.ndarray, tokens: int) -> None:
        assert tokens == ORDER.length
        self.layers.append(layer)


def dial(address: str) -> Channel:
    assert address == ORDER.address
    return Host()


@contextmanager
def running(pulls: Pulls, pages: Written) -> Iterator[list[object]]:
    """A pull in a thread; what becomes of it."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(pulls.run(ORDER, pages, dial))
        except ChannelClosed as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    yield ended
    thread.join(5)
    assert len(ended) == 1


def test_nothing_is_written_before_the_last_k_and_v_of_a_step() -> None:
    """They may belong to the pages' former request."""
    pages, pulls = Written(), Pulls()
    with running(pulls, pages):
        assert not until(lambda: bool(pages.layers), 0.2)
        pages.appends.begin(0, ORDER.after, appends=True)
        assert not until(lambda: bool(pages.layers), 0.2)
        pages.appends.end(0)
    assert pages.layers == list(range(GEOMETRY.num_layers))
    assert pulls.bytes == GEOMETRY.num_layers * stored_bytes(GEOMETRY, ORDER.length)


def test_a_pull_that_waits_can_be_dropped() -> None:
    pages, pulls = Written(), Pulls()
    with running(pulls, pages) as ended:
        assert until(lambda: bool(pulls._running))
        pulls.drop(ORDER.ticket)
    assert ended == ["nobody wants it any more"]
    assert pages.layers == []


def test_a_step_that_does_not_end_is_not_waited_for_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "SETTLE_SECONDS", 0.2)
    with running(Pulls(), Written()) as ended:
        pass
    assert ended == ["step 7 has not come to its end in 0.2 s"]
