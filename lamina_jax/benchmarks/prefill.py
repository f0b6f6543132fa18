"""Prefill speed: prompt tokens per second, split and collocated.

A prompt is prefilled in chunks, one after the other, as the scheduler would plan it when nothing else
runs; the later chunks read what the earlier ones cached. See `lamina_jax.benchmarks.columns`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.columns import (
    COLUMNS,
    MODEL_HELP,
    RANDOM_QWEN3,
    engine_command,
    format_columns,
    models,
    rows_of,
    started,
    time_in_turn,
)
from lamina_jax.benchmarks.quick import add_quick

COLLOCATED = list(COLUMNS)[:2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "a prompt of 1024 tokens, three rounds", prompt=[1024], rounds=3)
    parser.add_argument("--prompt", type=int, nargs="+", default=[256, 1024], help="its tokens")
    parser.add_argument("--chunk", type=int, default=256, help="tokens prefilled at once")
    parser.add_argument("--rounds", type=int, default=5, help="timings per column")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one timing, about")
    parser.add_argument("--model", nargs="+", default=["bundled", RANDOM_QWEN3], help=MODEL_HELP)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per model and prompt length; the results as plain dicts."""
    prompts, rounds = args.prompt, args.rounds
    results = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as scratch:
        for name, folder in models(args.model, Path(scratch)):
            for prompt in prompts:
                common = _worker(folder, prompt, args.chunk)
                with ExitStack() as ends:
                    commands = {name: engine_command({**common, **mine}) for name, mine in COLUMNS.items()}
                    cell = rows_of(time_in_turn(started(ends, commands), rounds, args.seconds))
                results += [{"model": name, "prompt": prompt, "chunk": args.chunk, **row} for row in cell]
                print(f"\n{name}: prefill of {prompt} tokens in chunks of {args.chunk}; median of {rounds}")
                print(format_columns(cell, COLLOCATED), flush=True)
    return results


def _worker(folder: str, prompt: int, chunk: int) -> dict[str, Any]:
    return {
        "model": folder,
        "prompt": prompt,
        "max_num_seqs": 1,
        "max_model_len": prompt + 64,
        "max_prefill_tokens": min(chunk, prompt),
        "prefill_stall_ms": math.inf,
    }
