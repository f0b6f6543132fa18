"""What the memory side is told once per microbatch and step: pages, lengths, positions, slots.

Importing it loads no jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lamina_jax.core import MicrobatchPlan

if TYPE_CHECKING:
    from jax.sharding import Sharding

Leaf = Any
"""An array, on the host or on devices; or its `jax.ShapeDtypeStruct` while a program is compiled."""


class StepMetadata(NamedTuple):
    """The memory side's part of a `MicrobatchPlan`, which see for the shapes. All int32."""

    block_tables: Leaf
    context_lens: Leaf
    page_index: Leaf
    positions: Leaf
    slots: Leaf


def metadata_of(plan: MicrobatchPlan) -> StepMetadata:
    """On the host."""
    return StepMetadata(plan.block_tables, plan.context_lens, plan.page_index, plan.positions, plan.slots)


def metadata_shapes(bucket: tuple[int, int], pages_per_request: int, place: Sharding) -> StepMetadata:
    """For a bucket (B, Q) and block tables of M = `pages_per_request` places."""
    import jax

    def struct(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, np.int32, sharding=place)

    rows, _ = bucket
    table = struct(rows, pages_per_request)
    return StepMetadata(table, struct(rows), table, struct(*bucket), struct(*bucket))
