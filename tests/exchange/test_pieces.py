"""Arrays of the compute mesh come apart into the table's messages and together again, without a copy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.exchange.pieces import arrays_of, messages_of
from lamina_jax.pool.geometry import head_table


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (1, 4), (2, 4), (4, 4), (4, 1), (2, 1)])
def test_round_trip(shards: int, workers: int) -> None:
    table = head_table(8, 4, shards, workers)
    devices = jax.devices()[:shards]
    sharding = NamedSharding(Mesh(np.array(devices), ("tensor",)), P("tensor"))
    # Array i holds, shard after shard, message shard * (c / t) + i: three times the message's number.
    numbers = np.arange(len(table.pieces), dtype=np.int32).reshape(shards, table.per_shard).T
    arrays = tuple(jax.device_put(np.repeat(row, 3), sharding) for row in numbers)

    messages = messages_of(arrays, table, 0, range(len(table.pieces)))
    for j, (message, piece) in enumerate(zip(messages, table.pieces, strict=True)):
        np.testing.assert_array_equal(message, np.full(3, j))
        assert message.devices() == {devices[piece.shard]}

    again = arrays_of(messages, table, sharding)
    for array, back in zip(arrays, again, strict=True):
        np.testing.assert_array_equal(array, back)
        assert back.sharding.is_equivalent_to(sharding, 1)
        pointers = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
        assert [shard.data.unsafe_buffer_pointer() for shard in back.addressable_shards] == pointers
