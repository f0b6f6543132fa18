"""Between the compute mesh's arrays and the messages of the head table, one of each piece.

A compute program returns c / t arrays, each of which holds one piece of each of the t shards; piece j
is shard j // (c / t) of array j % (c / t). Taking them apart and putting them together copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from lamina_jax.pool.geometry import HeadTable

Arrays = tuple[jax.Array, ...]


def messages_of(arrays: Arrays, table: HeadTable) -> Sequence[jax.Array]:
    """The c messages in c / t arrays, each on its shard's device."""
    if table.shards == 1:
        return arrays
    count = table.per_shard
    return [arrays[j % count].addressable_data(j // count) for j in range(len(table.pieces))]


def arrays_of(messages: Sequence[jax.Array], table: HeadTable, sharding: Sharding) -> Arrays:
    """The inverse, for flat messages [size], each on its shard's device: c / t arrays [t size]."""
    if table.shards == 1:
        return tuple(messages)
    count = table.per_shard
    shape = (table.shards * messages[0].size,)
    return tuple(
        jax.make_array_from_single_device_arrays(shape, sharding, list(messages[i::count]))
        for i in range(count)
    )
