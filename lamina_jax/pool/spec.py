"""What an engine asks of an attention worker when it takes a lease. No jax here."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.pool.geometry import CacheGeometry

KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class TransferSpec:
    """How device arrays are exchanged with the worker; see `lamina_jax.exchange.transfer`.

    Attributes:
        address: of the engine's transfer server.
        worker_ip: at which the engine reaches the worker, and where the worker's own listens.
        key: the secret of both, `KEY_BYTES` long.
    """

    address: str
    worker_ip: str
    key: bytes


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """A share of the KV cache that a worker holds, and the static shapes of what it will be sent.

    Attributes:
        geometry: of this worker's share, over all of its devices.
        kv_start: the first of its KV heads, among the model's.
        first_device, devices: on how many devices of the worker in a row it lies, cut by KV head.
        windows, scales, softcaps: of each layer's attention.
        buckets: (B, Q, cached): rows and new tokens of a microbatch as they come to this worker, and
            whether they come with a cached part.
        pages_per_request: M, the width of its block tables.
        overlap: whether q and k, v come in two frames or in one.
        pieces: in how many pieces of heads each device's share comes and goes.
        copies: of so many pieces in a row that have the same KV heads, the first one's k and v are kept.
        pulls: whether KV is also pulled from prefill hosts.
        by_token: whether a KV frame holds only the tokens that this worker keeps.
        transfer: how tensors come and go, if not in frames.
    """

    geometry: CacheGeometry
    devices: int
    windows: tuple[int, ...]
    scales: tuple[float, ...]
    softcaps: tuple[float | None, ...]
    buckets: tuple[tuple[int, int, bool], ...]
    pages_per_request: int
    overlap: bool
    pieces: int
    copies: int
    by_token: bool
    pulls: bool = False
    kv_start: int = 0
    first_device: int = 0
    transfer: TransferSpec | None = None
