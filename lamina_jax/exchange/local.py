"""The exchange within one process: asynchronous copies from device to device.

Every send queues the consumer's program behind the copy, so that the host is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina_jax.core import MicrobatchPlan
from lamina_jax.exchange.base import WireCount
from lamina_jax.exchange.pieces import Arrays, arrays_of, messages_of
from lamina_jax.pool.geometry import HeadTable
from lamina_jax.pool.metadata import StepMetadata
from lamina_jax.pool.shard import AttentionShard, Bucket


class LocalExchange:
    """Between `mesh`, the compute mesh, and `shards`, one of each worker of the head table.

    A message goes from the device that computed it to the device that reads it, and to no other.
    """

    def __init__(self, shards: Sequence[AttentionShard], table: HeadTable, mesh: Mesh) -> None:
        self.shards, self.table = tuple(shards), table
        self.joined = NamedSharding(mesh, P(*mesh.axis_names))
        compute = list(mesh.devices.flat)
        self.homes = [compute[piece.shard] for piece in table.pieces]
        self.pieces = [table.of_worker(worker) for worker in range(table.workers)]
        self.kv_pieces = [[j for j in pieces if table.pieces[j].sends_kv] for pieces in self.pieces]
        self.wire, self.programs_queued = WireCount(), 0

    def begin(self, plan: MicrobatchPlan) -> LocalStep:
        metadata = [shard.begin(plan) for shard in self.shards]
        self.wire.metadata_bytes += sum(array.nbytes for meta in metadata for array in meta)
        return LocalStep(self, plan.bucket, metadata)

    def fill_pages(self, fill: Callable[[jax.Array], jax.Array]) -> None:
        """Replace the pages of every layer and device by `fill` of them."""
        for shard in self.shards:
            shard.pages = list(map(fill, shard.pages))


class LocalStep:
    """One microbatch's step; see `lamina_jax.exchange.base.StepExchange`."""

    def __init__(self, exchange: LocalExchange, bucket: Bucket, metadata: list[StepMetadata]) -> None:
        self._exchange, self._bucket, self._metadata = exchange, bucket, metadata
        self._returned: dict[int, list[jax.Array]] = {}

    def send_query(self, layer: int, q: Arrays) -> None:
        sent = self._sent(q, self._exchange.pieces)
        self._returned[layer] = self._back(
            part
            for shard, meta, pieces in zip(self._exchange.shards, self._metadata, sent, strict=True)
            for part in shard.attend(layer, self._bucket, meta, pieces)
        )

    def send_kv(self, layer: int, kv: Arrays) -> None:
        sent = self._sent(kv, self._exchange.kv_pieces)
        for shard, meta, pieces in zip(self._exchange.shards, self._metadata, sent, strict=True):
            shard.append(layer, self._bucket, meta, pieces)

    def send_all(self, layer: int, qkv: Arrays) -> None:
        sent = self._sent(qkv, self._exchange.pieces)
        self._returned[layer] = self._back(
            part
            for shard, meta, pieces in zip(self._exchange.shards, self._metadata, sent, strict=True)
            for part in shard.append_and_attend(layer, self._bucket, meta, pieces)
        )

    def receive(self, layer: int) -> Arrays:
        return arrays_of(self._returned.pop(layer), self._exchange.table, self._exchange.joined)

    def _sent(self, arrays: Arrays, wanted: Sequence[Sequence[int]]) -> Iterator[Arrays]:
        """Of each worker its messages, on its device."""
        messages = messages_of(arrays, self._exchange.table)
        for shard, pieces in zip(self._exchange.shards, wanted, strict=True):
            self._exchange.programs_queued += 1  # that takes them
            yield tuple([self._put(messages[j], shard.device) for j in pieces])

    def _back(self, messages: Iterable[jax.Array]) -> list[jax.Array]:
        return [
            self._put(message, home) for message, home in zip(messages, self._exchange.homes, strict=True)
        ]

    def _put(self, message: jax.Array, device: jax.Device) -> jax.Array:
        # A device as such is the cheaper destination of a copy: half the host's time of a sharding.
        self._exchange.wire.add(message)
        return jax.device_put(message, device)
