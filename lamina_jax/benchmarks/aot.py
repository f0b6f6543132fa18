"""The decode step compiled for devices that are not there: memory, collectives, kernels of its programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, get_args, get_type_hints

from lamina_jax.aot.cases import Case, chosen
from lamina_jax.aot.devices import GB, Topology
from lamina_jax.aot.measure import Kernels
from lamina_jax.aot.worker import PACKAGES, missing
from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.table import format_table
from lamina_jax.config import EngineConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORDS", help='cases with these words, as in "memory h100"'
    )
    parser.add_argument("--batch", type=int, default=32, help="requests decoded at once")
    parser.add_argument("--context", type=int, default=4096, help="cached tokens of each")
    parser.add_argument(
        "--kv-dtype",
        choices=get_args(get_type_hints(EngineConfig)["kv_dtype"]),
        default="auto",
        help="of the pages, as `serve` takes it",
    )
    parser.add_argument("--programs", action="store_true", help="print every program of each case, too")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a row per case and, where asked, its programs; the results as plain dicts."""
    try:
        cases = chosen(args.only)
    except ValueError as error:
        raise SystemExit(f"--only: {error}") from None
    load = {"rows": args.batch, "context": args.context, "kv_dtype": args.kv_dtype}
    results = compile_cases(cases, load)
    tokens = args.batch * args.context
    print(f"one decode step of {args.batch} requests, {tokens:,} tokens in the cache; GB of each device")
    print(summary(results))
    if args.programs:
        for result in results:
            print(f"\n{result['case']}\n{programs(result)}")
    return results


def compile_cases(cases: Sequence[Case], load: dict[str, Any]) -> list[dict[str, Any]]:
    """What `lamina_jax.aot.worker.measure` says of each case, with its "programs" as a list and its "case".

    Each platform has a process.

    Raises:
        SystemExit: a platform whose compiler is not installed, or a program that does not compile.
    """
    results = []
    with ExitStack() as ends:
        columns: dict[str, Column] = {}
        for case in cases:
            platform = Topology(case.topology).kind.platform
            if platform not in columns:
                columns[platform] = _column(platform)
                ends.callback(columns[platform].close)
            print(f"compiling: {case}", file=sys.stderr)
            results.append({"case": str(case), **_measured(columns[platform], {"case": case, **load})})
    return results


def _measured(column: Column, question: dict[str, Any]) -> dict[str, Any]:
    """All of a worker's answers to a question; each may take as long as a column may."""
    answer, compiled = column.answer(question), []
    while "needs" not in answer:
        compiled.append(answer)
        answer = json.loads(column.line())
    return {"programs": compiled, **answer}


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A row per case; what does not fit is refused in words."""
    header = ["", "devices", "hosts", "programs", "seconds", "weights", "pages", "temporaries", "in flight"]
    return format_table(
        [*header, "usable", "collectives of a layer", "kernels"], [_row(each) for each in results]
    )


def programs(result: dict[str, Any]) -> str:
    """A row per program of a case, in MB of each device."""
    header = ["program", "seconds", "arguments", "temporaries", "results", "collectives", "kernels"]
    return format_table(
        header,
        [
            [
                each["name"],
                f"{each['seconds']:.1f}",
                *(f"{each[name] / 1e6:,.1f}" for name in ("arguments", "temporaries", "results")),
                _counts(each["collectives"]),
                str(Kernels(**each["kernels"])),
            ]
            for each in result["programs"]
        ],
    )


def refusal(result: dict[str, Any]) -> str:
    """Why a case does not fit its devices; "" where it does."""
    needed = sum(result["needs"].values())
    if needed <= result["usable"]:
        return ""
    return f"does not fit: needs {needed / GB:.1f} GB of {result['usable'] / GB:.1f} GB"


def _row(result: dict[str, Any]) -> list[str]:
    start = [result["case"], str(result["devices"]), str(result["hosts"])]
    needs = [_gb(result["needs"][name]) for name in ("weights", "pages", "temporaries", "in_flight")]
    usable = f"{result['usable'] / GB:.1f}"
    if refused := refusal(result):
        return [*start, "", "", *needs, usable, "", refused]
    compiled = result["programs"]
    seconds = f"{sum(each['seconds'] for each in compiled):.1f}"
    kernels = _worst([Kernels(**each["kernels"]) for each in compiled])
    return [*start, str(len(compiled)), seconds, *needs, usable, _counts(result["layer"]), str(kernels)]


def _worst(kernels: Sequence[Kernels]) -> Kernels:
    fields = [[value for value in values if value is not None] for values in zip(*kernels, strict=True)]
    return Kernels(*(max(values) if values else None for values in fields))


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counted.items())


def _gb(size: int) -> str:
    return f"{size / GB:.2f}" if size else ""


def _column(platform: str) -> Column:
    if lacking := missing(platform):
        raise SystemExit(
            f"{' and '.join(lacking)} of {', '.join(PACKAGES[platform])} are not installed, which compile "
            f"for {platform}: pip install lamina_jax[aot], or name other cases with --only"
        )
    column = Column(f"aot {platform}", [sys.executable, "-m", "lamina_jax.aot.worker", platform])
    column.line()
    return column
