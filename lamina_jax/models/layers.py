"""Layers that decoder families share, and how a parameter is declared.

A model is built abstract: its parameters are `jax.ShapeDtypeStruct`s that carry, in one place, their
shape, dtype, logical axes, checkpoint name and initialiser. Loading replaces them by arrays.

Activations here are x[T, D]: T tokens of any number of requests, told apart by nobody but `attention`.
In bfloat16 they are rounded once per stretch of elementwise work: products, norms, rotations and sums are
float32, and what enters a matrix product, the wire or the residual stream is bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from lamina_jax.models.config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class Storage:
    """How weights are held: their dtype, which way round a matrix lies, and how rows of one are taken.

    "out_in" is the checkpoint's own order and the fast one for bfloat16 on a CPU, "in_out" that for
    float32. XLA on a CPU converts a whole 16-bit float operand to float32 before it gathers, and its "bits"
    not; on a TPU it copies the operand for the sake of bits.
    """

    dtype: jnp.dtype
    layout: Literal["out_in", "in_out"] = "out_in"
    gathered_as: Literal["bits", "floats"] = "bits"


def param(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    axes: tuple[str, ...],
    name: str,
    init: Literal["normal", "ones", "zeros"] = "normal",
    transpose: bool = False,
) -> nnx.Param:
    """Declare a parameter: `name` is its tensor in the checkpoint, which `transpose` turns round."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, name=name, init=init, transpose=transpose)


class Linear(nnx.Module):
    """y[T, O] = x[T, I] W + b in float32, whatever x and W are."""

    def __init__(
        self, sizes: tuple[int, int], axes: tuple[str, str], name: str, storage: Storage, bias: bool = False
    ) -> None:
        inputs, outputs = sizes
        turned = storage.layout == "in_out"
        self.contract = 0 if turned else 1
        self.weight = param(
            (inputs, outputs) if turned else (outputs, inputs),
            storage.dtype,
            axes=axes if turned else axes[::-1],
            name=f"{name}.weight",
            transpose=turned,
        )
        self.bias = (
            param((outputs,), storage.dtype, axes=axes[1:], name=f"{name}.bias", init="zeros")
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "T I"]) -> Float32[Array, "T O"]:
        y = matmul(x, self.weight[...], self.contract)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)[None, :]


def matmul(x: Float[Array, "T I"], weight: Float[Array, "_ _"], contract: int) -> Float32[Array, "T O"]:
    """x times a matrix along the matrix's axis `contract`, in float32."""
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32)


def add(x: Float[Array, "T D"], update: Float32[Array, "T D"]) -> Float[Array, "T D"]:
    """The residual stream with an update, rounded once."""
    return (x.astype(jnp.float32) + update).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) over the last axis, in float32, times a weight."""

    def __init__(self, size: int, axis: str, name: str, storage: Storage, eps: float) -> None:
        self.eps = eps
        self.weight = param((size,), storage.dtype, axes=(axis,), name=f"{name}.weight", init="ones")

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(self.eps))
        weight = self.weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * scale * weight).astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D] of token embeddings, which tied models also use as the output projection."""

    def __init__(self, config: ModelConfig, name: str, storage: Storage) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.as_bits = storage.dtype.itemsize == 2 and storage.gathered_as == "bits"
        self.weight = param(shape, storage.dtype, axes=("vocab", "embed"), name=f"{name}.weight")

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        table = self.weight[...]
        if not self.as_bits:
            return table[tokens]
        rows = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
        return jax.lax.bitcast_convert_type(rows, table.dtype)

    def logits(self, x: Float[Array, "B D"]) -> Float32[Array, "B V"]:
        return matmul(x, self.weight[...], contract=1)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, name: str, storage: Storage) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear((hidden, inner), ("embed", "mlp"), f"{name}.gate_proj", storage, bias)
        self.up = Linear((hidden, inner), ("embed", "mlp"), f"{name}.up_proj", storage, bias)
        self.down = Linear((inner, hidden), ("mlp", "embed"), f"{name}.down_proj", storage, bias)

    def __call__(self, x: Float[Array, "T D"]) -> Float32[Array, "T D"]:
        return self.down((jax.nn.silu(self.gate(x)) * self.up(x)).astype(x.dtype))


Rotation = tuple[Float[Array, "T H"], Float[Array, "T H"]]
"""cos and signed sin of each position's angles, float32[T, H]: `rotate` needs no more than two products."""


def rotation(positions: Int[Array, " T"], config: RopeConfig, head_dim: int) -> Rotation:
    """The rotary embedding's cos and sin at `positions`.

    Both halves of a head are written out: XLA on a CPU fuses cos and sin into every user, and would
    compute them anew for each head, but not what is concatenated.
    """
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(config, head_dim))[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate((cos, cos), axis=-1), jnp.concatenate((-sin, sin), axis=-1)


def rotate(x: Float32[Array, "T N H"], by: Rotation) -> Float32[Array, "T N H"]:
    """Rotate pairs (i, i + H/2) of each head."""
    cos, sin = (part[:, None, :] for part in by)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies float32[H / 2], scaled as the checkpoint says.

    "llama3" (Llama 3.1) divides the frequencies of long wavelengths by `factor`, leaves those of short
    ones, and interpolates between.
    """
    frequencies = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if config.scaling == "linear":
        frequencies = frequencies / config.factor
    elif config.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = config.low_freq_factor, config.high_freq_factor
        kept = np.clip((config.original_max_position / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / config.factor
    return frequencies.astype(np.float32)
