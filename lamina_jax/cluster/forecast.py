"""What a cluster will need, from the shape of its model: memory per process, bytes on the wire per step.

It reads a checkpoint's `config.json` and no weights. Importing it loads jax, but starts no backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from lamina_jax.cluster.claims import device_names, machine_of
from lamina_jax.cluster.processes import Cluster
from lamina_jax.config import ConfigError
from lamina_jax.engine.budget import wanted_pages
from lamina_jax.engine.limits import Limits, resolve_limits
from lamina_jax.engine.placement import TENSOR_AXES
from lamina_jax.models import ModelConfig, Storage, build
from lamina_jax.pool.geometry import CacheGeometry, geometry_of
from lamina_jax.weights.loader import spec_of


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Figures of one cluster. B below counts the rows of all microbatches, at full batch, with padding.

    Attributes:
        weight_bytes: on each of the `compute_devices`.
        page_bytes: of one KV page on one worker.
        full_pages: per worker, that hold `max_num_seqs` requests of `max_model_len` tokens.
        num_pages: per worker, where the file says so.
        rows: B.
        wire_bytes: of q, k, v, o and lse in one decode step, both ways, over all workers.
        messages_per_layer: of one microbatch, both ways, over all workers.
    """

    weight_bytes: int
    compute_devices: int
    page_bytes: int
    full_pages: int
    num_pages: int | None
    limits: Limits
    rows: int
    wire_bytes: int
    messages_per_layer: int


def forecast(cluster: Cluster, shape: ModelConfig) -> Forecast:
    """The figures of a cluster that serves a model of `shape`.

    Raises:
        ConfigError: workers or devices that cannot share the model's heads, lengths that are beyond it.
    """
    check_heads(cluster, shape)
    config, workers = cluster.engine.settings, len(cluster.workers)
    try:
        limits = resolve_limits(
            config, shape.max_position, share_silicon=_share_silicon(cluster), workers=workers
        )
    except ConfigError as error:
        raise ConfigError(f"{cluster.file}: engine.settings: {error}") from None
    geometry = geometry_of(config, shape)
    shards = _count(config.compute_devices)
    rows = limits.microbatches * limits.decode_buckets[-1]
    return Forecast(
        weight_bytes=weight_bytes(shape, shape.dtype if config.dtype == "auto" else config.dtype, shards),
        compute_devices=shards,
        page_bytes=(geometry.share(workers) if config.partition == "heads" else geometry).bytes_per_page,
        full_pages=wanted_pages(limits),
        num_pages=config.num_pages,
        limits=limits,
        rows=rows,
        wire_bytes=wire_bytes(geometry, rows, workers, by_token=config.partition == "tokens"),
        messages_per_layer=workers * (3 if limits.overlap else 2),
    )


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


def wire_bytes(geometry: CacheGeometry, rows: int, workers: int, *, by_token: bool) -> int:
    """Bytes of q, k, v, o and lse that B = `rows` query rows send and receive in all layers.

    Cut by head or by request: (2 + 2/G) e d B L + 4 N B L, with d = N H and e bytes per value. Cut by
    token every worker gets all of q, and answers with an o and lse of its own.
    """
    itemsize = 4 if geometry.wire_dtype == "float32" else 2
    q = o = itemsize * geometry.num_heads * geometry.head_dim
    kv = 2 * itemsize * geometry.num_kv_heads * geometry.head_dim
    lse = 4 * geometry.num_heads
    return ((q + o + lse) * (workers if by_token else 1) + kv) * rows * geometry.num_layers


def _share_silicon(cluster: Cluster) -> bool:
    """Whether all run on one machine's CPU, as far as the file says."""
    choices = [cluster.engine.settings.compute_devices, *(w.settings.devices for w in cluster.workers)]
    machines = {machine_of(cluster.address(process)) for process in cluster.roles().values()}
    return len(machines) == 1 and all(choice is None or choice.startswith("cpu") for choice in choices)


def _count(devices: str | None) -> int:
    """How many devices a choice names; one where it is left open."""
    return len(device_names(devices)) if devices else 1


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)
