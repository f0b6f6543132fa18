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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np

from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.latencies import Record, spread, summary
from lamina_jax.benchmarks.server_process import ServerProcess, serving
from lamina_jax.benchmarks.table import format_table
from lamina_jax.benchmarks.workload import Planned, made_up, with_prompts

STREAMS = (1, 64, 500)
SEATS = 64
"""Requests decoded at once; more of them wait in the queue."""

GOAL_STREAMS, GOAL = 64, 2.0
"""p99 of the gaps at so many streams: at most so many times that of the engine alone."""

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 8

Figures = dict[str, float | None]


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--overhead",
        action="store_true",
        help="the engine alone beside the server; the load is --output-tokens, --ids-below and --seed",
    )
    group.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="at once (default 1 64 500)")
    group.add_argument("--rounds", type=int, default=5, help="timings of each (default 5)")


class EngineAlone(Column):
    """`lamina_jax.benchmarks.engine_alone` as a process."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "lamina_jax.benchmarks.engine_alone", model, *flags]
        super().__init__("engine alone", command)

    def take(self, requests: Sequence[Planned]) -> Figures:
        """The figures of requests that are submitted at once; see `figures`."""
        prompts, max_tokens = [request.prompt for request in requests], requests[0].max_tokens
        took = self.answer({"prompts": prompts, "max_tokens": max_tokens})
        records = [
            Record(sent=0.0, prompt_tokens=len(request.prompt), arrivals=arrivals, counts=counts)
            for request, arrivals, counts in zip(requests, took["arrivals"], took["counts"], strict=True)
        ]
        return figures(records, {"engine": took["cpu_seconds"]})


class ThroughHTTP:
    """The same requests, sent to a server."""

    def __init__(self, server: ServerProcess) -> None:
        from lamina_jax.benchmarks.load_client import Target, send_all, served_model

        self._server, self._send = server, send_all
        self._target = Target(url=server.url, model=served_model(server.url)["id"], ignore_eos=True)

    def take(self, requests: Sequence[Planned]) -> Figures:
        """Their figures."""
        before, client = self._server.cpu_seconds(), time.process_time()
        records, _ = self._send(self._target, requests)
        client = time.process_time() - client
        after = self._server.cpu_seconds()
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
        alone = EngineAlone(model, flags)
        ends.callback(alone.close)
        alone.line()
        http = ThroughHTTP(ends.enter_context(serving(model, flags)))
        ways: dict[str, Callable[[Sequence[Planned]], Figures]] = {
            "alone": alone.take,
            "http": http.take,
        }
        for way in ways.values():
            way(_requests(SEATS, WARM_UP_TOKENS, args))
        for streams in args.streams:
            requests = _requests(streams, tokens, args)
            rounds = [{name: way(requests) for name, way in ways.items()} for _ in range(args.rounds)]
            levels.append({"streams": streams, "tokens": tokens, **_compared(rounds)})
    _print(model, levels)
    return {"levels": levels}


def _requests(streams: int, tokens: int, args: argparse.Namespace) -> list[Planned]:
    random = np.random.default_rng(args.seed)
    shapes = made_up(streams, (PROMPT_TOKENS, PROMPT_TOKENS), (tokens, tokens), random)
    return with_prompts(shapes, args.ids_below, random)


def _compared(rounds: Sequence[dict[str, Figures]]) -> dict[str, Any]:
    """Medians over the rounds: of each figure, and of how the two compare in a round."""

    def of_alone(name: str) -> float | None:
        pairs = [(one["http"][name], one["alone"][name]) for one in rounds]
        return _median([http / alone if http and alone else None for http, alone in pairs])

    def extra(one: dict[str, Figures]) -> float:
        http, alone = one["http"], one["alone"]
        return 1e6 * (http["seconds"] - alone["seconds"]) / http["tokens"]  # type: ignore[operator]

    return {
        **{
            way: {name: _median([one[way][name] for one in rounds]) for name in found}
            for way, found in rounds[0].items()
        },
        "p99_ratio": of_alone("p99_ms"),
        "steady_p99_ratio": of_alone("steady_p99_ms"),
        "microseconds_per_token": _median([extra(one) for one in rounds]),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _print(model: str, levels: Sequence[dict[str, Any]]) -> None:
    print(f"\n{model}: {PROMPT_TOKENS} + {levels[0]['tokens']} tokens, {SEATS} requests decoded at once")
    header = [
        "streams",
        "",
        "tokens/s",
        "gap p50, ms",
        "p99",
        "of alone",
        "steady p99",
        "of alone",
        "us/token",
    ]
    print(format_table(header, [row for level in levels for row in _rows(level)]))
    print(
        "of alone: as a multiple of the engine's; steady: while every request streams; us/token: extra time"
    )
    processes = {
        "engine alone": ("alone", "engine"),
        "engine": ("http", "engine"),
        "server": ("http", "server"),
        "client": ("http", "client"),
    }
    rows = [
        [
            str(level["streams"]),
            *(f"{level[way][f'{process}_cpu_us']:.0f}" for way, process in processes.values()),
        ]
        for level in levels
    ]
    print("\nCPU time per token, us")
    print(format_table(["streams", *processes], rows))
    for level in levels:
        if level["streams"] == GOAL_STREAMS:
            print(
                f"\nthe p99 gap at {GOAL_STREAMS} streams, goal: at most {GOAL:g} x that of the engine alone"
            )
            for name, ratio in (("all", level["p99_ratio"]), ("steady", level["steady_p99_ratio"])):
                if ratio is not None:
                    print(f"  {name}: {ratio:.2f} x, {'met' if ratio <= GOAL else 'missed'}")


def _rows(level: dict[str, Any]) -> list[list[str]]:
    """The engine's, and HTTP's."""

    def row(way: str, label: str, p99_ratio: str, steady_ratio: str, extra: str) -> list[str]:
        one = level[way]
        gaps = [
            _cell(one["p50_ms"]),
            _cell(one["p99_ms"]),
            p99_ratio,
            _cell(one["steady_p99_ms"]),
            steady_ratio,
        ]
        return [str(level["streams"]), label, f"{one['tokens_per_second']:.0f}", *gaps, extra]

    ratios = _cell(level["p99_ratio"]), _cell(level["steady_p99_ratio"])
    return [
        row("alone", "engine alone", "", "", ""),
        row("http", "through HTTP", *ratios, f"{level['microseconds_per_token']:.0f}"),
    ]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
