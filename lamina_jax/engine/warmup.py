"""What is measured before an engine is ready: how long each prefill bucket takes. No jax here."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from lamina_jax.core import StepPlan
from lamina_jax.engine.prefill import plan_prefill
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler_config import SchedulerConfig


def measure_prefill(runner: ModelRunner, config: SchedulerConfig) -> tuple[float, ...]:
    """Seconds of one microbatch of each of `config.prefill_buckets`, of padding: nothing is kept."""
    seconds = []
    for bucket in config.prefill_buckets:
        padding = plan_prefill(0, (), bucket, config)
        # As one that reads the cache and ends its prompts: what takes longest.
        padding = replace(padding, cached=True, samples=np.ones(bucket[0], bool))
        started = time.perf_counter()
        runner.read(runner.dispatch(StepPlan(step=0, microbatches=(padding,))))
        seconds.append(time.perf_counter() - started)
    return tuple(seconds)
