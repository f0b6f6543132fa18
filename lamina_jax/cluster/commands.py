"""The command line of each process of a cluster. Starts nothing, and no jax here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lamina_jax.cluster.processes import Cluster, EngineProcess, join_address


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one host runs.

    Args:
        role: "engine", "worker 0", ...
        argv: the program and its arguments.
        cores: that it is pinned to, such as "0-3"; None: any.
        environment: variables set for it.
    """

    role: str
    argv: tuple[str, ...]
    cores: str | None = None
    environment: Mapping[str, str]


def commands(cluster: Cluster, python: str = sys.executable) -> list[Command]:
    """What starts each process, by a Python in which lamina_jax is installed."""
    return [
        Command(
            role=role,
            argv=(python, "-m", *_arguments(cluster, process)),
            cores=process.cores,
            environment=process.environment,
        )
        for role, process in cluster.roles().items()
    ]


def _arguments(cluster: Cluster, process: EngineProcess | WorkerProcess) -> list[str]:
    if isinstance(process, EngineProcess):
        return ["lamina_jax.serve", "--cluster", str(cluster.file)]
    listen = join_address(cluster.address(process), process.port)
    settings = {
        "devices": process.devices,
        "memory_fraction": process.memory_fraction,
        "data_port": process.data_port,
        "metrics_port": process.metrics_port,
        "drain_seconds": process.drain_seconds,
        **asdict(cluster.security),
    }
    return ["lamina_jax.attend", "--listen", listen, *_flags(settings)]


def _flags(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if value is None or value is False:
            continue
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield str(value)
