"""Paged attention as it runs on an accelerator, compiled, against a walk over the cached tokens in float64.

What must not be read is NaN in every case (`paged_cases`).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_cases import Case, cases, check, make_case, quantized

from lamina_jax.ops import merge
from pallas_kernels import paged_attention

pytestmark = pytest.mark.hardware

FLOATS = "float32", "bfloat16"
DTYPES = *FLOATS, "int8", "float8_e4m3fn", "uint8"  # uint8: the bits of float8_e4m3fn
TOLERANCE = {"float32": 1e-4}
ROUNDED = 2e-2
"""Of what is multiplied in bfloat16."""

ONE = {"B": 3, "Q": 1, "K": 2, "G": 4, "H": 128, "p": 64, "M": 6, "contexts": [0, 200, 384]}


def case_of(dtype: str, **changes: object) -> Case:
    """ONE, changed, with pages of `dtype`; queries come in bfloat16 where pages are quantised."""
    made = make_case(0, **(ONE | changes), dtype=jnp.dtype(dtype if dtype in FLOATS else "bfloat16"))
    return made if dtype in FLOATS else quantized(made, jnp.dtype(dtype))


def program(case: Case, platform: str) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(paged_attention, **case.options, platform=platform))


def check_on(platform: str, dtype: str, **changes: object) -> None:
    """Compile, run and compare. Only a TPU may refuse: what does not fill its tiles, and fp8 by name."""
    case = case_of(dtype, **changes)
    try:
        outputs = program(case, platform)(*case.operands)
    except ValueError as refusal:
        head_dim = case.q.shape[-1]
        if platform == "tpu" and (head_dim % 128 or dtype in ("float8_e4m3fn", "uint8")):
            pytest.skip(f"refused: {refusal}")
        raise
    check(case, outputs, TOLERANCE.get(dtype, ROUNDED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [64, 80, 96, 128, 256])
def test_head_dimensions(platform: str, dtype: str, H: int) -> None:
    check_on(platform, dtype, H=H)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("G", [1, 2, 3, 5, 7, 8, 16])
def test_groups(platform: str, dtype: str, G: int) -> None:
    check_on(platform, dtype, G=G)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Q", [2, 9, 130])
def test_chunks_of_query_tokens(platform: str, dtype: str, Q: int) -> None:
    check_on(platform, dtype, Q=Q)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("p", [16, 32, 128, 256])
def test_page_sizes(platform: str, dtype: str, p: int) -> None:
    check_on(platform, dtype, p=p, contexts=[0, 2 * p + 1, 6 * p])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{"window": 90}, {"window": 1}, {"worker": 1, "workers": 3}, {"softcap": 3.0}, {"Q": 5, "window": 66}],
    ids=lambda changes: "-".join(f"{name}{value}" for name, value in changes.items()),
)
def test_windows_workers_and_softcap(platform: str, dtype: str, changes: dict) -> None:
    check_on(platform, dtype, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("B", "M", "contexts"),
    [(1, 300, [19_007]), (9, 40, [2560, 0, 1, 64, 65, 0, 1999, 640, 0]), (4, 2, [0, 0, 0, 0])],
    ids=["long", "ragged", "empty"],
)
def test_ragged_batches(platform: str, dtype: str, B: int, M: int, contexts: list[int]) -> None:
    check_on(platform, dtype, B=B, M=M, contexts=contexts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("Q", [1, 6])
def test_drawn_contexts_windows_and_workers_of_one_program(platform: str, dtype: str, Q: int) -> None:
    shape = {"B": 4, "Q": Q, "K": 2, "G": 5, "H": 128, "p": 32, "M": 9}
    compiled = program(case_of(dtype, **shape, contexts=[0] * 4), platform)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def equals_numpy(data: st.DataObject) -> None:
        drawn = data.draw(cases(shape, jnp.dtype(dtype if dtype in FLOATS else "bfloat16")))
        case = drawn if dtype in FLOATS else quantized(drawn, jnp.dtype(dtype))
        check(case, compiled(*case.operands), TOLERANCE.get(dtype, ROUNDED))

    equals_numpy()
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_scores(platform: str, dtype: str) -> None:
    case = case_of(dtype)
    case = replace(case, q=np.round(8 * case.q), pages=np.round(8 * case.pages), scale=1.0)
    check(case, program(case, platform)(*case.operands), TOLERANCE.get(dtype, ROUNDED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_workers_merge_to_the_whole(platform: str, dtype: str) -> None:
    if platform == "tpu" and dtype in ("float8_e4m3fn", "uint8"):
        pytest.skip("a TPU may refuse fp8 by name")
    whole = case_of(dtype)
    shares = [case_of(dtype, worker=worker, workers=3) for worker in range(3)]
    # Each worker holds pages of its own, so the same numbers have to be put where it looks for them.
    shares = [_with_pages_of(whole, share) for share in shares]
    parts = [program(share, platform)(*share.operands) for share in shares]
    check(whole, jax.jit(merge)(parts), TOLERANCE.get(dtype, ROUNDED))


def _with_pages_of(whole: Case, share: Case) -> Case:
    """The share's places, looked up in the whole request's block table."""
    M = whole.block_tables.shape[1]
    places = np.minimum(share.page_index, M - 1)
    tables = np.take_along_axis(whole.block_tables, places, axis=1)
    return replace(share, q=whole.q, pages=whole.pages, block_tables=tables)
