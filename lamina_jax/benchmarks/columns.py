"""Engines beside each other: each in a process of its own, timed in turn in the same run.

The processes are timed round after round, so that a busy neighbour meets all of them alike; a figure is
the median over the rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
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


def models(folders: list[str] | None, scratch: Path) -> list[tuple[str, str]]:
    """(name, folder) of each model to be timed; without a choice the bundled one and a random 0.6B."""
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


def compare(
    common: dict[str, Any], rounds: int, seconds: float, extra: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time every column.

    Args:
        common: what `lamina_jax.benchmarks.worker` is told, the same for all.
        rounds: timings of each column, of about `seconds` each.
        extra: more settings of the disaggregated one.
    """
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


def table(cell: list[dict[str, Any]]) -> str:
    """The columns with their ratios, as text."""
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
