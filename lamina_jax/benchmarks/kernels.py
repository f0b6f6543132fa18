"""Paged attention beside the memory it reads: KV bytes per second as a share of what the device gives.

Every kernel that runs here, over batches, contexts, query heads per KV head and dtypes of the cache; beside
it what JAX ships, and on a GPU torch's attention and FlashInfer's where they are installed.
The kernels of a cell and the device's memory itself are timed in turn, so that a busy neighbour meets all of
them alike; a figure is the median over the rounds. See `kernel_passes` and `device_bandwidth`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from lamina_jax.benchmarks.device_bandwidth import Measure, bandwidth
from lamina_jax.benchmarks.kernel_columns import OTHERS_DTYPE, Columns, KernelColumn, find_devices
from lamina_jax.benchmarks.kernel_goals import goals
from lamina_jax.benchmarks.kernel_passes import DTYPES, Cell, Pass, Shape
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import in_turn, ratio, spread
from lamina_jax.benchmarks.table import format_table
from lamina_jax.compilation_cache import keep_programs
from lamina_jax.memory import available_memory

GROUP = 4
QUICK = {
    "cpu": [(1, 128), (8, 128), (32, 128), (1, 4096), (8, 1024), (32, 1024)],
    "gpu": [(1, 128), (32, 1024), (1, 131072), (8, 8192), (32, 8192), (256, 2048)],
    "tpu": [(1, 128), (32, 1024), (1, 131072), (8, 8192), (32, 8192)],
}
"""By platform: batch and context of a quick run's cells, with GROUP query heads per KV head."""

MEMORY_SHARE = 0.4
"""Of the device's memory, for the pools. The kernels of others bring their own."""

BUFFER_BYTES = 512 << 20
"""Read or copied to measure the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(
        parser, "a few cells, in three rounds of 0.1 s", rounds=3, seconds=0.1, batch=[], context=[], group=[]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256], help="requests")
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[128, 1024, 8192, 32768, 131072],
        help="cached tokens of each; what does not fit is left out",
    )
    parser.add_argument("--group", type=int, nargs="+", default=[1, 4, 8], help="query heads per KV head")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="of the cache")
    parser.add_argument("--page-size", type=int, default=64, help="tokens of a page")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each kernel")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one timing, about")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print tables and goals; the results as plain dicts."""
    keep_programs(None)
    shape = Shape(page_size=args.page_size)
    devices = find_devices(shape.kv_heads)
    cells, rounds, seconds = _cells(args, devices[0].platform), args.rounds, args.seconds
    budget = int(MEMORY_SHARE * available_memory(devices))
    columns = Columns(shape, args.dtype, devices, cells, budget)
    memory = bandwidth(devices, BUFFER_BYTES)
    results = list(fixed_costs(columns, memory))
    print(
        f"{devices[0].device_kind}: {shape.kv_heads} KV heads of {shape.head_dim}, pages of {shape.page_size}"
    )
    for row in results:
        cost = f"{row['fixed_microseconds']:.1f} us on the device, beside what it reads"
        print(f"a call of {row['kernel']} {row['dtype']} costs {cost}")
    for cell in cells:
        if cell not in columns.cells:
            print(f"left out, because its pages do not fit into {budget / 2**30:.1f} GiB: {cell}")
            continue
        found = measure(columns, cell, memory, rounds, seconds)
        print(f"\n{cell}; median of {rounds}\n{_text(found)}", flush=True)
        results += found
    print("", *goals(results), sep="\n")
    return [{"device": devices[0].device_kind, "page_size": shape.page_size, **row} for row in results]


