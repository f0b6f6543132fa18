"""The decode loop over two meshes (paper 4.2-4.3).

Slice k of a microbatch runs on the compute mesh and sends q (and k, v) to the memory mesh; while the
cached part is away, the compute mesh works on the other microbatch. The loop only queues work: it
waits for no result, and a step's sampled tokens stay on the device for the next.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import jax

from lamina_jax.core import MicrobatchPlan, Sampled, StepPlan
from lamina_jax.engine.compute import ComputeSide
from lamina_jax.engine.pipeline import dispatch_order
from lamina_jax.engine.programs import Arrays
from lamina_jax.engine.queue import Queue
from lamina_jax.engine.sampler import Chosen, sampled
from lamina_jax.engine.sampling import Logprobs
from lamina_jax.exchange.base import Exchange, StepExchange
from lamina_jax.ops import Part

MOST_QUEUED, FEWEST_QUEUED = 12, 3
"""Slices, of at most two programs each; see `lamina_jax.engine.queue`."""


@dataclass
class _InFlight:
    """A microbatch on its way through the slices."""

    plan: MicrobatchPlan
    step: Arrays
    exchange: StepExchange
    carried: Arrays = ()
    local: Part | None = None
    chosen: Chosen | None = None
    prompt: list[Logprobs] = field(default_factory=list)


class DisaggregatedRunner:
    """Runs step plans over a compute side and an exchange; see `ModelRunner`.

    Args:
        compute: the model's slices.
        exchange: the way to the memory mesh; the attribute may be replaced between steps, for instance
            by one that looks at what passes.
        overlap: send q before k and v are computed (paper 4.2.2).
    """

    def __init__(self, compute: ComputeSide, exchange: Exchange, *, overlap: bool) -> None:
        self.exchange = exchange
        self._compute, self._overlap = compute, overlap
        self._queue = Queue(MOST_QUEUED, FEWEST_QUEUED)
        self._last: dict[int, jax.Array] = {}
        self._unfinished: dict[int, _InFlight] = {}
        self._no_tokens = compute.no_tokens()
        self._steps, self._seconds = 0, 0.0

    def dispatch(self, plan: StepPlan) -> list[_InFlight]:
        """Queue a step but for its last slices: those wait for the next step, whose first slice joins
        them microbatch by microbatch, so that the memory mesh has work meanwhile."""
        started = time.perf_counter()
        order = [batch.microbatch for batch in plan.microbatches]
        batches: dict[int, _InFlight] = {}
        for batch in plan.microbatches:
            self._finish(batch.microbatch)
            batches[batch.microbatch] = self._begin(batch)
            self._run_slice(batches[batch.microbatch], 0)
        for microbatch in list(self._unfinished):
            self._finish(microbatch)
        self._run_layers(order, batches)
        self._unfinished = dict(batches)
        self._steps += 1
        self._seconds += time.perf_counter() - started
        return list(batches.values())

    def read(self, step: list[_InFlight]) -> list[Sampled]:
        for batch in step:
            if self._unfinished.get(batch.plan.microbatch) is batch:
                self._finish(batch.plan.microbatch)
        return [sampled(batch.plan, batch.chosen, batch.prompt) for batch in step]

    def stats(self) -> dict[str, Any]:
        steps, wire = max(self._steps, 1), self.exchange.wire
        return {
            "programs_per_step": (self._compute.programs_queued + self.exchange.programs_queued) / steps,
            "dispatch_microseconds_per_step": 1e6 * self._seconds / steps,
            "wire_bytes_per_step": wire.tensor_bytes / steps,
            "wire_messages_per_step": wire.messages / steps,
            "wire_metadata_bytes_per_step": wire.metadata_bytes / steps,
        }

    def forget(self) -> None:
        """Nothing is in flight any more: what was is not read."""
        self._unfinished.clear()
        self._last.clear()
        self._queue.clear()

    def _begin(self, plan: MicrobatchPlan) -> _InFlight:
        last = self._last.get(plan.microbatch, self._no_tokens)
        return _InFlight(plan, self._compute.begin(plan, last), self.exchange.begin(plan))

    def _finish(self, microbatch: int) -> None:
        """Queue the last slice and the sampler of a microbatch's step before, if that has not been done."""
        batch = self._unfinished.pop(microbatch, None)
        if batch is None or not (batch.plan.samples.any() or batch.plan.prompt_targets is not None):
            return
        compute, plan, last = self._compute, batch.plan, self._compute.num_slices - 1
        before = self._before(batch, last)
        if plan.samples.any():
            logits = compute.run(plan, last, "last", batch.step, **before)
            batch.chosen = compute.sample(plan, logits, batch.step)
            if plan.kind == "decode":
                self._last[microbatch] = batch.chosen.tokens
        if plan.prompt_targets is not None:
            batch.prompt = compute.prompt_logprobs(plan, batch.step, **before)

    def _run_layers(self, order: list[int], batches: dict[int, _InFlight]) -> None:
        """Queue all slices but the first and the last."""
        for index, microbatch, _ in dispatch_order(order, self._compute.num_slices - 2, replicas=1):
            self._run_slice(batches[microbatch], index + 1)

    def _before(self, batch: _InFlight, index: int) -> dict[str, Any]:
        """What slice `index` merges and goes on with."""
        if not index:
            return {}
        cached = batch.exchange.receive(index - 1) if batch.plan.cached else ()
        return {"carried": batch.carried, "local": batch.local, "cached": cached}

    def _run_slice(self, batch: _InFlight, index: int) -> None:
        """Queue one slice: merge what came back from the layer before, send what the next one needs."""
        plan, run, step = batch.plan, self._compute.run, batch.step
        before = self._before(batch, index)
        if batch.plan.cached and self._overlap:
            query = run(plan, index, "query", step, **before)
            batch.exchange.send_query(index, query.sent)
            out = run(plan, index, "rest", step, **before, early=query.early, q=query.q)
            batch.exchange.send_kv(index, out.sent)
        else:
            out = run(plan, index, "whole", step, **before)
            (batch.exchange.send_all if batch.plan.cached else batch.exchange.send_kv)(index, out.sent)
        batch.local, batch.carried = out.local, out.carried
        self._queue.add(out.local[1])
