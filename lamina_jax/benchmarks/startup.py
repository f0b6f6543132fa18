"""Start: from the command to `/ready`, with nothing compiled before and with everything.

Each round starts `python -m lamina_jax.serve` twice over an empty folder for compiled programs: the first
start fills it, the second finds it full. docs/startup.md says what a phase is. The figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from lamina_jax.benchmarks.processes import ServerProcess, running
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.table import format_table

STARTS = ("first", "second")

PHASES = {
    "listening on": "command and port",
    "importing jax": "imports",
    "loading weights": "weights",
    "slicing": "slicing and tracing",
    "compiling": "compiling",
    "compiling attention": "compiling attention",
    "measuring prefill": "measuring prefill",
}
"""What the command says when a phase begins, but for the first, which that ends; and the phase's name."""

COUNTS = ("programs", "from the cache", "CPU seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "one round", rounds=1)
    parser.add_argument("--model", default="bundled", help="a folder or hub id")
    parser.add_argument("--rounds", type=int, default=3, help="of two starts each")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="more flags of the server")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table; the results as plain dicts."""
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
            for name in STARTS:
                print(f"round {number + 1} of {args.rounds}: {name} start", file=sys.stderr)
                flags = ["--compilation-cache", folder, *args.server_flags]
                starts[name].append(start(args.model, flags))
    results = [{"model": args.model, "start": name, **medians(taken)} for name, taken in starts.items()]
    print(f"{args.model}: seconds from the command to /ready; median of {args.rounds}")
    print(table(results))
    return results


def start(model: str, flags: list[str]) -> dict[str, float]:
    """One start: the seconds of each phase and their sum, and `COUNTS`."""
    with running(ServerProcess(model, flags)) as server:
        total = time.monotonic() - server.started
        compiled = server.fetch("/stats")["compiled"]
        used = sum(server.cpu_seconds().values())
    counts = (compiled["programs"], compiled["from_cache"], used)
    return {**phases(server.lines, total), "ready": total, **dict(zip(COUNTS, counts, strict=True))}


def phases(lines: Iterable[tuple[float, str]], total: float) -> dict[str, float]:
    """Seconds of each phase, from (seconds, line) of what the command said until it was ready."""
    begun: dict[str, float] = {}
    for seconds, line in lines:
        said = next((said for said in sorted(PHASES, key=len, reverse=True) if line.startswith(said)), None)
        if said is not None:
            begun.setdefault(said, seconds)
    begun["listening on"] = 0.0
    names = [said for said in PHASES if said in begun]
    ends = [*(begun[said] for said in names[1:]), total]
    return {PHASES[said]: end - begun[said] for said, end in zip(names, ends, strict=True)}


def medians(starts: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}


def table(results: list[dict[str, Any]]) -> str:
    """A row for each figure, a column for each start."""
    figures = [name for name in results[0] if name not in ("model", "start")]
    rows = [
        [
            name,
            *(f"{result[name]:.0f}" if name in COUNTS[:2] else f"{result[name]:.1f}" for result in results),
        ]
        for name in figures
    ]
    return format_table(["", *(result["start"] for result in results)], rows)
