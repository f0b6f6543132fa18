"""The scheduler's limits: how many pages, rows and tokens there are, and the buckets compiled for them.

It owns the static shapes of a step. It knows nothing of requests, devices or jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.config import ConfigError
from lamina_jax.pool.partition import PartitionKind

_POSITIVE = (
    "vocab_size",
    "num_pages",
    "page_size",
    "max_model_len",
    "max_num_seqs",
    "max_waiting",
    "microbatches",
    "workers",
)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits of a scheduler. ConfigError names the setting that cannot be obeyed.

    Args:
        vocab_size: V.
        num_pages: P, pages of the KV pool; of each worker, where the cache is partitioned.
        page_size: p, tokens per page.
        max_model_len: longest prompt + continuation in tokens.
        max_num_seqs: requests that hold pages at once.
        max_waiting: requests in the queue beyond which the engine takes no more.
        microbatches: n, decode microbatches.
        decode_buckets: the row counts B that a decode microbatch can have, ascending.
        prefill_buckets: the (B, Q) that a prefill microbatch can have: chunks of at most Q tokens of B
            prompts.
        prefill_seconds: how long a microbatch of each of them takes; None: not measured.
        prefill_stall: how long requests that decode may wait for one, in seconds.
        partition: how the attention workers share the cache.
        workers: W, the workers that page ids tell apart: 1 by head, where all of them have the same pages.
    """

    vocab_size: int
    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    microbatches: int
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[tuple[int, int], ...]
    prefill_seconds: tuple[float, ...] | None = None
    prefill_stall: float = float("inf")
    max_waiting: int = 1024
    partition: PartitionKind = "heads"
    workers: int = 1

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.partition == "heads" and self.workers != 1:
            raise ConfigError(
                f"workers={self.workers}: by head all workers have the same pages, so that the scheduler "
                "sees one; give workers=1, or partition=requests or tokens"
            )
        if self.padding_slot >= 2**31:
            raise ConfigError(
                f"workers={self.workers} * num_pages={self.num_pages} * page_size={self.page_size} does not "
                "fit int32: lower num_pages"
            )
        self._check_buckets()

    def _check_buckets(self) -> None:
        ascending = all(a < b for a, b in zip((0, *self.decode_buckets), self.decode_buckets, strict=False))
        if not self.decode_buckets or not ascending:
            raise ConfigError(f"decode_buckets must be positive and ascending, got {self.decode_buckets}")
        if self.decode_buckets[-1] < self.rows_per_microbatch:
            raise ConfigError(
                f"decode_buckets={self.decode_buckets} have no room for {self.rows_per_microbatch} rows "
                f"(max_num_seqs={self.max_num_seqs}, microbatches={self.microbatches}): add a larger one"
            )
        if any(rows % self.segments for rows in self.decode_buckets):
            raise ConfigError(
                f"decode_buckets={self.decode_buckets} must be multiples of workers={self.workers}: by "
                "request each has an equal share of the rows"
            )
        if not self.prefill_buckets or min(min(bucket) for bucket in self.prefill_buckets) < 1:
            raise ConfigError(f"prefill_buckets must be pairs of positive (B, Q), got {self.prefill_buckets}")

    @property
    def total_pages(self) -> int:
        """Pages of all workers."""
        return self.workers * self.num_pages

    @property
    def most_pages(self) -> int:
        """Pages of the largest request that can ever be held."""
        return self.total_pages if self.partition == "tokens" else self.num_pages

    @property
    def segments(self) -> int:
        """Equal parts of a decode microbatch's rows: by request, one for each worker."""
        return self.workers if self.partition == "requests" else 1

    def segment(self, worker: int) -> int:
        """The part of the rows that a worker's requests are in."""
        return worker % self.segments

    @property
    def seats(self) -> int:
        """Requests that each segment's worker takes at once: ceil(max_num_seqs / segments)."""
        return -(-self.max_num_seqs // self.segments)

    @property
    def rows_per_microbatch(self) -> int:
        """Most live rows of one decode microbatch: ceil(seats / n) of each segment."""
        return self.segments * -(-self.seats // self.microbatches)

    @property
    def table_width(self) -> int:
        """M, the width of a block table: pages of the longest request."""
        return -(-self.max_model_len // self.page_size)

    @property
    def padding_slot(self) -> int:
        """The slot of a token that is not kept: one past all pages, so that its write is dropped."""
        return self.total_pages * self.page_size
