"""The engine's end of round trips of device arrays: JAX's transfer alone, and the exchange made of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

import jax
import jax.numpy as jnp
from jax.experimental.transfer import start_transfer_server
from jax.sharding import SingleDeviceSharding

from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.null_transfer import DEADLINE_SECONDS, KEY, LOCAL
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.socket import connect
from lamina_jax.exchange.transfer import TransferLink


def transfer_trips(
    ends: ExitStack, worker: Column, path: str, query: int, answer: int
) -> dict[str, Callable[[], float]]:
    """By kind of column, what makes a round trip of so many bytes and returns its seconds.

    raw: pulls posted ahead on both sides, each side waiting for its array.
    arrays: a frame and an offer there; the answer is pulled at once, and the program that takes it queued
    behind it. This alone is waited for.

    Args:
        ends: what closes the connection.
        worker: a `lamina_jax.benchmarks.null_transfer` of these bytes at `path`.
    """
    (device,) = jax.local_devices()[:1]
    server = start_transfer_server(device.client, f"{LOCAL}:0", [f"{LOCAL}:0"])
    link = TransferLink(device, LOCAL, KEY)
    found = worker.answer({"raw": server.address(), "exchange": link.address})
    connection = server.connect(found["raw"])
    link.connect(found["exchange"])
    channel = connect(f"unix:{path}", DEADLINE_SECONDS)
    ends.callback(channel.close)

    back = jax.ShapeDtypeStruct((answer // 2,), jnp.uint16, sharding=SingleDeviceSharding(device))
    consume = jax.jit(lambda answer: answer[-1]).lower(back).compile()
    zeros = jnp.zeros(query // 2, jnp.uint16)
    produce = jax.jit(lambda q: q + jnp.uint16(1)).lower(zeros).compile()
    numbers, steps = count(), count()

    def raw() -> float:
        number = next(numbers)
        q = produce(zeros).block_until_ready()
        started = time.perf_counter()
        answer = connection.pull(2 * number + 1, [back])
        server.await_pull(2 * number, [q])
        jax.block_until_ready(answer)
        return time.perf_counter() - started

    def arrays() -> float:
        header = Header(Kind.QUERY, 0, step=next(steps))
        q = produce(zeros).block_until_ready()
        started = time.perf_counter()
        link.offer(header, [q])
        channel.send(header, [])
        (answer,) = link.pull(header._replace(kind=Kind.ANSWER), [back])
        consume(answer).block_until_ready()
        return time.perf_counter() - started

    return {"raw": raw, "arrays": arrays}
