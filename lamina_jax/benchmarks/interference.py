"""What prompts do to requests that decode: the gap between their tokens, wherever prompts are prefilled.

The engine and its attention worker run on core 0, the prefill host on core 1. Some requests decode for ever;
prompts come one after the other, and end with their first token. "control" is no prefill at all, but matrix
products on core 1 for as long: what is left of a column's gap beside it is the prefill's own doing. "inline"
prefills in chunks beside decoding, "pulled" on the prefill host, its KV written in the gaps between frames of
decoding; "pushed" writes it as it comes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lamina_jax.benchmarks.checkpoints import random_checkpoint
from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.interference_processes import (
    COMPUTE_CORE,
    attention_worker,
    engine_command,
    prefill_host,
)
from lamina_jax.benchmarks.processes import running
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import in_turn
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.models.shapes import QWEN3_0_6B

SHAPE = replace(
    QWEN3_0_6B,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
"""Small enough that a step of both sides on one core takes some milliseconds."""

COLUMNS = ("undisturbed", "control", "inline", "pushed", "pulled")
TABLE = [
    ("prompts are", "{column}"),
    ("gaps", "{gaps:,}"),
    ("gap p50 ms", "{gap_p50_ms:.2f}"),
    ("p99 ms", "{gap_p99_ms:.2f}"),
    ("max ms", "{gap_max_ms:.1f}"),
    ("p50 / control", "{p50_over_control:.2f}"),
    ("p99 / control", "{p99_over_control:.2f}"),
    ("TTFT p50 ms", "{ttft_p50_ms:,.0f}"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "2 rounds of 2 prompts of 256 tokens", rounds=2, prompts=2, prompt_tokens=256)
    parser.add_argument("--decodes", type=int, default=4, help="requests that decode")
    parser.add_argument("--context", type=int, default=256, help="tokens of each at first")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of each prompt")
    parser.add_argument("--prompts", type=int, default=4, help="in each round")
    parser.add_argument("--rounds", type=int, default=5, help="of all columns in turn")
    parser.add_argument(
        "--partition", choices=("heads", "requests", "tokens"), default="heads", help="of the cache"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table; a dict for each column."""
    with ExitStack() as ends:
        engines = _engines(ends, args)
        alone = statistics.median(engines["pulled"].answer({"column": "alone"})["seconds"] for _ in range(5))
        print(
            f"{args.decodes} requests decode from {args.context} tokens on; prompts of {args.prompt_tokens}, "
            f"each {1e3 * alone:,.0f} ms on the prefill host; {args.rounds} rounds of {args.prompts}\n"
        )
        asked = {"prompts": args.prompts, "prompt_seconds": alone}
        timed = {name: partial(engines[name].answer, {"column": name, **asked}) for name in COLUMNS}
        taken = in_turn(timed, args.rounds)
    results = [_result(name, rounds) for name, rounds in taken.items()]
    control = results[COLUMNS.index("control")]
    for result in results:
        for figure in ("p50", "p99"):
            result[f"{figure}_over_control"] = result[f"gap_{figure}_ms"] / control[f"gap_{figure}_ms"]
    print(format_rows(TABLE, results))
    return results


def _engines(ends: ExitStack, args: argparse.Namespace) -> dict[str, Column]:
    """The engine behind each column, ready; all processes end with `ends`."""
    scratch = Path(ends.enter_context(TemporaryDirectory(prefix="lamina-bench-")))
    cache = scratch / "compiled"
    settings = {
        "model": str(random_checkpoint(SHAPE, scratch / "model")),
        "max_num_seqs": args.decodes + 1,
        "max_model_len": max(args.context + 4096, args.prompt_tokens + 64),
        "max_prefill_tokens": min(256, args.prompt_tokens),
        "partition": args.partition,
        "prefill_stall_ms": float("inf"),
    }
    prefill = f"127.0.0.1:{ends.enter_context(running(prefill_host(settings, cache))).port}"
    engines = {}
    for name in ("inline", "pulled", "pushed"):
        worker = ends.enter_context(running(attention_worker(cache, at_once=name == "pushed")))
        mine = {"attention": f"127.0.0.1:{worker.port}", "prefill": None if name == "inline" else prefill}
        command = engine_command({**settings, **mine}, args.decodes, args.context, args.prompt_tokens)
        engines[name] = ends.enter_context(closing(Column(name, command, COMPUTE_CORE, cache)))
        engines[name].line()
    return {**engines, "undisturbed": engines["pulled"], "control": engines["pulled"]}


def _result(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gaps = 1e3 * np.concatenate([one["gaps"] for one in rounds])
    firsts = 1e3 * np.concatenate([one["first_tokens"] for one in rounds])
    p50, p99 = np.percentile(gaps, (50, 99)).tolist()
    figures = {"gaps": len(gaps), "gap_p50_ms": p50, "gap_p99_ms": p99, "gap_max_ms": float(gaps.max())}
    return {
        "column": name,
        **figures,
        **({"ttft_p50_ms": float(np.median(firsts))} if len(firsts) else {}),
    }
