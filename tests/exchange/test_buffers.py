"""A receive buffer is written again only when no array, view or program can still read it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax.exchange.buffers import ALIGNMENT, BufferPool

COUNT = 4096
SLOW = jnp.full((96, 96), 1 / 96)


def _sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of x, read only when some time has passed."""
    delay = jax.lax.fori_loop(0, 4, lambda _, a: a @ weights, weights)[0, 0]
    return x.sum() + 0 * delay


def _double(x: jax.Array, weights: jax.Array) -> jax.Array:
    """As long as x, so that a donated x may be written to."""
    return x + _sum(x, weights) / COUNT


SUM = jax.jit(_sum).lower(jnp.zeros(COUNT), SLOW).compile()
DONATED = jax.jit(_double, donate_argnums=0).lower(jnp.zeros(COUNT), SLOW).compile()
ROWS = jax.jit(lambda x, w: _sum(x.ravel(), w)).lower(jnp.zeros((64, 64)), SLOW).compile()

WAYS: dict[str, Callable[[np.ndarray], tuple[jax.Array, float]]] = {
    "straight to a program": lambda x: (SUM(x, SLOW), COUNT),
    "through device_put": lambda x: (SUM(jax.device_put(x), SLOW), COUNT),
    "a reshaped view": lambda x: (ROWS(x.reshape(64, 64), SLOW), COUNT),
    "a part of it": lambda x: (jnp.sum(jax.device_put(x[: COUNT // 2])), COUNT / 2),
    "donated by the program": lambda x: (DONATED(x, SLOW), 2),
    "device_put, then donated": lambda x: (DONATED(jax.device_put(x), SLOW), 2),
    "kept as an array": lambda x: (jax.device_put(x), 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_poisoned_free_buffers_change_no_result(way: str) -> None:
    """Every buffer is filled with NaNs as soon as it is free, while programs over others still run."""
    pool, rng = BufferPool(per_size=8), random.Random(0)
    pending: deque[tuple[jax.Array, float]] = deque()
    addresses = set()
    for i in range(600):
        pool.take(COUNT * 4).view(np.float32)[:] = np.nan
        buffer = pool.take(COUNT * 4)
        addresses.add(buffer.ctypes.data)
        x = buffer.view(np.float32)
        x[:] = i
        result, factor = WAYS[way](x)
        pending.append((result, factor * i))
        del buffer, x
        while len(pending) > rng.choice([1, 4, 12]):
            result, expected = pending.popleft()
            np.testing.assert_array_equal(np.asarray(result), np.float32(expected))
    assert len(addresses) < 300, "buffers are used again"


def test_a_buffer_in_use_is_not_handed_out() -> None:
    pool = BufferPool(per_size=2)
    held = [pool.take(100) for _ in range(5)]
    assert len({buffer.ctypes.data for buffer in held}) == 5
    first = held[0].ctypes.data
    view = held[0][10:20].view(np.int16)[1:]
    memory = memoryview(held[0])
    held.clear()
    assert first not in {pool.take(100).ctypes.data for _ in range(5)}
    del view
    assert first not in {pool.take(100).ctypes.data for _ in range(5)}
    memory.release()
    assert first in {pool.take(100).ctypes.data for _ in range(5)}


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 100_000])
def test_size_and_alignment(nbytes: int) -> None:
    buffer = BufferPool().take(nbytes)
    assert (buffer.nbytes, buffer.dtype) == (nbytes, np.uint8)
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert buffer.flags.writeable


def test_what_is_kept_is_bounded() -> None:
    pool = BufferPool(per_size=2, sizes=3)
    for nbytes in range(1000, 1100):
        held = [pool.take(nbytes) for _ in range(4)]
        assert len({buffer.ctypes.data for buffer in held}) == 4
    kept = [buffer for buffers in pool._kept.values() for buffer in buffers]
    assert sorted(buffer.nbytes for buffer in kept) == [1097, 1097, 1098, 1098, 1099, 1099]
