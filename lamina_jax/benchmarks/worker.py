"""One column of a benchmark: an engine in a process of its own, timed on request.

`python -m lamina_jax.benchmarks.worker SETTINGS` (JSON: fields of `EngineConfig`, and `batch` and
`context` to decode, or `prompt` to prefill) builds the engine, fills its KV cache, prints "ready" and
then, for every line {"steps": n} that it reads from stdin, runs so many steps and prints what they took
as a line of JSON. Such a line may have another "context", and with it another "batch", as long as they fit.

The cache of attention workers in other processes is not filled: it holds zeros, which take as long to read.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.config import EngineConfig
from lamina_jax.core import MicrobatchPlan, Request, SamplingParams, StepPlan
from lamina_jax.engine.build import build_engine
from lamina_jax.engine.collocated import CollocatedRunner
from lamina_jax.engine.disaggregated import DisaggregatedRunner
from lamina_jax.engine.prefill import plan_prefill
from lamina_jax.engine.rows import DecodeRows, LiveRequest
from lamina_jax.engine.runner import ModelRunner
from lamina_jax.engine.scheduler_config import SchedulerConfig
from lamina_jax.exchange.local import LocalExchange


def main() -> None:
    settings = json.loads(sys.argv[1])
    batch, context = settings.pop("batch", 0), settings.pop("context", 0)
    prompt = settings.pop("prompt", 0)
    engine = build_engine(EngineConfig(**settings))
    assert isinstance(engine.runner, CollocatedRunner | DisaggregatedRunner)
    pages = engine.runner if isinstance(engine.runner, CollocatedRunner) else engine.runner.exchange
    if isinstance(pages, CollocatedRunner | LocalExchange):
        pages.fill_pages(_random_pages)
    config = engine.scheduler.config
    plans = prefill_plans(config, prompt) if prompt else [decode_plans(config, batch, context)]
    run_steps(engine.runner, plans, 3)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "context" in asked:
            plans = [decode_plans(config, asked.get("batch", batch), asked["context"])]
        taken: dict[str, Any] = {**run_steps(engine.runner, plans, asked["steps"])}
        if "timings" in (stats := engine.runner.stats()):
            taken["timings"] = stats["timings"]
        print(json.dumps(taken), flush=True)


Step = tuple[MicrobatchPlan, ...]


def run_steps(runner: ModelRunner, plans: Sequence[Step], steps: int) -> dict[str, float]:
    """Run `plans` in turn, `steps` in all, with one step of run-ahead; tokens/s, s, and CPUs used."""
    in_flight: deque[Any] = deque()
    tokens = 0
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        microbatches = plans[step % len(plans)]
        tokens += sum(len(plan.request_ids) * plan.bucket[1] for plan in microbatches)
        in_flight.append(runner.dispatch(StepPlan(step=step, microbatches=microbatches)))
        if len(in_flight) > 1:
            runner.read(in_flight.popleft())
    while in_flight:
        runner.read(in_flight.popleft())
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "steps": steps,
        "cpus": (time.process_time() - cpu) / seconds,
    }


def decode_plans(config: SchedulerConfig, batch: int, context: int) -> Step:
    """A decode step of `batch` requests with `context` cached tokens each, over all microbatches.

    The same step is repeated: its tokens are written at the same place, and are fed back.
    """
    sampling, pages = SamplingParams(temperature=0), count()
    plans = []
    for microbatch in range(config.microbatches):
        rows = DecodeRows(microbatch, config)
        for row in range(batch // config.microbatches):
            name, tokens = f"{microbatch}.{row}", (0,) * (context + 1)
            request = Request(request_id=name, prompt_token_ids=tokens, sampling=sampling)
            own = list(islice(pages, -(-len(tokens) // config.page_size)))
            rows.join(LiveRequest(request, max_tokens=1, pages=own))
        planned = rows.plan(step=0)
        assert planned is not None
        plan, _ = planned
        plans.append(replace(plan, feedback=np.arange(len(plan.feedback), dtype=np.int32)))
    return tuple(plans)


def prefill_plans(config: SchedulerConfig, length: int) -> list[Step]:
    """The chunks of one prompt of `length` tokens."""
    chunk = max(config.prefill_buckets, key=lambda bucket: bucket[1])
    pages = -(-length // config.page_size)
    request = Request(
        request_id="prompt", prompt_token_ids=(1,) * length, sampling=SamplingParams(temperature=0)
    )
    live = LiveRequest(request, max_tokens=1, pages=list(range(pages)))
    plans: list[Step] = []
    while live.prefilled < length:
        plans.append((plan_prefill(len(plans), [live], chunk, config),))
    return plans


_HELD_AS_BITS = {"uint16": jnp.bfloat16, "uint8": jnp.float8_e4m3fn}


def _random_pages(pages: jax.Array) -> jax.Array:
    """Normal values in the pages' own storage, be it that of the bits of floats. So are the scales of
    quantised pages: what there is to compute stays finite."""
    block = np.random.default_rng(0).normal(size=pages.shape[1:]).astype(np.float32)
    values = block.astype(_HELD_AS_BITS.get(pages.dtype.name, pages.dtype)).view(pages.dtype)
    return jax.device_put(np.broadcast_to(values, pages.shape), pages.sharding)


if __name__ == "__main__":
    main()
