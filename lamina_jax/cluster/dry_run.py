"""`serve --cluster FILE --dry-run`: what each process would be, as text. It starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.processes import Cluster, EngineProcess
from lamina_jax.config import ConfigError

if TYPE_CHECKING:
    from lamina_jax.cluster.forecast import Forecast


def describe(cluster: Cluster) -> str:
    """Who runs what, and what it will need.

    Raises:
        ConfigError: the model is not there, or does not fit what the file says.
    """
    # Only now jax and grpc: a file that is wrong in itself is refused at once.
    from lamina_jax.cluster.forecast import forecast
    from lamina_jax.exchange.security import check_address
    from lamina_jax.models.hf_config import CheckpointError, read_config
    from lamina_jax.weights.hub import find_model

    for i, worker in enumerate(cluster.workers):
        host = cluster.address(worker)
        check_address(host, cluster.security, f"{cluster.file}: workers[{i}].host")
    model = cluster.engine.settings.model
    try:
        needs = forecast(cluster, read_config(find_model(model)))
    except CheckpointError as error:
        raise ConfigError(f"{cluster.file}: engine.settings.model={model!r}: {error}") from None
    parts = [_processes(cluster), _commands(cluster), _memory(cluster, needs), _wire(cluster, needs)]
    return "\n\n".join(["\n".join(part) for part in parts] + [*_notes(cluster)])


def _processes(cluster: Cluster) -> Iterator[str]:
    rows = [("role", "host", "listens on", "cores", "devices")]
    for role, process in cluster.roles().items():
        if isinstance(process, EngineProcess):
            listens = f"{process.server.host}:{process.server.port}"
            devices = process.settings.compute_devices
        else:
            listens, devices = process.settings.listen, process.settings.devices
        host = f"{process.host} ({cluster.address(process)})"
        rows.append((role, host, listens, process.cores or "any", devices or "chosen at start"))
    return _table(rows)


def _commands(cluster: Cluster) -> Iterator[str]:
    for command in commands(cluster, python="python"):
        variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
        yield f"{command.role}: {' '.join([*variables, shlex.join(command.argv)])}"


def _memory(cluster: Cluster, needs: Forecast) -> Iterator[str]:
    each = f" on each of {needs.compute_devices} devices" if needs.compute_devices > 1 else ""
    rows = [("memory", "weights", "KV cache"), ("engine", f"{_size(needs.weight_bytes)}{each}", "none")]
    full = f"{needs.full_pages} pages ({_size(needs.full_pages * needs.page_bytes)})"
    for role in list(cluster.roles())[1:]:
        if needs.num_pages is None:
            cache = f"what is free, at {_size(needs.page_bytes)} a page"
        else:
            cache = f"{needs.num_pages} pages ({_size(needs.num_pages * needs.page_bytes)})"
        rows.append((role, "none", cache))
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
    yield (
        f"messages per layer and microbatch: {needs.messages_per_layer}, with {len(cluster.workers)} "
        f"workers, overlap {'on' if limits.overlap else 'off'}, exchange={settings.exchange}"
    )
    if "auto" in (settings.microbatches, settings.overlap):
        yield "microbatches and overlap, where auto, are taken as the devices suggest"


def _notes(cluster: Cluster) -> Iterator[str]:
    for key, value in vars(cluster.security).items():
        if isinstance(value, str) and not Path(value).is_file():
            yield f"note: security.{key}: there is no {value} on this machine"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
