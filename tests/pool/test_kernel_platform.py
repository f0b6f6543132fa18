"""Which reading of paged attention a device runs: never one that refuses the pages."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.pages import pages_struct
from lamina_jax.pool.shard import kernel_platform
from pallas_kernels import paged_attention


def geometry(dtype: str, head_dim: int, page_size: int) -> CacheGeometry:
    return CacheGeometry(
        num_layers=1,
        num_pages=2,
        page_size=page_size,
        num_kv_heads=1,
        num_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        wire_dtype="float32",
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "taken"),
    [
        ("float32", 128, 16, True),
        ("float32", 80, 128, True),
        ("float32", 40, 128, False),
        ("float32", 128, 12, False),
        ("float32", 64, 64, False),
        ("int8", 128, 64, True),
        ("int8", 128, 32, False),
        ("float8_e4m3fn", 64, 128, True),
        ("float8_e4m3fn", 128, 16, False),
    ],
)
def test_a_tpu_runs_its_kernel_where_that_takes_the_pages(
    dtype: str, head_dim: int, page_size: int, taken: bool
) -> None:
    held = geometry(dtype, head_dim, page_size)
    pages = pages_struct(held, SingleDeviceSharding(jax.devices()[0]))
    integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((1, 1, 2, head_dim), jnp.float32)
    operands = (q, pages, integers((1, 2)), integers((1,)), integers((1, 2)), integers((1, 1)), integers(()))
    trace = partial(jax.eval_shape, partial(paged_attention, scale=1.0, platform="tpu"), *operands)
    assert kernel_platform(held, "tpu") == ("tpu" if taken else None)
    if taken:
        trace()
    else:
        with pytest.raises(ValueError, match=r"on a tpu|which a tpu needs"):
            trace()


@pytest.mark.parametrize(("head_dim", "reading"), [(48, "native"), (40, "cpu")])
def test_a_cpu_runs_the_native_kernel_where_heads_fit(head_dim: int, reading: str) -> None:
    assert kernel_platform(geometry("bfloat16", head_dim, 16), "cpu", native=True) == reading
    assert kernel_platform(geometry("bfloat16", head_dim, 16), "cpu") == "cpu"
