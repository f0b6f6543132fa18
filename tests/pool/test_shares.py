"""What the compute hosts exchange with the workers: together all of the table, each with its own heads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.pool.geometry import CacheGeometry, HeadTable, head_table
from lamina_jax.pool.shares import host_shares, host_table

GEOMETRY = CacheGeometry(
    num_layers=2,
    num_pages=8,
    page_size=4,
    num_kv_heads=8,
    num_heads=16,
    head_dim=8,
    dtype="float32",
    wire_dtype="float32",
)


HOSTS, DEVICES = st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2])
WORKERS = st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)])
"""Of attention workers so many, with so many devices each."""


def table_of(hosts: int, local: int, workers: tuple[int, int]) -> HeadTable:
    """Of a model with 8 KV heads and 16 query heads; `local`: compute devices of each host."""
    return head_table(16, 8, hosts * local, workers[0] * workers[1])


@given(HOSTS, DEVICES, WORKERS)
def test_the_hosts_pieces_are_the_table(hosts: int, local_shards: int, workers: tuple[int, int]) -> None:
    table, devices = table_of(hosts, local_shards, workers), workers[1]
    found = []
    for host in range(hosts):
        local, shares = host_table(table, host, hosts), host_shares(table, devices, host, hosts)
        assert (local.shards, local.copies) == (table.shards // hosts, table.copies)
        assert local.pieces[0].shard == local.pieces[0].worker == 0
        assert [j for share in shares for j in share.pieces] == list(range(len(local.pieces)))
        for share in shares:
            each = len(share.pieces) // share.devices
            for i, j in enumerate(share.pieces):
                piece = local.pieces[j]
                device = share.worker * devices + share.first_device + i // each
                shard = host * local.shards + piece.shard
                found.append((shard, device, piece.q_start, piece.kv_start, piece.sends_kv))
                assert piece.shard == j // local.per_shard
    assert found == [(p.shard, p.worker, p.q_start, p.kv_start, p.sends_kv) for p in table.pieces]


@given(HOSTS, DEVICES, WORKERS)
def test_the_pages_of_all_hosts_are_the_cache(
    hosts: int, local_shards: int, workers: tuple[int, int]
) -> None:
    table, devices = table_of(hosts, local_shards, workers), workers[1]
    shares = [share for host in range(hosts) for share in host_shares(table, devices, host, hosts)]
    assert sum(share.of(GEOMETRY).bytes_per_page for share in shares) == GEOMETRY.bytes_per_page
    assert sum(share.num_heads for share in shares) == GEOMETRY.num_heads
    heads = [head for share in shares for head in range(share.kv_start, share.kv_start + share.num_kv_heads)]
    assert heads == list(range(GEOMETRY.num_kv_heads))


def test_hosts_that_do_not_divide_the_kv_heads_are_refused() -> None:
    table = head_table(16, 2, shards=4, workers=1)
    with pytest.raises(ConfigError, match="num_hosts=4 compute hosts cannot share the model's 2 KV heads"):
        host_shares(table, 1, 0, 4)


def test_devices_that_would_hold_unequal_parts_are_refused() -> None:
    table = head_table(12, 12, shards=12, workers=4)  # a device has 3 pieces, each of 3 hosts 4
    with pytest.raises(ConfigError, match="cannot hold them evenly"):
        host_shares(table, 2, 0, 3)
    assert [len(share.pieces) for share in host_shares(table, 1, 0, 3)] == [3, 1]
