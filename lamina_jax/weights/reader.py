"""Reads parts of a tensor in a safetensors file, as a model holds them: turned round and converted.

Knows nothing of devices: who wants a part says which.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Index = tuple[slice, ...]
"""A part of a tensor: a slice, without a step, of each dimension."""

ALIGNMENT = 64
"""Bytes. A CPU device takes an array over from numpy without a copy where it begins at a multiple."""

BLOCK_ROWS = 128
"""Rows that are read and turned at once: two to three times as fast as a whole large matrix."""


class Reader:
    """A tensor of which nothing is read but the parts that are asked for; call it with an index.

    Args:
        stored: the tensor, as `safe_open(...).get_slice` gives it.
        shape, dtype: as the model holds it.
        transpose: in the file its axes come in the reverse order.

    Attributes:
        elements: that have been read so far.
    """

    def __init__(self, stored: Any, shape: tuple[int, ...], dtype: np.dtype, *, transpose: bool) -> None:
        self._stored, self._shape, self._dtype, self._transpose = stored, shape, dtype, transpose
        self.elements = 0

    def __call__(self, index: Index) -> np.ndarray:
        """A copy of a part, the caller's own: C-contiguous, and beginning at a multiple of `ALIGNMENT`."""
        bounds = [part.indices(size) for part, size in zip(index, self._shape, strict=True)]
        out = _aligned_empty(tuple(stop - start for start, stop, _ in bounds), self._dtype)
        as_stored = out.T if self._transpose else out
        (first, _, _), *others = bounds[::-1] if self._transpose else bounds
        columns = [slice(start, stop) for start, stop, _ in others]
        for row in range(0, len(as_stored), BLOCK_ROWS):
            block = as_stored[row : row + BLOCK_ROWS]
            rows = slice(first + row, first + row + len(block))
            np.copyto(block, self._stored[(rows, *columns)], casting="unsafe")
        self.elements += out.size
        return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
