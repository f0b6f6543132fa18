"""Columns of `bench kernels` on a GPU from torch's world: its own attention and FlashInfer's.

Each is there where it is installed. Torch's reads dense K and V, FlashInfer's pages. A pass is recorded as
a CUDA graph, so that launches from Python are not what is timed. torch is imported when a column is made.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable
from typing import Any

from lamina_jax.benchmarks.kernel_passes import Cell, Pass, Shape

DTYPE = "bfloat16"
MOST_CALLS = 64
"""In a pass: FlashInfer keeps some megabytes for each. So small cells may find their KV in a cache."""

WORKSPACE_BYTES = 256 << 20

Calls = list[Callable[[], object]]
MakeCalls = Callable[[Shape, Cell, int, str], Calls]
"""For a shape, a cell and a number of calls on a device ("cuda", or "cpu" in tests)."""


def make_pass(
    name: str, make_calls: MakeCalls, shape: Shape, pass_bytes: int, cell: Cell, device: str = "cuda"
) -> Pass:
    """The calls of one of KERNELS.

    Args:
        pass_bytes: of KV, that a pass should read at least.

    Raises:
        ImportError: it is not installed.
    """
    num_bytes = cell.batch * cell.context * shape.token_bytes(DTYPE)
    calls = min(MOST_CALLS, -(-pass_bytes // num_bytes))
    return Pass(name, DTYPE, calls, num_bytes, _recorded(make_calls(shape, cell, calls, device), device))


def _recorded(calls: Calls, device: str) -> Callable[[int], object]:
    """Run all calls so many times and wait; on a GPU as a recorded graph."""
    import torch

    for call in calls:  # what is compiled or chosen at a first call is not recorded
        call()
    if device == "cpu":
        return lambda passes: deque((call() for _ in range(passes) for call in calls), maxlen=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run(passes: int) -> None:
        for _ in range(passes):
            graph.replay()
        torch.cuda.synchronize()

    return run


def _torch_calls(shape: Shape, cell: Cell, calls: int, device: str) -> Calls:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, dim = shape.kv_heads, shape.head_dim
    q = torch.ones((cell.batch, cell.group * heads, 1, dim), dtype=torch.bfloat16, device=device)
    kv = torch.randn((calls, 2, cell.batch, heads, cell.context, dim), dtype=torch.bfloat16, device=device)

    def call(k: Any, v: Any) -> Callable[[], object]:
        return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=cell.group > 1)

    return [call(k, v) for k, v in kv]


def _flashinfer_calls(shape: Shape, cell: Cell, calls: int, device: str) -> Calls:
    import torch

    flashinfer: Any = importlib.import_module("flashinfer")
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    q = torch.ones((cell.batch, cell.group * heads, dim), dtype=torch.bfloat16, device=device)
    count = cell.pages(page)
    pages = torch.randn((calls * count, 2, heads, page, dim), dtype=torch.bfloat16, device=device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    starts = torch.arange(cell.batch + 1, dtype=torch.int32, device=device) * (count // cell.batch)
    last = torch.full((cell.batch,), (cell.context - 1) % page + 1, dtype=torch.int32, device=device)

    def call(indices: Any) -> Callable[[], object]:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=cell.group > 1
        )
        wrapper.plan(
            starts,
            indices,
            last,
            cell.group * heads,
            heads,
            dim,
            page,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return lambda: wrapper.run(q, pages)

    order = torch.randperm(calls * count, device=device).to(torch.int32)
    return [call(indices) for indices in order.split(count)]


KERNELS: dict[str, MakeCalls] = {
    "torch": _torch_calls,
    "flashinfer": _flashinfer_calls,
}
