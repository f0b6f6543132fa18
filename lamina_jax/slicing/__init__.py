"""A plain JAX function cut at its attention operators (paper 4.2): `slice_at_attention`."""

from __future__ import annotations

from lamina_jax.slicing.slices import Sliced, slice_at_attention
from lamina_jax.slicing.stages import Attention, Port, Slice, Stage

__all__ = ["Attention", "Port", "Slice", "Sliced", "Stage", "slice_at_attention"]
