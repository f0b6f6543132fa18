"""The columns of `bench kernels`: every kernel that runs on this machine, and the pools that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import jax

from lamina_jax.benchmarks import shipped_kernels, torch_kernels
from lamina_jax.benchmarks.kernel_passes import (
    Cell,
    Pass,
    Shape,
    Step,
    empty_step,
    make_pool,
    paged_step,
    planned_step,
)
from lamina_jax.compilation import num_cores
from lamina_jax.cpu_kernels import use_native
from lamina_jax.devices import choose_worker_devices, memory_devices_for

PASS_BYTES = 256 << 20
"""What a pass reads at least, where memory allows: several times what caches hold."""

PLANNED = "gpu-planned"
"""The kernel of a GPU with its split plan made once for all layers; "gpu" makes one in every call."""

MOST_VALUES = 2**31
"""In a pool: more of one byte each are refused by the kernel of a GPU."""

OTHERS_DTYPE = torch_kernels.DTYPE
"""The only one that the kernels of others are timed with."""


class KernelColumn(NamedTuple):
    """A kernel with a cache of one dtype, and how to make its pass for a cell."""

    name: str
    dtype: str
    make: Callable[[Cell], Pass]


def find_devices(kv_heads: int) -> tuple[jax.Device, ...]:
    """One accelerator, or as many virtual devices of the CPU as it has cores and as share the heads evenly:
    what attention runs on in an engine of this machine that has XLA's kernels."""
    devices = choose_worker_devices(None)
    if devices[0].platform != "cpu":
        return devices[:1]
    return devices[: memory_devices_for(min(num_cores(), len(devices)), kv_heads)]


class Columns:
    """Pools of `num_pages` for each dtype and kernel; they are filled when a cell first needs them.

    Args:
        cells: those wanted. The pools are as large as the largest that fits needs, and at least PASS_BYTES.
        memory: bytes for all pools together.

    Attributes:
        cells: of those wanted, the ones that fit.
    """

    def __init__(
        self,
        shape: Shape,
        dtypes: Sequence[str],
        devices: Sequence[jax.Device],
        cells: Sequence[Cell],
        memory: int,
    ) -> None:
        self.shape, self._dtypes, self._devices = shape, dtypes, devices
        self._pool = cache(lambda dtype, count: make_pool(shape, dtype, self.num_pages, devices[:count]))
        self._kernels = _kernels(devices)
        self._others = OTHERS_DTYPE in dtypes and devices[0].platform != "cpu"
        token = sum(shape.token_bytes(dtype) for dtype in dtypes) * len(set(self._kernels.values()))
        token += self._others * shape.token_bytes(OTHERS_DTYPE)
        page_bytes = min(map(shape.token_bytes, dtypes)) * shape.page_size
        most = min(memory // (token * shape.page_size), MOST_VALUES // shape.page_values)
        self.cells = [cell for cell in cells if cell.pages(shape.page_size) <= most]
        needed = max((cell.pages(shape.page_size) for cell in self.cells), default=0)
        self.num_pages = max(needed, min(most, -(-PASS_BYTES // page_bytes)))

    def ours(self) -> Iterator[KernelColumn]:
        """Each reading of `pallas_kernels.paged_attention` with each dtype."""
        for kernel, dtype in product(self._kernels, self._dtypes):
            step = planned_step(dtype) if kernel == PLANNED else paged_step(dtype, kernel)
            yield KernelColumn(kernel, dtype, partial(self._pass, kernel, dtype, step))

    def nothing(self, column: KernelColumn) -> KernelColumn:
        """In the place of one of ours: calls that read no pages."""
        return column._replace(make=partial(self._pass, column.name, column.dtype, empty_step))

    def others(self) -> Iterator[KernelColumn]:
        """The kernels of others; making a pass raises ImportError where one is not installed."""
        if self._others:
            yield KernelColumn(shipped_kernels.NAME, OTHERS_DTYPE, self._shipped)
        if self._others and self._devices[0].platform == "gpu":
            for name, calls in torch_kernels.KERNELS.items():
                make = partial(torch_kernels.make_pass, name, calls, self.shape, PASS_BYTES)
                yield KernelColumn(name, OTHERS_DTYPE, make)

    def _pass(self, kernel: str, dtype: str, step: Step, cell: Cell) -> Pass:
        return self._pool(dtype, self._kernels[kernel]).make_pass(kernel, cell, step)

    def _shipped(self, cell: Cell) -> Pass:
        return shipped_kernels.make_pass(self._pool(OTHERS_DTYPE, 1), cell)


def _kernels(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Readings of `pallas_kernels.paged_attention` that run here, by the number of devices that they run on:
    XLA uses one core for an attention loop, so that a CPU's cores are as many devices; a native kernel
    uses them all by itself."""
    kernels = {devices[0].platform: len(devices)}
    if use_native("auto", devices[0]):
        kernels["native"] = 1
    if devices[0].platform == "gpu":
        kernels[PLANNED] = 1
    return kernels
