"""What HTTP costs: the same requests through a server, and by the same engine with nothing around it.

Both are processes of their own, with the same settings, asked in turn. The engine's gaps are those between
the steps that yield a request's tokens, the server's those between events at its client. Client, server and
engine share the machine's cores, so each one's CPU time is told, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lamina_jax.benchmarks.columns import Column, started
from lamina_jax.benchmarks.latencies import Record, spread, summary
from lamina_jax.benchmarks.processes import ServerProcess, running
from lamina_jax.benchmarks.rounds import in_turn
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.benchmarks.workload import Planned, made_up, with_prompts

STREAMS = (1, 64, 500)
SEATS = 64
"""Requests decoded at once; more of them wait in the queue."""

GOAL_STREAMS, GOAL = 64, 2.0
"""p99 of the gaps at so many streams: at most so many times that of the engine alone."""

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 8

Figures = dict[str, Any]

TABLE = [
    ("streams", "{streams}"),
    ("", "{way}"),
    ("tokens/s", "{tokens_per_second:.0f}"),
    ("gap p50, ms", "{p50_ms:.2f}"),
    ("p99", "{p99_ms:.2f}"),
    ("of alone", "{p99_ratio:.2f}"),
    ("steady p99", "{steady_p99_ms:.2f}"),
    ("of alone", "{steady_p99_ratio:.2f}"),
    ("us/token", "{microseconds_per_token:.0f}"),
]
CPU_TABLE = [
    ("streams", "{streams}"),
    ("engine alone", "{alone[engine_cpu_us]:.0f}"),
    *((process, f"{{http[{process}_cpu_us]:.0f}}") for process in ("engine", "server", "client")),
]


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--overhead",
        action="store_true",
        help="the engine alone beside the server; the load is --output-tokens, --ids-below and --seed",
    )
    group.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="at once")
    group.add_argument("--rounds", type=int, default=5, help="timings of each")


def through_engine(column: Column, requests: Sequence[Planned]) -> Figures:
    """The figures of requests that are submitted at once to `lamina_jax.benchmarks.engine_alone`."""
    prompts, max_tokens = [request.prompt for request in requests], requests[0].max_tokens
    took = column.answer({"prompts": prompts, "max_tokens": max_tokens})
    records = [
        Record(sent=0.0, prompt_tokens=len(prompt), arrivals=arrivals, counts=counts)
        for prompt, arrivals, counts in zip(prompts, took["arrivals"], took["counts"], strict=True)
    ]
    return figures(records, {"engine": took["cpu_seconds"]})


def through_http(server: ServerProcess, requests: Sequence[Planned]) -> Figures:
    """Those of the same requests, sent to a server."""
    from lamina_jax.benchmarks.load_client import Target, send_all, served_model

    target = Target(url=server.url, model=served_model(server.url)["id"], ignore_eos=True)
    before, client = server.cpu_seconds(), time.process_time()
    records, _ = send_all(target, requests)
    client = time.process_time() - client
    after = server.cpu_seconds()
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    return figures(records, {"client": client} | {name: after[name] - before[name] for name in after})


def figures(records: Sequence[Record], cpu_seconds: dict[str, float]) -> Figures:
    """Seconds from the first request sent to the last token, and tokens/s of them; p50 and p99 of the gaps in
    ms, and p99 of those that lie where every request streams: no prompt is prefilled then, and nobody waits;
    and of each process its CPU time per token in us."""
    seconds = max(record.sent + record.arrivals[-1] for record in records)
    sums = summary(records, seconds)
    begin = max(record.sent + record.arrivals[0] for record in records)
    end = min(record.sent + record.arrivals[-1] for record in records)
    steady = spread(
        [
            after - before
            for record in records
            for before, after in pairwise(record.arrivals)
            if begin <= record.sent + before and record.sent + after <= end
        ]
    )
    tokens = sums["output_tokens"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": sums["output_tokens_per_second"],
        "p50_ms": sums["itl_ms"]["p50"],
        "p99_ms": sums["itl_ms"]["p99"],
        "steady_p99_ms": steady["p99"] if steady else None,
        **{f"{process}_cpu_us": 1e6 * spent / tokens for process, spent in cpu_seconds.items()},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table of both and one of CPU time; the results as plain dicts."""
    if args.url:
        raise SystemExit("--overhead starts both of what it compares: leave --url out")
    tokens = args.output_tokens[1]
    if tokens < 2:
        raise SystemExit("--overhead looks at gaps between tokens: --output-tokens must be at least 2")
    model, flags = args.model or "bundled", ["--max-num-seqs", str(SEATS), *args.server_flags]
    levels = []
    with ExitStack() as ends:
        command = [sys.executable, "-m", "lamina_jax.benchmarks.engine_alone", model, *flags]
        (alone,) = started(ends, {"engine alone": command})
        server = ends.enter_context(running(ServerProcess(model, flags)))
        ways = {"alone": partial(through_engine, alone), "http": partial(through_http, server)}
        for way in ways.values():
            way(_requests(SEATS, WARM_UP_TOKENS, args))
        for streams in args.streams:
            requests = _requests(streams, tokens, args)
            taken = in_turn({name: partial(way, requests) for name, way in ways.items()}, args.rounds)
            levels.append({"streams": streams, "tokens": tokens, **_compared(taken)})
    _print(model, levels)
    return {"levels": levels}


def _requests(streams: int, tokens: int, args: argparse.Namespace) -> list[Planned]:
    random = np.random.default_rng(args.seed)
    shapes = made_up(streams, (PROMPT_TOKENS, PROMPT_TOKENS), (tokens, tokens), random)
    return with_prompts(shapes, args.ids_below, random)


def _compared(taken: dict[str, list[Figures]]) -> dict[str, Any]:
    """Medians over the rounds: of each figure, and of how the two compare in a round."""
    pairs = list(zip(taken["http"], taken["alone"], strict=True))

    def of_alone(name: str) -> float | None:
        return _median([http[name] / alone[name] for http, alone in pairs if http[name] and alone[name]])

    return {
        **{
            way: {name: _median([one[name] for one in rounds]) for name in rounds[0]}
            for way, rounds in taken.items()
        },
        "p99_ratio": of_alone("p99_ms"),
        "steady_p99_ratio": of_alone("steady_p99_ms"),
        "microseconds_per_token": _median(
            [1e6 * (http["seconds"] - alone["seconds"]) / http["tokens"] for http, alone in pairs]
        ),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _print(model: str, levels: Sequence[dict[str, Any]]) -> None:
    print(f"\n{model}: {PROMPT_TOKENS} + {levels[0]['tokens']} tokens, {SEATS} requests decoded at once")
    rows: list[dict[str, Any]] = []
    for level in levels:
        rows.append({**level["alone"], "streams": level["streams"], "way": "engine alone"})
        rows.append({**level, **level["http"], "way": "through HTTP"})
    print(format_rows(TABLE, rows))
    print(
        "of alone: as a multiple of the engine's; steady: while every request streams; us/token: extra time"
    )
    print("\nCPU time per token, us")
    print(format_rows(CPU_TABLE, levels))
    for level in levels:
        if level["streams"] == GOAL_STREAMS:
            print(
                f"\nthe p99 gap at {GOAL_STREAMS} streams, goal: at most {GOAL:g} x that of the engine alone"
            )
            for name, ratio in (("all", level["p99_ratio"]), ("steady", level["steady_p99_ratio"])):
                if ratio is not None:
                    print(f"  {name}: {ratio:.2f} x, {'met' if ratio <= GOAL else 'missed'}")
