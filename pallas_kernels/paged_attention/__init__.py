"""The cached part of attention: new tokens' queries against a request's KV pages, as (o, lse).

Owns the contract and the choice of a reading for a platform. Knows nothing of layers, of the new tokens'
attention among themselves (the local part), or of merging the two.
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention.contract import (
    NO_PAGE,
    Pages,
    QuantizedPages,
    check_shapes,
    logical_dtype,
)
from pallas_kernels.paged_attention.cpu import paged_attention_cpu
from pallas_kernels.paged_attention.gpu import paged_attention_gpu, split_plan_gpu
from pallas_kernels.paged_attention.gpu_plan import SplitPlan
from pallas_kernels.paged_attention.native import paged_attention_native
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.taken import refusal
from pallas_kernels.paged_attention.tpu import paged_attention_tpu

__all__ = [
    "NO_PAGE",
    "PLATFORMS",
    "Pages",
    "QuantizedPages",
    "SplitPlan",
    "paged_attention",
    "refusal",
    "split_plan",
]

PLATFORMS = ("cpu", "native", "gpu", "tpu")


def paged_attention(
    q: Float[Array, "B Q N H"],
    pages: Pages,
    block_tables: Int32[Array, "B M"],
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None = None,
    dtype: DTypeLike | None = None,
    platform: str | None = None,
    plan: SplitPlan | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """Attention of Q new tokens for each of B requests over the cached tokens that `pages` hold.

    The new token at position t sees the cached token at position s where t - window < s and
    s < context_len. There is no causal mask: every cached token precedes every new one. The pages may hold
    the whole context or, where several workers share a request's tokens, a part of it; the results
    of the parts are merged by their lse (paper 4.2.2).

    Slot j of the page at entry m of a block table holds position page_index[m] * p + j. The entries with
    page_index * p < context_len hold cached tokens. Slots beyond the context, pages wholly before the
    window of every new token, and all other pages may contain anything, NaN too.
    So `page_index` increases along a row, and an entry that holds no page has one that lies at or beyond
    the context: where one worker holds whole requests every row is simply 0, 1, ... M - 1; where several
    share a request, a row holds the places of this worker's pages, then NO_PAGE.

    Works inside `jax.jit` and, split by KV head, inside `jax.shard_map`.

    Args:
        q: queries of the new tokens, of any float dtype; query head n reads KV head n // G.
        pages: K and V; float32, bfloat16 or float16, or the bits of one of the latter two as uint16,
            [P, 2, K, p, H]; or QuantizedPages.
        block_tables: page ids in 0 .. P - 1; any id where there is no page.
        context_lens: cached tokens of each request, on all workers together; 0 for a row without any.
        page_index: the place of each of those pages in its request.
        q_positions: position of each new token in its request.
        window: how far back a token sees, itself included; 2**30 for no window.
        scale: of q . k, before the softcap.
        softcap: scores become softcap * tanh(scores / softcap).
        dtype: what the pages hold; needed where they are uint16.
        platform: "cpu", "native" (a CPU's, `pallas_kernels.native.load` comes first), "gpu" or "tpu": the
            reading written for it; None: plain XLA operators, for any platform. "tpu" and "native" take
            some pages only: `refusal` says which.
        plan: of `split_plan`, for programs of layers that share it; None: made here.
        interpret: run the Pallas kernel of "gpu" or "tpu" in interpret mode, on any device.

    Returns:
        o: normalised output, 0 for the rows that see no cached token.
        lse: natural logarithm of the sum of exp(score), -inf for those rows.

    Raises:
        ValueError: shapes, dtypes or a platform that do not fit, named with their values.
    """
    check_shapes(q, pages, block_tables, context_lens, page_index, q_positions)
    where = (block_tables, context_lens, page_index, q_positions, window)
    held = logical_dtype(pages, dtype)
    if platform not in (None, *PLATFORMS):
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)} or None, got {platform!r}")
    if interpret and platform not in ("gpu", "tpu"):
        raise ValueError(f"interpret=True needs a Pallas kernel: platform='gpu' or 'tpu', got {platform!r}")
    if plan is not None and platform != "gpu":
        raise ValueError(f"only platform='gpu' takes a plan, got one for {platform!r}: leave plan out")
    if platform == "tpu":
        return paged_attention_tpu(q, pages, *where, scale=scale, softcap=softcap, interpret=interpret)
    if platform == "gpu":
        return paged_attention_gpu(
            q, pages, *where, scale=scale, softcap=softcap, dtype=held, plan=plan, interpret=interpret
        )
    if platform == "native":
        return paged_attention_native(q, pages, *where, scale=scale, softcap=softcap, dtype=held)
    if platform == "cpu":
        return paged_attention_cpu(q, pages, *where, scale=scale, softcap=softcap, dtype=held)
    return paged_attention_reference(q, pages, *where, scale=scale, softcap=softcap, dtype=held)


def split_plan(
    q: Float[Array | jax.ShapeDtypeStruct, "B Q N H"],
    pages: Pages | jax.ShapeDtypeStruct,
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    platform: str | None,
    interpret: bool = False,
) -> SplitPlan | None:
    """What `paged_attention` with these arguments works out before it reads a page; None: nothing.

    Calls may share it that differ in the numbers in q and pages, in block tables, scale and softcap alone. Of
    q and pages only shapes and dtypes matter: inside `jax.shard_map`, those of a device's own share.
    """
    if platform != "gpu":
        return None
    return split_plan_gpu(q, pages, context_lens, page_index, q_positions, window, interpret=interpret)
