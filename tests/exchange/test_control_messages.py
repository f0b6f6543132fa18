"""What an engine asks for comes to the worker as it was, and nonsense does not get in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from echo_session import SPEC, spec
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.exchange.control_messages import LeaseRequest, decode_request, encode
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.spec import WorkerSpec

COUNT = st.integers(1, 1 << 20)
BUCKET = st.tuples(st.integers(1, 1 << 10), st.integers(1, 1 << 10), st.booleans())
DTYPE = st.sampled_from(["float32", "bfloat16"])
FLOAT = st.floats(allow_nan=False)


@st.composite
def fields(draw: st.DrawFn) -> tuple[dict, dict]:
    """Of a spec and its geometry."""
    layers, devices = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    kv_heads = devices * draw(st.integers(1, 8))
    geometry = {
        "num_layers": layers,
        "num_pages": draw(COUNT),
        "page_size": draw(COUNT),
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * draw(st.integers(1, 8)),
        "head_dim": draw(COUNT),
        "dtype": draw(DTYPE),
        "wire_dtype": draw(DTYPE),
    }

    def each(values: st.SearchStrategy) -> tuple:
        return tuple(draw(st.lists(values, min_size=layers, max_size=layers)))

    spec = {
        "devices": devices,
        "windows": each(st.integers(1, 1 << 30)),
        "scales": each(FLOAT),
        "softcaps": each(st.none() | FLOAT),
        "buckets": tuple(draw(st.lists(BUCKET, min_size=1, max_size=4))),
        "pages_per_request": draw(COUNT),
        "overlap": draw(st.booleans()),
        "pieces": draw(COUNT),
        "copies": draw(COUNT),
        "by_token": draw(st.booleans()),
        "kv_start": draw(st.integers(0, 64)),
        "first_device": draw(st.integers(0, 64)),
    }
    return spec, geometry


@given(fields())
def test_a_spec_survives_the_wire(drawn: tuple[dict, dict]) -> None:
    spec = WorkerSpec(**drawn[0], geometry=CacheGeometry(**drawn[1]))
    request = LeaseRequest("me", spec, "ours")
    assert decode_request(encode(request)) == request


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (spec(num_pages=0), "num_pages=0"),
        (spec(page_size=1 << 32), "page_size=4294967296"),
        (spec(dtype="int4"), "dtype=int4"),
        (spec(wire_dtype="int8"), "wire_dtype=int8"),
        (spec(num_layers=3), r"windows=\(1073741824, 16\)"),
        (spec(num_heads=3), "num_heads=3"),
        (replace(SPEC, devices=3), "devices=3"),
        (replace(SPEC, pieces=0), "pieces=0"),
        (replace(SPEC, first_device=-1), "first_device=-1"),
        (replace(SPEC, kv_start=-1), "kv_start=-1"),
        (replace(SPEC, windows=(0, 16)), r"windows=\(0, 16\)"),
        (replace(SPEC, softcaps=(None,)), r"softcaps=\(None,\)"),
        (replace(SPEC, buckets=((0, 1, True),)), r"buckets=\(0, 1\)"),
        (replace(SPEC, buckets=((1 << 20, 2, True),)), r"buckets=\(1048576, 2\)"),
        (replace(SPEC, buckets=((1, 1, True),) * 257), "buckets=257"),
    ],
)
def test_a_wrong_field_is_named(wrong: WorkerSpec, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        decode_request(encode(LeaseRequest("me", wrong)))


def test_a_group_has_a_longest_name() -> None:
    with pytest.raises(ConfigError, match="group=xxx"):
        decode_request(encode(LeaseRequest("me", SPEC, 65 * "x")))


def test_a_wrong_type_is_named() -> None:
    message = {"engine": "me", "spec": msgspec.to_builtins(SPEC) | {"pieces": "1"}}
    with pytest.raises(ConfigError, match=r"Expected `int`, got `str` - at `\$.spec.pieces`"):
        decode_request(encode(message))


def test_a_message_has_a_largest_size() -> None:
    with pytest.raises(ConfigError, match="1048576 are allowed"):
        decode_request(encode(LeaseRequest("me" * 2**20, SPEC)))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    with suppress(ConfigError):
        decode_request(data)
