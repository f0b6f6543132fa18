"""Decode speed against bandwidth: a worker behind a proxy that throttles, beside what the formula asks for.

The paper's minimum bandwidth is (2 + 2/G) e d B L / (alpha (MTIME + ATIME)): with that much, sending takes
alpha of what a step takes otherwise, if nothing hides it. MTIME and ATIME are what the layers and attention
take in a step that is not throttled. Both directions are throttled, each for itself. Every bandwidth is an
engine and a worker of its own on two cores, and all are timed in turn (`lamina_jax.benchmarks.two_cores`).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.checkpoints import COMPUTE_BOUND
from lamina_jax.benchmarks.columns import time_in_turn
from lamina_jax.benchmarks.processes import Listening
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.table import format_rows, optional
from lamina_jax.benchmarks.tcp_proxy import Proxy
from lamina_jax.benchmarks.two_cores import Bench, whole_pages

ALPHA = 0.2
FACTORS = 0.25, 0.5, 1.0, 2.0, 4.0
"""Bandwidths to be timed, as multiples of the formula's."""

WAYS = {
    "one microbatch": {"microbatches": 1, "overlap": "off"},
    "two microbatches, q first": {"microbatches": 2, "overlap": "on"},
}
UNTHROTTLED = math.inf
PROXY_HOST = "127.0.0.2"  # where it can have the ports that the worker has on 127.0.0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "three bandwidths in three rounds", factors=(0.5, 1.0, 2.0), rounds=3)
    parser.set_defaults(factors=FACTORS)
    parser.add_argument("--batch", type=int, default=128, help="requests decoded at once")
    parser.add_argument("--context", type=int, default=384, help="cached tokens of each")
    parser.add_argument("--rounds", type=int, default=9, help="timings per bandwidth")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timing, about")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.svg, .png); needs matplotlib")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table for each way to run; the results as plain dicts."""
    plot = optional("bandwidth_plot", "--plot", "plots").draw if args.plot else None
    rounds, factors = args.rounds, args.factors
    with ExitStack() as ends:
        longest = whole_pages(args.context)
        bench = Bench(ends, COMPUTE_BOUND, batch=args.batch, longest=longest)
        for way, settings in WAYS.items():
            bench.split(way, settings, partial(_through, rate=UNTHROTTLED, ends=ends))
        free = time_in_turn(bench.columns, rounds, args.seconds, context=args.context)
        demand = formula(args.batch, _layers_and_attention(free[next(iter(WAYS))]))
        rates = [UNTHROTTLED, *(factor * demand for factor in sorted(factors, reverse=True))]
        for rate in rates[1:]:
            for way, settings in WAYS.items():
                name = f"{way}, {rate / 1e6:.0f} MB/s"
                bench.split(name, settings, partial(_through, rate=rate, ends=ends))
        timings = list(time_in_turn(bench.columns, rounds, args.seconds, context=args.context).values())
    print(f"batch {args.batch}, context {args.context}, float32; median of {rounds} rounds;")
    print(f"load average after it: {os.getloadavg()[0]:.1f} (2 are this benchmark's own)")
    demand = formula(args.batch, _layers_and_attention(timings[0]))
    results = []
    for i, way in enumerate(WAYS):
        steps = [[one["seconds"] / one["steps"] for one in taken] for taken in timings[i :: len(WAYS)]]
        results.append(_curve(way, rates, steps, args.batch, demand))
    _print(results, demand)
    if plot:
        plot(results, demand, args)
    return results


def formula(batch: int, seconds: float) -> float:
    """Bytes per second at which sending takes ALPHA of `seconds`: MTIME + ATIME."""
    shape = COMPUTE_BOUND
    G, d = shape.num_heads // shape.num_kv_heads, shape.num_heads * shape.head_dim
    return (2 + 2 / G) * 4 * d * batch * shape.num_layers / (ALPHA * seconds)


def _layers_and_attention(taken: list[dict[str, Any]]) -> float:
    return statistics.median(
        1e-6 * (one["timings"]["compute"] + one["timings"]["attention"]) for one in taken
    )


def _through(worker: Listening, *, rate: float, ends: ExitStack) -> str:
    """The worker's address behind two proxies, of which the one for data is throttled."""
    control = Proxy(f"{PROXY_HOST}:0", f"127.0.0.1:{worker.port}")
    port = worker.data_port
    data = Proxy(f"{PROXY_HOST}:{port}", f"127.0.0.1:{port}", bytes_per_second=rate)
    for proxy in (control, data):
        ends.callback(proxy.close)
    data.start()
    return "{}:{}".format(*control.start())


def _curve(
    way: str, rates: list[float], steps: list[list[float]], batch: int, demand: float
) -> dict[str, Any]:
    """What a step takes at each rate, as a median and as a multiple of the unthrottled one's."""
    points = [
        {
            "bytes_per_second": None if rate == UNTHROTTLED else rate,
            "tokens_per_second": batch / statistics.median(seconds),
            "slowdown": statistics.median(a / b for a, b in zip(seconds, steps[0], strict=True)),
        }
        for rate, seconds in zip(rates, steps, strict=True)
    ]
    return {"way": way, "points": points, "measured": bandwidth_at(1 + ALPHA, points), "formula": demand}


def bandwidth_at(slowdown: float, points: list[dict[str, Any]]) -> float | None:
    """The bandwidth at which a step takes `slowdown` times as long as unthrottled, between two of those
    measured; None where none of them is so slow. What a step takes grows with the time of a byte."""
    known = [
        (1 / p["bytes_per_second"] if p["bytes_per_second"] else 0.0, p["slowdown"])
        for p in points  # from the fastest to the slowest
    ]
    for (fast, below), (slow, above) in pairwise(known):
        if below <= slowdown < above:
            return 1 / (fast + (slow - fast) * (slowdown - below) / (above - below))
    return None


def _print(results: list[dict[str, Any]], demand: float) -> None:
    for result in results:
        print()
        columns = [
            (result["way"], "{rate}"),
            ("tokens/s", "{tokens_per_second:.0f}"),
            ("step, of unthrottled", "{slowdown:.2f}"),
        ]
        rates = [point["bytes_per_second"] for point in result["points"]]
        names = [f"{rate / 1e6:.0f} MB/s" if rate else "unthrottled" for rate in rates]
        rows = [{"rate": name, **point} for name, point in zip(names, result["points"], strict=True)]
        print(format_rows(columns, rows))
        found = f"{result['measured'] / 1e6:.0f} MB/s" if result["measured"] else "none that was timed"
        print(
            f"a step takes {1 + ALPHA:g} times as long at {found}; the formula says {demand / 1e6:.0f} MB/s"
        )
