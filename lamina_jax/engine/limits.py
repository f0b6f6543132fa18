"""The settings of a configuration that depend on the model and on the devices, resolved. No jax here."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.engine.buckets import Bucket, decode_buckets, prefill_buckets
from lamina_jax.engine.scheduler_config import SchedulerConfig
from lamina_jax.pool.partition import PartitionKind

DEFAULT_PREFILL_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Lengths and batch shapes of an engine; see `EngineConfig` for the names, and `SchedulerConfig` for
    `workers`."""

    max_model_len: int
    max_num_seqs: int
    max_prefill_tokens: int
    microbatches: int
    overlap: bool
    page_size: int
    max_waiting: int
    partition: PartitionKind = "heads"
    workers: int = 1

    @property
    def rows(self) -> int:
        """Most rows of a microbatch, padding included."""
        prefill = max(rows for rows, _ in self.prefill_buckets)
        return max(self.decode_buckets[-1], prefill)

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        segments = self.workers if self.partition == "requests" else 1
        return decode_buckets(-(-self.max_num_seqs // self.microbatches), segments)

    @property
    def prefill_buckets(self) -> tuple[tuple[int, int], ...]:
        return prefill_buckets(self.max_prefill_tokens, self.max_num_seqs)

    def buckets(self) -> list[tuple[Bucket, bool]]:
        """Every (B, Q), and whether it has a cached part."""
        decode = [((rows, 1), True) for rows in self.decode_buckets]
        return decode + [(bucket, cached) for bucket in self.prefill_buckets for cached in (False, True)]

    @property
    def pages_per_request(self) -> int:
        """M: pages of a request of max_model_len."""
        return -(-self.max_model_len // self.page_size)

    def scheduler(self, num_pages: int, vocab_size: int) -> SchedulerConfig:
        """The scheduler's view of them, with a pool of `num_pages` (of each worker)."""
        return SchedulerConfig(
            vocab_size=vocab_size,
            num_pages=num_pages,
            page_size=self.page_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_waiting=self.max_waiting,
            microbatches=self.microbatches,
            decode_buckets=self.decode_buckets,
            prefill_buckets=self.prefill_buckets,
            partition=self.partition,
            workers=self.workers,
        )


def resolve_limits(
    config: EngineConfig, max_position: int, *, share_silicon: bool, workers: int = 1
) -> Limits:
    """Fill in what was left to be chosen.

    Where both meshes share silicon nothing is hidden behind anything: one microbatch, since two read
    the weights twice.

    Args:
        workers: attention workers that share the cache.

    Raises:
        ConfigError: a length beyond the model's own.
    """
    max_model_len = config.max_model_len or max_position
    if max_model_len > max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the model's own limit of {max_position}"
        )
    if config.max_prefill_tokens and config.max_prefill_tokens > max_model_len:
        raise ConfigError(
            f"max_prefill_tokens={config.max_prefill_tokens} is more than max_model_len={max_model_len}"
        )
    chosen = 1 if share_silicon or config.placement == "collocated" else 2
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        max_prefill_tokens=config.max_prefill_tokens or min(max_model_len, DEFAULT_PREFILL_TOKENS),
        microbatches=chosen if config.microbatches == "auto" else config.microbatches,
        # By token, q goes to every worker and k, v to one: they never share a message.
        overlap=config.overlap == "on"
        or (config.overlap == "auto" and (not share_silicon or config.partition == "tokens")),
        page_size=config.page_size,
        partition=config.partition,
        workers=1 if config.partition == "heads" else workers,
    )
