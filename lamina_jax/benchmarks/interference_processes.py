"""The processes of `lamina_jax.benchmarks.interference`, each on one core.

`python -m lamina_jax.benchmarks.interference_processes engine|products|worker ...` is one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lamina_jax.benchmarks.processes import Listening, attend_command

COMPUTE_CORE, PREFILL_CORE = "0", "1"
WORKER_MEMORY = 0.3
"""Share of the free memory that each of the workers may fill: there are three."""

_ME = (sys.executable, "-m", "lamina_jax.benchmarks.interference_processes")


def engine_command(settings: dict[str, Any], decodes: int, context: int, prompt_tokens: int) -> list[str]:
    """What starts an engine as a column."""
    told = {"decodes": decodes, "context": context, "prompt_tokens": prompt_tokens}
    return [*_ME, "engine", json.dumps(settings), json.dumps(told)]


def attention_worker(cache: Path, *, at_once: bool) -> Listening:
    """An attention worker on the compute core; `at_once`: pulled KV is written as it comes."""
    return Listening([*_ME, "worker"] if at_once else attend_command(WORKER_MEMORY), COMPUTE_CORE, cache)


def prefill_host(settings: dict[str, Any], cache: Path) -> Listening:
    """A prefill host on the prefill core."""
    named = {name: value for name, value in settings.items() if name not in ("model", "partition")}
    flags = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "lamina_jax.serve", settings["model"], *flags]
    return Listening([*command, "--role", "prefill", "--listen", "127.0.0.1:0"], PREFILL_CORE, cache)


class Load:
    """An engine with requests that decode for ever, and prompts whose first token is waited for, or matrix
    products in their place."""

    def __init__(self, settings: dict[str, Any], decodes: int, context: int, prompt_tokens: int) -> None:
        from lamina_jax import LLM, SamplingParams

        self._engine = LLM(**settings).engine
        self._decodes, self._context, self._prompt_tokens = decodes, context, prompt_tokens
        self._products = subprocess.Popen([*_ME, "products"], stdin=subprocess.PIPE, text=True)
        self._first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self._long = SamplingParams(max_tokens=1 << 20, temperature=0, ignore_eos=True)
        self._rng = np.random.default_rng(0)
        self._count = 0

    def answer(self, column: str, prompts: int = 0, prompt_seconds: float = 0.0) -> dict[str, Any]:
        """What a column of the table is made from. Times in seconds."""
        if column == "alone":
            return {"seconds": self._prompt({})}
        running = [self._submit(self._context, self._long) for _ in range(self._decodes)]
        arrivals: dict[str, list[float]] = {name: [] for name in running}
        self._until(lambda: min(map(len, arrivals.values())) >= 20, arrivals)
        for times in arrivals.values():
            times.clear()
        firsts = [self._disturb(column, prompt_seconds, arrivals) for _ in range(prompts)]
        for name in running:
            self._engine.abort(name)
        while self._engine.has_work:
            self._engine.step()
        gaps = [gap for times in arrivals.values() for gap in np.diff(times).tolist()]
        return {"gaps": gaps, "first_tokens": [first for first in firsts if first is not None]}

    def _disturb(self, column: str, seconds: float, arrivals: dict[str, list[float]]) -> float | None:
        """One prompt, or what stands for it, and half its time without; the time to its first token."""
        began, first = time.perf_counter(), None
        if column == "control":
            print(seconds, file=self._products.stdin, flush=True)
        if column in ("control", "undisturbed"):
            self._until(lambda: time.perf_counter() > began + seconds, arrivals)
        else:
            first = self._prompt(arrivals)
        rest = time.perf_counter() + seconds / 2
        self._until(lambda: time.perf_counter() > rest, arrivals)
        return first

    def _prompt(self, arrivals: dict[str, list[float]]) -> float:
        """One prompt; the time to its first token."""
        began, name = time.perf_counter(), self._submit(self._prompt_tokens, self._first)
        times: dict[str, list[float]] = {**arrivals, name: []}
        self._until(lambda: bool(times[name]), times)
        return times[name][0] - began

    def _submit(self, tokens: int, sampling: Any) -> str:
        self._count += 1
        prompt = self._rng.integers(0, self._engine.vocab_size, tokens).tolist()
        self._engine.submit(self._engine.request(f"r{self._count}", prompt, sampling))
        return f"r{self._count}"

    def _until(self, condition: Any, arrivals: dict[str, list[float]]) -> None:
        """Step the engine, noting when tokens come."""
        while not condition():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id in arrivals and output.outputs:
                    arrivals[output.request_id].append(now)


def _engine(settings: str, told: str) -> None:
    load = Load(json.loads(settings), **json.loads(told))
    load.answer("alone")
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(load.answer(**json.loads(line))), flush=True)


def _products() -> None:
    """Matrix products on the prefill core, for as many seconds as each line says."""
    os.sched_setaffinity(0, {int(PREFILL_CORE)})
    matrix = np.ones((256, 256), np.float32)
    for line in sys.stdin:
        until = time.perf_counter() + float(line)
        while time.perf_counter() < until:
            np.matmul(matrix, matrix)


def _worker() -> None:
    """An attention worker that writes pulled KV without waiting for a gap; until it is killed."""
    from functools import partial
    from threading import Event

    from lamina_jax.config import AttendConfig, SecurityConfig
    from lamina_jax.worker.gaps import Gaps
    from lamina_jax.worker.server import WorkerServer
    from lamina_jax.worker.session import Session

    class AtOnce(Gaps):
        def wait(self) -> None:
            """Not at all."""

    make = partial(Session, cpu_kernels="auto")
    config = AttendConfig(listen="127.0.0.1:0", devices="cpu:0", memory_fraction=WORKER_MEMORY)
    server = WorkerServer(config, SecurityConfig(), lambda *given: make(*given, gaps=AtOnce()))
    facts = server.start()
    print(f"listening on 127.0.0.1 (port {server.port}, data port {facts.data_port})", file=sys.stderr)
    Event().wait()


def main(argv: list[str]) -> None:
    """Be what the first word says."""
    match argv:
        case ["engine", settings, told]:
            _engine(settings, told)
        case ["products"]:
            _products()
        case ["worker"]:
            _worker()


if __name__ == "__main__":
    main(sys.argv[1:])
