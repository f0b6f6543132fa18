"""A load client: latency and throughput of a server under Poisson arrivals, or those of a trace.

Without --url it starts a server of its own, which gets the flags that follow `--`, and ends it. With
--overhead it compares with the engine alone (`lamina_jax.benchmarks.http_overhead`). docs/load.md says what
the figures mean.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lamina_jax.benchmarks import http_overhead
from lamina_jax.benchmarks.latencies import FIGURES, Record, goodput, summary
from lamina_jax.benchmarks.processes import ServerProcess, running
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.table import format_table, optional
from lamina_jax.benchmarks.workload import (
    Planned,
    length_bounds,
    made_up,
    poisson,
    read_trace,
    with_prompts,
)

if TYPE_CHECKING:
    from lamina_jax.benchmarks.load_client import Target

API_KEY = "LAMINA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(
        parser,
        "40 requests at 10 a second, 64 + 32 tokens; one round with --overhead",
        requests=40,
        rate=10.0,
        prompt_tokens=(64, 64),
        output_tokens=(32, 32),
        rounds=1,
    )
    where = parser.add_argument_group("the server")
    where.add_argument("--url", help="one that runs, such as http://127.0.0.1:8000; default: start one")
    where.add_argument("--model", help='a folder or hub id to serve (default "bundled"); with --url its name')
    where.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"default: ${API_KEY}, if set")
    where.add_argument(
        "server_flags", nargs="*", metavar="-- FLAG", help="flags of the server that is started"
    )
    what = parser.add_argument_group("the load")
    what.add_argument("--requests", type=_count, default=200, help="how many")
    what.add_argument(
        "--rate",
        type=_positive,
        help="requests a second, Poisson; inf: all at once (default: the trace's, or inf)",
    )
    what.add_argument("--concurrency", type=_count, help="most requests at a time (default: no bound)")
    what.add_argument("--prompt-tokens", type=length_bounds, default="128", metavar="N[:M]", help="of each")
    what.add_argument("--output-tokens", type=length_bounds, default="64", metavar="N[:M]", help="of each")
    what.add_argument(
        "--trace", type=Path, metavar="FILE", help="arrivals and lengths: .csv or .jsonl, also .gz of either"
    )
    what.add_argument(
        "--length-scale", type=_positive, default=1.0, metavar="X", help="lengths of the trace times X"
    )
    what.add_argument("--ids-below", type=_count, default=256, help="of a prompt's tokens")
    what.add_argument("--ignore-eos", action="store_true", help="every answer has its full length")
    what.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts")
    what.add_argument("--timeout", type=_positive, default=600.0, help="seconds a request may take")
    told = parser.add_argument_group("the figures")
    told.add_argument("--ttft-slo", type=_positive, metavar="MS", help="bound of TTFT for the goodput")
    told.add_argument("--tpot-slo", type=_positive, metavar="MS", help="bound of TPOT for the goodput")
    told.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.svg, .png); needs matplotlib")
    http_overhead.add_arguments(parser.add_argument_group("what HTTP costs"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; the figures and a row for each request."""
    optional("load_client", "bench serve", "bench")
    if args.overhead:
        return http_overhead.run(args)
    draw = optional("serve_plot", "--plot", "plots").draw if args.plot else None
    if args.url and args.server_flags:
        raise SystemExit(f"{' '.join(args.server_flags)}: flags for a server to be started; --url names one")
    with ExitStack() as ends:
        url = (args.url or "").rstrip("/")
        if not url:
            print("starting a server", file=sys.stderr)
            url = ends.enter_context(running(ServerProcess(args.model or "bundled", args.server_flags))).url
        target, context = _target(args, url)
        requests, left_out = planned(args, context)
        records, seconds = _send(target, requests, args.concurrency)
    figures = summary(records, seconds)
    if args.ttft_slo or args.tpot_slo:
        figures["goodput_per_second"] = goodput(
            records, seconds, ttft_ms=args.ttft_slo, tpot_ms=args.tpot_slo
        )
    print(f"\n{target.model}: {_described(args, len(requests))}")
    if left_out:
        print(f"{left_out} requests are left out: longer than the context of {context} tokens")
    _print(figures)
    if draw:
        draw(records, seconds, args.plot)
    return {"figures": figures, "requests": [record.as_row() for record in records]}


