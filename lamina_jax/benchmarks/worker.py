"""One column of a decode benchmark: an engine in a process of its own, timed on request.

`python -m lamina_jax.benchmarks.worker SETTINGS` (JSON: fields of `EngineConfig`, and `batch` and
`context`) builds the engine, fills its KV cache, prints "ready" and then, for every number that it
reads from stdin, runs so many decode steps and prints what they took as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.config import EngineConfig
from lamina_jax.core import MicrobatchPlan, StepPlan
from lamina_jax.engine.build import build_engine
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler_config import SchedulerConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    batch, context = settings.pop("batch"), settings.pop("context")
    engine = build_engine(EngineConfig(**settings))
    assert isinstance(engine.runner, CollocatedRunner | DisaggregatedRunner)
    engine.runner.fill_pages(_random_pages)
    plans = decode_plans(engine.scheduler.config, batch, context)
    run_steps(engine.runner, plans, 3)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_steps(engine.runner, plans, int(line))), flush=True)


def run_steps(runner: ModelRunner, microbatches: tuple[MicrobatchPlan, ...], steps: int) -> dict[str, float]:
    """Decode `steps` tokens per row with one step of run-ahead; tokens/s, s, and CPUs used."""
    in_flight: deque[Any] = deque()
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        in_flight.append(runner.dispatch(StepPlan(step=step, microbatches=microbatches)))
        if len(in_flight) > 1:
            runner.read(in_flight.popleft())
    while in_flight:
        runner.read(in_flight.popleft())
    seconds = time.perf_counter() - started
    rows = sum(len(plan.request_ids) for plan in microbatches)
    return {
        "tokens_per_second": rows * steps / seconds,
        "seconds": seconds,
        "cpus": (time.process_time() - cpu) / seconds,
    }


def decode_plans(config: SchedulerConfig, batch: int, context: int) -> tuple[MicrobatchPlan, ...]:
    """A decode step of `batch` requests with `context` cached tokens each, over all microbatches.

    The same step is repeated: its tokens are written at the same place, and are fed back.
    """
    n, page, width = config.microbatches, config.page_size, config.table_width
    rows = batch // n
    bucket = min(size for size in config.decode_buckets if size >= rows)
    pages = -(-(context + 1) // page)
    plans = []
    for microbatch in range(n):
        tables = np.zeros((bucket, width), np.int32)
        tables[:rows, :pages] = microbatch * rows * pages + np.arange(rows * pages).reshape(rows, pages)
        lengths = np.where(np.arange(bucket) < rows, context, 0).astype(np.int32)
        slots = tables[np.arange(bucket), lengths // page] * page + lengths % page
        plans.append(
            MicrobatchPlan(
                microbatch=microbatch,
                kind="decode",
                request_ids=tuple(f"{microbatch}.{row}" for row in range(rows)),
                tokens=np.zeros((bucket, 1), np.int32),
                feedback=np.arange(bucket, dtype=np.int32),
                positions=lengths[:, None],
                context_lens=lengths,
                block_tables=tables,
                page_index=np.tile(np.arange(width, dtype=np.int32), (bucket, 1)),
                slots=np.where(lengths > 0, slots, config.padding_slot).astype(np.int32)[:, None],
                logits_at=np.arange(bucket, dtype=np.int32),
                cached=True,
                samples=np.arange(bucket) < rows,
            )
        )
    return tuple(plans)


def _random_pages(pages: jax.Array) -> jax.Array:
    """Normal values in the pages' own storage: bfloat16 bits where they are uint16."""
    block = np.random.default_rng(0).normal(size=pages.shape[1:]).astype(np.float32)
    values = (
        block.astype(jnp.bfloat16).view(np.uint16) if pages.dtype == jnp.uint16 else block.astype(pages.dtype)
    )
    return jax.device_put(np.broadcast_to(values, pages.shape), pages.sharding)


if __name__ == "__main__":
    main()
