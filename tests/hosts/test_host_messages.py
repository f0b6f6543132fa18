"""A step's plan comes to the other hosts as it was, and nonsense does not get in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.core import LogitEdits, MicrobatchPlan, SamplingRows, StepPlan
from lamina_jax.hosts.messages import Agreed, Dispatch, Hello, World, decode_order, decode_report, encode


def plan(rows: int, queries: int, pages: int, *, sampling: bool) -> MicrobatchPlan:
    """With arrays of numbers that are all different."""
    numbers = iter(range(10**6))

    def ints(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array([next(numbers) for _ in range(size)], np.int32).reshape(shape)

    def floats(*shape: int) -> np.ndarray:
        return ints(*shape).astype(np.float32)

    edits = LogitEdits(
        history=ints(rows, 16),
        presence=floats(rows),
        frequency=floats(rows),
        repetition=floats(rows),
        bias_ids=ints(rows, 3),
        bias=floats(rows, 3),
    )
    chosen = SamplingRows(
        temperature=floats(rows),
        top_k=ints(rows),
        top_p=floats(rows),
        min_p=floats(rows),
        uniform=floats(rows),
        edits=edits,
        logprobs=True,
    )
    return MicrobatchPlan(
        microbatch=1,
        kind="prefill" if queries > 1 else "decode",
        request_ids=("a", ""),
        tokens=ints(rows, queries),
        feedback=ints(rows),
        positions=ints(rows, queries),
        context_lens=ints(rows),
        block_tables=ints(rows, pages),
        page_index=ints(rows, pages),
        slots=ints(rows, queries),
        logits_at=ints(rows),
        cached=True,
        samples=np.arange(rows) % 2 == 0,
        sampling=chosen if sampling else None,
        prompt_targets=ints(rows * queries) if queries > 1 else None,
        worker=0,
    )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool(np.all(left == right))
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_a_plan_survives_the_wire(rows: int, queries: int, pages: int, sampling: bool) -> None:
    batch = plan(rows, queries, pages, sampling=sampling)
    step = StepPlan(step=7, microbatches=(batch, replace(batch, microbatch=0)))
    found = decode_order(bytes(encode(Dispatch(step))))
    assert isinstance(found, Dispatch)
    assert same(found.plan, step)


def test_transposed_arrays_survive_too() -> None:
    batch = plan(3, 2, 2, sampling=False)
    turned = replace(batch, tokens=np.asfortranarray(batch.tokens))
    found = decode_order(encode(Dispatch(StepPlan(step=0, microbatches=(turned,)))))
    assert isinstance(found, Dispatch)
    assert same(found.plan.microbatches[0].tokens, batch.tokens)


@given(st.binary(max_size=256))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (decode_order, decode_report):
        with suppress(ConfigError):
            decode(data)


@given(st.data())
def test_a_damaged_plan_is_a_plan_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encode(Dispatch(StepPlan(step=7, microbatches=(plan(2, 1, 2, sampling=True),)))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ConfigError):
        decode_order(bytes(whole))


@pytest.mark.parametrize(
    "array",
    [
        ("object", [1], b"12345678"),
        ("int32", [2], b"1234"),
        ("int32", [-1], b""),
        ("int32", [1] * 5, b"1234"),
    ],
)
def test_an_array_that_cannot_be_is_refused(array: tuple[str, list[int], bytes]) -> None:
    step = StepPlan(step=0, microbatches=(plan(1, 1, 1, sampling=False),))
    message = msgspec.msgpack.decode(encode(Dispatch(step)))
    message["plan"]["microbatches"][0]["tokens"] = array
    with pytest.raises(ConfigError, match="no message of a compute host"):
        decode_order(msgspec.msgpack.encode(message))


def test_each_side_takes_its_own_messages_alone() -> None:
    assert decode_order(encode(World("a:1", "group"))) == World("a:1", "group")
    assert decode_report(encode(Hello(1, 2, {"a": "b"}, "me"))) == Hello(1, 2, {"a": "b"}, "me")
    with pytest.raises(ConfigError):
        decode_report(encode(Agreed(3)))
