"""A cached part comes out of its message bit for bit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax.pool.message import message_shape, pack_part, unpack_part


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(dtype: jnp.dtype) -> None:
    dtype = jnp.dtype(dtype)
    shape = (3, 2, 4, 8)
    rng = np.random.default_rng(0)
    o = jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    # Every kind of float32, among them bits that would be NaNs or denormals of a 16-bit type.
    lse = jnp.asarray(rng.integers(0, 2**32, size=shape[:3], dtype=np.uint32).view(np.float32))
    lse = lse.at[0, 0, 0].set(-jnp.inf)
    message = pack_part(o, lse)
    assert message.ndim == 1
    assert (message.shape, message.dtype) == (
        message_shape(shape, dtype).shape,
        message_shape(shape, dtype).dtype,
    )
    assert message.nbytes == o.nbytes + lse.nbytes
    o_back, lse_back = unpack_part(message, shape, dtype)
    assert o_back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(o_back), np.asarray(o))
    np.testing.assert_array_equal(np.asarray(lse_back).view(np.uint32), np.asarray(lse).view(np.uint32))
