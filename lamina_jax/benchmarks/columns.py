"""Columns beside each other: each in a process of its own, timed in turn in the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.checkpoints import random_checkpoint
from lamina_jax.benchmarks.processes import pinned, with_cache
from lamina_jax.benchmarks.rounds import in_turn, ratio, spread
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.models.shapes import QWEN3_0_6B

COLUMNS: dict[str, dict[str, Any]] = {
    "collocated, 1 device": {"placement": "collocated", "compute_devices": "cpu:0"},
    "collocated, 2 devices": {"placement": "collocated", "compute_devices": "cpu:0-1"},
    "disaggregated": {"placement": "disaggregated"},
}
"""The settings of each column. "2 devices": attention, and with it heads, pages and weights, sharded over
two. "disaggregated" is what an engine is by default."""

RANDOM_QWEN3 = "qwen3-0.6b"
MODEL_HELP = f"folders, 'bundled', or {RANDOM_QWEN3}: random weights of that shape"

ANSWER_SECONDS = 540.0
"""How long a column may take to start, or to do what it was asked for."""

Timings = dict[str, list[dict[str, Any]]]
"""By column: what each round took."""


def models(names: Sequence[str], scratch: Path) -> list[tuple[str, str]]:
    """(name, folder) of each model to be timed; `RANDOM_QWEN3` is written to `scratch`."""
    found = []
    for name in names:
        folder = name
        if name == RANDOM_QWEN3:
            print("writing random weights of the Qwen3-0.6B shape", file=sys.stderr)
            folder = str(random_checkpoint(QWEN3_0_6B, scratch))
        found.append((name, folder))
    return found


def engine_command(settings: dict[str, Any]) -> list[str]:
    """What starts an engine as a column; see `lamina_jax.benchmarks.worker` for the settings."""
    return [sys.executable, "-m", "lamina_jax.benchmarks.worker", json.dumps(settings)]


class Column:
    """A process that prints "ready" and then answers; on some cores only ("0-1"), where they are named.

    Args:
        cache: a folder for compiled programs, which columns share.
    """

    def __init__(
        self, name: str, command: list[str], cores: str | None = None, cache: Path | None = None
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            pinned(command, cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=with_cache(cache),
        )

    def ask(self, steps: int, **changes: Any) -> dict[str, Any]:
        """Run so many steps; what they took. `changes`: see `lamina_jax.benchmarks.worker`."""
        return self.answer({"steps": steps, **changes})

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """A line of JSON for a line of JSON."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def line(self) -> str:
        """The process's next line; it has none when it failed, and then its error stands on stderr."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + ANSWER_SECONDS
        too_long = threading.Timer(ANSWER_SECONDS, self.process.kill)
        too_long.start()
        line = self.process.stdout.readline()
        too_long.cancel()
        if not line:
            late = f", killed after {ANSWER_SECONDS:.0f} s" if time.monotonic() >= deadline else ""
            raise SystemExit(f"the column {self.name!r} ended with exit code {self.process.wait(60)}{late}")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def started(ends: ExitStack, commands: Mapping[str, list[str]]) -> list[Column]:
    """Columns by name, ready; they end with `ends`."""
    columns = []
    for name, command in commands.items():
        print(f"starting: {name}", file=sys.stderr)
        columns.append(ends.enter_context(closing(Column(name, command))))
    for column in columns:
        column.line()
    return columns


def time_in_turn(columns: Sequence[Column], rounds: int, seconds: float, **changes: Any) -> Timings:
    """`rounds` timings of each column, of about `seconds` each."""
    steps = [max(4, round(seconds / (column.ask(4, **changes)["seconds"] / 4))) for column in columns]
    timed = {
        column.name: partial(column.ask, count, **changes)
        for column, count in zip(columns, steps, strict=True)
    }
    return in_turn(timed, rounds)


def speeds(taken: list[dict[str, Any]]) -> list[float]:
    """Tokens per second, round by round."""
    return [one["tokens_per_second"] for one in taken]


def summary(name: str, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a column's timings."""
    return {
        "column": name,
        "tokens_per_second": statistics.median(speeds(taken)),
        "spread": spread(speeds(taken)),
        "cpus": statistics.median(one["cpus"] for one in taken),
    }


def rows_of(timings: Timings) -> list[dict[str, Any]]:
    """Each column's medians and its "ratios" to all of them."""
    return [
        summary(name, taken)
        | {"ratios": {other: ratio(speeds(taken), speeds(others)) for other, others in timings.items()}}
        for name, taken in timings.items()
    ]


def format_columns(rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> str:
    """The columns as text, with their ratios to `others`."""
    figures = [
        ("tokens/s", "{tokens_per_second:.1f}"),
        ("spread", "{spread:.0%}"),
        ("CPUs used", "{cpus:.2f}"),
    ]
    ratios = [(f"of {other}", f"{{ratios[{other}]:.2f}}") for other in others]
    return format_rows([("", "{column}"), *figures, *ratios], rows)
