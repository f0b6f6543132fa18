"""Decode speed: disaggregated beside collocated, and beside transformers and llama.cpp where at hand.

The KV cache is filled, not prefilled. Every column is a process of its own, and all are timed in turn
(`lamina_jax.benchmarks.columns`); where memory does not hold all of them at once, one after the other.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.cells import PAGE_SIZE, Cell, Footprint, fit, footprint
from lamina_jax.benchmarks.columns import (
    COLUMNS,
    MODEL_HELP,
    RANDOM_QWEN3,
    Timings,
    engine_command,
    format_columns,
    models,
    rows_of,
    started,
    time_in_turn,
)
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.reference import (
    NO_REFERENCE,
    add_llama_batched_bench,
    add_reference_python,
    llama_cpp_command,
    reference_command,
    reference_python,
)
from lamina_jax.memory import host_memory
from lamina_jax.weights.hub import find_model

ONE, TWO, SPLIT = COLUMNS
TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"

GOALS: dict[tuple[str, str], dict[int, float]] = {
    (ONE, TRANSFORMERS): {128: 1.8, 1024: 3.0},
    (SPLIT, ONE): {128: 0.95, 1024: 1.1},
    (SPLIT, TWO): {128: 0.9, 1024: 0.9},
}
"""By context: the least that one column should be of another, of `GOAL_MODEL` at `GOAL_BATCHES`."""

GOAL_MODEL = RANDOM_QWEN3, "bfloat16"
CHOICES: dict[str, dict[str, Any]] = {
    SPLIT: COLUMNS[SPLIT],
    **{
        f"microbatches {n}, overlap {overlap}": {**COLUMNS[SPLIT], "microbatches": n, "overlap": overlap}
        for n, overlap in product((1, 2), ("off", "on"))
    },
}
"""What "auto" chooses among, beside what it chooses."""

KERNELS: dict[str, dict[str, Any]] = {
    f"{name}, {kernels} kernels": {**COLUMNS[name], "cpu_kernels": kernels}
    for name, kernels in product((ONE, SPLIT), ("native", "xla"))
}
"""A CPU's two ways."""

GOAL_OF_THE_BEST = 0.97
"""The least that "auto" should be of the best of its choices."""

