"""The processes of a cluster and their settings, as plain data. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lamina_jax.config import AttendConfig, EngineConfig, SecurityConfig, ServerConfig


@dataclass(frozen=True, kw_only=True)
class Process:
    """What every process of a cluster has.

    Args:
        host: a name under [hosts].
        cores: the host's cores that it is pinned to, such as "0", "0-3" or "0,2-3"; None: any.
        environment: variables set for it, beside those that its starter has.
    """

    host: str
    cores: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineProcess(Process):
    """The compute side and its HTTP server: `python -m lamina_jax.serve --cluster FILE`.

    Args:
        settings: of the engine; `attention` names the file's workers, `security` is the file's.
        server: of the HTTP server.
    """

    settings: EngineConfig
    server: ServerConfig


@dataclass(frozen=True, kw_only=True)
class WorkerProcess(Process):
    """An attention worker: `python -m lamina_jax.attend`.

    Args:
        port: where the engine finds it, on its host's address.
        settings: the flags of `attend`; `listen` comes from host and port.
    """

    port: int
    settings: AttendConfig = field(default_factory=AttendConfig)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One engine and its attention workers.

    Args:
        file: that it was read from.
        hosts: address of each host by its name.
        engine: its `settings` hold the security of all processes, too.
        workers: in the order of their shares.
    """

    file: Path
    hosts: dict[str, str]
    engine: EngineProcess
    workers: tuple[WorkerProcess, ...]

    @property
    def security(self) -> SecurityConfig:
        return self.engine.settings.security

    def roles(self) -> dict[str, EngineProcess | WorkerProcess]:
        """Each process by its role: "engine", "worker 0", "worker 1", ..."""
        return {"engine": self.engine, **{f"worker {i}": worker for i, worker in enumerate(self.workers)}}

    def keys(self) -> dict[str, EngineProcess | WorkerProcess]:
        """Each process by its key path in the file: "engine", "workers[0]", ..."""
        return {"engine": self.engine, **{f"workers[{i}]": worker for i, worker in enumerate(self.workers)}}

    def address(self, process: Process) -> str:
        """The address of a process's host."""
        return self.hosts[process.host]
