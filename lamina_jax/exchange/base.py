"""What the decode loop asks of an exchange between the compute mesh and the memory mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from lamina_jax.core import MicrobatchPlan


@dataclass
class WireCount:
    """What crossed between the meshes: tensor bytes and messages, step metadata apart."""

    tensor_bytes: int = 0
    messages: int = 0
    metadata_bytes: int = 0

    def add(self, message: jax.Array) -> None:
        """Count one message."""
        self.messages += 1
        self.tensor_bytes += message.nbytes


@runtime_checkable
class StepExchange(Protocol):
    """One microbatch's step, as the compute side sees it. A tensor is a tuple: one array per memory
    worker, cut along its heads by `lamina_jax.pool.geometry.head_ranges`. B rows of Q new tokens.

    A layer either sends q first and k, v when they are ready (`send_query`, `send_kv`), or all in one
    message (`send_all`). No call waits for the other side.
    """

    def send_query(self, layer: int, q: tuple[jax.Array, ...]) -> None:
        """q[B, Q, N_w, H] to each worker, which starts on the cached part."""
        ...

    def send_kv(self, layer: int, kv: tuple[jax.Array, ...]) -> None:
        """kv[B, Q, 2 K_w, H] (k's heads, then v's) to each worker, to be appended to its pages."""
        ...

    def send_all(self, layer: int, qkv: tuple[jax.Array, ...]) -> None:
        """qkv[B, Q, N_w + 2 K_w, H] to each worker: both of the above."""
        ...

    def receive(self, layer: int) -> tuple[jax.Array, ...]:
        """Each worker's cached part on the compute mesh, a message of `lamina_jax.pool.message`."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """A way between the meshes."""

    wire: WireCount
    programs_queued: int
    """Programs that this process has queued for the memory side."""

    def begin(self, plan: MicrobatchPlan) -> StepExchange:
        """Tell every worker the step's pages, slots and lengths."""
        ...

    def fill_pages(self, fill: Callable[[jax.Array], jax.Array]) -> None:
        """Replace the pages of every layer and device by `fill` of them; for benchmarks."""
        ...
