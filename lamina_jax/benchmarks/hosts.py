"""What each compute host sends, receives and does in a step, against compute hosts and attention workers.

All are processes of this machine, so that bytes and messages count here, and times only beside each other. A
model of random weights decodes one batch for so many tokens, and one for twice as many: what the second
adds is steps of decoding alone.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.checkpoints import COMPUTE_BOUND, random_checkpoint
from lamina_jax.benchmarks.processes import (
    Listening,
    Process,
    ServerProcess,
    attend_command,
    cpu_seconds,
    descendants,
    running,
)
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.cluster.forecast import wire_bytes
from lamina_jax.config import EngineConfig
from lamina_jax.pool.geometry import geometry_of, head_table

MODEL = replace(
    COMPUTE_BOUND,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=16,
    num_kv_heads=8,
    max_position=1024,
)
FLAGS = ("--max-model-len", "256", "--page-size", "16", "--prefill-stall-ms", "inf", "--microbatches", "1")
BATCH, TOKENS = 8, 64

TRAFFIC_SECONDS = 1.5
"""Until every compute host has told host 0 what it has exchanged."""

Counters = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4], help="compute hosts")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="attention workers")
    parser.add_argument("--partition", choices=("heads", "requests", "tokens"), default="heads")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    results = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as scratch:
        folder = random_checkpoint(MODEL, Path(scratch))
        for hosts, workers in product(args.hosts, args.workers):
            print(f"starting: {hosts} compute hosts, {workers} attention workers", file=sys.stderr)
            per_host = measure(str(folder), hosts, workers, args.partition)
            formula = expected_bytes(hosts, workers, args.partition)
            results.append({"hosts": hosts, "workers": workers, "formula": formula, "per_host": per_host})
    print(
        f"{MODEL.num_layers} layers, {MODEL.num_heads} query and {MODEL.num_kv_heads} KV heads of "
        f"{MODEL.head_dim}, float32; batch {BATCH}, partition={args.partition}; of a step\n"
    )
    print(table(results))
    return results


def expected_bytes(hosts: int, workers: int, partition: str) -> int:
    """Of q, k, v, o and lse that a step of decoding moves, over all hosts."""
    heads = head_table(MODEL.num_heads, MODEL.num_kv_heads, hosts, workers if partition == "heads" else 1)
    geometry = geometry_of(EngineConfig(), MODEL)
    return wire_bytes(geometry, BATCH, workers, heads.pieces, by_token=partition == "tokens")


def measure(model: str, hosts: int, workers: int, partition: str) -> list[Counters]:
    """Of each compute host, per step: tensor bytes and messages, metadata bytes, CPU milliseconds."""
    flags = [*FLAGS, "--max-num-seqs", str(BATCH), "--partition", partition]
    with ExitStack() as ends:
        pool = [Listening(attend_command(0.05)) for _ in range(workers)]
        for worker in pool:
            ends.enter_context(running(worker))
        flags += ["--attention", ",".join(f"127.0.0.1:{worker.port}" for worker in pool)]
        followers = []
        if hosts > 1:
            flags += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-hosts", str(hosts), "--host-id"]
            serve = [sys.executable, "-m", "lamina_jax.serve", model, *flags]
            commands = [[*serve, str(host)] for host in range(1, hosts)]
            followers = [ends.enter_context(running(Process(command))) for command in commands]
            flags += ["0"]
        server = ends.enter_context(running(ServerProcess(model, flags)))
        engines = [descendants(server.process.pid)[0], *(follower.process.pid for follower in followers)]
        counted = [counters(server, engines, tokens) for tokens in (TOKENS, TOKENS, 2 * TOKENS)]
    return [decoding(*host) for host in zip(*counted, strict=True)]


def decoding(warm: Counters, once: Counters, twice: Counters) -> Counters:
    """Per step of decoding: what a batch of twice as many tokens adds."""
    added = {name: (twice[name] - once[name]) - (once[name] - warm[name]) for name in warm}
    return {name: value / added["steps"] for name, value in added.items() if name != "steps"}


def counters(server: ServerProcess, engines: Sequence[int], tokens: int) -> list[Counters]:
    """After a batch of so many tokens each, the sums so far of each host, whose processes are `engines`."""
    body = {"prompt": [1, 2, 3], "n": BATCH, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    model = server.fetch("/v1/models")["data"][0]["id"]
    server.fetch("/v1/completions", {**body, "model": model})
    time.sleep(TRAFFIC_SECONDS)
    stats = server.fetch("/stats")
    found = stats.get("compute_hosts") or [stats]
    return [
        {
            "steps": stats["steps"],
            "bytes": host["wire_bytes_per_step"] * stats["steps"],
            "messages": host["wire_messages_per_step"] * stats["steps"],
            "metadata": host["wire_metadata_bytes_per_step"] * stats["steps"],
            "cpu_ms": 1e3 * cpu_seconds(engine),
        }
        for host, engine in zip(found, engines, strict=True)
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each cell: all hosts' bytes, and the most that any host has of anything."""
    rows = []
    for result in results:
        per_host = result["per_host"]
        total = sum(host["bytes"] for host in per_host)
        most = {name: max(host[name] for host in per_host) for name in per_host[0]}
        rows.append({**result, **most, "total": total, "share": per_host[0]["bytes"] / total})
    columns = [
        ("hosts x workers", "{hosts} x {workers}"),
        ("bytes, all hosts", "{total:,.0f}"),
        ("formula", "{formula:,}"),
        ("of the busiest", "{bytes:,.0f}"),
        ("of host 0", "{share:.3f}"),
        ("messages", "{messages:.1f}"),
        ("metadata bytes", "{metadata:,.0f}"),
        ("CPU ms", "{cpu_ms:.1f}"),
    ]
    return format_rows(columns, rows)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
