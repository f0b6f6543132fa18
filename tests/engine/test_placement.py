"""Weights on the compute mesh: cut where they can be, KV heads repeated where there are too few."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lamina_jax.engine.placement import bytes_per_device, describe_weight, place_weight
from lamina_jax.weights.loader import TensorSpec
from lamina_jax.weights.reader import Index

SPEC = {"name": "weight", "dtype": "float32"}


class Counting:
    """Parts of an array, as a reader gives them, and how many elements they were."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.elements = values, 0

    def __call__(self, index: Index) -> np.ndarray:
        part = self.values[index].copy()
        self.elements += part.size
        return part


@pytest.mark.parametrize("axes", [("embed", "kv_heads"), ("kv_heads", "embed"), ("kv_heads",)])
@pytest.mark.parametrize(("devices", "shares"), [(1, 1), (2, 1), (4, 2)])
def test_each_kv_head_stands_beside_its_copies(axes: tuple[str, ...], devices: int, shares: int) -> None:
    """Two heads of size 3, twice each, whichever way round the matrix lies; biases too. A device reads its
    own heads alone: of four devices two have the same."""
    sizes = {"embed": 5, "kv_heads": 6}
    weight = np.random.default_rng(0).normal(size=[sizes[axis] for axis in axes]).astype(np.float32)
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    read = Counting(weight)
    spec = TensorSpec(shape=weight.shape, axes=axes, **SPEC)
    repeated = place_weight(spec, read, mesh=mesh, head_dim=3, copies=2)
    np.testing.assert_array_equal(repeated, np.take(weight, order, axis=axes.index("kv_heads")))
    assert read.elements == shares * weight.size


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
    read = Counting(values)
    array = place_weight(TensorSpec(shape=shape, axes=axes, **SPEC), read, mesh=mesh)
    np.testing.assert_array_equal(array, values)
    assert {shard.data.shape for shard in array.addressable_shards} == {share}
    assert bytes_per_device([array, array]) == 2 * 4 * np.prod(share)
    assert read.elements == values.size  # once, wherever it lies


@pytest.mark.parametrize("axes", [("embed", "kv_heads"), ("kv_heads",), ("mlp", "embed"), ("vocab", "embed")])
def test_a_described_weight_is_like_the_placed_one(axes: tuple[str, ...]) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    sizes = {"embed": 5, "kv_heads": 6, "mlp": 8, "vocab": 7}
    values = np.zeros([sizes[axis] for axis in axes], np.float32)
    spec = TensorSpec(shape=values.shape, axes=axes, **SPEC)
    placed = place_weight(spec, Counting(values), mesh=mesh, head_dim=3, copies=2)
    described = describe_weight(spec, mesh=mesh, copies=2)
    assert (described.shape, described.dtype) == (placed.shape, placed.dtype)
    assert described.sharding == placed.sharding
    assert bytes_per_device([described]) == bytes_per_device([placed])
