"""Between the compute mesh's arrays and the messages of the head table, one of each piece.

A compute program returns c / t arrays for each segment of its rows. Each array holds one piece of each of
the t shards: piece j is shard j // (c / t) of array j % (c / t). Taking them apart and putting them
together copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from lamina_jax.pool.geometry import HeadTable

Arrays = tuple[jax.Array, ...]


def messages_of(
    arrays: Arrays, table: HeadTable, segment: int, pieces: range, *, kv_alone: bool = False
) -> list[jax.Array]:
    """The messages of some pieces of one segment, each on its shard's device; of k and v by themselves only
    those that are sent."""
    count, first = table.per_shard, segment * table.per_shard
    wanted = [j for j in pieces if table.pieces[j].sends_kv or not kv_alone]
    if table.shards == 1 and arrays[0].is_fully_addressable:
        return [arrays[first + j] for j in wanted]
    return [arrays[first + j % count].addressable_data(j // count) for j in wanted]


def arrays_of(messages: Sequence[Any], table: HeadTable, sharding: Sharding) -> tuple[Any, ...]:
    """The inverse, for flat messages [size], each on its shard's device (on the host, where t = 1 and that
    is the same memory): of every c messages c / t arrays [t size]. Over several hosts, `table` and the
    messages are this host's, the arrays of all of them."""
    shards = len(sharding.device_set)
    if shards == 1:
        return tuple(messages)
    shape, pieces, count = (shards * messages[0].size,), len(table.pieces), table.per_shard
    return tuple(
        jax.make_array_from_single_device_arrays(
            shape, sharding, list(messages[start + i : start + pieces : count])
        )
        for start in range(0, len(messages), pieces)
        for i in range(count)
    )
