"""The exchange within one process: asynchronous copies from device to device.

Every send queues the consumer's program behind the copy, so that the host is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Sharding

from lamina_jax.core import MicrobatchPlan
from lamina_jax.exchange.base import WireCount
from lamina_jax.pool.metadata import StepMetadata
from lamina_jax.pool.shard import AttentionShard, Bucket


class LocalExchange:
    """Between the compute mesh, where arrays come back placed as `compute` says, and `shards`.

    A device as such is the cheaper destination of a copy: half the host's time of a sharding.
    """

    def __init__(self, shards: Sequence[AttentionShard], compute: Sharding | jax.Device) -> None:
        self.shards, self.compute = tuple(shards), compute
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
        self._returned: dict[int, tuple[jax.Array, ...]] = {}

    def send_query(self, layer: int, q: tuple[jax.Array, ...]) -> None:
        self._returned[layer] = tuple(
            self._back(shard.attend(layer, self._bucket, meta, self._out(shard, part)))
            for shard, meta, part in zip(self._exchange.shards, self._metadata, q, strict=True)
        )

    def send_kv(self, layer: int, kv: tuple[jax.Array, ...]) -> None:
        for shard, meta, part in zip(self._exchange.shards, self._metadata, kv, strict=True):
            shard.append(layer, self._bucket, meta, self._out(shard, part))

    def send_all(self, layer: int, qkv: tuple[jax.Array, ...]) -> None:
        self._returned[layer] = tuple(
            self._back(shard.append_and_attend(layer, self._bucket, meta, self._out(shard, part)))
            for shard, meta, part in zip(self._exchange.shards, self._metadata, qkv, strict=True)
        )

    def receive(self, layer: int) -> tuple[jax.Array, ...]:
        return self._returned.pop(layer)

    def _out(self, shard: AttentionShard, array: jax.Array) -> jax.Array:
        self._exchange.wire.add(array)
        self._exchange.programs_queued += 1  # each message to a shard is one program's input
        return jax.device_put(array, shard.device)

    def _back(self, message: jax.Array) -> jax.Array:
        self._exchange.wire.add(message)
        return jax.device_put(message, self._exchange.compute)
