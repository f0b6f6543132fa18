"""What a device's memory gives a program that does nothing else: the measure of `bench kernels`.

An accelerator copies a buffer, and every byte read or written counts. A CPU reads one with all its cores, in
the fastest of several ways: which one that is differs from machine to machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamina_jax.compilation import num_cores

TRIES = 5
"""Of each way to read."""

COPIES = 20
"""One after the other, so that starting them is not what is measured."""

Measure = Callable[[], float]
"""Bytes per second, measured now."""


def bandwidth(devices: Sequence[jax.Device], num_bytes: int) -> Measure:
    """How to measure the memory of `devices`, which is one accelerator or the virtual devices of a CPU.

    Args:
        num_bytes: of the buffer, many times what caches hold.
    """
    if devices[0].platform == "cpu":
        ways = [*_numpy_reads(num_bytes), _xla_read(devices, num_bytes)]
        fastest = min(ways, key=lambda way: statistics.median(_seconds(way) for _ in range(TRIES)))
        return lambda: num_bytes / _seconds(fastest)
    copy = _copy(devices[0], num_bytes)
    return lambda: 2 * num_bytes * COPIES / _seconds(lambda: copy(COPIES))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _numpy_reads(num_bytes: int) -> list[Callable[[], object]]:
    """Reductions in a thread for each core, which numpy computes without the interpreter's lock."""
    # The bits of floats: integers would be subnormal as float32, and slow to multiply.
    ones = np.ones(num_bytes // 8 // num_cores() * num_cores()).view(np.uint64)
    parts = np.split(ones, num_cores())
    threads = ThreadPoolExecutor(num_cores())
    return [
        lambda: list(threads.map(np.bitwise_xor.reduce, parts)),
        lambda: list(threads.map(np.max, parts)),
        lambda: list(threads.map(lambda part: np.dot(part.view(np.float32), part.view(np.float32)), parts)),
    ]


def _xla_read(devices: Sequence[jax.Device], num_bytes: int) -> Callable[[], object]:
    """A sum on every virtual device at once."""
    parts = NamedSharding(Mesh(np.array(devices), ("part",)), PartitionSpec("part"))
    values = jax.device_put(np.ones((len(devices), num_bytes // 4 // len(devices)), np.float32), parts)
    total = jax.jit(lambda values: jnp.sum(values, axis=1)).lower(values).compile()
    total(values)
    return lambda: jax.block_until_ready(total(values))


def _copy(device: jax.Device, num_bytes: int) -> Callable[[int], object]:
    """Copies one after the other, each of what the last one wrote."""
    source = jax.device_put(np.zeros(num_bytes // 4, np.float32), device)
    add_one = jax.jit(lambda values: values + 1).lower(source).compile()

    def copy(times: int) -> object:
        values = source
        for _ in range(times):
            values = add_one(values)
        return jax.block_until_ready(values)

    copy(2)
    return copy
