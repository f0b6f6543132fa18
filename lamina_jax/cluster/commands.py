"""The command line of each process of a cluster. Starts nothing, and no jax here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass

from lamina_jax.cluster.processes import (
    AnyProcess,
    Cluster,
    EngineProcess,
    PrefillProcess,
    WorkerProcess,
)
from lamina_jax.config import AttendConfig, EngineConfig, SecurityConfig, ServerConfig

SERVE, ATTEND = "lamina_jax.serve", "lamina_jax.attend"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one host runs.

    Args:
        role: "engine", "worker 0", ...
        argv: the program and its arguments.
        cores: that it is pinned to, such as "0-3"; None: any.
        environment: variables set for it.
        ends_with_input: to be told to end by the end of its standard input, not by a signal.
    """

    role: str
    argv: tuple[str, ...]
    cores: str | None = None
    environment: dict[str, str]
    ends_with_input: bool = False


def commands(cluster: Cluster, python: str = sys.executable, *, by_flags: bool = False) -> list[Command]:
    """What starts each process, by a Python in which lamina_jax is installed.

    Args:
        by_flags: with every setting on the command line, for hosts that do not have the cluster file.
    """
    arguments = _by_flags if by_flags else _by_file
    return [
        Command(
            role=role,
            argv=(python, "-m", *arguments(cluster, role, process)),
            cores=process.cores,
            environment=process.environment,
        )
        for role, process in cluster.roles().items()
    ]


def _by_file(cluster: Cluster, role: str, process: AnyProcess) -> list[str]:
    if isinstance(process, WorkerProcess):
        return _by_flags(cluster, role, process)
    serve = [SERVE, "--cluster", str(cluster.file)]
    if isinstance(process, EngineProcess):
        return serve
    as_prefill = ["--role", "prefill"] if isinstance(process, PrefillProcess) else []
    return [*serve, *as_prefill, "--host-id", role.rsplit(maxsplit=1)[-1]]


def _by_flags(cluster: Cluster, role: str, process: AnyProcess) -> list[str]:
    security = [*_flags(cluster.security)]
    if isinstance(process, WorkerProcess):
        return [ATTEND, "--listen", process.settings.listen, *_flags(process.settings), *security]
    if isinstance(process, EngineProcess):
        return [*_serve(process.settings), *_flags(process.server), *security]
    number = int(role.rsplit(maxsplit=1)[-1])
    if isinstance(process, PrefillProcess):
        listen = ["--role", "prefill", "--listen", cluster.listens(process)]
        return [*_serve(cluster.prefill_settings(number)), *listen, *security]
    return [*_serve(cluster.compute_settings(number)), *security]


def _serve(settings: EngineConfig) -> list[str]:
    return [SERVE, settings.model, *_flags(settings)]


def _flags(settings: EngineConfig | ServerConfig | AttendConfig | SecurityConfig) -> Iterator[str]:
    """Those that say more than their default; a server's `insecure` is among the security's."""
    defaults = type(settings)()
    for key, value in vars(settings).items():
        if key in ("listen", "model") or is_dataclass(value) or value == getattr(defaults, key):
            continue
        if key == "insecure" and isinstance(settings, ServerConfig):
            continue
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield str(value)
