"""What HTTP costs: the same requests through a server, and by the same engine with nothing around it.

Both are processes of their own, with the same settings, asked in turn. The engine's gaps are those between
the steps that yield a request's tokens, the server's those between events at its client. Client, server and
engine share the machine's cores, so each one's CPU time is told, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from lamina_jax.benchmarks.latencies import Record, summary
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


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--overhead",
        action="store_true",
        help="the engine alone beside the server; the load is --output-tokens, --ids-below and --seed",
    )
    group.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="at once (default 1 64 500)")
    group.add_argument("--rounds", type=int, default=5, help="timings of each (default 5; --quick: 1)")


class EngineAlone:
    """`lamina_jax.benchmarks.engine_alone` as a process; ends with the block."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "lamina_jax.benchmarks.engine_alone", model, *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> EngineAlone:
        self._line()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, requests: Sequence[Planned]) -> dict[str, Any]:
        """The figures of requests that are submitted at once; see `figures`."""
        asked = {"prompts": [request.prompt for request in requests], "max_tokens": requests[0].max_tokens}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        took = json.loads(self._line())
        records = [
            Record(sent=0.0, prompt_tokens=len(request.prompt), arrivals=arrivals, counts=counts)
            for request, arrivals, counts in zip(requests, took["arrivals"], took["counts"], strict=True)
        ]
        return figures(records, {"engine": took["cpu_seconds"]})

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine alone ended with exit code {self._process.wait(timeout=60)}")
        return line


class ThroughHTTP:
    """The same requests, sent to a server."""

    def __init__(self, server: ServerProcess) -> None:
        from lamina_jax.benchmarks.load_client import Target, send_all, served_model

        self._server, self._send = server, send_all
        self._target = Target(url=server.url, model=served_model(server.url)["id"], ignore_eos=True)

    def ask(self, requests: Sequence[Planned]) -> dict[str, Any]:
        before, client = self._server.cpu_seconds(), time.process_time()
        records, _ = self._send(self._target, requests)
        client = time.process_time() - client
        after = self._server.cpu_seconds()
        failed = [record.error for record in records if record.error is not None]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
        return figures(records, {"client": client} | {name: after[name] - before[name] for name in after})


def figures(records: Sequence[Record], cpu_seconds: dict[str, float]) -> dict[str, Any]:
    """tokens/s and seconds from the first request sent to the last token; p50 and p99 of the gaps, in ms."""
    seconds = max(record.sent + record.arrivals[-1] for record in records)
    sums = summary(records, seconds)
    return {
        "tokens": sums["output_tokens"],
        "seconds": seconds,
        "tokens_per_second": sums["output_tokens_per_second"],
        "p50_ms": sums["itl_ms"]["p50"],
        "p99_ms": sums["itl_ms"]["p99"],
        "cpu_seconds": cpu_seconds,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table of both and one of CPU time; the results as plain dicts."""
    if args.url:
        raise SystemExit("--overhead starts both of what it compares: leave --url out")
    tokens = 32 if args.quick else args.output_tokens[1]
    if tokens < 2:
        raise SystemExit("--overhead looks at gaps between tokens: --output-tokens must be at least 2")
    model, flags = args.model or "bundled", ["--max-num-seqs", str(SEATS), *args.server_flags]
    levels = []
    with ExitStack() as ends:
        alone = ends.enter_context(EngineAlone(model, flags))
        http = ThroughHTTP(ends.enter_context(serving(model, flags)))
        ways: dict[str, Callable[[Sequence[Planned]], dict[str, Any]]] = {
            "alone": alone.ask,
            "http": http.ask,
        }
        for way in ways.values():
            way(_requests(SEATS, WARM_UP_TOKENS, args))
        for streams in args.streams:
            requests = _requests(streams, tokens, args)
            rounds = [
                {name: way(requests) for name, way in ways.items()}
                for _ in range(1 if args.quick else args.rounds)
            ]
            levels.append({"streams": streams, "tokens": tokens, **_medians(rounds)})
    _print(model, levels)
    return {"levels": levels}


def _requests(streams: int, tokens: int, args: argparse.Namespace) -> list[Planned]:
    random = np.random.default_rng(args.seed)
    shapes = made_up(streams, (PROMPT_TOKENS, PROMPT_TOKENS), (tokens, tokens), random)
    return with_prompts(shapes, args.ids_below, random)


def _medians(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Of each figure; and how the two compare, round by round."""

    def median(pick: Callable[[dict[str, dict[str, Any]]], float]) -> float:
        return statistics.median(pick(one) for one in rounds)

    medians: dict[str, Any] = {}
    for way, found in rounds[0].items():
        medians[way] = {
            name: median(lambda one, way=way, name=name: one[way][name])  # type: ignore[misc]
            for name in found
            if name != "cpu_seconds"
        }
        medians[way]["cpu_seconds"] = {
            process: median(lambda one, way=way, process=process: one[way]["cpu_seconds"][process])  # type: ignore[misc]
            for process in found["cpu_seconds"]
        }
    return {
        **medians,
        "p99_ratio": median(lambda one: one["http"]["p99_ms"] / one["alone"]["p99_ms"]),
        "microseconds_per_token": median(
            lambda one: 1e6 * (one["http"]["seconds"] - one["alone"]["seconds"]) / one["http"]["tokens"]
        ),
    }


def _print(model: str, levels: Sequence[dict[str, Any]]) -> None:
    tokens = levels[0]["tokens"]
    print(f"\n{model}: {PROMPT_TOKENS} + {tokens} tokens, {SEATS} requests decoded at once")
    header = ["streams", "", "tokens/s", "gap p50, ms", "gap p99, ms", "p99, of alone", "extra us/token"]
    rows = []
    for level in levels:
        ratios = {
            "alone": ["", ""],
            "http": [f"{level['p99_ratio']:.2f}", f"{level['microseconds_per_token']:.0f}"],
        }
        for way, label in (("alone", "engine alone"), ("http", "through HTTP")):
            one = level[way]
            gaps = [f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}"]
            rows.append(
                [str(level["streams"]), label, f"{one['tokens_per_second']:.0f}", *gaps, *ratios[way]]
            )
    print(format_table(header, rows))
    processes = {
        "engine alone": ("alone", "engine"),
        "engine": ("http", "engine"),
        "server": ("http", "server"),
        "client": ("http", "client"),
    }
    print("\nCPU microseconds per token")
    header = ["streams", *processes]
    rows = [
        [
            str(level["streams"]),
            *(
                f"{1e6 * level[way]['cpu_seconds'][name] / level[way]['tokens']:.0f}"
                for way, name in processes.values()
            ),
        ]
        for level in levels
    ]
    print(format_table(header, rows))
    for level in levels:
        if level["streams"] == GOAL_STREAMS:
            verdict = "met" if level["p99_ratio"] <= GOAL else "missed"
            print(
                f"\np99 gap at {GOAL_STREAMS} streams: {level['p99_ratio']:.2f} x that of the engine alone "
                f"(goal: at most {GOAL:g}): {verdict}"
            )
