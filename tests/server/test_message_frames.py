"""Messages on a stream: whole however they are cut, and an error where they are none."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
from fake_server import DEADLINE, EngineThread, FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import EngineConfig
from lamina_jax.core import CompletionOutput, Logprob, RequestOutput, SamplingParams
from lamina_jax.server import messages
from lamina_jax.server.engine_link import EngineLink
from lamina_jax.server.frames import EVENTS, MESSAGES, MOST_BYTES, STARTS, FrameError, pack, read, receive

SAMPLING = SamplingParams(stop="é", logit_bias={3: -1.5}, seed=2**64 - 1, stop_token_ids=[4])
TO_ENGINE = [
    messages.Submit("c", [[1, 2], [2**31 - 1]], SAMPLING),
    messages.Abort("c", 2),
    messages.AskStats(),
    messages.Stop(),
]
NEWS = RequestOutput(
    request_id="c-0",
    outputs=[
        CompletionOutput(
            index=1,
            text="é",
            token_ids=[7],
            finish_reason="stop",
            stop_reason="x",
            logprobs=[{7: Logprob(-float("inf"), 3, None)}],
        )
    ],
    prompt_logprobs=[None, {5: Logprob(-0.25, 1, "y")}],
    finished=True,
)
FROM_ENGINE = [
    messages.Progress("compiling", 1, 2),
    messages.Ready({"pages_total": 3, "devices": ["cpu:0"]}),
    messages.Outputs([NEWS]),
    messages.Rejected("c", "too many", True),
    messages.Lost("host:1", "it broke"),
    messages.Alive(),
    messages.Died("it did"),
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(st.integers(0, 2**16), max_size=20))
def test_however_a_stream_is_cut_the_messages_are_whole(places: list[int]) -> None:
    async def read_all() -> list[messages.Event]:
        stream = asyncio.StreamReader()
        for piece in cut(b"".join(map(pack, FROM_ENGINE)), places):
            stream.feed_data(piece)
        stream.feed_eof()
        found = [await read(stream, EVENTS) for _ in FROM_ENGINE]
        with pytest.raises(EOFError):
            await read(stream, EVENTS)
        return found

    assert asyncio.run(read_all()) == FROM_ENGINE


@given(st.lists(st.integers(0, 2**16), max_size=20))
def test_a_blocking_socket_reads_the_same(places: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def write() -> None:
            for piece in cut(b"".join(map(pack, TO_ENGINE)), places):
                ours.sendall(piece)
            ours.close()

        writer = threading.Thread(target=write)
        writer.start()
        assert [receive(theirs, MESSAGES) for _ in TO_ENGINE] == TO_ENGINE
        with pytest.raises(EOFError):
            receive(theirs, MESSAGES)
        writer.join(DEADLINE)


def test_a_configuration_crosses_as_it_is() -> None:
    start = messages.Start(EngineConfig(prefill_stall_ms=float("inf"), microbatches=2), cores="0-1")
    assert STARTS.decode(pack(start)[4:]) == start


@pytest.mark.parametrize(
    "message",
    [
        messages.Submit("c", [[2**64]], SAMPLING),
        messages.Submit("c", [[1]], SamplingParams(stop="\ud800")),
        messages.Died("x" * (MOST_BYTES + 1)),
    ],
)
def test_what_cannot_be_sent_is_refused(message: messages.Message | messages.Died) -> None:
    with pytest.raises(FrameError):
        pack(message)


GARBAGE = {
    "no msgpack": struct.pack("!I", 3) + b"\xc1\xc1\xc1",
    "no message of ours": struct.pack("!I", 1) + b"\x01",
    "no field of ours": struct.pack("!I", 13) + b"\x81\xa4type\xa6Secret",
    "text that is no text": struct.pack("!I", 3) + b"\xa2\xff\xfe",
    "too long": struct.pack("!I", MOST_BYTES + 1),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_from_the_server_ends_the_engine(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    engine = EngineThread(FakeEngine().build)
    with engine.connection as connection:
        connection.settimeout(DEADLINE)
        while not isinstance(receive(connection, EVENTS), messages.Ready):
            pass
        connection.sendall(pack(messages.AskStats()) + garbage)
        engine.join(DEADLINE)
        assert not engine.is_alive()
    assert "cannot be read" in caplog.text


class Scripted:
    """An `EngineHost` that has said all that it will say."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.killed = connection, False

    def ended(self) -> str | None:
        return "was ended by SIGKILL" if self.killed else None

    def kill(self) -> None:
        self.killed = True


@contextmanager
def scripted(said: bytes) -> Iterator[Scripted]:
    with ExitStack() as owned:
        ours, theirs = map(owned.enter_context, socket.socketpair())
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        yield Scripted(ours)


def events_of(host: Scripted) -> list[messages.Event]:
    async def follow() -> list[messages.Event]:
        link = EngineLink(host)
        await link.open()
        events = [event async for event in link.events()]
        await link.close(0)
        return events

    return asyncio.run(follow())


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_from_the_engine_is_its_death(garbage: bytes) -> None:
    with scripted(pack(FROM_ENGINE[0]) + garbage + pack(FROM_ENGINE[1])) as host:
        first, last = events_of(host)
        assert first == FROM_ENGINE[0]
        assert isinstance(last, messages.Died)
        assert "cannot be read" in last.reason
        assert host.killed


@pytest.mark.parametrize("rest", [b"", pack(FROM_ENGINE[0])[:-1], b"\0"])
def test_a_stream_that_ends_is_a_death_too(rest: bytes) -> None:
    with scripted(pack(FROM_ENGINE[0]) + rest) as host:
        first, last = events_of(host)
        assert first == FROM_ENGINE[0]
        assert last == messages.Died("its process speaks no more")
        assert host.killed
