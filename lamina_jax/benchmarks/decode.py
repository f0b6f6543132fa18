"""Decode speed: disaggregated beside collocated, on the same machine in the same run.

Every column is an engine in a process of its own; the processes are timed in turn, round after round,
so that a busy neighbour meets all of them alike. The figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.checkpoints import QWEN3_0_6B, random_checkpoint
from lamina_jax.benchmarks.table import format_table

COLUMNS: dict[str, dict[str, Any]] = {
    "collocated, 1 device": {"placement": "collocated", "compute_devices": "cpu:0"},
    "collocated, 2 devices": {"placement": "collocated", "compute_devices": "cpu:0-1"},
    "disaggregated": {"placement": "disaggregated"},
}
"""The settings of each column. "2 devices": weights, heads and pages sharded over two."""


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
        for name, folder in _models(args.model, Path(scratch)):
            for batch in args.batch:
                for context in contexts:
                    cell = _cell(folder, batch, context, rounds, args.seconds, args.settings)
                    results += [{"model": name, "batch": batch, "context": context, **row} for row in cell]
                    print(f"\n{name}: decode at batch {batch}, context {context}; median of {rounds}")
                    print(_table(cell), flush=True)
    return results


def _models(folders: list[str] | None, scratch: Path) -> list[tuple[str, str]]:
    if folders:
        return [(folder, folder) for folder in folders]
    shape = "Qwen3-0.6B shape, bfloat16"
    print(f"writing random weights: {shape}", file=sys.stderr)
    return [("bundled", "bundled"), (shape, str(random_checkpoint(QWEN3_0_6B, scratch)))]


@dataclass
class _Column:
    """A worker process and its timings."""

    name: str
    process: subprocess.Popen[str]
    steps: int = 4
    timings: list[dict[str, float]] = field(default_factory=list)

    def ask(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def line(self) -> str:
        """The worker's next line; it has none when it failed, and then its error stands on stderr."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the column {self.name!r} ended with exit code {self.process.wait(timeout=60)}")
        return line


def _cell(
    folder: str, batch: int, context: int, rounds: int, seconds: float, extra: dict[str, Any]
) -> list[dict[str, Any]]:
    common = {
        "model": folder,
        "batch": batch,
        "context": context,
        "max_num_seqs": batch,
        "max_model_len": context + 64,
        "max_prefill_tokens": 64,
    }
    columns = []
    try:
        for name, settings in COLUMNS.items():
            mine = extra if name == "disaggregated" else {}
            columns.append(_start(name, {**common, **settings, **mine}))
            columns[-1].line()
        for column in columns:
            column.steps = max(4, round(seconds / (column.ask(4)["seconds"] / 4)))
        for _ in range(rounds):
            for column in columns:
                column.timings.append(column.ask(column.steps))
    finally:
        for column in columns:
            column.process.kill()
            column.process.communicate()
    return [_summary(column) for column in columns]


def _start(name: str, settings: dict[str, Any]) -> _Column:
    command = [sys.executable, "-m", "lamina_jax.benchmarks.worker", json.dumps(settings)]
    return _Column(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))


def _summary(column: _Column) -> dict[str, Any]:
    speeds = [timing["tokens_per_second"] for timing in column.timings]
    return {
        "column": column.name,
        "tokens_per_second": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "cpus": statistics.median(timing["cpus"] for timing in column.timings),
    }


def _table(cell: list[dict[str, Any]]) -> str:
    baselines = [row["tokens_per_second"] for row in cell if row["column"] != "disaggregated"]
    header = ["", "tokens/s", "spread", "CPUs used", "of 1 device", "of the better collocated"]
    return format_table(
        header,
        [
            [
                row["column"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['spread']:.0%}",
                f"{row['cpus']:.2f}",
                f"{row['tokens_per_second'] / baselines[0]:.2f}",
                f"{row['tokens_per_second'] / max(baselines):.2f}",
            ]
            for row in cell
        ],
    )
