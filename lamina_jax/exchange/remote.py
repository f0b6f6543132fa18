"""The exchange with attention workers in other processes, over any channel.

Frames to a worker are sent in order by the sender; answers are received by the decode loop's own thread,
which waits for them in `receive` and nowhere else. A worker that is lost raises `WorkerLost` there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.core import MicrobatchPlan, WorkerLost
from lamina_jax.exchange.base import WireCount
from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.pieces import Arrays, arrays_of, messages_of
from lamina_jax.exchange.sender import Outgoing, Sender
from lamina_jax.exchange.timings import Stamps, Timings
from lamina_jax.pool.geometry import HeadTable
from lamina_jax.pool.message import message_dtype
from lamina_jax.pool.partition import Partition, Told
from lamina_jax.pool.shares import HeadShare

MOST_REASON_BYTES = 4096
"""Of the text in which a worker says why it gives up."""

SOCKET_BYTES = 128 * 1024
"""Answers of this size fit the buffers of any connection, so that sending them holds no worker up."""

MOST_KEPT = 64
"""Answers that came before anybody wanted them: of each microbatch one, its last layer's."""

CLOSE_SECONDS = 1.0


class Worker:
    """One attention worker.

    Attributes:
        address: of its process.
        channel: to it.
        due_bytes: of the answers that have not come.
        wire: counts its answers.
        lost: why it is lost, if it is.
        clock_offset_ns: about how much its clock is ahead of ours.
        stamps: where its times are noted; None: nowhere.
    """

    stamps: Stamps | None = None

    def __init__(self, address: str, channel: Channel, clock_offset_ns: int = 0) -> None:
        self.address, self.channel, self.clock_offset_ns = address, channel, clock_offset_ns
        self.due_bytes, self.wire = 0, WireCount()
        self.lost: str | None = None
        self._kept: dict[Header, np.ndarray] = {}

    def lose(self, reason: str) -> None:
        """Note the first reason, and wake whoever waits for the worker; from any thread."""
        self.lost = self.lost or reason
        self.channel.close()

    def frame(
        self, header: Header, arrays: Sequence[jax.Array | np.ndarray], tokens: np.ndarray | None
    ) -> Outgoing:
        """What is to be sent to it of a layer; see `Outgoing`."""
        given_ns = 0 if self.stamps is None else monotonic_ns()
        return Outgoing(self.channel, header, arrays, tokens, self.stamps, given_ns)

    def check(self) -> None:
        """Raises `WorkerLost` where it is lost."""
        if self.lost:
            raise WorkerLost(self.address, self.lost)

    def blame(self) -> None:
        """A program of the step has failed: lose the worker if that came of it."""

    def begin(self, microbatch: int) -> None:
        """A step of a microbatch begins: nobody comes for answers of the one before."""
        self._kept = {key: kept for key, kept in self._kept.items() if key.microbatch != microbatch}

    def answer(self, wanted: Header) -> np.ndarray:
        """Wait for the answer with this microbatch, layer, step and length. Others are kept for later.

        Raises:
            WorkerLost: it will not come.
        """
        if self.stamps is not None:
            self.stamps.waits(wanted)
        while wanted not in self._kept:
            try:
                header, payload = self.channel.receive(self._room)
            except (ChannelClosed, ProtocolError) as error:
                self.lose(str(error))
                break
            payload = payload[: header.length]
            if header.kind == Kind.FAILED:
                self.lose(payload.tobytes().decode(errors="replace"))
                break
            if self.stamps is not None:
                self.stamps.answered(header)
            self.due_bytes -= header.length
            self.wire.count(header.length)
            self._kept[header._replace(received_ns=0, done_ns=0)] = payload
            if len(self._kept) > MOST_KEPT:
                self.lose(f"it sends answers that nobody asked for, such as {header}")
                break
        else:
            return self._kept.pop(wanted)
        raise WorkerLost(self.address, self.lost or "")

    def _room(self, header: Header) -> int:
        most = {Kind.ANSWER: self.due_bytes, Kind.FAILED: MOST_REASON_BYTES}.get(header.kind, -1)
        if header.length > most:
            raise ProtocolError(f"a worker sends no {header}")
        return header.length


