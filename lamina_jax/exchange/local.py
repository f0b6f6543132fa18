"""The exchange within one process: asynchronous copies from device to device.

Every send queues the consumer's program behind the copy, so that the host is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.core import MicrobatchPlan
from lamina_jax.exchange.base import WireCount
from lamina_jax.exchange.pieces import Arrays, arrays_of, messages_of
from lamina_jax.pool.geometry import HeadTable
from lamina_jax.pool.partition import Partition
from lamina_jax.pool.shard import AttentionShard, Begun


class LocalExchange:
    """Between `mesh`, the compute mesh, and the memory devices of this process.

    A message goes from the device that computed it to the device that reads it, and to no other.

    Args:
        shards: one of each memory device; those of one part of the cache follow each other.
        table: which heads the compute mesh exchanges with each shard of a part.
        partition: how the parts share the cache.
    """

    def __init__(
        self, shards: Sequence[AttentionShard], table: HeadTable, mesh: Mesh, partition: Partition
    ) -> None:
        self.shards, self.table, self.partition = tuple(shards), table, partition
        self.joined = NamedSharding(mesh, P(*mesh.axis_names))
        compute = list(mesh.devices.flat)
        self.homes = [compute[piece.shard] for piece in table.pieces]
        self.wire, self.programs_queued = WireCount(), 0

    def begin(self, plan: MicrobatchPlan) -> LocalStep:
        targets = []
        for part, segment, host in self.partition.split(plan):
            for worker in range(self.table.workers):
                shard = self.shards[part * self.table.workers + worker]
                self.wire.metadata_bytes += sum(array.nbytes for array in host)
                pieces = self.table.of_worker(worker)
                begun = shard.begin(host)
                self.programs_queued += bool(begun.plans)
                targets.append(_Target(shard, begun, segment, pieces))
        return LocalStep(self, targets)

    def fill_pages(self, fill: Callable[[jax.Array], jax.Array]) -> None:
        """Replace every array of pages, of each layer and device, by `fill` of it; for benchmarks."""
        for shard in self.shards:
            for layer, pages in enumerate(shard.pages):  # one by one: two pools may not fit
                shard.pages[layer] = jax.tree.map(fill, pages)


@dataclass(frozen=True)
class _Target:
    """A shard in one microbatch's step: what it has begun, and which messages it is sent."""

    shard: AttentionShard
    begun: Begun
    segment: int
    pieces: range


class LocalStep:
    """One microbatch's step; see `lamina_jax.exchange.base.StepExchange`."""

    def __init__(self, exchange: LocalExchange, targets: list[_Target]) -> None:
        self._exchange, self._targets = exchange, targets
        self._returned: dict[int, list[jax.Array]] = {}

    def send_query(self, layer: int, q: Arrays) -> None:
        self._ask(AttentionShard.attend, layer, q)

    def send_kv(self, layer: int, kv: Arrays) -> None:
        for target, sent in self._sent(kv, kv_alone=True):
            target.shard.append(layer, target.begun, sent)

    def send_all(self, layer: int, qkv: Arrays) -> None:
        self._ask(AttentionShard.append_and_attend, layer, qkv)

    def receive(self, layer: int) -> tuple[Any, ...]:
        return arrays_of(self._returned.pop(layer), self._exchange.table, self._exchange.joined)

    def _ask(self, compute: Callable[..., Arrays], layer: int, arrays: Arrays) -> None:
        """Send what a layer's answers are computed from, and queue them and their way back."""
        self._returned[layer] = [
            answer
            for target, sent in self._sent(arrays)
            for answer in self._back(target, compute(target.shard, layer, target.begun, sent))
        ]

    def _sent(self, arrays: Arrays, *, kv_alone: bool = False) -> Iterator[tuple[_Target, Arrays]]:
        """Every target with its messages, on its device."""
        for target in self._targets:
            self._exchange.programs_queued += 1  # that takes them
            place = target.segment, target.pieces
            messages = messages_of(arrays, self._exchange.table, *place, kv_alone=kv_alone)
            yield target, tuple([self._put(message, target.shard.device) for message in messages])

    def _back(self, target: _Target, messages: Arrays) -> list[jax.Array]:
        homes = self._exchange.homes[target.pieces.start : target.pieces.stop]
        return [self._put(message, home) for message, home in zip(messages, homes, strict=True)]

    def _put(self, message: jax.Array, device: jax.Device) -> jax.Array:
        # A device as such is the cheaper destination of a copy: half the host's time of a sharding.
        self._exchange.wire.count(message.nbytes)
        return jax.device_put(message, device)
