"""The two placements as an engine is put together from them: compile what tells how much memory is needed,
say it, then make the pages and the runner. It knows nothing of checkpoints, configurations or budgets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import jax

from lamina_jax.compilation import Job
from lamina_jax.engine.budget import Share, shares_of
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.disaggregated import MOST_QUEUED
from lamina_jax.engine.limits import Limits
from lamina_jax.engine.memory_side import CachePlan, MemorySide
from lamina_jax.engine.runner import ModelRunner

log = logging.getLogger(__name__)


class Assembly(Protocol):
    """A placement of a model, with as many pages as are wanted until `open` says otherwise."""

    def probe(self) -> list[Job]:
        """What can be compiled before the pages are counted: of those that read pages, the largest."""
        ...

    def shares(self, weights: int) -> list[Share]:
        """What is needed where, once the jobs of `probe` are done; `weights`: bytes on each device."""
        ...

    def open(self, num_pages: int) -> tuple[ModelRunner, list[Job]]:
        """Make the pages (of each part); the runner works once the jobs are done."""
        ...

    def page_devices(self) -> list[str]:
        """Where pages are."""
        ...


class Split:
    """Slices on the compute mesh, attention on the memory side."""

    def __init__(self, compute: ComputeSide, memory: MemorySide, plan: CachePlan) -> None:
        self._compute, self._memory, self._plan = compute, memory, plan
        for part in range(plan.partition.workers):
            for piece in plan.table.pieces:
                device = plan.mesh.devices.flat[piece.shard]
                holder = memory.names[part * plan.table.workers + piece.worker]
                log.info("%s and %s: %s", device, holder, piece)

    def probe(self) -> list[Job]:
        limits = self._plan.limits
        jobs = [
            job
            for bucket, cached in limits.buckets()
            for job in self._compute.jobs(bucket, cached=cached, overlap=limits.overlap)
        ]
        return jobs + self._memory.probe(self._plan)

    def shares(self, weights: int) -> list[Share]:
        devices, needs = self._plan.mesh.local_devices, self._compute.footprint
        shares = shares_of(devices, needs, weights=weights, limits=self._plan.limits, ahead=MOST_QUEUED)
        return shares + self._memory.shares(self._plan)

    def open(self, num_pages: int) -> tuple[ModelRunner, list[Job]]:
        exchange, jobs = self._memory.open(self._plan.with_pages(num_pages))
        return self._memory.runner(self._compute, exchange, overlap=self._plan.limits.overlap), jobs

    def page_devices(self) -> list[str]:
        return self._memory.page_devices()


class Collocated:
    """One program per step, on the compute mesh.

    Args:
        page_bytes: of one page, on each device.
    """

    def __init__(
        self, runner: CollocatedRunner, devices: Sequence[jax.Device], limits: Limits, page_bytes: int
    ) -> None:
        self._runner, self._devices, self._limits, self._page_bytes = runner, devices, limits, page_bytes

    def probe(self) -> list[Job]:
        with_cache = [bucket for bucket, cached in self._limits.buckets() if cached]
        return list(self._runner.jobs(max(with_cache, key=math.prod), cached=True))

    def shares(self, weights: int) -> list[Share]:
        needs, page, limits = self._runner.footprint, self._page_bytes, self._limits
        # Each microbatch runs one step ahead, one of prefill beside them.
        ahead = limits.microbatches + 1
        return shares_of(self._devices, needs, weights=weights, page=page, limits=limits, ahead=ahead)

    def open(self, num_pages: int) -> tuple[ModelRunner, list[Job]]:
        self._runner.hold(num_pages)
        buckets = self._limits.buckets()
        return self._runner, [
            job for bucket, cached in buckets for job in self._runner.jobs(bucket, cached=cached)
        ]

    def page_devices(self) -> list[str]:
        return sorted({str(device) for device in self._devices})