GOAL_BATCHES = 8, 32
MEMORY_SHARE = 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(
        parser,
        "batch 8 at context 128 and 1024, bfloat16, timings of 1 s",
        batch=[8],
        context=[128, 1024],
        dtype=["bfloat16"],
        seconds=1.0,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests decoded at once")
    contexts = [128, 1024, 4096]
    parser.add_argument("--context", type=int, nargs="+", default=contexts, help="cached tokens of each")
    dtypes = "bfloat16", "float32"
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="of weights and cache")
    parser.add_argument("--rounds", type=int, default=5, help="timings per column")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one timing, about")
    parser.add_argument("--model", nargs="+", default=[RANDOM_QWEN3], help=MODEL_HELP)
    instead = parser.add_mutually_exclusive_group()
    for flag, columns, what in (
        ("--choices", CHOICES, "the defaults, beside all that they choose among"),
        ("--cpu-kernels", KERNELS, "native kernels of the CPU beside XLA's"),
    ):
        instead.add_argument(
            flag, dest="instead", action="store_const", const=columns, help=f"instead: {what}"
        )
    add_reference_python(parser)
    add_llama_batched_bench(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per model, dtype and cell; the results as plain dicts."""
    if args.instead and (args.reference_python or args.llama_batched_bench):
        raise SystemExit(
            "--reference-python and --llama-batched-bench are for the columns that --choices and "
            "--cpu-kernels leave out: give one or the other"
        )
    if not args.instead and reference_python(args.reference_python) is None:
        print(f"no column {TRANSFORMERS}: {NO_REFERENCE}", file=sys.stderr)
    cells = [Cell(*cell) for cell in product(args.batch, args.context)]
    results = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as scratch:
        for (name, folder), dtype in product(models(args.model, Path(scratch)), args.dtype):
            commands = commands_for(args, find_model(folder), dtype, Path(scratch))
            one = footprint(find_model(folder), dtype)
            for cell, timings in measure(commands, one, cells, args.rounds, args.seconds):
                rows = rows_of(timings) if isinstance(timings, dict) else [{"needs_bytes": timings}]
                results += [{"model": name, "dtype": dtype, **cell._asdict(), **row} for row in rows]
                print(f"\n{name}, {dtype}: decode at {cell}; median of {args.rounds}")
                print(_text(timings, rows), flush=True)
                if isinstance(timings, dict) and (name, dtype) == GOAL_MODEL:
                    for goal in goals(cell, rows):
                        print(goal, flush=True)
    return results


Commands = dict[str, Callable[[Sequence[Cell]], list[str]]]
"""What starts each column, for the cells that it is to be timed at."""


def commands_for(args: argparse.Namespace, folder: Path, dtype: str, scratch: Path) -> Commands:
    """The columns of one model; the files of those that are no engine of ours go to `scratch`."""
    commands: Commands = {
        name: partial(_engine, {"model": str(folder), "dtype": dtype, **settings})
        for name, settings in (args.instead or COLUMNS).items()
    }
    if args.instead:
        return commands
    if (python := reference_python(args.reference_python)) is not None:
        settings = {"model": str(folder), "dtype": dtype}
        transformers = reference_command(python, "transformers_worker.py", settings)
        commands[TRANSFORMERS] = lambda cells: transformers
    if args.llama_batched_bench is not None:
        gguf = Path(tempfile.mkdtemp(dir=scratch)) / f"{dtype}.gguf"
        llama_cpp = llama_cpp_command(args.llama_batched_bench, folder, dtype, gguf)
        commands[LLAMA_CPP] = lambda cells: llama_cpp
    return commands


def _engine(settings: Mapping[str, Any], cells: Sequence[Cell]) -> list[str]:
    batch, context = (max(sizes) for sizes in zip(*cells, strict=True))
    common = {
        **cells[0]._asdict(),
        "max_num_seqs": batch,
        "max_model_len": context + PAGE_SIZE,
        "max_prefill_tokens": PAGE_SIZE,
        "page_size": PAGE_SIZE,
        "num_pages": max(cell.pages for cell in cells),
        "memory_fraction": 1.0,  # whether it fits was asked above, of all columns together
        "prefill_stall_ms": math.inf,
    }
    return engine_command({**common, **settings})


def measure(
    commands: Commands, one: Footprint, cells: Sequence[Cell], rounds: int, seconds: float
) -> Iterator[tuple[Cell, Timings | int]]:
    """Every cell with its timings, or with the bytes that it would need; `one`: of a column."""
    found = fit(cells, one, len(commands), int(MEMORY_SHARE * host_memory()))
    for cell in found.refused:
        yield cell, one(cell)
    yield from _timed(commands, found.together, rounds, seconds)
    for cell in found.alone:
        timings: Timings = {}
        for name, command in commands.items():
            for _, one_column in _timed({name: command}, [cell], rounds, seconds):
                timings |= one_column
        yield cell, timings


def _timed(
    commands: Commands, cells: Sequence[Cell], rounds: int, seconds: float
) -> Iterator[tuple[Cell, Timings]]:
    """Start columns, and time them in turn at each cell."""
    if not cells:
        return
    with ExitStack() as ends:
        columns = started(ends, {name: command(cells) for name, command in commands.items()})
        for cell in cells:
            print(f"timing: {', '.join(commands)} at {cell}", file=sys.stderr)
            yield cell, time_in_turn(columns, rounds, seconds, **cell._asdict())


def _text(timings: Timings | int, rows: list[dict[str, Any]]) -> str:
    if not isinstance(timings, dict):
        return f"needs {timings / 2**30:.0f} GB, more than {MEMORY_SHARE:.0%} of what is free: not run"
    lines = [format_decode(rows)]
    if TRANSFORMERS in timings:
        lines.append(f"{TRANSFORMERS}: its {timings[TRANSFORMERS][0]['cache']} cache, the faster one")
    if LLAMA_CPP in timings:
        kind = timings[LLAMA_CPP][0]["cache"]
        lines.append(f"{LLAMA_CPP}: its {kind} cache; its generation only, but CPUs used of its whole run")
    return "\n".join(lines)


def format_decode(rows: Sequence[Mapping[str, Any]]) -> str:
    """The columns of one cell as text."""
    beside = (ONE, TRANSFORMERS, LLAMA_CPP, f"{ONE}, xla kernels", f"{SPLIT}, xla kernels")
    others = [other for other in beside if other in rows[0]["ratios"]]
    return format_columns(rows, others or [SPLIT])


def goals(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The goals of a cell, met or missed."""
    by_name = {row["column"]: row for row in rows}
    if CHOICES.keys() == by_name.keys():
        best = max((row for row in rows if row["column"] != SPLIT), key=lambda row: row["tokens_per_second"])
        yield _goal(by_name[SPLIT], best["column"], GOAL_OF_THE_BEST)
    for (name, other), by_context in GOALS.items():
        goal = by_context.get(cell.context)
        if goal is not None and cell.batch in GOAL_BATCHES and {name, other} <= by_name.keys():
            yield _goal(by_name[name], other, goal)


def _goal(row: Mapping[str, Any], other: str, goal: float) -> str:
    ratio, name = row["ratios"][other], row["column"]
    return f"goal: {name} at least {goal} of {other}: {ratio:.2f} ({'met' if ratio >= goal else 'missed'})"
