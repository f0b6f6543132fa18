"""A cached part as one message: o and lse in one flat array, so that a layer's answer is one transfer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from lamina_jax.ops import Part


def pack_part(o: Float[Array, "B Q N H"], lse: Float[Array, "B Q N"]) -> Shaped[Array, " size"]:
    """o in its own dtype, then lse in float32. 16-bit values travel as uint16: bits of a float32 are not
    to be touched as floats of another kind."""
    if o.dtype == jnp.float32:
        return jnp.concatenate([o.reshape(-1), lse.reshape(-1)])
    bits = jax.lax.bitcast_convert_type(o, jnp.uint16).reshape(-1)
    return jnp.concatenate([bits, jax.lax.bitcast_convert_type(lse, jnp.uint16).reshape(-1)])


def unpack_part(message: Shaped[Array, " size"], shape: tuple[int, int, int, int], dtype: jnp.dtype) -> Part:
    """The inverse, for o of `shape` [B, Q, N, H] and `dtype`."""
    rows, queries, heads, size = shape
    count = rows * queries * heads * size
    o, lse = message[:count], message[count:]
    if message.dtype == jnp.uint16:
        o = jax.lax.bitcast_convert_type(o, dtype)
        lse = jax.lax.bitcast_convert_type(lse.reshape(-1, 2), jnp.float32)
    return o.reshape(shape), lse.reshape(shape[:3])


def message_shape(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the message for o of `shape` and `dtype`."""
    structs = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    return jax.eval_shape(pack_part, *structs)


def message_dtype(wire_dtype: str) -> np.dtype:
    """Of what crosses where q, k, v and o are of `wire_dtype`."""
    return np.dtype(np.float32 if wire_dtype == "float32" else np.uint16)


def to_wire(x: Shaped[Array, "..."], wire_dtype: str) -> Shaped[Array, "..."]:
    """x in the wire dtype; 16-bit values as their bits, which the host reads four times quicker."""
    x = x.astype(wire_dtype)
    return x if wire_dtype == "float32" else jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_wire(x: Shaped[Array, "..."], wire_dtype: str) -> Shaped[Array, "..."]:
    """The inverse."""
    return x if wire_dtype == "float32" else jax.lax.bitcast_convert_type(x, jnp.dtype(wire_dtype))
