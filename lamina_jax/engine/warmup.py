"""What is measured before an engine is ready: how long each prefill bucket takes. No jax here."""

from __future__ import annotations

import time

import numpy as np

from lamina_jax.core import MicrobatchPlan, StepPlan
from lamina_jax.engine.rows import page_places
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler_config import SchedulerConfig


def measure_prefill(runner: ModelRunner, config: SchedulerConfig) -> tuple[float, ...]:
    """Seconds of one microbatch of each of `config.prefill_buckets`, of padding: nothing is kept."""
    seconds = []
    for bucket in config.prefill_buckets:
        plan = StepPlan(step=0, microbatches=(_padding(bucket, config),))
        started = time.perf_counter()
        runner.read(runner.dispatch(plan))
        seconds.append(time.perf_counter() - started)
    return tuple(seconds)


def _padding(bucket: tuple[int, int], config: SchedulerConfig) -> MicrobatchPlan:
    rows, _ = bucket
    zeros = np.zeros(bucket, np.int32)
    return MicrobatchPlan(
        microbatch=config.microbatches,
        kind="prefill",
        request_ids=(),
        tokens=zeros,
        feedback=np.full(rows, -1, np.int32),
        positions=zeros,
        context_lens=zeros[:, 0],
        block_tables=np.zeros((rows, config.table_width), np.int32),
        page_index=page_places(rows, config),
        slots=np.full(bucket, config.padding_slot, np.int32),
        logits_at=zeros[:, 0],
        cached=True,
        samples=np.ones(rows, bool),
        worker=0 if config.partition == "requests" else None,
    )
