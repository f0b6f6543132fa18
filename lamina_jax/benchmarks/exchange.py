"""The exchange: q there and (o, lse) back over each channel, beside raw ping-pongs of the same bytes.

The engine's side is pinned to one core, a null worker in a process of its own to another. Three things are
timed in turn, round after round, so that a busy neighbour meets all of them alike:

raw: bytes over a plain socket or gRPC stream, nothing around them.
frames: a channel, from a numpy array to a numpy array.
arrays: from a jax array that has been computed, to the end of a compiled program that takes the answer as it
lies in the receive buffer. The program reads one number of it.
call: of that, from when the answer is there to the end of the program: in a decode loop this is the start of
the next slice, and no part of the exchange.

Of device arrays (jax) raw is JAX's own transfer with pulls posted ahead, and arrays the exchange made of it.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.exchange_transfer import transfer_trips
from lamina_jax.benchmarks.null_worker import DEADLINE_SECONDS, RAW_METHOD, receive_raw
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.rounds import in_turn, ratio
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.exchange.channel import Channel
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.grpc import GrpcChannel, stream_options
from lamina_jax.exchange.socket import connect

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}
"""Bytes of q, in 16 bits with a head dimension of 128; lse adds a 64th to the answer."""
GOALS = {"tcp": 1.5, "unix": 1.5, "grpc": 1.3}
"""At most so many times raw, at 64 KB."""

KINDS = ("raw", "frames", "arrays", "call")

_NULL_TRANSFER = [sys.executable, "-m", "lamina_jax.benchmarks.null_transfer"]

Trip = Callable[[], float]
"""One round trip; the seconds it took."""


TABLE = [
    ("", "{size}, {way}"),
    ("raw", "{raw_us:.0f}"),
    ("spread", "{raw_spread:.0%}"),
    ("frames", "{frames_us:.0f}"),
    ("spread", "{frames_spread:.0%}"),
    ("of raw", "{frames_ratio:.2f}"),
    ("arrays", "{arrays_us:.0f}"),
    ("spread", "{arrays_spread:.0%}"),
    ("of raw", "{arrays_ratio:.2f}"),
    ("call", "{call_us:.0f}"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "4 KB, 64 KB and 1 MB in 20 rounds", sizes=list(SIZES)[:3], rounds=20)
    parser.set_defaults(sizes=list(SIZES))
    parser.add_argument("--rounds", type=int, default=50, help="timings of each way")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    sizes, rounds = args.sizes, args.rounds
    allowed = os.sched_getaffinity(0)
    engine, worker = min(allowed), max(allowed)
    results = [row for name in sizes for row in _measure(name, rounds, engine, worker)]
    print(f"round trips in microseconds between cores {engine} and {worker}; median of {rounds} rounds")
    print(format_rows(TABLE, results))
    for row in results:
        if row["size"] == "64 KB" and (goal := GOALS.get(row["way"])):
            found = {kind: row[f"{kind}_ratio"] for kind in ("frames", "arrays")}
            words = [f"{kind} {of:.2f} ({'met' if of <= goal else 'missed'})" for kind, of in found.items()]
            print(f"goal: {row['way']} at 64 KB at most {goal} of raw: {', '.join(words)}")
    return results


def _measure(name: str, rounds: int, engine_core: int, worker_core: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    query = SIZES[name]
    answer = query + query // 64
    with ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="lamina-bench-"))
        command = [sys.executable, "-m", "lamina_jax.benchmarks.null_worker", folder, str(query), str(answer)]
        worker = ends.enter_context(closing(Column("null worker", command, str(worker_core))))
        devices_at = f"{folder}/devices"
        command = [*_NULL_TRANSFER, devices_at, str(query), str(answer)]
        devices = ends.enter_context(closing(Column("null transfer worker", command, str(worker_core))))
        raw_port, frames_port, grpc_port = map(int, worker.line().split())
        ends.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {engine_core})
        options = [("grpc.use_local_subchannel_pool", 1), *stream_options(answer)]
        calls = ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options))
        channels: dict[str, Channel] = {
            "tcp": connect(f"127.0.0.1:{frames_port}", DEADLINE_SECONDS),
            "unix": connect(f"unix:{folder}/frames", DEADLINE_SECONDS),
            "grpc": GrpcChannel(calls, (), DEADLINE_SECONDS),
        }
        tcp = ends.enter_context(socket.create_connection(("127.0.0.1", raw_port)))
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        unix = ends.enter_context(socket.socket(socket.AF_UNIX))
        unix.connect(f"{folder}/raw")
        trips = {
            ("tcp", "raw"): _raw_socket(tcp, query, answer),
            ("unix", "raw"): _raw_socket(unix, query, answer),
            ("grpc", "raw"): _raw_grpc(calls, query),
        }
        for way, channel in channels.items():
            ends.callback(channel.close)
            trips[way, "frames"] = _frames(channel, query)
            trips[way, "arrays"], trips[way, "call"] = _arrays(channel, query, answer)
        for kind, trip in transfer_trips(ends, devices, devices_at, query, answer).items():
            trips["jax", kind] = trip
        times = _times(trips, rounds, max(2, min(50, (8 << 20) // query)))
    return [
        _row(way, name, {kind: times[way, kind] for kind in KINDS if (way, kind) in times})
        for way in (*channels, "jax")
    ]


def _times(trips: dict[tuple[str, str], Trip], rounds: int, count: int) -> dict[tuple[str, str], list[float]]:
    """Of each round the median of `count` trips, in microseconds. The first round warms up."""

    def median(trip: Trip) -> float:
        return 1e6 * statistics.median(trip() for _ in range(count))

    times = in_turn({key: partial(median, trip) for key, trip in trips.items()}, rounds + 1)
    return {key: values[1:] for key, values in times.items()}


def _row(way: str, size: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    row: dict[str, Any] = {"size": size, "way": way}
    for kind, values in times.items():
        tenth = statistics.quantiles(values, n=10)
        row[f"{kind}_us"] = statistics.median(values)
        row[f"{kind}_spread"] = (tenth[-1] - tenth[0]) / row[f"{kind}_us"]
        row[f"{kind}_ratio"] = ratio(values, times["raw"])
    return row


def _raw_socket(sock: socket.socket, query: int, answer: int) -> Trip:
    data, into = bytes(query), memoryview(bytearray(answer))

    def trip() -> float:
        started = time.perf_counter()
        sock.sendall(data)
        receive_raw(sock, into)
        return time.perf_counter() - started

    return trip


def _raw_grpc(calls: grpc.Channel, query: int) -> Trip:
    data = bytes(query)
    outbox: SimpleQueue[bytes] = SimpleQueue()
    call = calls.stream_stream(RAW_METHOD)(iter(outbox.get, None))

    def trip() -> float:
        started = time.perf_counter()
        outbox.put(data)
        next(call)
        return time.perf_counter() - started

    return trip


def _frames(channel: Channel, query: int) -> Trip:
    data = np.zeros(query, np.uint8)

    def trip() -> float:
        started = time.perf_counter()
        channel.send(Header(Kind.QUERY, query), [data])
        channel.receive(_room)
        return time.perf_counter() - started

    return trip


def _arrays(channel: Channel, query: int, answer: int) -> tuple[Trip, Trip]:
    """The trip, and one that tells the seconds of the call alone."""
    message = jax.ShapeDtypeStruct((answer // 2,), jnp.uint16)
    consume = jax.jit(lambda answer: answer[-1]).lower(message).compile()
    zeros = jnp.zeros((query // 256, 128), jnp.uint16)
    produce = jax.jit(lambda q: q + jnp.uint16(1)).lower(zeros).compile()

    def times() -> tuple[float, float, float]:
        q = produce(zeros).block_until_ready()  # a new one, since jax keeps the numpy array of an old one
        started = time.perf_counter()
        channel.send(Header(Kind.QUERY, query), [np.asarray(q)])
        payload = channel.receive(_room).payload
        answered = time.perf_counter()
        consume(payload.view(np.uint16)).block_until_ready()
        return started, answered, time.perf_counter()

    def trip() -> float:
        started, _, ended = times()
        return ended - started

    def call() -> float:
        _, answered, ended = times()
        return ended - answered

    return trip, call


def _room(header: Header) -> int:
    return header.length
