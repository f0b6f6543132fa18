"""Where weights go on the compute mesh: each parameter by its logical axes.

It knows parameters by their axes' names alone, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.weights.loader import Read, TensorSpec
from lamina_jax.weights.reader import Index

TENSOR_AXES = {"vocab", "mlp", "heads", "kv_heads"}
"""Logical axes that are cut over the compute mesh's axis "tensor"; the others are whole on every device."""


def place_weight(
    spec: TensorSpec, read: Read, *, mesh: Mesh, head_dim: int = 1, copies: int = 1
) -> jax.Array:
    """A tensor on `mesh`: cut along its axis of `TENSOR_AXES` where that divides evenly, else whole on
    every device. Each KV head of k's and v's projections is repeated `copies` times.

    Of the tensor is read what this process's own devices hold; what all of them hold, once.
    """
    target = describe_weight(spec, mesh=mesh, copies=copies)
    if copies > 1 and "kv_heads" in spec.axes:
        read = partial(_read_repeated, read, target.shape, spec.axes.index("kv_heads"), head_dim, copies)
    return jax.make_array_from_callback(target.shape, target.sharding, read, target.dtype)


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


def _read_repeated(
    read: Read, shape: tuple[int, ...], axis: int, head_dim: int, copies: int, index: Index
) -> np.ndarray:
    """A part of a tensor of `shape`, whose heads along `axis` stand `copies` times in a row.

    The op then sees as many KV heads as there are devices, each next to its query heads.
    """
    repeated = np.arange(shape[axis])[index[axis]]
    rows = repeated // (head_dim * copies) * head_dim + repeated % head_dim
    first, last = rows.min(), rows.max()
    part = read((*index[:axis], slice(first, last + 1), *index[axis + 1 :]))
    return part.take(rows - first, axis)


def bytes_per_device(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of `arrays` on each device of their mesh."""
    shapes = [(array, array.sharding.shard_shape(array.shape)) for array in arrays]
    return sum(int(np.prod(shape)) * array.dtype.itemsize for array, shape in shapes)
