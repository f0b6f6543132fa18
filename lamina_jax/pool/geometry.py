"""The shape of the paged KV cache, and who holds which KV heads. No jax here.

One array per layer, [P, 2, K, p, H]: a page id means the same slot in every layer. The cache is
partitioned by KV head over the devices of the memory mesh (paper 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """L layers, P pages, p tokens per page, K KV heads and N query heads of size H.

    `dtype` is the logical dtype of k and v in the pages, `wire_dtype` that of q, k, v and o as they come
    and go (the activations'): "float32" or "bfloat16".
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
        return 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def share(self, workers: int) -> CacheGeometry:
        """The geometry of one of `workers` equal shares of the heads."""
        return replace(self, num_kv_heads=self.num_kv_heads // workers, num_heads=self.num_heads // workers)


@dataclass(frozen=True)
class HeadRange:
    """The heads that memory worker `worker` holds: KV heads [kv_start, kv_stop) and their queries'."""

    worker: int
    kv_start: int
    kv_stop: int
    q_start: int
    q_stop: int


def head_ranges(num_heads: int, num_kv_heads: int, workers: int) -> tuple[HeadRange, ...]:
    """Who holds what: the one table by which q, k, v and o are cut for the exchange."""
    kv, group = num_kv_heads // workers, num_heads // num_kv_heads
    return tuple(
        HeadRange(w, w * kv, (w + 1) * kv, w * kv * group, (w + 1) * kv * group) for w in range(workers)
    )
