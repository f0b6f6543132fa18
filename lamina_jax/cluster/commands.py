"""The command line of each process of a cluster. Starts nothing, and no jax here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lamina_jax.cluster.processes import Cluster, EngineProcess, WorkerProcess
from lamina_jax.config import AttendConfig, SecurityConfig


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
    environment: dict[str, str]


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
    flags = [*_flags(process.settings), *_flags(cluster.security)]
    return ["lamina_jax.attend", "--listen", process.settings.listen, *flags]


def _flags(settings: AttendConfig | SecurityConfig) -> Iterator[str]:
    """Those that say more than their default."""
    defaults = type(settings)()
    for key, value in vars(settings).items():
        if key == "listen" or value == getattr(defaults, key):
            continue
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield str(value)
