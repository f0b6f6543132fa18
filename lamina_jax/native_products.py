"""A program's matrix products with few rows of bfloat16, by the native kernel of `pallas_kernels.native`.

XLA on a CPU reads bfloat16 weights at a third of the speed of memory, and decoding does little else. The
products are found in the program as it was traced, so that models know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from pallas_kernels.native import matmul

MOST_ROWS = 32
"""With more rows the product is bound by arithmetic, and XLA is as fast."""

# x[T, I] by w[O, I], as `lamina_jax.models.layers.matmul` writes it for weights [out, in].
_DIMENSIONS = (((1,), (1,)), ((), ()))


def with_native_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for one CPU device, its products of few rows by the native kernel."""

    def rewritten(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed, jax.tree.leaves(args)))

    return rewritten


def _evaluate(closed: ClosedJaxpr, args: list[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        operands = [_value(known, atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            if _is_native(eqn):
                out = matmul(*operands)
            else:
                out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        known.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else (out,), strict=True))
    return [_value(known, atom) for atom in jaxpr.outvars]


def _value(known: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else known[atom]


def _is_native(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "dot_general" or eqn.params["dimension_numbers"] != _DIMENSIONS:
        return False
    x, w, y = (cast(ShapedArray, atom.aval) for atom in (*eqn.invars, *eqn.outvars))
    if not (x.ndim == w.ndim == 2 and x.dtype == w.dtype == jnp.bfloat16 and y.dtype == jnp.float32):
        return False
    (rows, inputs), outputs = x.shape, w.shape[0]
    return rows <= MOST_ROWS and inputs % 16 == 0 and outputs % 4 == 0
