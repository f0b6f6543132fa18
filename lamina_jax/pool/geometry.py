"""The shape of the paged KV cache, and who holds which heads. No jax here.

Each layer's pages are [P, 2, K, p, H]: a page id means the same slot in every layer. The cache is
partitioned by KV head over the devices of the memory mesh (paper 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamina_jax.config import ConfigError, EngineConfig

if TYPE_CHECKING:
    from lamina_jax.models import ModelConfig

KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
"""Of one value in the pages, by dtype; those of one byte come with a scale."""

SCALE_BYTES = 4
"""Of the float32 scale that a k or v vector of one token and head has in quantised pages."""


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """L layers, P pages, p tokens per page, K KV heads and N query heads of size H.

    `dtype` is the logical dtype of k and v in the pages, one of `KV_BYTES`; `wire_dtype` that of q, k, v
    and o as they come and go (the activations'): "float32" or "bfloat16".
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    dtype: str
    wire_dtype: str

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page id: its k and v in every layer, over all devices."""
        return self.num_layers * self.page_size * self.bytes_per_token_and_layer

    @property
    def bytes_per_token_and_layer(self) -> int:
        """Bytes of the k and v of one token in one layer, their scales included, over all devices."""
        vector = self.head_dim * KV_BYTES[self.dtype] + (SCALE_BYTES if self.is_quantized else 0)
        return 2 * self.num_kv_heads * vector

    @property
    def is_quantized(self) -> bool:
        """Whether each vector of k and v is kept as values of one byte and a scale."""
        return KV_BYTES[self.dtype] == 1

    def share(self, workers: int) -> CacheGeometry:
        """The geometry of one of `workers` equal shares of the heads."""
        return replace(self, num_kv_heads=self.num_kv_heads // workers, num_heads=self.num_heads // workers)


def geometry_of(config: EngineConfig, shape: ModelConfig, num_pages: int = 0) -> CacheGeometry:
    """The whole cache of a model, its dtypes as they are configured."""
    activations = shape.dtype if config.dtype == "auto" else config.dtype
    kept_as = {"auto": activations, "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
    return CacheGeometry(
        num_layers=shape.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=shape.num_kv_heads,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        dtype=kept_as.get(config.kv_dtype, config.kv_dtype),
        wire_dtype=activations if config.wire_dtype == "auto" else config.wire_dtype,
    )


@dataclass(frozen=True)
class Piece:
    """Heads that one compute shard has in common with one worker: query heads [q_start, q_stop) and
    their KV heads [kv_start, kv_stop). `sends_kv`: of several shards with the same KV heads, the lowest.
    """

    shard: int
    worker: int
    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    sends_kv: bool

    def __str__(self) -> str:
        heads = f"{_span('query', self.q_start, self.q_stop)}, {_span('KV', self.kv_start, self.kv_stop)}"
        return heads if self.sends_kv else f"{heads} (k and v come from a shard before)"


@dataclass(frozen=True)
class HeadTable:
    """Who talks to whom: t compute shards and W workers cut the heads in c = max(t, W) equal pieces.

    Piece j is on compute shard j // (c / t) and on worker j // (c / W).
    """

    shards: int
    workers: int
    pieces: tuple[Piece, ...]

    @property
    def per_shard(self) -> int:
        """Pieces of one compute shard."""
        return len(self.pieces) // self.shards

    @property
    def per_worker(self) -> int:
        """Pieces of one worker."""
        return len(self.pieces) // self.workers

    @property
    def copies(self) -> int:
        """Compute shards that hold the same KV head: more than one where they outnumber the KV heads."""
        return sum(piece.kv_start == self.pieces[0].kv_start for piece in self.pieces)

    def of_worker(self, worker: int) -> range:
        """The indices of a worker's pieces."""
        return range(worker * self.per_worker, (worker + 1) * self.per_worker)


def head_table(num_heads: int, num_kv_heads: int, shards: int, workers: int) -> HeadTable:
    """The one table by which q, k, v and o are cut for the exchange; `workers` divides the KV heads.

    With more shards than KV heads each shard has one, computed from weights that were repeated.

    Raises:
        ConfigError: heads that so many shards cannot share evenly, among each other or with the workers.
    """
    if not _even(num_heads, num_kv_heads, shards, workers):
        fitting = [str(t) for t in range(1, num_heads + 1) if _even(num_heads, num_kv_heads, t, workers)]
        raise ConfigError(
            f"compute_devices names {shards} devices, which cannot share the model's {num_heads} query and "
            f"{num_kv_heads} KV heads evenly with {workers} memory devices; {', '.join(fitting)} would"
        )
    count = max(shards, workers)
    copies = max(1, count // num_kv_heads)
    q, kv = num_heads // count, max(1, num_kv_heads // count)
    return HeadTable(
        shards,
        workers,
        tuple(
            Piece(
                shard=j * shards // count,
                worker=j * workers // count,
                q_start=j * q,
                q_stop=(j + 1) * q,
                kv_start=j // copies * kv,
                kv_stop=(j // copies + 1) * kv,
                sends_kv=j % copies == 0,
            )
            for j in range(count)
        ),
    )


def _span(kind: str, start: int, stop: int) -> str:
    return f"{kind} head {start}" if stop == start + 1 else f"{kind} heads {start}-{stop - 1}"


def _even(num_heads: int, num_kv_heads: int, shards: int, workers: int) -> bool:
    def either(a: int, b: int) -> bool:
        return a % b == 0 or b % a == 0

    return num_heads % shards == 0 and either(shards, num_kv_heads) and either(shards, workers)
