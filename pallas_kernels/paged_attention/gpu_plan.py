"""How the cached tokens of a batch are shared among a fixed number of GPU programs, each the same number.

Plain integers from the lengths alone: one plan serves every layer of a step that has the same window.
Knows nothing of heads, of dtypes or of the products.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.paged_attention.contract import first_visible, visited_entries


class SplitPlan(NamedTuple):
    """Parts of requests, in the order of the requests: programs + B of them, of which the last may be empty.

    A slot is a place in a request's block table, counted in tokens: entry * p + offset.

    Attributes:
        request: whose slots the part reads.
        start: the first of them.
        stop: the one after the last.
        program_parts: program c computes the parts program_parts[c] <= i < program_parts[c + 1].
        request_parts: request b is the merge of request_parts[b] <= i < request_parts[b + 1].
    """

    request: Int32[Array, " parts"]
    start: Int32[Array, " parts"]
    stop: Int32[Array, " parts"]
    program_parts: Int32[Array, " programs+1"]
    request_parts: Int32[Array, "B+1"]


def plan_splits(
    context_lens: Int32[Array, "B"],
    page_index: Int32[Array, "B M"],
    q_positions: Int32[Array, "B Q"],
    window: Int32[Array, ""] | int,
    *,
    page_size: int,
    block: int,
    programs: int,
) -> SplitPlan:
    """Cut the slots that the requests visit into `programs` runs of equally many blocks.

    The blocks of all requests are laid end to end; a part begins where a program's share does or where a
    request does, so that a program may end one request and begin the next.

    Args:
        context_lens, page_index, q_positions, window: as of `pallas_kernels.paged_attention`.
        page_size: p.
        block: slots that a program reads at a time; a part begins at a multiple of it from its request's
            first visited page.
        programs: C, how many share the work of one KV head.
    """
    first_entry, stop_entry = visited_entries(
        page_index, context_lens, first_visible(q_positions, window), page_size
    )
    blocks = ((stop_entry - first_entry) * page_size + (block - 1)) // block
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    begins = ends - blocks
    total = ends[-1]
    share = jnp.maximum((total + (programs - 1)) // programs, 1)

    # Every edge once: an empty request has none, nor has a request that begins where a program does.
    program_edges = share * jnp.arange(programs, dtype=jnp.int32)
    own_edge = (blocks > 0) & (begins % share != 0)
    edges = jnp.sort(
        jnp.concatenate([jnp.minimum(program_edges, total), jnp.where(own_edge, begins, total), total[None]])
    )
    begin, end = edges[:-1], edges[1:]
    request = jnp.minimum(_count(ends[None, :] <= begin[:, None]), len(blocks) - 1)
    first_slot = first_entry * page_size

    def slot(edge: Int32[Array, " parts"]) -> Int32[Array, " parts"]:
        return first_slot[request] + (edge - begins[request]) * block

    def first_part(edge: Int32[Array, " edges"]) -> Int32[Array, " edges"]:
        return _count(begin[None, :] < edge[:, None])

    return SplitPlan(
        request=request,
        start=slot(begin),
        stop=jnp.minimum(slot(end), stop_entry[request] * page_size),
        program_parts=first_part(jnp.append(jnp.minimum(program_edges, total), total)),
        request_parts=first_part(jnp.append(begins, total)),
    )


def _count(condition: Bool[Array, "X Y"]) -> Int32[Array, " X"]:
    return jnp.sum(condition, axis=1, dtype=jnp.int32)
