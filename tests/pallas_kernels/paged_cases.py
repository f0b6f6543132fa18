"""Calls of paged attention with made-up pages, and what they must return, computed token by token.

Everything that must not be seen is NaN. The expected values are float64 numpy, by a walk over the
cached tokens that shares nothing with the code under test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from jax.typing import DTypeLike

from pallas_kernels import NO_PAGE, QuantizedPages, paged_attention

NO_WINDOW = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """The operands as numpy arrays; q and pages already rounded to the dtype under test. Pages are one
    array, or two: `QuantizedPages`."""

    q: np.ndarray
    pages: Any
    block_tables: np.ndarray
    context_lens: np.ndarray
    page_index: np.ndarray
    q_positions: np.ndarray
    window: int
    scale: float
    softcap: float | None

    @property
    def operands(self) -> tuple[jnp.ndarray, ...]:
        arrays = (self.q, self.pages, self.block_tables, self.context_lens, self.page_index, self.q_positions)
        return (*jax.tree.map(jnp.asarray, arrays), jnp.int32(self.window))

    @property
    def options(self) -> dict[str, float | None]:
        return {"scale": self.scale, "softcap": self.softcap}


def make_case(
    seed: int,
    *,
    B: int,
    Q: int,
    K: int,
    G: int,
    H: int,
    p: int,
    M: int,
    contexts: list[int],
    window: int = NO_WINDOW,
    softcap: float | None = None,
    dtype: DTypeLike = np.float32,
    worker: int = 0,
    workers: int = 1,
) -> Case:
    """B requests with these contexts, of at most M pages each; the pages of one of `workers` that hold
    every request's pages in turn."""
    rng = np.random.default_rng(seed)
    places = [list(range(-(-context // p)))[worker::workers] for context in contexts]
    P = B * M + 1
    ids = rng.permutation(P)

    pages = np.full((P, 2, K, p, H), np.nan, dtype)
    block_tables = np.zeros((B, M), np.int32)
    page_index = np.full((B, M), NO_PAGE, np.int32)
    for b, row in enumerate(places):
        if workers == 1:  # as the scheduler writes it
            page_index[b] = np.arange(M)
        for m, place in enumerate(row):
            block_tables[b, m] = page = ids[b * M + m]
            page_index[b, m] = place
            if (place + 1) * p <= contexts[b] - window + 1:
                continue  # before the window of the first, so of every new token
            filled = min(contexts[b] - place * p, p)
            pages[page, :, :, :filled] = rng.standard_normal((2, K, filled, H))

    context_lens = np.array(contexts, np.int32)
    return Case(
        q=rng.standard_normal((B, Q, K * G, H)).astype(dtype),
        pages=pages,
        block_tables=block_tables,
        context_lens=context_lens,
        page_index=page_index,
        q_positions=context_lens[:, None] + np.arange(Q, dtype=np.int32),
        window=window,
        scale=H**-0.5,
        softcap=softcap,
    )


def quantized(case: Case, stored: DTypeLike) -> Case:
    """The same case with its pages rounded to int8, float8_e4m3fn or uint8, the bits of the latter. What
    must not be seen is NaN in the scales, and in the values where they can be."""
    pages = np.asarray(case.pages, np.float32)
    empty = np.isnan(pages).all(axis=-1)
    largest = np.abs(np.where(empty[..., None], 0, pages)).max(axis=-1)
    if stored == np.int8:
        scales = np.where(largest > 0, largest, 1) / np.float32(127)
        values = np.rint(np.where(empty[..., None], 77, pages / scales[..., None])).astype(np.int8)
    else:
        scales = np.where(largest > 0, largest, 1) / np.float32(448)
        values = (pages / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
        values = values.view(stored)
    return replace(case, pages=QuantizedPages(values, np.where(empty, np.nan, scales).astype(np.float32)))


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    return {
        "B": draw(st.integers(1, 5)),
        "Q": draw(st.integers(1, 9)),
        "K": draw(st.integers(1, 4)),
        "G": draw(st.sampled_from([1, 2, 3, 5, 7, 8])),
        "H": draw(st.sampled_from([8, 16, 24, 64, 128])),
        "p": draw(st.sampled_from([4, 8, 16, 64])),
        "M": draw(st.integers(1, 6)),
    }


@st.composite
def cases(draw: st.DrawFn, shape: dict[str, int], dtype: DTypeLike = np.float32) -> Case:
    """What can differ without another shape."""
    B, p, M = shape["B"], shape["p"], shape["M"]
    workers = draw(st.integers(1, 3))
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        **shape,
        contexts=draw(st.lists(st.integers(0, M * p), min_size=B, max_size=B)),
        window=draw(st.one_of(st.just(NO_WINDOW), st.integers(1, M * p))),
        dtype=dtype,
        worker=draw(st.integers(0, workers - 1)),
        workers=workers,
    )


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """float64 o [B Q N H] and lse [B Q N]."""
    B, Q, N, H = case.q.shape
    G = N // case.pages.shape[2]
    o, lse = np.zeros((B, Q, N, H)), np.full((B, Q, N), -np.inf)
    for b in range(B):
        cached = dict(_cached_tokens(case, b))  # position -> [2, K, H]
        for i in range(Q):
            seen = [kv for s, kv in cached.items() if s > case.q_positions[b, i] - case.window]
            if not seen:
                continue
            k, v = np.stack(seen, axis=2)  # [K, S, H] each
            for n in range(N):
                scores = case.scale * (k[n // G] @ case.q[b, i, n].astype(np.float64))
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores - scores.max())
                o[b, i, n] = weights @ v[n // G] / weights.sum()
                lse[b, i, n] = scores.max() + np.log(weights.sum())
    return o, lse


def _cached_tokens(case: Case, b: int) -> Iterator[tuple[int, np.ndarray]]:
    vectors, page_size = dequantized(case.pages), case.pages.shape[3]
    for page, place in zip(case.block_tables[b], case.page_index[b], strict=True):
        for offset in range(page_size):
            position = int(place) * page_size + offset
            if position < case.context_lens[b]:
                yield position, vectors[page, :, :, offset]


def dequantized(pages: Any) -> np.ndarray:
    """K and V in float64."""
    if not isinstance(pages, QuantizedPages):
        return np.asarray(pages).astype(np.float64)
    values, scales = map(np.asarray, pages)
    values = values.view(ml_dtypes.float8_e4m3fn) if values.dtype == np.uint8 else values
    return values.astype(np.float64) * scales[..., None].astype(np.float64)


def attend(case: Case, **options: object) -> tuple[jax.Array, jax.Array]:
    """Paged attention, compiled, with these options."""
    program = jax.jit(functools.partial(paged_attention, **case.options, **options))
    return program(*case.operands)


def check(case: Case, outputs: tuple[jax.Array, jax.Array], tolerance: float = 1e-5) -> None:
    for got, want in zip(outputs, expected(case), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
