"""Where weights go on the compute mesh: each parameter by its logical axes.

It knows parameters by their axes' names alone, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.engine.world import placed
from lamina_jax.weights.loader import TensorSpec

TENSOR_AXES = {"vocab", "mlp", "heads", "kv_heads"}
"""Logical axes that are cut over the compute mesh's axis "tensor"; the others are whole on every device."""


def place_weight(
    spec: TensorSpec, array: np.ndarray, *, mesh: Mesh, head_dim: int, copies: int = 1
) -> jax.Array:
    """A tensor on `mesh`: cut along its axis of `TENSOR_AXES` where that divides evenly, else whole on
    every device. Each KV head of k's and v's projections is repeated `copies` times."""
    array = repeat_heads(array, spec.axes, head_dim, copies)
    return placed(array, _sharding(spec.axes, array.shape, mesh))


def describe_weight(spec: TensorSpec, *, mesh: Mesh, copies: int = 1) -> jax.ShapeDtypeStruct:
    """What `place_weight` would give; the mesh may be of devices that are only described."""
    sizes = zip(spec.axes, spec.shape, strict=True)
    shape = tuple(size * copies if axis == "kv_heads" else size for axis, size in sizes)
    return jax.ShapeDtypeStruct(shape, np.dtype(spec.dtype), sharding=_sharding(spec.axes, shape, mesh))


def _sharding(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    devices = mesh.shape["tensor"]
    cut = [
        "tensor" if axis in TENSOR_AXES and size % devices == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, P(*cut))


def repeat_heads(array: np.ndarray, axes: tuple[str, ...], head_dim: int, copies: int) -> np.ndarray:
    """An array with an axis "kv_heads" of size K H, with each head `copies` times in a row.

    The op then sees as many KV heads as there are devices, each next to its query heads.
    """
    if copies == 1 or "kv_heads" not in axes:
        return array
    axis = axes.index("kv_heads")
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    heads = array.reshape(*before, -1, head_dim, *after)
    return heads.repeat(copies, axis).reshape(*before, -1, *after)


def bytes_per_device(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of `arrays` on each device of their mesh."""
    shapes = [(array, array.sharding.shard_shape(array.shape)) for array in arrays]
    return sum(int(np.prod(shape)) * array.dtype.itemsize for array, shape in shapes)
