"""Any part of a tensor, as the model holds it; and of the file that part alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lamina_jax.weights.reader import ALIGNMENT, BLOCK_ROWS, Reader
from lamina_jax.weights.safetensors import opened


class Counting:
    """A slice of a file, and how many elements were taken of it."""

    def __init__(self, stored: Any) -> None:
        self.stored, self.elements = stored, 0

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        part: np.ndarray = self.stored[index]
        self.elements += part.size
        return part


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 2 * BLOCK_ROWS + 3), st.integers(1, 30)), min_size=1, max_size=2),
    more=st.integers(0, 20),
    transpose=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_any_part(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int]],
    more: int,
    transpose: bool,
    dtype: str,
) -> None:
    """`sizes`: where a part begins and how long it is; the tensor goes on for `more`."""
    shape = tuple(start + length + more for start, length in sizes)
    values = np.random.default_rng(0).integers(0, 2000, size=shape).astype(np.float32)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({"x": np.ascontiguousarray(values.T if transpose else values)}, file)
    index = tuple(slice(start, start + length) for start, length in sizes)
    with opened(file) as tensors:
        stored = Counting(tensors.get_slice("x"))
        read = Reader(stored, shape, np.dtype(dtype), transpose=transpose)
        part, whole = read(index), read((slice(None),) * len(shape))
    np.testing.assert_array_equal(part, values[index].astype(dtype))
    np.testing.assert_array_equal(whole, values.astype(dtype))
    for found in (part, whole):
        assert found.dtype == np.dtype(dtype)
        assert found.flags.c_contiguous
        assert found.ctypes.data % ALIGNMENT == 0
    assert read.elements == stored.elements == part.size + whole.size
