"""`serve --cluster FILE --dry-run`: what each process would be, as text. It starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.processes import (
    Cluster,
    EngineProcess,
    FollowerProcess,
    PrefillProcess,
    WorkerProcess,
)
from lamina_jax.config import ConfigError, address_of

if TYPE_CHECKING:
    from lamina_jax.cluster.forecast import Forecast, Weights
    from lamina_jax.models import ModelConfig


def describe(cluster: Cluster) -> str:
    """Who runs what, and what it will need.

    Raises:
        ConfigError: the model is not there, or does not fit what the file says.
    """
    # Only now jax and grpc: a file that is wrong in itself is refused at once.
    from lamina_jax.cluster.forecast import forecast

    check_reach(cluster)
    shape, notes = _shape(cluster)
    needs = forecast(cluster, shape)
    parts = [_processes(cluster), _commands(cluster), _memory(cluster, needs), _wire(cluster, needs)]
    notes += _notes(cluster)
    return "\n\n".join("\n".join(part) for part in [*parts, notes] if part)


def check_reach(cluster: Cluster) -> None:
    """Refuse a cluster of which a process listens where other machines reach it, unprotected.

    Raises:
        ConfigError: it names the key of its host.
    """
    from lamina_jax.exchange.security import check_address

    for key, process in cluster.keys().items():
        if process != cluster.engine or process.followers:
            check_address(cluster.address(process), cluster.security, f"{cluster.file}: {key}.host")


def _shape(cluster: Cluster) -> tuple[ModelConfig, list[str]]:
    """The model's shape, and what to say of where it came from."""
    from lamina_jax.models.hf_config import CheckpointError, read_config
    from lamina_jax.models.shapes import HUB_IDS
    from lamina_jax.weights.hub import find_model

    model = cluster.engine.settings.model
    try:
        return read_config(find_model(model)), []
    except CheckpointError as error:
        if model in HUB_IDS:
            note = f"note: engine.settings.model: {model} is not on this machine; its shape is known"
            return HUB_IDS[model], [note]
        raise ConfigError(f"{cluster.file}: engine.settings.model={model!r}: {error}") from None


def _processes(cluster: Cluster) -> Iterator[str]:
    rows = [("role", "host", "listens on", "cores", "devices")]
    for role, process in cluster.roles().items():
        if isinstance(process, EngineProcess):
            listens = address_of(process.server.host, process.server.port)
            if process.followers:
                listens += f", {cluster.listens(process)}"
            devices = process.settings.compute_devices
        elif isinstance(process, FollowerProcess):
            listens, devices = "-", cluster.engine.settings.compute_devices
        elif isinstance(process, WorkerProcess):
            listens, devices = process.settings.listen, process.settings.devices
        else:
            listens, devices = cluster.listens(process), process.compute_devices
        host = f"{process.host} ({cluster.address(process)})"
        rows.append((role, host, listens, process.cores or "any", devices or "chosen at start"))
    return _table(rows)


def _commands(cluster: Cluster) -> Iterator[str]:
    for command in commands(cluster, python="python"):
        variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
        yield f"{command.role}: {' '.join([*variables, shlex.join(command.argv)])}"


def _memory(cluster: Cluster, needs: Forecast) -> Iterator[str]:
    rows = [("memory", "weights", "KV cache")]
    full = f"{needs.full_pages} pages ({_size(needs.full_pages * needs.page_bytes)})"
    for role, process in cluster.roles().items():
        if not isinstance(process, WorkerProcess):
            weights, cache = _weights(needs.weights[role]), "none"
        elif needs.num_pages is None:
            weights, cache = "none", f"what is free, at {_size(needs.page_bytes)} a page"
        else:
            weights, cache = "none", f"{needs.num_pages} pages ({_size(needs.num_pages * needs.page_bytes)})"
        if isinstance(process, PrefillProcess):
            cache = f"prompts until they are pulled, at {_size(needs.whole_page_bytes)} a page"
        rows.append((role, weights, cache))
    yield from _table(rows)
    settings, limits = cluster.engine.settings, needs.limits
    yield (
        f"a page holds {limits.page_size} tokens; {limits.max_num_seqs} requests of {limits.max_model_len} "
        f"tokens fill {full} per worker with partition={settings.partition}"
    )


def _wire(cluster: Cluster, needs: Forecast) -> Iterator[str]:
    settings, limits = cluster.engine.settings, needs.limits
    batches = f"{limits.microbatches} microbatches" if limits.microbatches > 1 else "one microbatch"
    yield (
        f"wire per step at full batch: {needs.wire_bytes:,} bytes of q, k, v, o and lse, "
        f"for {needs.rows} rows in {batches}"
    )
    if len(cluster.compute) > 1:
        yield f"of them one of the {len(cluster.compute)} compute hosts moves {needs.host_wire_bytes:,} bytes"
    yield (
        f"messages per layer and microbatch: {needs.messages_per_layer}, with {_peers(cluster)}, "
        f"overlap {'on' if limits.overlap else 'off'}, exchange={settings.exchange}"
    )
    if "auto" in (settings.microbatches, settings.overlap):
        yield "microbatches and overlap, where auto, are taken as the devices suggest"


def _peers(cluster: Cluster) -> str:
    hosts = f"{len(cluster.compute)} compute hosts and " if len(cluster.compute) > 1 else ""
    return f"{hosts}{len(cluster.workers)} workers"


def _weights(weights: Weights) -> str:
    each = f" on each of {weights.devices} devices" if weights.devices > 1 else ""
    return f"{_size(weights.bytes)}{each}"


def _notes(cluster: Cluster) -> Iterator[str]:
    for key, value in vars(cluster.security).items():
        if isinstance(value, str) and not Path(value).is_file():
            yield f"note: security.{key}: there is no {value} on this machine"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _size(count: int) -> str:
    if count >= 2**34:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
