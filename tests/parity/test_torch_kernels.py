"""Torch's column of `bench kernels`, on a CPU. Needs torch: `make test-parity`."""

from __future__ import annotations

import pytest

from lamina_jax.benchmarks.kernel_passes import Cell, Shape
from lamina_jax.benchmarks.torch_kernels import KERNELS, make_pass

SHAPE = Shape(kv_heads=2, head_dim=16, page_size=4)
CELL = Cell(batch=3, context=7, group=2)

pytestmark = pytest.mark.parity


def test_a_pass_reads_as_much_as_it_is_asked_to() -> None:
    num_bytes = 3 * 7 * SHAPE.token_bytes("bfloat16")
    one = make_pass("torch", KERNELS["torch"], SHAPE, 3 * num_bytes - 1, CELL, device="cpu")
    assert (one.dtype, one.calls, one.num_bytes) == ("bfloat16", 3, num_bytes)
    assert one.seconds_per_call(2) > 0


def test_calls_attend_to_keys_and_values_of_their_own() -> None:
    import torch

    outputs = [call() for call in KERNELS["torch"](SHAPE, CELL, 2, "cpu")]
    assert [tuple(output.shape) for output in outputs] == [(3, 4, 1, 16)] * 2
    # All queries are ones, so that the query heads of a KV head agree, and two KV heads do not.
    assert all(torch.equal(output[:, 0::2], output[:, 1::2]) for output in outputs)
    assert not torch.equal(outputs[0][:, 0], outputs[0][:, 2])
    assert not torch.equal(*outputs)
