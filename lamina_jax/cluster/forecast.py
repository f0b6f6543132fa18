"""What a cluster will need, from the shape of its model: memory per process, bytes on the wire per step.

It reads a checkpoint's `config.json` and no weights. Importing it loads jax, but starts no backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from lamina_jax.cluster.claims import device_names, machine_of
from lamina_jax.cluster.processes import Cluster, PrefillProcess, WorkerProcess
from lamina_jax.config import ConfigError
from lamina_jax.engine.budget import wanted_pages
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.placement import TENSOR_AXES
from lamina_jax.models import ModelConfig, Storage, build
from lamina_jax.pool.geometry import CacheGeometry, HeadTable, Piece, geometry_of, head_table
from lamina_jax.weights.loader import spec_of


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on each of a process's devices."""

    bytes: int
    devices: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Figures of one cluster. B below counts the rows of all microbatches, at full batch, with padding.

    Attributes:
        weights: of each process that has any, by its role.
        page_bytes: of one KV page on one worker.
        whole_page_bytes: of one KV page with all heads, as prefill hosts have it.
        full_pages: per worker, that hold `max_num_seqs` requests of `max_model_len` tokens.
        num_pages: per worker, where the file says so.
        rows: B.
        wire_bytes: of q, k, v, o and lse in one decode step, both ways, over all workers.
        host_wire_bytes: of these, what the compute host with the most of them sends and receives.
        messages_per_layer: of one microbatch, both ways, over all compute hosts and workers.
    """

    weights: dict[str, Weights]
    page_bytes: int
    whole_page_bytes: int
    full_pages: int
    num_pages: int | None
    limits: Limits
    rows: int
    wire_bytes: int
    host_wire_bytes: int
    messages_per_layer: int


def forecast(cluster: Cluster, shape: ModelConfig) -> Forecast:
    """The figures of a cluster that serves a model of `shape`.

    Raises:
        ConfigError: hosts, workers or devices that cannot share the model's heads, lengths beyond its own.
    """
    check_heads(cluster, shape)
    config, workers = cluster.engine.settings, len(cluster.workers)
    try:
        limits = resolve_limits(
            config, shape.max_position, share_silicon=_share_silicon(cluster), workers=workers
        )
        table = _table(cluster, shape)
    except ConfigError as error:
        raise ConfigError(f"{cluster.file}: engine.settings: {error}") from None
    geometry = geometry_of(config, shape)
    rows = limits.microbatches * limits.decode_buckets[-1]
    by_token = config.partition == "tokens"
    of_hosts = [
        wire_bytes(geometry, rows, workers, pieces, by_token=by_token) for pieces in _pieces(cluster, table)
    ]
    return Forecast(
        weights=_weights(cluster, shape),
        whole_page_bytes=geometry.bytes_per_page,
        page_bytes=(geometry.share(workers) if config.partition == "heads" else geometry).bytes_per_page,
        full_pages=wanted_pages(limits),
        num_pages=config.num_pages,
        limits=limits,
        rows=rows,
        wire_bytes=sum(of_hosts),
        host_wire_bytes=max(of_hosts),
        messages_per_layer=_pairs(cluster, table) * (3 if limits.overlap else 2),
    )


def _table(cluster: Cluster, shape: ModelConfig) -> HeadTable:
    """Which heads each compute device exchanges with each device of one part of the cache."""
    config = cluster.engine.settings
    parts = len(cluster.workers) if config.partition == "heads" else 1
    shards = len(cluster.compute) * _count(config.compute_devices)
    return head_table(
        shape.num_heads, shape.num_kv_heads, shards, parts * _count(cluster.workers[0].settings.devices)
    )


def _pieces(cluster: Cluster, table: HeadTable) -> list[list[Piece]]:
    """Of each compute host those of the table that are its devices'."""
    devices = _count(cluster.engine.settings.compute_devices)
    return [
        [piece for piece in table.pieces if piece.shard // devices == host]
        for host in range(len(cluster.compute))
    ]


def _pairs(cluster: Cluster, table: HeadTable) -> int:
    """How many pairs of a compute host and a worker have heads in common."""
    if cluster.engine.settings.partition != "heads":
        return len(cluster.compute) * len(cluster.workers)
    devices = _count(cluster.workers[0].settings.devices)
    return sum(len({piece.worker // devices for piece in pieces}) for pieces in _pieces(cluster, table))


def _weights(cluster: Cluster, shape: ModelConfig) -> dict[str, Weights]:
    """Of compute hosts, which share one copy, and of prefill hosts, which have one each."""
    config = cluster.engine.settings
    dtype = shape.dtype if config.dtype == "auto" else config.dtype
    found = {}
    for role, process in cluster.roles().items():
        if isinstance(process, WorkerProcess):
            continue
        if isinstance(process, PrefillProcess):
            devices, hosts = _count(process.compute_devices), 1
        else:
            devices, hosts = _count(config.compute_devices), len(cluster.compute)
        found[role] = Weights(weight_bytes(shape, dtype, devices * hosts), devices)
    return found


def check_heads(cluster: Cluster, shape: ModelConfig) -> None:
    """Refuse workers, or devices of a worker, that cannot share the KV heads evenly.

    Raises:
        ConfigError: it names the key, and the numbers that would work.
    """
    heads, workers = shape.num_kv_heads, len(cluster.workers)
    if cluster.engine.settings.partition == "heads":
        if heads % workers:
            raise ConfigError(
                f"{cluster.file}: workers: {workers} cannot share the model's {heads} KV heads evenly: "
                f"give {_divisors(heads)} of them, or engine.settings.partition = requests or tokens"
            )
        heads //= workers
    named = [
        (i, worker.settings.devices) for i, worker in enumerate(cluster.workers) if worker.settings.devices
    ]
    for i, devices in named:
        first, count = _count(named[0][1]), _count(devices)
        if count != first:
            raise ConfigError(
                f"{cluster.file}: workers[{i}].devices: {count}, but workers[{named[0][0]}] has {first}: "
                "give all workers equally many"
            )
        if heads % count:
            raise ConfigError(
                f"{cluster.file}: workers[{i}].devices: {count} devices cannot share this worker's {heads} "
                f"KV heads evenly: give {_divisors(heads)}"
            )


def weight_bytes(shape: ModelConfig, dtype: str, shards: int = 1) -> int:
    """Bytes of a model's weights on each of `shards` compute devices."""
    model = build(shape, Storage(jnp.dtype(dtype)))
    specs = [spec_of(parameter) for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    copies = max(1, shards // shape.num_kv_heads)  # with more devices than KV heads each has one whole
    total = 0
    for spec in specs:
        size = math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize
        cut = any(a in TENSOR_AXES and n % shards == 0 for a, n in zip(spec.axes, spec.shape, strict=True))
        size *= copies if "kv_heads" in spec.axes else 1
        total += size // shards if cut else size
    return total


def wire_bytes(
    geometry: CacheGeometry, rows: int, workers: int, pieces: Sequence[Piece], *, by_token: bool
) -> int:
    """Bytes of q, k, v, o and lse that B = `rows` query rows send and receive in all layers, of the heads in
    some `pieces`.

    Cut by head or by request, all heads are (2 + 2/G) e d B L + 4 N B L, with d = N H and e bytes per value.
    Cut by token every worker gets all of q, and answers with an o and lse of its own.
    """
    itemsize = 4 if geometry.wire_dtype == "float32" else 2
    heads = sum(piece.q_stop - piece.q_start for piece in pieces)
    kv_heads = sum(piece.kv_stop - piece.kv_start for piece in pieces if piece.sends_kv)
    q = o = itemsize * heads * geometry.head_dim
    kv = 2 * itemsize * kv_heads * geometry.head_dim
    lse = 4 * heads
    return ((q + o + lse) * (workers if by_token else 1) + kv) * rows * geometry.num_layers


def _share_silicon(cluster: Cluster) -> bool:
    """Whether all run on one machine's CPU, as far as the file says."""
    choices = [cluster.engine.settings.compute_devices, *(w.settings.devices for w in cluster.workers)]
    machines = {machine_of(cluster.address(process)) for process in (*cluster.compute, *cluster.workers)}
    return len(machines) == 1 and all(choice is None or choice.startswith("cpu") for choice in choices)


def _count(devices: str | None) -> int:
    """How many devices a choice names; one where it is left open."""
    return len(device_names(devices)) if devices else 1


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)
