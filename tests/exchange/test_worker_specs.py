"""What an engine asks for comes to the worker as it was, and nonsense does not get in."""

from __future__ import annotations

from contextlib import suppress

import pytest
from echo_session import SPEC
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.exchange import control_pb2 as pb
from lamina_jax.exchange.specs import spec_from_message, spec_to_message
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
    }
    return spec, geometry


@given(fields())
def test_a_spec_survives_the_wire(drawn: tuple[dict, dict]) -> None:
    spec = WorkerSpec(**drawn[0], geometry=CacheGeometry(**drawn[1]))
    data = spec_to_message(spec).SerializeToString()
    assert spec_from_message(pb.WorkerSpec.FromString(data)) == spec


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.geometry.ClearField("num_pages"), "num_pages=0"),
        (lambda m: setattr(m.geometry, "dtype", "int8"), "dtype=int8"),
        (lambda m: setattr(m.geometry, "num_layers", 3), "layers=2"),
        (lambda m: setattr(m.geometry, "num_heads", 3), "num_heads=3"),
        (lambda m: setattr(m, "devices", 3), "devices=3"),
        (lambda m: setattr(m, "pieces", 0), "pieces=0"),
        (lambda m: m.buckets.add(rows=0, queries=1), r"buckets=\(0, 1\)"),
        (lambda m: m.buckets.add(rows=1 << 20, queries=2), r"buckets=\(1048576, 2\)"),
        (lambda m: [m.buckets.add(rows=1, queries=1) for _ in range(256)], "buckets=258"),
    ],
)
def test_a_wrong_field_is_named(change: object, name: str) -> None:
    message = spec_to_message(SPEC)
    change(message)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=name):
        spec_from_message(message)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_spec_or_refused(data: bytes) -> None:
    with suppress(ConfigError, DecodeError):
        spec_from_message(pb.WorkerSpec.FromString(data))
