"""The few static shapes that a step may have (invariant 6). No jax here."""

from __future__ import annotations

import numpy as np

Bucket = tuple[int, int]
"""(B, Q): rows and new tokens per row."""

SMALLEST_BATCH = 4
"""Rows below which XLA on a CPU multiplies bfloat16 matrices ten times slower."""

SHORT_PROMPT = 64


def decode_buckets(rows: int, segments: int = 1) -> tuple[int, ...]:
    """Row counts of a decode microbatch of at most `rows` requests: powers of two times `segments`, from 4
    up."""
    buckets = [segments]
    while buckets[0] < SMALLEST_BATCH:
        buckets[0] *= 2
    while buckets[-1] < rows:
        buckets.append(2 * buckets[-1])
    return tuple(buckets)


def prefill_buckets(max_prefill_tokens: int, max_num_seqs: int) -> tuple[tuple[int, int], ...]:
    """Pairs (B, Q): one long prompt, four of a quarter of it, and one short prompt."""
    pairs = {(1, max_prefill_tokens)}
    if max_prefill_tokens >= 4 * SHORT_PROMPT:
        pairs.add((1, SHORT_PROMPT))
        if max_num_seqs > 1:
            pairs.add((min(4, max_num_seqs), -(-max_prefill_tokens // 4)))
    return tuple(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])))


def padded_rows(rows: np.ndarray) -> np.ndarray:
    """int32[max(B, 4)]: rows of a matrix product, padded with zeros to the smallest batch."""
    return np.pad(rows, (0, max(0, SMALLEST_BATCH - len(rows))))