class RemoteExchange:
    """Between `mesh`, the compute mesh, and workers; see `lamina_jax.exchange.base.Exchange`.

    Args:
        shares: what is exchanged with each worker of a part of the cache.
        table: which heads this host's devices of the compute mesh exchange with each device of a part.
        partition: how the parts share the cache.
        wire_dtype, head_dim: of what is exchanged.
        timings: what the times of it are noted in; None: nothing is.

    Attributes:
        told: the number of the last step that each part of the cache was told of; 0: of none.
    """

    def __init__(
        self,
        shares: Sequence[HeadShare],
        table: HeadTable,
        mesh: Mesh,
        partition: Partition,
        *,
        wire_dtype: str,
        head_dim: int,
        timings: Timings | None = None,
    ) -> None:
        self.workers: tuple[Worker, ...] = ()
        self.table, self.partition, self.timings = table, partition, timings
        self.joined = NamedSharding(mesh, P(*mesh.axis_names))
        self.message_dtype = message_dtype(wire_dtype)
        self._heads, self._head_dim = table.pieces[0].q_stop - table.pieces[0].q_start, head_dim
        self._compute = mesh.local_devices
        self.in_place = mesh.size == 1 and self._compute[0].platform == "cpu"
        self._pieces = [share.pieces for share in shares]
        self.wire, self.programs_queued = WireCount(), 0
        self._step_type: type[RemoteStep] = RemoteStep
        self._sends_kept = partition.kind == "tokens"  # k and v go only to who keeps them
        self._sender, self._steps = Sender(), 0
        self.told = [0] * partition.workers

    def attach(self, workers: Sequence[Worker]) -> None:
        """Exchange with these from now on; those of one part of the cache follow each other."""
        self.workers, self._sender = tuple(workers), Sender()
        self.told = [0] * self.partition.workers
        for worker in workers:
            worker.wire = self.wire
        if self.timings is not None:
            self.timings.restart([worker.clock_offset_ns for worker in workers], self._sender.cpu_ns)
            for worker, stamps in zip(workers, self.timings.workers, strict=True):
                worker.stamps = stamps

    def begin(self, plan: MicrobatchPlan) -> RemoteStep:
        self._steps = self._steps + 1 & 0xFFFFFFFF
        header = Header(Kind.BEGIN, 0, plan.microbatch, 0, self._steps)
        if self.timings is not None:
            self.timings.begin(header)
        return self._step_type(self, header, list(self._targets(header, self.partition.split(plan))))

    def _targets(self, header: Header, parts: list[Told]) -> Iterator[_Target]:
        """Every worker that takes part, which is told its part of the step."""
        for part, segment, told in parts:
            self.told[part] = header.step
            rows, queries = told.positions.shape
            tokens, metadata = None, told
            if self._sends_kept:
                tokens, slots = self._kept_tokens(told.slots)
                metadata = told._replace(slots=slots)
            numbers = np.concatenate(
                [np.array([rows, queries], np.int32), *[array.reshape(-1) for array in metadata]]
            )
            for i, pieces in enumerate(self._pieces):
                worker = self.workers[part * len(self._pieces) + i]
                worker.begin(header.microbatch)
                self.wire.metadata_bytes += numbers.nbytes
                self.send(worker, Outgoing(worker.channel, header, (numbers,)))
                size = rows * queries * self._heads * (self._head_dim + 4 // self.message_dtype.itemsize)
                yield _Target(worker, segment, pieces, tokens, size * self.message_dtype.itemsize)

    def send(self, worker: Worker, frame: Outgoing) -> None:
        """Send a frame when its arrays have been computed; returns at once."""
        self._sender.send(frame, at_once=worker.due_bytes <= SOCKET_BYTES)

    def _kept_tokens(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that a worker keeps, and `slots` with theirs first and padding behind them."""
        tokens = self.partition.kept(slots)
        compact = np.full_like(slots, self.partition.padding_slot)
        compact.reshape(-1)[: len(tokens)] = slots.reshape(-1)[tokens]
        return tokens, compact

    def place(self, message: np.ndarray, piece: int) -> jax.Array | np.ndarray:
        """A message where its shard's program reads it; on a CPU of one shard, where it is."""
        if self.in_place:
            return message
        return jax.device_put(message, self._compute[self.table.pieces[piece].shard])

    def close(self) -> None:
        """End the connections; what waits for them gets `WorkerLost`."""
        for worker in self.workers:
            worker.lose("the engine has closed the connection")
        self._sender.close(CLOSE_SECONDS)
        self.workers = ()


@dataclass(frozen=True)
class _Target:
    """A worker in one microbatch's step: which segment of the rows and which pieces it is sent, which
    tokens it keeps (None: all), and the bytes of one piece of its answer."""

    worker: Worker
    segment: int
    pieces: range
    tokens: np.ndarray | None
    answer_bytes: int


class RemoteStep:
    """One microbatch's step; see `lamina_jax.exchange.base.StepExchange`."""

    def __init__(self, exchange: RemoteExchange, header: Header, targets: list[_Target]) -> None:
        self._exchange, self._header, self._targets = exchange, header, targets

    def send_query(self, layer: int, q: Arrays) -> None:
        self._send(Kind.QUERY, layer, q)

    def send_kv(self, layer: int, kv: Arrays) -> None:
        self._send(Kind.KV, layer, kv)

    def send_all(self, layer: int, qkv: Arrays) -> None:
        self._send(Kind.QKV, layer, qkv)

    def receive(self, layer: int) -> tuple[Any, ...]:
        exchange, found = self._exchange, []
        for target in self._targets:
            length = len(target.pieces) * target.answer_bytes
            wanted = self._header._replace(kind=Kind.ANSWER, layer=layer, length=length)
            answer = target.worker.answer(wanted).view(exchange.message_dtype)
            messages = answer.reshape(len(target.pieces), -1)
            found += [exchange.place(*pair) for pair in zip(messages, target.pieces, strict=True)]
        if exchange.in_place:
            return tuple(found)
        return arrays_of(found, exchange.table, exchange.joined)

    def _send(self, kind: Kind, layer: int, arrays: Arrays) -> None:
        table, header = self._exchange.table, self._header._replace(kind=kind, layer=layer)
        for target in self._targets:
            tokens = target.tokens if kind == Kind.KV else None
            if tokens is not None and not len(tokens):
                continue
            sent = messages_of(arrays, table, target.segment, target.pieces, kv_alone=kind == Kind.KV)
            frame = target.worker.frame(header, sent, tokens)
            self._exchange.wire.count(frame.nbytes)
            self._exchange.send(target.worker, frame)
            if kind != Kind.KV:
                target.worker.due_bytes += len(target.pieces) * target.answer_bytes
