"""Pages as arrays: of the bytes that the geometry counts, stored as each platform takes them."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from tiny_models import TINY

from lamina_jax.config import EngineConfig
from lamina_jax.pool.geometry import KV_BYTES, CacheGeometry, geometry_of
from lamina_jax.pool.pages import make_pages, pages_struct, storage_dtype


def here() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 5),
    dtype=st.sampled_from(sorted(KV_BYTES)),
)
def test_a_page_has_the_bytes_that_are_counted(sizes: tuple[int, ...], dtype: str) -> None:
    layers, pages, tokens, heads, size = sizes
    geometry = CacheGeometry(
        num_layers=layers,
        num_pages=pages,
        page_size=tokens,
        num_kv_heads=heads,
        num_heads=2 * heads,
        head_dim=8 * size,
        dtype=dtype,
        wire_dtype="float32",
    )
    arrays = jax.tree.leaves(pages_struct(geometry, here()))
    held = sum(array.size * array.dtype.itemsize for array in arrays)
    assert layers * held == pages * geometry.bytes_per_page
    assert {array.shape[:4] for array in arrays} == {(pages, 2, heads, tokens)}


@pytest.mark.parametrize("name", get_args(get_type_hints(EngineConfig)["kv_dtype"]))
def test_every_name_of_a_dtype_makes_pages(name: Any) -> None:
    geometry = geometry_of(EngineConfig(kv_dtype=name, page_size=8), TINY, num_pages=3)
    pages, struct = make_pages(geometry, here()), pages_struct(geometry, here())
    assert len(pages) == TINY.num_layers
    for layer in pages:
        assert jax.tree.map(lambda a: (a.shape, a.dtype), layer) == jax.tree.map(
            lambda a: (a.shape, a.dtype), struct
        )
        assert not any(np.any(array) for array in jax.tree.leaves(layer))


def test_only_a_platform_that_is_slow_with_floats_keeps_their_bits() -> None:
    assert [storage_dtype("bfloat16", platform).name for platform in ("cpu", "gpu", "tpu")] == [
        "uint16", "bfloat16", "bfloat16"
    ]  # fmt: skip
    for platform in ("cpu", "gpu", "tpu"):
        assert storage_dtype("float8_e4m3fn", platform) == np.uint8
        assert storage_dtype("int8", platform) == np.int8
        assert storage_dtype("float32", platform) == np.float32
