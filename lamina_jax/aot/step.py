"""What is compiled: a model's decode step at a load, cut at its attentions. Knows nothing of devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lamina_jax.config import EngineConfig
from lamina_jax.engine.buckets import SMALLEST_BATCH, Bucket
from lamina_jax.engine.compute import step_shapes
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.placement import describe_weight
from lamina_jax.models import Storage, as_function, build
from lamina_jax.models.shapes import SHAPES
from lamina_jax.pool.geometry import CacheGeometry, geometry_of
from lamina_jax.slicing import Sliced, slice_at_attention
from lamina_jax.weights.loader import spec_of


@dataclass(frozen=True)
class Step:
    """One decode step of `rows` requests with `context` tokens each in the cache, of a model of `SHAPES`."""

    model: str
    rows: int
    context: int
    kv_dtype: Any = "auto"

    @cached_property
    def config(self) -> EngineConfig:
        """Attention is elsewhere and hidden behind the compute side's work, as between unlike devices."""
        return EngineConfig(
            max_model_len=self.context,
            max_num_seqs=self.rows,
            microbatches=1,
            overlap="on",
            kv_dtype=self.kv_dtype,
        )

    @cached_property
    def limits(self) -> Limits:
        return resolve_limits(self.config, SHAPES[self.model].max_position, share_silicon=False)

    @property
    def bucket(self) -> Bucket:
        return self.limits.decode_buckets[-1], 1

    @cached_property
    def geometry(self) -> CacheGeometry:
        """Of the whole cache, with the pages that the step's requests fill."""
        return geometry_of(self.config, SHAPES[self.model], self.rows * self.limits.pages_per_request)


def described_weights(model: str, mesh: Mesh, copies: int = 1) -> Any:
    """The weights on `mesh` as shapes with shardings: the parameters of the function that `cut` cuts."""
    decoder = build(SHAPES[model], _storage(model))
    state = nnx.state(decoder, nnx.Param)
    for _, parameter in nnx.to_flat_state(state):
        parameter.set_value(describe_weight(spec_of(parameter), mesh=mesh, copies=copies))
    nnx.update(decoder, state)
    return as_function(decoder)[1]


def _storage(model: str) -> Storage:
    """As an engine holds weights on accelerators."""
    return Storage(jnp.dtype(SHAPES[model].dtype), gathered_as="floats")


@cache
def cut(model: str, copies: int = 1) -> Sliced:
    """The model cut at its attentions, each KV head `copies` times: where it runs makes no difference."""
    here = Mesh(jax.devices("cpu")[:1], ("tensor",))
    fn, _ = as_function(build(SHAPES[model], _storage(model)))
    return slice_at_attention(fn, described_weights(model, here, copies), *step_shapes((SMALLEST_BATCH, 2)))
