"""An engine on one core and its attention worker on another: the columns of benchmarks that compare them.

XLA makes as many threads as a process has cores when it starts, so that both are pinned before they begin.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lamina_jax.benchmarks.checkpoints import random_checkpoint
from lamina_jax.benchmarks.columns import Column, engine_command
from lamina_jax.benchmarks.processes import Listening, attend_command, running
from lamina_jax.models import ModelConfig

ENGINE_CORE, WORKER_CORE, BOTH_CORES = "0", "1", "0-1"
PAGE_SIZE = 64


class Bench:
    """Columns of random weights, each ready when it is made.

    Args:
        ends: ends them all.
        shape: of the model.
        batch, longest: most requests, and most cached tokens of each, that a column is asked for.
    """

    def __init__(self, ends: ExitStack, shape: ModelConfig, *, batch: int, longest: int) -> None:
        self._ends = ends
        scratch = Path(ends.enter_context(TemporaryDirectory(prefix="lamina-bench-")))
        self._cache = scratch / "compiled"  # which like columns share
        self.columns: list[Column] = []
        self._common = {
            "model": str(random_checkpoint(shape, scratch / "model")),
            "batch": batch,
            "context": PAGE_SIZE,
            "max_num_seqs": batch,
            "max_model_len": longest + PAGE_SIZE,
            "max_prefill_tokens": PAGE_SIZE,
            "num_pages": batch * (longest // PAGE_SIZE + 1),
            "page_size": PAGE_SIZE,
            "prefill_stall_ms": math.inf,
        }

    def collocated(self, name: str, **settings: Any) -> None:
        """Add a column of one process on both cores."""
        self._add(name, BOTH_CORES, {"placement": "collocated", **settings})

    def split(
        self, name: str, settings: Mapping[str, Any], way: Callable[[Listening], str] | None = None
    ) -> Listening:
        """Add a column of an engine and its worker, which is returned.

        Args:
            way: makes the way to the worker; its address as the engine is to know it. None: its own.
        """
        worker = self._ends.enter_context(running(Listening(attend_command(0.9), WORKER_CORE, self._cache)))
        address = way(worker) if way else f"127.0.0.1:{worker.port}"
        self._add(name, ENGINE_CORE, {"attention": address, "timings": True, **settings})
        return worker

    def _add(self, name: str, cores: str, settings: dict[str, Any]) -> None:
        print(f"starting: {name}", file=sys.stderr)
        column = Column(name, engine_command({**self._common, **settings}), cores, self._cache)
        self._ends.enter_context(closing(column))
        column.line()
        self.columns.append(column)


def xla_threads(process: subprocess.Popen[str]) -> int:
    """How many threads XLA computes with in a process."""
    tasks = Path(f"/proc/{process.pid}/task")
    return sum(task.joinpath("comm").read_text().strip() == "tf_XLAEigen" for task in tasks.iterdir())


def balanced_context(column: Column, longest: int) -> int:
    """The context, in whole pages, at which a step's attention takes as long as its layers. From a quarter
    and three quarters of the longest, between which both are taken to grow evenly."""
    probes = [whole_pages(longest / 4), whole_pages(longest * 3 / 4)]
    excess = []
    for context in probes:
        taken = [column.ask(6, context=context)["timings"] for _ in range(3)]
        excess.append(statistics.median(times["attention"] - times["compute"] for times in taken))
    slope = (excess[1] - excess[0]) / (probes[1] - probes[0])
    return whole_pages(min(probes[0] - excess[0] / slope, longest))


def whole_pages(context: float) -> int:
    """The nearest number of tokens that fills pages, at least one."""
    return PAGE_SIZE * max(1, round(context / PAGE_SIZE))
