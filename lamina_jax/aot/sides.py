"""The engine's own programs on described devices, put together as `lamina_jax.engine.build` does, and the
memory that they need there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.aot.step import Step, cut, described_weights
from lamina_jax.compilation import Compilation, Footprint, Job, largest
from lamina_jax.engine.budget import Needs, shares_of
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.disaggregated import MOST_QUEUED
from lamina_jax.engine.limits import Limits
from lamina_jax.engine.memory_side import CachePlan
from lamina_jax.engine.placement import bytes_per_device
from lamina_jax.engine.sampler import Sampler
from lamina_jax.models.shapes import SHAPES
from lamina_jax.pool.geometry import head_table
from lamina_jax.pool.partition import Partition
from lamina_jax.pool.shard import AttentionShard

PEERS = 4
"""Devices of the side that is not compiled: they say in how many pieces heads come and go."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Programs that run on a number of like devices.

    Attributes:
        jobs: what compiles each distinct program of a decode step once.
        footprint: of the largest of them, once the jobs are done.
        weights, page: bytes on each device, of a page in all layers.
        ahead: how many programs' results there are before the first is used.
        layer: of those programs, what runs for a layer in the middle of the model.
    """

    jobs: Iterator[Job]
    footprint: Callable[[], Footprint]
    weights: int = 0
    page: int = 0
    ahead: int = MOST_QUEUED
    layer: Callable[[], Sequence[Compilation]] = tuple

    def needs(self, devices: Sequence[jax.Device], limits: Limits) -> Needs:
        """Of each of its devices, once the jobs are done."""
        shares = shares_of(
            devices, self.footprint(), weights=self.weights, page=self.page, limits=limits, ahead=self.ahead
        )
        return shares[0][1]


def compute(step: Step, devices: Sequence[jax.Device]) -> Side:
    """The layers over all `devices`; `PEERS` others hold the cache."""
    geometry, mesh = step.geometry, _mesh(devices)
    table = head_table(geometry.num_heads, geometry.num_kv_heads, len(devices), PEERS)
    params = described_weights(step.model, mesh, table.copies)
    side = ComputeSide(
        cut(step.model, table.copies),
        params,
        mesh,
        table,
        partition=_partition(step),
        wire_dtype=geometry.wire_dtype,
        rows=step.limits.rows,
        sampler=_sampler(step, mesh),
    )
    middle = side.num_slices // 2
    return Side(
        jobs=_without_sampler(side.jobs(step.bucket, cached=True, overlap=True)),
        footprint=lambda: side.footprint,
        weights=bytes_per_device(jax.tree.leaves(params)),
        layer=lambda: [side.compilation(step.bucket, middle, form) for form in ("query", "rest")],
    )


def sampling(step: Step, devices: Sequence[jax.Device]) -> Side:
    """What chooses tokens, on all `devices` alike."""
    sampler = _sampler(step, _mesh(devices))
    jobs = sampler.jobs(step.bucket[0], SHAPES[step.model].vocab_size)
    return Side(jobs=jobs, footprint=lambda: largest(sampler.programs))


def memory(step: Step, devices: Sequence[jax.Device]) -> Side:
    """The cache over all `devices`, cut by KV head; `PEERS` others have the layers. All run the same."""
    geometry = step.geometry
    table = head_table(geometry.num_heads, geometry.num_kv_heads, PEERS, len(devices))
    plan = CachePlan(
        geometry=geometry,
        partition=_partition(step),
        table=table,
        mesh=_mesh(devices),
        limits=step.limits,
        sliced=cut(step.model),
    )
    shard = AttentionShard(
        geometry.share(len(devices)),
        devices[0],
        plan.windows,
        plan.kinds,
        pieces=table.per_worker,
        copies=table.copies,
    )
    return Side(
        jobs=shard.jobs(step.bucket, plan.pages_per_request, cached=True, overlap=True),
        footprint=lambda: shard.footprint,
        page=shard.geometry.bytes_per_page,
    )


def collocated(step: Step, devices: Sequence[jax.Device]) -> Side:
    """A whole step as one program over all `devices`: the layers, and attention under `shard_map`."""
    mesh = _mesh(devices)
    params = described_weights(step.model, mesh)
    runner = CollocatedRunner(
        cut(step.model),
        params,
        step.geometry,
        mesh,
        rows=step.limits.rows,
        pages_per_request=step.limits.pages_per_request,
        sampler=_sampler(step, mesh),
    )
    return Side(
        jobs=_without_sampler(runner.jobs(step.bucket, cached=True)),
        footprint=lambda: runner.footprint,
        weights=bytes_per_device(jax.tree.leaves(params)),
        page=step.geometry.share(len(devices)).bytes_per_page,
        ahead=2,
    )


SIDES: dict[str, Callable[[Step, Sequence[jax.Device]], Side]] = {
    "compute": compute,
    "sampler": sampling,
    "memory": memory,
    "collocated": collocated,
}


def _without_sampler(jobs: Iterator[Job]) -> Iterator[Job]:
    """Logits are whole on every device, so that its programs are the same wherever a vocabulary is the same:
    they are a side of their own."""
    return (job for job in jobs if not job[0].startswith("sampler"))


def _partition(step: Step) -> Partition:
    return Partition("heads", 1, step.geometry.num_pages, step.geometry.page_size)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("tensor",))


def _sampler(step: Step, mesh: Mesh) -> Sampler:
    return Sampler(NamedSharding(mesh, P()), step.limits.rows, step.limits.max_model_len)
