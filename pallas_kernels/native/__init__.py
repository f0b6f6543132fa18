"""Kernels in C++ for a CPU: cached attention and matrix products at the speed of memory, on every core.

XLA has no such product for a few rows of bfloat16, and runs a loop over pages on one core. They are compiled
where a C++ compiler is found, and called from compiled programs through XLA's foreign function interface;
elsewhere XLA's own forms run.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.native.build import BuildError, library

__all__ = ["BuildError", "load", "matmul"]

TARGETS = ("lamina_matmul", "lamina_paged_attention")
"""What a program calls: functions of the library, and the names they have in XLA."""


@functools.cache
def load() -> None:
    """Make the native kernels known to this process, compiling them if that has not been done yet.

    Raises:
        BuildError: they cannot be compiled here, or not loaded from where they are kept.
    """
    path = library(default_folder())
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:  # a filesystem without execution, a file that is broken
        raise BuildError(
            f"cannot load the compiled kernels: {error}; remove them, or set XDG_CACHE_HOME"
        ) from error
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(kernels, target)), platform="cpu")


def default_folder() -> Path:
    """lamina_jax/native in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lamina_jax" / "native"


def matmul(x: BFloat16[Array, "T I"], w: BFloat16[Array, "O I"]) -> Float32[Array, "T O"]:
    """x times the transpose of w, summed in float32, at the speed of reading w where T is small.

    `load` comes first. I is a multiple of 16, O of 4: XLA fails where they are not.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("lamina_matmul", shape)(x, w)
