"""The engine's own programs on described devices, put together as `lamina_jax.engine.build` does, and the
memory that they need there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.aot.step import Step, cut, described_weights
from lamina_jax.compilation import Compilation, Job, largest
from lamina_jax.engine.budget import Needs, shares_of
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.disaggregated import MOST_QUEUED
from lamina_jax.engine.memory_side import CachePlan
from lamina_jax.engine.placement import bytes_per_device
from lamina_jax.engine.sampler import Sampler
from lamina_jax.models.shapes import SHAPES
from lamina_jax.pool.geometry import head_table
from lamina_jax.pool.partition import Partition
from lamina_jax.pool.shard import AttentionShard

PEERS = 4
"""Devices of the side that is not compiled: they say in how many pieces heads come and go."""

SAMPLER = "sampler"
"""What the names of the sampler's programs begin with. Logits are whole on every device, so that they are the
same wherever a vocabulary is the same: a side of their own."""


class Side(Protocol):
    """Programs that run on a number of like devices."""

    def jobs(self) -> Iterator[Job]:
        """What compiles each distinct program of a decode step once."""
        ...

    def needs(self) -> Needs:
        """Of each device, once the jobs are done."""
        ...

    def layer(self) -> Sequence[Compilation]:
        """Of those programs, what runs for a layer in the middle of the model."""
        ...


class Compute:
    """The layers over all `devices`; `PEERS` others hold the cache."""

    def __init__(self, step: Step, devices: Sequence[jax.Device]) -> None:
        geometry, self._step, self._devices = step.geometry, step, devices
        mesh = _mesh(devices)
        table = head_table(geometry.num_heads, geometry.num_kv_heads, len(devices), PEERS)
        params = described_weights(step.model, mesh, table.copies)
        self._weights = bytes_per_device(jax.tree.leaves(params))
        self._side = ComputeSide(
            cut(step.model, table.copies),
            params,
            mesh,
            table,
            partition=Partition("heads", 1, geometry.num_pages, geometry.page_size),
            wire_dtype=geometry.wire_dtype,
            rows=step.limits.rows,
            sampler=_sampler(step, mesh),
        )

    def jobs(self) -> Iterator[Job]:
        jobs = self._side.jobs(self._step.bucket, cached=True, overlap=True)
        return (job for job in jobs if not job[0].startswith(SAMPLER))

    def needs(self) -> Needs:
        limits, footprint = self._step.limits, self._side.footprint
        shares = shares_of(self._devices, footprint, weights=self._weights, limits=limits, ahead=MOST_QUEUED)
        return shares[0][1]

    def layer(self) -> Sequence[Compilation]:
        middle = self._side.num_slices // 2
        return [self._side.compilation(self._step.bucket, middle, form) for form in ("query", "rest")]


class Sampling:
    """What chooses tokens, on all `devices` alike."""

    def __init__(self, step: Step, devices: Sequence[jax.Device]) -> None:
        self._step, self._devices = step, devices
        self._sampler = _sampler(step, _mesh(devices))

    def jobs(self) -> Iterator[Job]:
        return self._sampler.jobs(self._step.bucket[0], SHAPES[self._step.model].vocab_size)

    def needs(self) -> Needs:
        footprint, limits = largest(self._sampler.programs), self._step.limits
        return shares_of(self._devices, footprint, limits=limits, ahead=MOST_QUEUED)[0][1]

    def layer(self) -> Sequence[Compilation]:
        return ()


class Memory:
    """The cache over all `devices`, cut by KV head; `PEERS` others have the layers. All run the same."""

    def __init__(self, step: Step, devices: Sequence[jax.Device]) -> None:
        geometry, self._step, self._devices = step.geometry, step, devices
        table = head_table(geometry.num_heads, geometry.num_kv_heads, PEERS, len(devices))
        plan = CachePlan(
            geometry=geometry,
            partition=Partition("heads", 1, geometry.num_pages, geometry.page_size),
            table=table,
            mesh=_mesh(devices),
            limits=step.limits,
            sliced=cut(step.model),
        )
        self._width, share = plan.pages_per_request, geometry.share(len(devices))
        self._shard = AttentionShard(
            share, devices[0], plan.windows, plan.kinds, pieces=table.per_worker, copies=table.copies
        )

    def jobs(self) -> Iterator[Job]:
        return self._shard.jobs(self._step.bucket, self._width, cached=True, overlap=True)

    def needs(self) -> Needs:
        page, limits = self._shard.geometry.bytes_per_page, self._step.limits
        shares = shares_of(self._devices, self._shard.footprint, page=page, limits=limits, ahead=MOST_QUEUED)
        return shares[0][1]

    def layer(self) -> Sequence[Compilation]:
        return ()


class Collocated:
    """A whole step as one program over all `devices`: the layers, and attention under `shard_map`."""

    def __init__(self, step: Step, devices: Sequence[jax.Device]) -> None:
        self._step, self._devices = step, devices
        mesh = _mesh(devices)
        params = described_weights(step.model, mesh)
        self._weights = bytes_per_device(jax.tree.leaves(params))
        self._runner = CollocatedRunner(
            cut(step.model),
            params,
            step.geometry,
            mesh,
            rows=step.limits.rows,
            pages_per_request=step.limits.pages_per_request,
            sampler=_sampler(step, mesh),
        )

    def jobs(self) -> Iterator[Job]:
        jobs = self._runner.jobs(self._step.bucket, cached=True)
        return (job for job in jobs if not job[0].startswith(SAMPLER))

    def needs(self) -> Needs:
        limits, page = self._step.limits, self._step.geometry.share(len(self._devices)).bytes_per_page
        shares = shares_of(
            self._devices, self._runner.footprint, weights=self._weights, page=page, limits=limits, ahead=2
        )
        return shares[0][1]

    def layer(self) -> Sequence[Compilation]:
        return ()


SIDES: dict[str, Callable[[Step, Sequence[jax.Device]], Side]] = {
    "compute": Compute,
    "sampler": Sampling,
    "memory": Memory,
    "collocated": Collocated,
}


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("tensor",))


def _sampler(step: Step, mesh: Mesh) -> Sampler:
    return Sampler(NamedSharding(mesh, P()), step.limits.rows, step.limits.max_model_len)
