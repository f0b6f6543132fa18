"""What one compute host exchanges with each attention worker: its own part of the head table. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from lamina_jax.config import ConfigError
from lamina_jax.pool.geometry import CacheGeometry, HeadTable, Piece


@dataclass(frozen=True)
class HeadShare:
    """A worker's devices that hold heads of one compute host.

    Attributes:
        worker: which worker of a part of the cache.
        first_device, devices: of the worker's devices, those in a row that hold these heads.
        pieces: of the host's own table.
        kv_start: the first KV head, among the model's.
        num_heads, num_kv_heads: over all of these devices.
    """

    worker: int
    first_device: int
    devices: int
    pieces: range
    kv_start: int
    num_heads: int
    num_kv_heads: int

    def of(self, geometry: CacheGeometry) -> CacheGeometry:
        """The geometry of the cache on these devices."""
        return replace(geometry, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)


def host_table(table: HeadTable, host: int, hosts: int) -> HeadTable:
    """The pieces of one of `hosts` compute hosts, with its shards and workers numbered from 0."""
    own = _pieces(table, host, hosts)
    workers = {piece.worker for piece in own}
    return HeadTable(
        table.shards // hosts,
        len(workers),
        tuple(
            replace(piece, shard=piece.shard - own[0].shard, worker=piece.worker - own[0].worker)
            for piece in own
        ),
    )


def host_shares(table: HeadTable, devices: int, host: int, hosts: int) -> list[HeadShare]:
    """What a host exchanges with each worker, in the order of its pieces.

    Args:
        table: of all hosts; its workers are devices, of which so many in a row are one attention worker.

    Raises:
        ConfigError: hosts that do not divide the KV heads, or devices of one worker that would hold
            unequal parts of a host's heads.
    """
    heads = table.pieces[-1].kv_stop
    if heads % hosts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"num_hosts={hosts} compute hosts cannot share the model's {heads} KV heads evenly, and a head "
            f"of two hosts would have its pages twice; {fitting} would"
        )
    numbered = enumerate(_pieces(table, host, hosts))
    by_worker = groupby(numbered, key=lambda pair: pair[1].worker // devices)
    return [_share(worker, devices, list(group)) for worker, group in by_worker]


def _pieces(table: HeadTable, host: int, hosts: int) -> tuple[Piece, ...]:
    count = len(table.pieces) // hosts
    return table.pieces[host * count : (host + 1) * count]


def _share(worker: int, devices: int, numbered: list[tuple[int, Piece]]) -> HeadShare:
    pieces = [piece for _, piece in numbered]
    held = [piece.worker for piece in pieces]
    counts = {held.count(device) for device in held}
    if len(counts) > 1:
        raise ConfigError(
            f"a compute host has {len(pieces)} pieces of heads on {len(set(held))} devices of attention "
            f"worker {worker}, which cannot hold them evenly: take a number of compute devices, or of the "
            "workers' devices, that divides the other"
        )
    return HeadShare(
        worker=worker,
        first_device=held[0] - worker * devices,
        devices=len(set(held)),
        pieces=range(numbered[0][0], numbered[-1][0] + 1),
        kv_start=pieces[0].kv_start,
        num_heads=pieces[-1].q_stop - pieces[0].q_start,
        num_kv_heads=pieces[-1].kv_stop - pieces[0].kv_start,
    )
