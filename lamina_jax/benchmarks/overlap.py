"""Two microbatches over one attention worker beside one, and beside the collocated model on both cores.

The engine is pinned to core 0, its attention worker to core 1; the collocated engine has both. The context
is looked for at which a step's attention takes as long as its layers. Every column is a process of its own,
and all are timed in turn (`lamina_jax.benchmarks.columns`).
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import ExitStack
from typing import Any

from lamina_jax.benchmarks import overlap_gain
from lamina_jax.benchmarks.checkpoints import COMPUTE_BOUND
from lamina_jax.benchmarks.columns import Column, speeds, summary, time_in_turn
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import ratio
from lamina_jax.benchmarks.table import format_rows, format_table
from lamina_jax.benchmarks.two_cores import Bench, balanced_context, whole_pages, xla_threads

LONGEST = 1024
HOP_GOAL_MICROSECONDS = 50
HOP_BATCHES = 8, 64

ONE, TWO, COLLOCATED = "one", "two", "collocated"
GOALS = {f"{TWO} / {ONE}": 1.8, f"{TWO} / {COLLOCATED}": 0.95}
SPLIT = {
    f"{name}, overlap {overlap}": {"microbatches": n, "overlap": overlap}
    for name, n in ((ONE, 1), (TWO, 2))
    for overlap in ("off", "on")
}
TIMED = ("compute", "attention", "wire_out", "wire_back", "exposed_wire")


FACTORS = (0.125, 0.25, 0.5, 1, 1.5)
"""Of the balanced context: those timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "the balanced context only, in five rounds", factors=(1,), rounds=5)
    parser.set_defaults(factors=FACTORS)
    parser.add_argument(
        "--overlap-gain", action="store_true", help="instead: q first, on against off, at G = 1 and G = 8"
    )
    parser.add_argument("--batch", type=int, default=512, help="requests decoded at once")
    parser.add_argument("--rounds", type=int, default=7, help="timings per column")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timing, about")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print what was chosen and the tables; the results as plain dicts."""
    rounds = args.rounds
    if args.overlap_gain:
        return overlap_gain.run(args.batch, rounds, args.seconds)
    with ExitStack() as ends:
        bench = Bench(ends, COMPUTE_BOUND, batch=args.batch, longest=LONGEST)
        for name, settings in SPLIT.items():
            worker = bench.split(name, settings)
        bench.collocated(f"{COLLOCATED}, 1 device", compute_devices="cpu:0")
        bench.collocated(f"{COLLOCATED}, 2 devices", compute_devices="cpu:0-1")
        engine = bench.columns[len(SPLIT) - 1]
        threads = xla_threads(engine.process), xla_threads(worker.process)
        print(f"threads of XLA: {threads[0]} in the engine, {threads[1]} in the worker")
        balanced = balanced_context(engine, LONGEST)
        contexts = sorted({whole_pages(min(balanced * factor, LONGEST)) for factor in args.factors})
        results = [_measure(bench, rounds, args.seconds, context) for context in contexts]
        print(f"load average after it: {os.getloadavg()[0]:.1f} (2 are this benchmark's own)")
        _print(results, balanced, args.batch, rounds)
        results += [_hop(engine, batch, balanced) for batch in (*HOP_BATCHES, args.batch)]
    return results


def _measure(bench: Bench, rounds: int, seconds: float, context: int) -> dict[str, Any]:
    """All columns at one context; a ratio is the median of the rounds' ratios of the better columns;
    that of their fastest rounds says what it is where neighbours were quiet for that long."""
    timings = time_in_turn(bench.columns, rounds, seconds, context=context)
    columns = {name: _figures(name, taken) for name, taken in timings.items()}
    best = {
        kind: max(
            (name for name in columns if name.startswith(kind)),
            key=lambda name: columns[name]["tokens_per_second"],
        )
        for kind in (ONE, TWO, COLLOCATED)
    }
    of = {f"{TWO} / {kind}": speeds(timings[name]) for kind, name in best.items()}
    two = speeds(timings[best[TWO]])
    ratios = {name: ratio(two, of[name]) for name in GOALS}
    fastest = {f"{name}, fastest rounds": max(two) / max(of[name]) for name in GOALS}
    return {"context": context, "columns": list(columns.values()), "best": best, **ratios, **fastest}


def _figures(name: str, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """A column's medians, those of its timings as milliseconds of a step."""
    figures = summary(name, taken)
    figures["step_ms"] = statistics.median(1e3 * one["seconds"] / one["steps"] for one in taken)
    if "timings" in taken[0]:
        for figure in (*TIMED, "host_per_hop"):
            figures[f"{figure}_ms"] = statistics.median(1e-3 * one["timings"][figure] for one in taken)
    return figures


def _hop(column: Column, batch: int, context: int) -> dict[str, Any]:
    """Print and return what the host does for a layer of a microbatch, at the batch of a column."""
    taken = [
        column.ask(40 if batch <= max(HOP_BATCHES) else 6, batch=batch, context=context) for _ in range(5)
    ]
    hop = statistics.median(one["timings"]["host_per_hop"] for one in taken)
    step = statistics.median(1e6 * one["seconds"] / one["steps"] for one in taken)
    goal = f" (goal {HOP_GOAL_MICROSECONDS})" if batch == min(HOP_BATCHES) else ""
    print(
        f"host per layer hop at batch {batch}: {hop:.0f} us{goal}; steps of {step / 1e3:.1f} ms: "
        f"hidden up to L x n = {step / hop:.0f}"
    )
    return {"batch": batch, "host_per_hop_us": hop, "step_us": step}


def _print(results: list[dict[str, Any]], balanced: int, batch: int, rounds: int) -> None:
    shape = COMPUTE_BOUND
    print(
        f"float32, {shape.num_layers} layers, hidden size {shape.hidden_size}, "
        f"{shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}; "
        f"batch {batch}; balanced at context {balanced}; median of {rounds} rounds"
    )
    (chosen,) = (result for result in results if result["context"] == balanced)
    print(f"\nat context {balanced}, milliseconds of a step")
    print(_columns_table(chosen["columns"]))
    for name, goal in GOALS.items():
        met = "met" if chosen[name] >= goal else "missed"
        fastest = chosen[f"{name}, fastest rounds"]
        print(
            f"goal: {name} at least {goal}: {chosen[name]:.2f} ({met}); of the fastest rounds {fastest:.2f}"
        )
    if len(results) > 1:
        print("\ntokens/s of the better column of each kind")
        print(_contexts_table(results))


def _columns_table(columns: list[dict[str, Any]]) -> str:
    speeds = [("", "{column}"), ("tokens/s", "{tokens_per_second:.0f}"), ("spread", "{spread:.0%}")]
    times = [(name.replace("_", " "), f"{{{name}_ms:.1f}}") for name in ("step", *TIMED)]
    return format_rows([*speeds, *times], columns)


def _contexts_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        by_name = {column["column"]: column for column in result["columns"]}
        best = [by_name[result["best"][kind]] for kind in (ONE, TWO, COLLOCATED)]
        split = by_name[result["best"][TWO]]
        rows.append(
            [
                str(result["context"]),
                f"{split['attention_ms'] / split['compute_ms']:.2f}",
                *(f"{column['tokens_per_second']:.0f}" for column in best),
                *(f"{result[name]:.2f}" for name in GOALS),
            ]
        )
    return format_table(["context", "attention / compute", ONE, TWO, COLLOCATED, *GOALS], rows)
