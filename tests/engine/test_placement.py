"""Weights on the compute mesh: cut where they can be, KV heads repeated where there are too few."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lamina_jax.engine.placement import bytes_per_device, describe_weight, place_weight, repeat_heads
from lamina_jax.weights.loader import TensorSpec

SPEC = {"name": "weight", "dtype": "float32"}


@pytest.mark.parametrize("axes", [("embed", "kv_heads"), ("kv_heads", "embed"), ("kv_heads",)])
def test_each_kv_head_stands_beside_its_copies(axes: tuple[str, ...]) -> None:
    """Two heads of size 3, twice each, whichever way round the matrix lies; biases too."""
    sizes = {"embed": 5, "kv_heads": 6}
    weight = np.random.default_rng(0).normal(size=[sizes[axis] for axis in axes]).astype(np.float32)
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    repeated = repeat_heads(weight, axes, head_dim=3, copies=2)
    np.testing.assert_array_equal(repeated, np.take(weight, order, axis=axes.index("kv_heads")))


@pytest.mark.parametrize(
    ("axes", "shape", "share"),
    [
        (("embed", "mlp"), (4, 8), (4, 2)),
        (("heads", "embed"), (8, 4), (2, 4)),
        (("vocab", "embed"), (7, 4), (7, 4)),  # does not divide
        (("embed",), (8,), (8,)),
    ],
)
def test_a_weight_is_cut_along_its_logical_axis(
    axes: tuple[str, ...], shape: tuple[int, ...], share: tuple[int, ...]
) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    array = place_weight(TensorSpec(shape=shape, axes=axes, **SPEC), values, mesh=mesh, head_dim=2)
    np.testing.assert_array_equal(array, values)
    assert {shard.data.shape for shard in array.addressable_shards} == {share}
    assert bytes_per_device([array, array]) == 2 * 4 * np.prod(share)


@pytest.mark.parametrize("axes", [("embed", "kv_heads"), ("kv_heads",), ("mlp", "embed"), ("vocab", "embed")])
def test_a_described_weight_is_like_the_placed_one(axes: tuple[str, ...]) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    sizes = {"embed": 5, "kv_heads": 6, "mlp": 8, "vocab": 7}
    values = np.zeros([sizes[axis] for axis in axes], np.float32)
    spec = TensorSpec(shape=values.shape, axes=axes, **SPEC)
    placed = place_weight(spec, values, mesh=mesh, head_dim=3, copies=2)
    described = describe_weight(spec, mesh=mesh, copies=2)
    assert (described.shape, described.dtype) == (placed.shape, placed.dtype)
    assert described.sharding == placed.sharding
    assert bytes_per_device([described]) == bytes_per_device([placed])
