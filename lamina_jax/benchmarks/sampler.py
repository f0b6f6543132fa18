"""The sampler's time as a share of a decode step, setting by setting.

Steps and samplers are timed in turn in one process, so that a busy neighbour meets all of them alike; a
figure is the median over the rounds. The sampler's time begins with the arrays that the host makes and
ends with the tokens on the device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from lamina_jax.benchmarks.checkpoints import random_checkpoint
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import in_turn
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.benchmarks.worker import decode_plans, run_steps
from lamina_jax.compilation import compile_all
from lamina_jax.config import EngineConfig
from lamina_jax.core import MicrobatchPlan, Request, SamplingParams
from lamina_jax.engine.build import build_engine
from lamina_jax.engine.sampler import Sampler
from lamina_jax.engine.sampling_rows import SampledRow, sampling_rows
from lamina_jax.models.shapes import QWEN3_0_6B

EVERYTHING: dict[str, Any] = {
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 1.0},
    "logprobs": 20,
}

FLAT, PEAKED = 1.0, 6.0
"""Standard deviations of normal logits: top-p 0.9 keeps three fifths of the vocabulary, or tens of tokens."""

SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "greedy": (FLAT, {"temperature": 0}),
    "temperature": (FLAT, {}),
    "top-k 50": (FLAT, {"top_k": 50}),
    "top-p 0.9, peaked logits": (PEAKED, {"top_p": 0.9}),
    "top-p 0.9, flat logits": (FLAT, {"top_p": 0.9}),
    "all, with penalties and logprobs": (FLAT, EVERYTHING),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "five rounds", rounds=5)
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--context", type=int, default=128, help="cached tokens of each")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each")
    parser.add_argument("--model", help="a folder; default: a random Qwen3-0.6B")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as scratch:
        folder = args.model or str(random_checkpoint(QWEN3_0_6B, Path(scratch)))
        timed = _timed(folder, args.batch, args.context)
    medians = {name: statistics.median(times) for name, times in in_turn(timed, args.rounds).items()}
    step = medians["decode step"]
    where = f"batch {args.batch}, context {args.context}"
    print(f"\na decode step at {where}: {1e3 * step:.0f} ms; median of {args.rounds}")
    results = [
        {"setting": name, "milliseconds": 1e3 * median, "share": median / step}
        for name, median in medians.items()
    ]
    columns = [("sampler", "{setting}"), ("ms", "{milliseconds:.1f}"), ("of a step", "{share:.1%}")]
    print(format_rows(columns, results[1:]))
    return results


def _timed(folder: str, batch: int, context: int) -> dict[str, Callable[[], float]]:
    """What is timed, warm: each a call that returns the seconds it took."""
    length = context + 64
    engine = build_engine(
        EngineConfig(
            model=folder,
            placement="collocated",
            compute_devices="cpu:0",
            max_num_seqs=batch,
            max_model_len=length,
            max_prefill_tokens=64,
        )
    )
    (plan,) = plans = decode_plans(engine.scheduler.config, batch, context)
    rows, vocab = plan.bucket[0], engine.vocab_size
    place = SingleDeviceSharding(jax.devices("cpu")[0])
    sampler = Sampler(place, rows, length)
    compile_all(sampler.jobs(rows, vocab), lambda done, total: None)
    noise = np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32)
    logits = {spread: jax.device_put(noise * np.float32(spread), place) for spread in (FLAT, PEAKED)}
    timed: dict[str, Callable[[], float]] = {
        "decode step": lambda: run_steps(engine.runner, [plans], 3)["seconds"] / 3
    }
    for name, (spread, params) in SETTINGS.items():
        timed[name] = _sampling(sampler, plan, logits[spread], SamplingParams(**params), context)
    for once in timed.values():
        once()
    return timed


def _sampling(
    sampler: Sampler, plan: MicrobatchPlan, logits: jax.Array, params: SamplingParams, context: int
) -> Callable[[], float]:
    """One call of the sampler for rows that all ask for the same."""
    rows, vocab = logits.shape
    fed = jax.device_put(np.zeros(rows, np.int32), logits.sharding)
    requests = [
        Request(request_id=str(row), prompt_token_ids=tuple(range(context)), sampling=params, seed=row)
        for row in range(rows)
    ]
    index = 0

    def once() -> float:
        nonlocal index
        started = time.perf_counter()
        sampled = [SampledRow(request, index) for request in requests]
        arrays = sampling_rows(sampled, rows, vocab_size=vocab, history=context + 64)
        jax.block_until_ready(sampler(replace(plan, sampling=arrays), logits, fed))
        index += 1
        return time.perf_counter() - started

    return once
