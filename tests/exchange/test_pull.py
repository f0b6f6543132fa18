"""What crosses between workers and prefill hosts, well-formed or not."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.exchange.frames import ProtocolError
from lamina_jax.exchange.prefill import PrefillRequest, decode_prefill, encode
from lamina_jax.exchange.pull import (
    PULL_TOKENS,
    TICKET_BYTES,
    PullOrder,
    decode_drop,
    decode_order,
    positions_of,
    pull_frame,
    read_pull,
    read_stored,
    stored_bytes,
)
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.partition import Partition

GEOMETRY = CacheGeometry(
    num_layers=2, num_pages=8, page_size=4, num_kv_heads=2, num_heads=4, head_dim=8, dtype="float32",
    wire_dtype="float32",
)  # fmt: skip
TICKET = bytes(range(TICKET_BYTES))


def order(**changes: object) -> PullOrder:
    fields = {
        "group": "ours",
        "ticket": TICKET,
        "address": "127.0.0.1:1",
        "length": 10,
        "pages": [5, 0, 2],
        "first": 0,
        "stride": 1,
        "after": 0,
        "kv_start": 0,
    }
    return PullOrder(**(fields | changes))  # type: ignore[arg-type]


def test_an_order_names_positions_and_their_slots() -> None:
    positions, slots = positions_of(order(), GEOMETRY)
    assert positions.tolist() == list(range(10))
    assert slots.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 8, 9]


@given(
    kind=st.sampled_from(["heads", "requests", "tokens"]),
    workers=st.integers(1, 3),
    length=st.integers(1, 40),
    worker=st.integers(0, 2),
)
def test_all_workers_together_keep_every_token_once(
    kind: str, workers: int, length: int, worker: int
) -> None:
    """In the slots in which the scheduler would have put it."""
    workers = 1 if kind == "heads" else workers
    partition = Partition(kind, workers, 16, 4)  # type: ignore[arg-type]
    first = worker % workers
    owners = [(first + place * (kind == "tokens")) % workers for place in range(-(-length // 4))]
    pages = [owner * 16 + place for place, owner in enumerate(owners)]
    kept = {}
    for held in partition.holders(pages):
        told = order(length=length, pages=held.pages, first=held.first, stride=held.stride)
        positions, slots = positions_of(told, replace(GEOMETRY, num_pages=16))
        kept.update(
            {p: held.worker * 64 + s for p, s in zip(positions.tolist(), slots.tolist(), strict=True)}
        )
    assert kept == {p: pages[p // 4] * 4 + p % 4 for p in range(length)}


@pytest.mark.parametrize("pages", [[8], [-1], [*range(8), 0]])
def test_pages_that_the_worker_does_not_have_are_refused(pages: list[int]) -> None:
    with pytest.raises(ProtocolError, match="pages"):
        positions_of(order(pages=pages), GEOMETRY)


@pytest.mark.parametrize(
    "changes",
    [{"group": ""}, {"ticket": b"x"}, {"length": 0}, {"pages": []}, {"first": -1}, {"address": "nowhere"}],
)
def test_orders_of_no_engine_are_refused(changes: dict[str, object]) -> None:
    (name,) = changes
    assert decode_order(msgspec.msgpack.encode(order())) == order()
    with pytest.raises(ConfigError, match=name):
        decode_order(msgspec.msgpack.encode(order(**changes)))


@settings(max_examples=200)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_an_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_order, decode_drop, decode_prefill):
        with pytest.raises(ConfigError):
            decode(data)
    with pytest.raises(ProtocolError):
        read_pull(np.frombuffer(data[:8], np.uint8), length=5, num_kv_heads=2)


@given(numbers=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=8))
def test_a_pull_asks_for_what_there_is_or_is_refused(numbers: list[int]) -> None:
    start, stop, *positions = numbers
    payload = pull_frame(start, stop, np.array(positions, np.int32)).view(np.uint8)
    if 0 <= start < stop <= 4 and all(0 <= position < 7 for position in positions):
        heads, found = read_pull(payload, length=7, num_kv_heads=4)
        assert (heads, found.tolist()) == (slice(start, stop), positions)
    else:
        with pytest.raises(ProtocolError):
            read_pull(payload, length=7, num_kv_heads=4)


@pytest.mark.parametrize("tokens", [1, PULL_TOKENS])
def test_stored_values_and_scales_come_back(tokens: int) -> None:
    geometry = replace(GEOMETRY, dtype="int8")
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (tokens, 2, 2, 8)).astype(np.int8)
    scales = rng.random((tokens, 2, 2), np.float32)
    payload = np.zeros(stored_bytes(geometry, PULL_TOKENS), np.uint8)
    came = np.concatenate([array.reshape(-1).view(np.uint8) for array in (values, scales)])
    assert len(came) == stored_bytes(geometry, tokens)
    payload[: len(came)] = came
    found = read_stored(payload, geometry, [np.dtype(np.int8), np.dtype(np.float32)], tokens)
    assert [array.shape[0] for array in found] == [PULL_TOKENS] * 2
    np.testing.assert_array_equal(found[0][:tokens], values)
    np.testing.assert_array_equal(found[1][:tokens], scales)


def test_a_prompt_travels_whole() -> None:
    tokens = np.array([3, 1, 4, 1, 5], "<i4")
    ticket, found = decode_prefill(encode(PrefillRequest(TICKET, tokens.tobytes())))
    assert ticket == TICKET
    assert found.tolist() == tokens.tolist()
    with pytest.raises(ConfigError, match="tokens of 3 bytes"):
        decode_prefill(encode(PrefillRequest(TICKET, b"abc")))
