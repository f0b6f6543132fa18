"""The memory side of a disaggregated engine: what there is of it, and the exchange with it.

Here it is a second mesh of this process; `lamina_jax.engine.remote_memory` has workers elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from lamina_jax.compilation import Job
from lamina_jax.devices import Devices
from lamina_jax.engine.buckets import Bucket
from lamina_jax.engine.budget import Room, Share, rooms_of, shares_of
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.disaggregated import MOST_QUEUED, DisaggregatedRunner
from lamina_jax.engine.limits import Limits
from lamina_jax.engine.programs import windows_of
from lamina_jax.engine.runner import Elsewhere
from lamina_jax.exchange.base import Exchange
from lamina_jax.exchange.local import LocalExchange
from lamina_jax.memory import default_fraction
from lamina_jax.pool.geometry import CacheGeometry, HeadTable
from lamina_jax.pool.partition import Partition
from lamina_jax.pool.shard import AttentionKind, AttentionShard, CachedPart
from lamina_jax.slicing import Sliced


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What the memory side is to hold, and for whom.

    Attributes:
        geometry: of the whole cache, with the pages of each part.
        partition: how the parts share it; `table`: how the devices of a part share its heads with those
            of `mesh`, the compute mesh.
        limits: lengths and buckets.
        sliced: says what each attention is.
    """

    geometry: CacheGeometry
    partition: Partition
    table: HeadTable
    mesh: Mesh
    limits: Limits
    sliced: Sliced

    def with_pages(self, num_pages: int) -> CachePlan:
        """The same of so many pages of each part."""
        return replace(
            self,
            geometry=replace(self.geometry, num_pages=num_pages),
            partition=replace(self.partition, num_pages=num_pages),
        )

    @property
    def windows(self) -> list[int]:
        return windows_of(self.sliced)

    @property
    def kinds(self) -> list[AttentionKind]:
        return [AttentionKind(op.scale, op.softcap) for op in self.sliced.attentions]

    @property
    def pages_per_request(self) -> int:
        """The width of a part's block tables."""
        return self.partition.table_width(self.limits.pages_per_request)

    def buckets(self) -> Iterator[tuple[Bucket, bool]]:
        """(B, Q) as each part is sent them, and whether with a cached part."""
        for (rows, queries), cached in self.limits.buckets():
            cut = self.partition.kind == "requests" and queries == 1
            yield (rows // self.partition.workers if cut else rows, queries), cached


@runtime_checkable
class MemorySide(Protocol):
    """Where the KV cache is.

    Attributes:
        workers: W, among which `EngineConfig.partition` divides the cache.
        devices: of each worker.
        names: of all devices, for the log.
        share_silicon: whether work here takes time from the compute mesh.
        rooms: the memory that there was before anything was loaded.
        elsewhere: prefills prompts on other hosts, once it is open; None: they are prefilled here.
    """

    workers: int
    devices: int
    names: Sequence[str]
    share_silicon: bool
    rooms: dict[str, Room]
    elsewhere: Elsewhere | None

    def probe(self, plan: CachePlan) -> list[Job]:
        """What compiles the program that needs the most memory, so that `shares` can tell."""
        ...

    def shares(self, plan: CachePlan) -> list[Share]:
        """What is needed in `rooms`, once the jobs of `probe` are done."""
        ...

    def open(self, plan: CachePlan) -> tuple[Exchange, list[Job]]:
        """The exchange, which works once the jobs are done. The plan may have fewer pages than before."""
        ...

    def runner(self, compute: ComputeSide, exchange: Exchange, *, overlap: bool) -> DisaggregatedRunner:
        """What runs steps over the exchange."""
        ...

    def page_devices(self) -> list[str]:
        """Where pages are."""
        ...


class LocalMemory:
    """Devices of this process, each of them a worker.

    Args:
        fraction: `EngineConfig.memory_fraction`.
        cached_part: what computes attention; None: the platform's kernel.
        native: that of a CPU is the native one.
    """

    devices = 1
    elsewhere: Elsewhere | None = None

    def __init__(
        self, devices: Devices, fraction: float | None, cached_part: CachedPart | None, *, native: bool
    ) -> None:
        self._devices, self._cached_part, self._native = devices.memory, cached_part, native
        self._shards: list[AttentionShard] = []
        self.workers = len(devices.memory)
        self.names: Sequence[str] = [str(device) for device in devices.memory]
        self.share_silicon = devices.share_silicon
        self.rooms = rooms_of(devices.memory, fraction or default_fraction(devices.memory))

    def probe(self, plan: CachePlan) -> list[Job]:
        self._make_shards(plan)
        # What a program needs does not grow with the pool that it reads, but with B x Q.
        with_cache = [bucket for bucket, cached in plan.buckets() if cached]
        return self._jobs(plan, max(with_cache, key=math.prod), cached=True)

    def shares(self, plan: CachePlan) -> list[Share]:
        shard = self._shards[0]
        return shares_of(
            self._devices,
            shard.footprint,
            page=shard.geometry.bytes_per_page,
            limits=plan.limits,
            ahead=MOST_QUEUED,
        )

    def open(self, plan: CachePlan) -> tuple[Exchange, list[Job]]:
        if plan.geometry.num_pages != self._shards[0].geometry.num_pages:
            self._make_shards(plan)
        for shard in self._shards:
            shard.hold()
        jobs = [job for bucket, cached in plan.buckets() for job in self._jobs(plan, bucket, cached=cached)]
        return LocalExchange(self._shards, plan.table, plan.mesh, plan.partition), jobs

    def runner(self, compute: ComputeSide, exchange: Exchange, *, overlap: bool) -> DisaggregatedRunner:
        return DisaggregatedRunner(compute, exchange, overlap=overlap)

    def page_devices(self) -> list[str]:
        arrays = jax.tree.leaves([shard.pages for shard in self._shards])
        return sorted({str(device) for array in arrays for device in array.devices()})

    def _make_shards(self, plan: CachePlan) -> None:
        share = plan.geometry.share(plan.table.workers)
        self._shards = [
            AttentionShard(
                share,
                device,
                plan.windows,
                plan.kinds,
                pieces=plan.table.per_worker,
                copies=plan.table.copies,
                cached_part=self._cached_part,
                native=self._native,
            )
            for device in self._devices
        ]

    def _jobs(self, plan: CachePlan, bucket: Bucket, *, cached: bool) -> list[Job]:
        overlap, width = plan.limits.overlap, plan.pages_per_request
        return [
            job for shard in self._shards for job in shard.jobs(bucket, width, cached=cached, overlap=overlap)
        ]