def fixed_costs(columns: Columns, memory: Measure) -> Iterator[dict[str, Any]]:
    """What a call of each kernel of ours, over pages in bfloat16, costs on the device beside reading its one
    page. What a call costs that reads nothing is taken off: the loop's own."""
    cell = Cell(1, columns.shape.page_size, GROUP)
    for column in columns.ours():
        if column.dtype == OTHERS_DTYPE and columns.num_pages:
            attends, nothing = _warm(column, cell), _warm(columns.nothing(column), cell)
            if isinstance(attends, Pass) and isinstance(nothing, Pass):
                pairs = [(attends.seconds_per_call(1), nothing.seconds_per_call(1)) for _ in range(5)]
                cost = statistics.median(a - b for a, b in pairs) - attends.num_bytes / memory()
                yield {"kernel": column.name, "dtype": column.dtype, "fixed_microseconds": 1e6 * cost}


def measure(
    columns: Columns, cell: Cell, memory: Measure, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one cell. A kernel that fails has its error for a row."""
    made = [(column, _warm(column, cell)) for column in (*columns.ours(), *columns.others())]
    passes = [one for _, one in made if isinstance(one, Pass)]
    counts = [max(1, round(seconds / (one.calls * one.seconds_per_call(1)))) for one in passes]
    timed: dict[tuple[str, str], Callable[[], float]] = {("memory", ""): memory}
    for one, count in zip(passes, counts, strict=True):
        timed[one.name, one.dtype] = partial(one.seconds_per_call, count)
    times = in_turn(timed, rounds)
    rates = times.pop(("memory", ""))
    cell_bytes = cell.batch * cell.context * columns.shape.token_bytes("bfloat16")
    rows = [_figures(one, times, rates) if isinstance(one, Pass) else {"error": one} for _, one in made]
    return [
        {"kernel": column.name, "dtype": column.dtype, **cell._asdict(), "cell_bytes": cell_bytes, **row}
        for (column, _), row in zip(made, rows, strict=True)
    ]


def _cells(args: argparse.Namespace, platform: str) -> list[Cell]:
    """Of all batches, contexts and groups; of a quick run those of QUICK, where flags say nothing else."""
    quick = [Cell(*cell, GROUP) for cell in QUICK[platform]]
    quick += [quick[-2]._replace(group=group) for group in (1, 8)]
    cells = [
        Cell(*cell)
        for some in quick
        for cell in product(
            args.batch or [some.batch], args.context or [some.context], args.group or [some.group]
        )
    ]
    return list(dict.fromkeys(cells))


def _warm(column: KernelColumn, cell: Cell) -> Pass | str:
    """The pass, after a first run, or why there is none."""
    try:
        made = column.make(cell)
        made.run(1)
        return made
    except Exception as error:  # whatever one kernel fails with, the others are timed
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _figures(
    one: Pass, times: Mapping[tuple[str, str], list[float]], rates: Sequence[float]
) -> dict[str, float]:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    mine, bfloat16 = times[one.name, one.dtype], times.get((one.name, "bfloat16"))
    shares = [one.num_bytes / took / rate for took, rate in zip(mine, rates, strict=True)]
    figures = {
        "microseconds": 1e6 * statistics.median(mine),
        "bytes_per_second": one.num_bytes / statistics.median(mine),
        "device_bytes_per_second": statistics.median(rates),
        "share": statistics.median(shares),
        "spread": spread(shares),
    }
    if bfloat16:
        figures["of_bfloat16"] = ratio(bfloat16, mine)
    return figures


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A cell's table, and below it what failed."""
    timed = [row for row in rows if "error" not in row]
    lines = [
        [
            f"{row['kernel']} {row['dtype']}",
            f"{row['microseconds']:.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['device_bytes_per_second'] / 1e9:.1f}",
            f"{row['share']:.2f}",
            f"{row['spread']:.0%}",
            f"{row['of_bfloat16']:.2f}" if "of_bfloat16" in row else "",
        ]
        for row in timed
    ]
    table = format_table(["", "us a call", "GB/s", "device", "share", "spread", "of bf16's rate"], lines)
    failed = [f"no {row['kernel']} {row['dtype']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([table, *failed])
