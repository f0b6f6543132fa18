"""The column `llama.cpp` of `bench decode`: llama.cpp's own `llama-batched-bench`, started for each timing.

`python -m lamina_jax.benchmarks.llama_cpp_worker SETTINGS` (JSON: `tool`, its path; `model`, a folder;
`dtype`; `gguf`, the file that is written of the model unless it is there) prints "ready" and then, for every
line {"steps": n, "batch": b, "context": c} that it reads, what so many decode steps took as a line of JSON.

The tool loads the model and fills the cache by a prefill of its own, of one request whose cache it copies to
the others; only its generation is timed. Its context grows by a token per step. Of two bytes it has two kinds
of cache; both are tried at each batch and context, and the faster is timed and named. One thread per core;
"cpus" is of the tool's whole run, since it does not tell its parts apart. It ends with this process, and that
with the one that started it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.gguf_file import write_gguf
from lamina_jax.cluster.pin import die_with

CACHE_PADDING = 256
"""llama.cpp gives every request a cache of a multiple of so many tokens."""

CACHES = {"float32": ("f32",), "bfloat16": ("f16", "bf16")}
"""What its cache may be beside weights of each dtype; f16 is its default."""

TRIED_STEPS = 4


def main() -> None:
    die_with(os.getppid())
    settings = json.loads(sys.argv[1])
    file = Path(settings["gguf"])
    if not file.exists():
        write_gguf(Path(settings["model"]), settings["dtype"], file)
    print("ready", flush=True)
    cell, kind = None, ""
    for line in sys.stdin:
        asked = json.loads(line)
        if cell != (asked["batch"], asked["context"]):
            cell = asked["batch"], asked["context"]
            kind = fastest(settings["tool"], file, CACHES[settings["dtype"]], *cell)
        command = tool_command(settings["tool"], file, kind, *cell, asked["steps"])
        print(json.dumps({**timed(command, asked["context"]), "cache": kind}), flush=True)


def fastest(tool: str, file: Path, kinds: Sequence[str], batch: int, context: int) -> str:
    """The kind of cache that is fastest here."""
    if len(kinds) == 1:
        return kinds[0]
    commands = {kind: tool_command(tool, file, kind, batch, context, TRIED_STEPS) for kind in kinds}
    seconds = {kind: timed(command, context)["seconds"] for kind, command in commands.items()}
    return min(kinds, key=lambda kind: seconds[kind])


def tool_command(tool: str, file: Path, kind: str, batch: int, context: int, steps: int) -> list[str]:
    """What decodes `steps` tokens of `batch` requests with `context` cached tokens each, of one kind."""
    cache = batch * -(-(context + steps) // CACHE_PADDING) * CACHE_PADDING
    threads = len(os.sched_getaffinity(0))
    flags = {
        "-m": file,
        "-c": cache,
        # A thread of the tool's prints its results, and the last may be lost when it exits: one more behind
        # the one that is wanted.
        "-npp": f"{context},1",
        "-ntg": steps,
        "-npl": batch,
        "-t": threads,
        "-tb": threads,
        "-ctk": kind,
        "-ctv": kind,
        "--output-format": "jsonl",
    }
    return [tool, "-pps", *(str(part) for flag in flags.items() for part in flag)]


def timed(command: list[str], context: int) -> dict[str, Any]:
    """Run the tool; what its generation behind `context` tokens took.

    Raises:
        SystemExit: it failed, or printed no such result.
    """
    bound = [sys.executable, "-m", "lamina_jax.cluster.pin", "--parent", str(os.getpid()), "--", *command]
    started, cpu = time.perf_counter(), _children_seconds()
    # Without a deadline of its own: whoever asked has one, and this process ends with it.
    tool = subprocess.run(bound, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    cpus = (_children_seconds() - cpu) / (time.perf_counter() - started)
    printed = [json.loads(line) for line in tool.stdout.splitlines() if line.startswith("{")]
    results = [result for result in printed if result["pp"] == context]
    if tool.returncode or not results:
        last = "\n".join(tool.stderr.splitlines()[-5:])
        raise SystemExit(
            f"{' '.join(command)}: exit code {tool.returncode}, {len(results)} results of "
            f"context {context}; the last that it said:\n{last}"
        )
    result = results[0]
    return {
        "tokens_per_second": result["speed_tg"],
        "seconds": result["t_tg"],
        "steps": result["tg"],
        "cpus": cpus,
    }


def _children_seconds() -> float:
    """Processor time of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
