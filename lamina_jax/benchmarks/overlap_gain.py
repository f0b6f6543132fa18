"""What sending q before k and v are computed gains (paper 4.2.2), with one and with eight query heads per KV
head, one microbatch; as `lamina_jax.benchmarks.overlap` has it otherwise.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from lamina_jax.benchmarks.checkpoints import COMPUTE_BOUND
from lamina_jax.benchmarks.columns import speeds, time_in_turn
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.benchmarks.two_cores import Bench, balanced_context

PAPER = {1: "up to 13.2 %", 8: "up to 3.5 %"}
"""By G: the gain on LLaMA-65B and on LLaMA3-70B, on GPUs."""

KV_PER_ROW = 2048
"""KV heads times the longest context: the same bytes of cache for each G."""


def run(batch: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    results = [_measure(G, batch, rounds, seconds) for G in PAPER]
    print(f"\nq sent before k and v are computed: batch {batch}, one microbatch; median of {rounds} rounds")
    columns = [
        ("", "G = {G}"),
        ("context", "{context}"),
        ("off, tokens/s", "{off:.0f}"),
        ("on, tokens/s", "{on:.0f}"),
        ("gain", "{gain:.1%}"),
        ("quartiles", "{quartiles[0]:.1%} .. {quartiles[1]:.1%}"),
        ("paper", "{paper}"),
    ]
    print(format_rows(columns, [{**one, "paper": PAPER[one["G"]]} for one in results]), flush=True)
    return results


def _measure(G: int, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """On beside off, at the context at which attention takes as long as the layers."""
    shape = replace(COMPUTE_BOUND, num_kv_heads=COMPUTE_BOUND.num_heads // G)
    longest = KV_PER_ROW // shape.num_kv_heads
    with ExitStack() as ends:
        bench = Bench(ends, shape, batch=batch, longest=longest)
        for overlap in ("off", "on"):
            bench.split(f"G = {G}, overlap {overlap}", {"microbatches": 1, "overlap": overlap})
        context = balanced_context(bench.columns[0], longest)
        timings = time_in_turn(bench.columns, rounds, seconds, context=context)
    off, on = map(speeds, timings.values())
    gains = [b / a - 1 for a, b in zip(off, on, strict=True)]
    lower, gain, upper = statistics.quantiles(gains, n=4)
    medians = {"off": statistics.median(off), "on": statistics.median(on)}
    return {"G": G, "context": context, **medians, "gain": gain, "quartiles": (lower, upper)}
