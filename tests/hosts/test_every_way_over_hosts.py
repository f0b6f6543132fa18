"""Hosts x workers x partitions x exchanges: the collocated tokens, and on each host the formula's bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest
from compute_hosts import MODEL, HostsOfEngines
from host_of_engines import answer
from real_processes import PROMPT, SETTINGS, WorkerProcess

from lamina_jax.engine.buckets import decode_buckets

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]

LENGTHS = (1, 9, 64, 100)
"""Shorter and longer than a page and a chunk; more of them than there are seats."""

GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
SEEDED = GREEDY | {"temperature": 0.9, "seed": 7, "top_p": 0.9}

EXCHANGES = {
    "unix": ("socket", "127.0.0.1"),
    "tcp": ("socket", "localhost"),  # not the name that a worker listens at: it might be another machine's
    "grpc": ("grpc", "127.0.0.1"),
    "jax": ("jax", "127.0.0.1"),
}


def batches() -> list[tuple[list[list[int]], list[dict[str, Any]]]]:
    """One prompt alone, whose bytes are easily told; then several, greedy and seeded."""
    rng = np.random.default_rng(5)
    several = [rng.integers(0, MODEL.vocab_size, size=length).tolist() for length in LENGTHS] * 2
    sampling = [GREEDY] * len(LENGTHS) + [SEEDED] * len(LENGTHS)
    return [([PROMPT], [GREEDY]), (several, sampling)]


@pytest.fixture(scope="module")
def collocated(checkpoint: str) -> list[list[list[int]]]:
    found: list[list[list[int]]] = answer(
        {"model": checkpoint, "placement": "collocated", **SETTINGS}, batches()
    )["tokens"]
    return found


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    """Of two workers, which all engines lease in turn."""
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(WorkerProcess())) for _ in range(2)]
        yield [worker.wait_listening().port for worker in workers]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostsOfEngines]:
    with closing(HostsOfEngines(tmp_path_factory.mktemp("hosts"))) as hosts:
        yield hosts


WAYS = list(itertools.product((1, 2), (1, 2), ("heads", "requests", "tokens"), EXCHANGES))
DEVICES = ("cpu:0", "cpu:0-1")


@pytest.mark.parametrize(
    ("num_hosts", "num_workers", "partition", "exchange", "devices"),
    # Of each host; in turn, so that each partition and each exchange has met both.
    [(*way, DEVICES[(i + i // len(EXCHANGES)) % 2]) for i, way in enumerate(WAYS)],
)
def test_the_collocated_tokens_and_the_formulas_bytes(
    checkpoint: str,
    collocated: list[list[list[int]]],
    ports: list[int],
    two_hosts: HostsOfEngines,
    num_hosts: int,
    num_workers: int,
    partition: str,
    exchange: str,
    devices: str,
) -> None:
    kind, host = EXCHANGES[exchange]
    settings = SETTINGS | {
        "model": checkpoint,
        "attention": ",".join(f"{host}:{port}" for port in ports[:num_workers]),
        "partition": partition,
        "exchange": kind,
        "compute_devices": devices,
    }
    found = (answer if num_hosts == 1 else two_hosts.answer)(settings, batches())
    assert found["tokens"] == collocated
    alone, last = found["stats"]
    assert last["compilations_after_ready"] == 0
    assert last["pages_free"] == last["pages_total"]
    assert len(last["weight_devices"]) == num_hosts * (2 if devices == "cpu:0-1" else 1)

    # One prompt in one chunk, then one row a step, in the smallest buckets.
    assert alone["steps"] == GREEDY["max_tokens"]
    each = {bytes_per_step * alone["steps"] for bytes_per_step, *_ in alone["hosts"]}
    rows = decode_buckets(SETTINGS["max_num_seqs"], num_workers if partition == "requests" else 1)[0]
    shape: dict[str, Any] = {
        "hosts": num_hosts,
        "workers": num_workers,
        "partition": partition,
        "exchange": exchange,
    }
    chunk = step_bytes(SETTINGS["max_prefill_tokens"], len(PROMPT), **shape, cached=False)
    assert each == {chunk + (alone["steps"] - 1) * step_bytes(rows, 1, **shape, cached=True)}


def step_bytes(
    rows: int, tokens: int, *, hosts: int, workers: int, partition: str, exchange: str, cached: bool
) -> int:
    """Of `tokens` in a batch of so many rows, on one host, in all layers: q, k, v out, o and lse back."""
    q = rows * MODEL.num_heads // hosts * MODEL.head_dim * 4
    back = q + rows * MODEL.num_heads // hosts * 4
    copies, kept = 1, rows
    if partition == "tokens":
        # A worker is sent what it keeps, and nobody keeps padding; as arrays, of static shapes, all of it.
        copies, kept = workers, workers * rows if exchange == "jax" else tokens
    kv = 2 * kept * MODEL.num_kv_heads // hosts * MODEL.head_dim * 4
    return MODEL.num_layers * (kv + (copies * (q + back) if cached else 0))