def planned(args: argparse.Namespace, context: int | None) -> tuple[list[Planned], int]:
    """What is sent, and how many requests are not because they are longer than `context`.

    Raises:
        SystemExit: a trace that cannot be read; or nothing fits.
    """
    random = np.random.default_rng(args.seed)
    if args.trace is None:
        shapes = made_up(args.requests, args.prompt_tokens, args.output_tokens, random)
    else:
        try:
            shapes = read_trace(args.trace, args.requests).scaled(args.length_scale)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--trace: {error}") from None
    if args.rate is not None:
        shapes.at[:] = poisson(len(shapes), args.rate, random)
    fitting = shapes if context is None else shapes.that_fit(context)
    if not len(fitting):
        raise SystemExit(
            f"every request is longer than the model's context of {context} tokens: ask for less"
        )
    return with_prompts(fitting, args.ids_below, random), len(shapes) - len(fitting)


def read_api_key(file: Path | None) -> str | None:
    """The first key of a file that the server could read, too; without a file that of the environment."""
    if file is None:
        return os.environ.get(API_KEY) or None
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None:
        raise SystemExit(f"--api-key-file: {file} has no key")
    return key


def _target(args: argparse.Namespace, url: str) -> tuple[Target, int | None]:
    """The server at `url`, and the context of its model, if it says."""
    from lamina_jax.benchmarks.load_client import Target, served_model

    key = read_api_key(args.api_key_file)
    try:
        served = served_model(url, key)
    except ConnectionError as error:
        raise SystemExit(f"error: {error}") from None
    name = args.model if args.url and args.model else served["id"]
    common = {"api_key": key, "ignore_eos": args.ignore_eos, "seconds": args.timeout}
    return Target(url=url, model=name, **common), served.get("max_model_len")


def _send(target: Target, requests: Sequence[Planned], concurrency: int | None) -> tuple[list[Record], float]:
    from lamina_jax.benchmarks.load_client import send_all

    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]} failed"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task, failed = bar.add_task("", total=len(requests), failed=0), 0

        def done(record: Record) -> None:
            nonlocal failed
            failed += record.error is not None
            bar.update(task, advance=1, failed=failed)

        return send_all(target, requests, concurrency=concurrency, done=done)


def _described(args: argparse.Namespace, count: int) -> str:
    """The load, in words."""
    if args.rate is None and args.trace:
        when = "arriving as in the trace"
    elif args.rate is None or math.isinf(args.rate):
        when = "all at once"
    else:
        when = f"Poisson at {args.rate:g}/s"
    lengths = [
        f"{least}" if least == most else f"{least} to {most}"
        for least, most in (args.prompt_tokens, args.output_tokens)
    ]
    tokens = f"{lengths[0]} + {lengths[1]} tokens"
    if args.trace:
        tokens = f"lengths of {args.trace.name}" + (
            f" x {args.length_scale:g}" if args.length_scale != 1 else ""
        )
    bound = "" if args.concurrency is None else f", at most {args.concurrency} at a time"
    return f"{count} requests, {when}{bound}; {tokens}, seed {args.seed}"


def _print(figures: dict[str, Any]) -> None:
    totals = {
        "requests ok": f"{figures['requests_ok']}",
        "requests failed": f"{figures['requests_failed']}",
        **{f"  {kind}": f"{count}" for kind, count in figures["errors"].items()},
        "duration, s": f"{figures['seconds']:.2f}",
        "requests/s": f"{figures['requests_per_second']:.2f}",
        "prompt tokens": f"{figures['prompt_tokens']}",
        "output tokens": f"{figures['output_tokens']}",
        "output tokens/s": f"{figures['output_tokens_per_second']:.1f}",
    }
    if "goodput_per_second" in figures:
        totals["goodput, requests/s"] = f"{figures['goodput_per_second']:.2f}"
    print(format_table(["", "total"], [list(row) for row in totals.items()]))
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = []
    for name, meaning in FIGURES.items():
        known = figures[f"{name}_ms"]
        cells = ["-"] * len(columns) if known is None else [f"{known[column]:.1f}" for column in columns]
        rows.append([f"{name.upper()} ({meaning}), ms", *cells])
    print()
    print(format_table(["", *columns], rows), flush=True)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
