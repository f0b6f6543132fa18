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
from jax.extend.core import JaxprEqn

from lamina_jax.slicing.trace import bind, evaluate, trace
from pallas_kernels.native import matmul

MOST_ROWS = 32
"""With more rows the product is bound by arithmetic, and XLA is as fast."""

# x[T, I] by w[O, I], as `lamina_jax.models.layers.matmul` writes it for weights [out, in].
_DIMENSIONS = (((1,), (1,)), ((), ()))


def with_native_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for one CPU device, its products of few rows by the native kernel."""

    def rewritten(*args: Any) -> Any:
        program = trace(function, args)
        leaves = dict(enumerate(jax.tree.leaves(args)))
        return jax.tree.unflatten(program.out_tree, evaluate(program.ops, leaves, program.outputs, _bind))

    return rewritten


def _bind(eqn: JaxprEqn, operands: list[Any]) -> Any:
    return matmul(*operands) if _is_native(eqn) else bind(eqn, operands)


def _is_native(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "dot_general" or eqn.params["dimension_numbers"] != _DIMENSIONS:
        return False
    x, w, y = (cast(ShapedArray, atom.aval) for atom in (*eqn.invars, *eqn.outvars))
    if not (x.ndim == w.ndim == 2 and x.dtype == w.dtype == jnp.bfloat16 and y.dtype == jnp.float32):
        return False
    (rows, inputs), outputs = x.shape, w.shape[0]
    return rows <= MOST_ROWS and inputs % 16 == 0 and outputs % 4 == 0
