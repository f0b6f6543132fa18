"""Decode speed: disaggregated beside collocated, on the same machine in the same run.

The KV cache is filled, not prefilled; see `lamina_jax.benchmarks.columns` for how it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.columns import compare, models, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="batch 8 at context 128, three rounds")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="requests decoded at once (default 8)"
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[128, 1024], help="cached tokens of each (default 128 1024)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings per column (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one timing, about (default 2)")
    parser.add_argument(
        "--model", nargs="+", help="folders; default: the bundled model and a random Qwen3-0.6B"
    )
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON for the disaggregated column")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per model and cell; the results as plain dicts."""
    contexts, rounds = ([128], 3) if args.quick else (args.context, args.rounds)
    results = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as scratch:
        for name, folder in models(args.model, Path(scratch)):
            for batch in args.batch:
                for context in contexts:
                    cell = compare(_worker(folder, batch, context), rounds, args.seconds, args.settings)
                    results += [{"model": name, "batch": batch, "context": context, **row} for row in cell]
                    print(f"\n{name}: decode at batch {batch}, context {context}; median of {rounds}")
                    print(table(cell), flush=True)
    return results


def _worker(folder: str, batch: int, context: int) -> dict[str, Any]:
    return {
        "model": folder,
        "batch": batch,
        "context": context,
        "max_num_seqs": batch,
        "max_model_len": context + 64,
        "max_prefill_tokens": 64,
        "prefill_stall_ms": math.inf,
    }
