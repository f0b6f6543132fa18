"""What the decode loop asks of an exchange between the compute mesh and the memory mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from lamina_jax.core import MicrobatchPlan


@dataclass
class WireCount:
    """What crossed between the meshes: tensor bytes and messages, step metadata apart.

    With more compute shards than KV heads, k and v sent by themselves count once per KV head as ever;
    in a message with q they count once per shard, since all shards run one program and send alike.
    """

    tensor_bytes: int = 0
    messages: int = 0
    metadata_bytes: int = 0

    def count(self, nbytes: int) -> None:
        """Count one message."""
        self.messages += 1
        self.tensor_bytes += nbytes


@runtime_checkable
class StepExchange(Protocol):
    """One microbatch's step, as the compute side sees it. B rows of Q new tokens.

    A tensor is cut along its heads in c pieces by `lamina_jax.pool.geometry.HeadTable`. It is a tuple
    of c / t arrays, each sharded over the compute mesh with one piece of each of the t shards (so that
    t = 1: one array of each piece); of a decode step over a cache that is partitioned by request, so many
    for each worker's segment of the rows. b: rows of a segment; n, k: query and KV heads of a piece.

    A layer either sends q first and k, v when they are ready (`send_query`, `send_kv`), or all in one
    message (`send_all`). No call waits for the other side.
    """

    def send_query(self, layer: int, q: tuple[jax.Array, ...]) -> None:
        """q[b, Q, t n, H] to the workers, which start on the cached part."""
        ...

    def send_kv(self, layer: int, kv: tuple[jax.Array, ...]) -> None:
        """kv[b, Q, t 2k, H] (of each shard k's heads, then v's) to the workers, to be appended to pages.
        Of shards with the same KV heads the lowest one sends."""
        ...

    def send_all(self, layer: int, qkv: tuple[jax.Array, ...]) -> None:
        """qkv[b, Q, t (n + 2k), H]: both of the above. Every shard sends its k and v, copies too."""
        ...

    def receive(self, layer: int) -> tuple[Any, ...]:
        """The cached parts: c / t arrays of t messages of `lamina_jax.pool.message`, on their shards, for
        each segment, or for each worker where the tokens are partitioned."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """A way between the meshes."""

    wire: WireCount
    programs_queued: int
    """Programs that this process has queued for the memory side."""

    def begin(self, plan: MicrobatchPlan) -> StepExchange:
        """Tell every worker the step's pages, slots and lengths."""
        ...
