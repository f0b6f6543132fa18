"""The processes of `lamina_jax.benchmarks.interference`, each on one core.

`python -m lamina_jax.benchmarks.interference_processes engine|products|worker ...` is one of them.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lamina_jax.benchmarks.columns import pinned, with_cache

COMPUTE_CORE, PREFILL_CORE = "0", "1"
WORKER_MEMORY = 0.3
"""Share of the free memory that each of the workers may fill: there are three."""

_ME = (sys.executable, "-m", "lamina_jax.benchmarks.interference_processes")
_LISTENING = re.compile(r"listening on .+ \(port (\d+), data port (\d+)\)")


def engine_command(
    settings: dict[str, Any], decodes: int, context: int, prompt_tokens: int, products_port: int
) -> list[str]:
    """What starts an engine as a column."""
    told = {"decodes": decodes, "context": context, "prompt_tokens": prompt_tokens, "port": products_port}
    return [*_ME, "engine", json.dumps(settings), json.dumps(told)]


def products_command() -> list[str]:
    """What computes matrix products whenever it is asked to."""
    return [*_ME, "products"]


def start_worker(ends: ExitStack, cache: Path, *, at_once: bool) -> str:
    """An attention worker on the compute core; `at_once`: pulled KV is written as it comes."""
    if at_once:
        return _started(ends, pinned([*_ME, "worker"], COMPUTE_CORE), cache)
    command = [sys.executable, "-m", "lamina_jax.attend", "--listen", "127.0.0.1:0"]
    command += ["--devices", "cpu:0", "--memory-fraction", str(WORKER_MEMORY)]
    return _started(ends, pinned(command, COMPUTE_CORE), cache)


def start_prefill_host(ends: ExitStack, settings: dict[str, Any], cache: Path) -> str:
    """A prefill host on the prefill core."""
    named = {name: value for name, value in settings.items() if name not in ("model", "partition")}
    flags = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "lamina_jax.serve", settings["model"], *flags]
    command += ["--role", "prefill", "--listen", "127.0.0.1:0"]
    return _started(ends, pinned(command, PREFILL_CORE), cache)


def _started(ends: ExitStack, command: list[str], cache: Path) -> str:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=with_cache(cache))
    ends.callback(process.communicate)
    ends.callback(process.kill)
    assert process.stderr is not None
    said: deque[str] = deque(maxlen=20)
    for line in process.stderr:
        said.append(line)
        if found := _LISTENING.search(line):
            return f"127.0.0.1:{found[1]}"
    raise SystemExit(f"{' '.join(command)} ended: {''.join(said)}")


class Load:
    """An engine with requests that decode for ever, and prompts whose first token is waited for.

    Args:
        port: where matrix products are to be had.
    """

    def __init__(
        self, settings: dict[str, Any], decodes: int, context: int, prompt_tokens: int, port: int
    ) -> None:
        from lamina_jax import LLM, SamplingParams

        self._engine = LLM(**settings).engine
        self._decodes, self._context, self._prompt_tokens = decodes, context, prompt_tokens
        self._products = socket.create_connection(("127.0.0.1", port))
        self._first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self._long = SamplingParams(max_tokens=1 << 20, temperature=0, ignore_eos=True)
        self._rng = np.random.default_rng(0)
        self._count = 0

    def answer(self, column: str, prompts: int = 0, prompt_seconds: float = 0.0) -> dict[str, Any]:
        """What a column of the table is made from. Times in seconds."""
        if column == "alone":
            return {"seconds": self._alone()}
        running = [self._submit(self._context, self._long) for _ in range(self._decodes)]
        arrivals: dict[str, list[float]] = {name: [] for name in running}
        self._until(lambda: min(map(len, arrivals.values())) >= 20, arrivals)
        for times in arrivals.values():
            times.clear()
        firsts = [
            first
            for _ in range(prompts)
            if (first := self._disturb(column, prompt_seconds, arrivals)) is not None
        ]
        for name in running:
            self._engine.abort(name)
        while self._engine.has_work:
            self._engine.step()
        gaps = [gap for times in arrivals.values() for gap in np.diff(times).tolist()]
        return {"gaps": gaps, "first_tokens": firsts}

    def _disturb(self, column: str, seconds: float, arrivals: dict[str, list[float]]) -> float | None:
        """One prompt, or what stands for it, and half its time without; the time to its first token."""
        began, first = time.perf_counter(), None
        if column == "control":
            self._products.sendall(json.dumps(seconds).encode() + b"\n")
        if column in ("control", "undisturbed"):
            self._until(lambda: time.perf_counter() > began + seconds, arrivals)
        else:
            name = self._submit(self._prompt_tokens, self._first)
            times: dict[str, list[float]] = {**arrivals, name: []}
            self._until(lambda: bool(times[name]), times)
            first = times[name][0] - began
        rest = time.perf_counter() + seconds / 2
        self._until(lambda: time.perf_counter() > rest, arrivals)
        return first

    def _alone(self) -> float:
        began = time.perf_counter()
        name = self._submit(self._prompt_tokens, self._first)
        times: dict[str, list[float]] = {name: []}
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
    """Matrix products for as many seconds as a line says; a connection's lines are followed in order."""
    import threading

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile() as lines:
            for line in lines:
                until = time.perf_counter() + json.loads(line)
                while time.perf_counter() < until:
                    np.matmul(matrix, matrix)

    matrix = np.ones((256, 256), np.float32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


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
