"""Balance of the KV cache: the largest share of a worker over the mean share, for each partition.

The scheduler deals pages as it does for an engine; only the tokens are made up. A fixed number of
requests is held at once: one that ends is followed by the next of the trace. Traces are generated,
prompt and output lengths lognormal and independent. By head no run is needed: every worker holds an
equal share of every page, and counts that do not divide the KV heads are refused.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any, get_args

import numpy as np

from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.table import format_table
from lamina_jax.core import Request, SamplingParams, StepPlan
from lamina_jax.engine.scheduler import Scheduler, SchedulerConfig
from lamina_jax.pool.partition import PartitionKind

TRACES = {"Azure-Conv": (1154.7, 211.1), "Azure-Code": (2047.8, 27.9), "Kimi-Conv": (12035.1, 342.6)}
"""Mean prompt and output tokens of the traces that the generated ones are named after."""

SIGMA = 1.0
KV_HEADS = 8
PAGE_SIZE = 64
MAX_MODEL_LEN = 131072
PREFILL_BUCKET = (8, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "32 requests, one, two and four workers", requests=32, workers=[1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="W")
    parser.add_argument("--requests", type=int, default=128, help="held at once")
    parser.add_argument("--seats", type=int, help="max_num_seqs of the engine (default: as many as requests)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts, `balance` being None where W is refused."""
    workers, requests = args.workers, args.requests
    seats = args.seats or requests
    if seats < requests:
        raise SystemExit(f"--seats {seats} does not hold --requests {requests}: raise it, or leave it out")
    print(f"largest KV share of a worker over the mean; {requests} requests held at once, {seats} seats;")
    print(f"lognormal lengths, sigma {SIGMA:g}; pages of {PAGE_SIZE} tokens, {KV_HEADS} KV heads\n")
    results = [
        {"trace": trace, "partition": kind, "workers": W, "balance": balance(trace, kind, W, requests, seats)}
        for trace in TRACES
        for kind in get_args(PartitionKind)
        for W in workers
    ]
    print(table(results, workers))
    return results


def table(results: list[dict[str, Any]], workers: list[int]) -> str:
    """A row for each trace and partition, a column for each W."""
    cells = ["-" if row["balance"] is None else f"{row['balance']:.2f}" for row in results]
    rows = []
    for place in range(0, len(results), len(workers)):
        trace, kind = results[place]["trace"], results[place]["partition"]
        name = f"{trace} ({TRACES[trace][0]:.0f} + {TRACES[trace][1]:.0f} tokens), {kind}"
        rows.append([name, *cells[place : place + len(workers)]])
    return format_table(["mean prompt + output, partition", *(f"W={W}" for W in workers)], rows)


def balance(trace: str, kind: PartitionKind, workers: int, requests: int, seats: int) -> float | None:
    """Largest over mean number of pages that a worker holds, as a mean over the steps of a steady state."""
    if kind == "heads":
        return None if KV_HEADS % workers else 1.0
    scheduler = Scheduler(_config(kind, workers, seats))
    per_worker = scheduler.config.num_pages
    ratios = []
    for ended in _serve(scheduler, _trace(*TRACES[trace]), requests):
        if ended > 2 * requests:
            held = [per_worker - free for free in scheduler.pages.free_by_worker]
            ratios.append(max(held) * workers / sum(held))
        if ended > 10 * requests:
            break
    return float(np.mean(ratios))


def _config(kind: PartitionKind, workers: int, seats: int) -> SchedulerConfig:
    """Pages for all seats at full length: seats alone bound what is admitted."""
    segments = workers if kind == "requests" else 1
    return SchedulerConfig(
        vocab_size=2,
        num_pages=-(-seats // workers) * (MAX_MODEL_LEN // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=seats,
        microbatches=1,
        decode_buckets=(segments * -(-seats // segments),),
        prefill_buckets=(PREFILL_BUCKET,),
        partition=kind,
        workers=workers,
    )


def _trace(prompt: float, output: float) -> Iterator[Request]:
    """Requests without end, the same ones every time."""
    random = np.random.default_rng(0)
    for number in count():
        lengths = _lognormal(random, prompt), _lognormal(random, output)
        yield Request(
            request_id=str(number),
            prompt_token_ids=(0,) * min(lengths[0], MAX_MODEL_LEN - 1),
            sampling=SamplingParams(max_tokens=lengths[1], temperature=0),
        )


def _lognormal(random: np.random.Generator, mean: float) -> int:
    """A length of at least one token."""
    return max(1, round(random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)))


def _serve(scheduler: Scheduler, trace: Iterator[Request], requests: int) -> Iterator[int]:
    """Run the scheduler with `requests` of the trace held at once; after each step, how many have ended."""
    for _ in range(requests):
        scheduler.add(next(trace))
    in_flight: deque[StepPlan] = deque()
    ended = 0
    while True:
        if plan := scheduler.schedule():
            in_flight.append(plan)
        if plan and len(in_flight) == 1:
            continue
        done = in_flight.popleft()
        tokens = [np.zeros(microbatch.bucket[0], np.int32) for microbatch in done.microbatches]
        for event in scheduler.update(done, tokens):
            if event.finish_reason:
                ended += 1
                scheduler.add(next(trace))
        yield ended
