"""The processes of a cluster and their settings, as plain data. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from lamina_jax.cluster.places import Places
from lamina_jax.config import AttendConfig, EngineConfig, SecurityConfig, ServerConfig, address_of


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
class FollowerProcess(Process):
    """A further compute host: `python -m lamina_jax.serve --cluster FILE --host-id I`, from 1 on.

    It shares the engine's settings.
    """


@dataclass(frozen=True, kw_only=True)
class EngineProcess(Process):
    """The compute side, or its host 0, and the HTTP server: `python -m lamina_jax.serve --cluster FILE`.

    Args:
        settings: of the engine; `attention` names the file's workers and `prefill` its prefill hosts, with
            followers `coordinator`, `num_hosts` and `host_id` are set; `security` is the file's.
        server: of the HTTP server.
        coordinator_port: where host 0 gathers the followers, on its host's address.
        followers: the compute hosts from 1 on.
    """

    settings: EngineConfig
    server: ServerConfig
    coordinator_port: int = 7100
    followers: tuple[FollowerProcess, ...] = ()


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
class PrefillProcess(Process):
    """A prefill host: `python -m lamina_jax.serve --cluster FILE --role prefill --host-id J`, from 0 on.

    Args:
        port: where engine and workers find it, on its host's address.
        compute_devices: its own; in all else it has the engine's settings.
    """

    port: int
    compute_devices: str | None = None


AnyProcess = EngineProcess | FollowerProcess | WorkerProcess | PrefillProcess


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One engine, on one or several compute hosts, its attention workers and its prefill hosts.

    Args:
        file: that it was read from.
        hosts: address of each host by its name.
        engine: its `settings` hold the security of all processes, too.
        workers: in the order of their shares.
        prefill: hosts that prefill prompts in the engine's place.
        places: what the file says of places that have hosts of their own.
    """

    file: Path
    hosts: dict[str, str]
    engine: EngineProcess
    workers: tuple[WorkerProcess, ...]
    prefill: tuple[PrefillProcess, ...] = ()
    places: Places = field(default_factory=Places)

    @property
    def security(self) -> SecurityConfig:
        return self.engine.settings.security

    @property
    def compute(self) -> tuple[EngineProcess | FollowerProcess, ...]:
        """The compute hosts: the engine is number 0."""
        return (self.engine, *self.engine.followers)

    @property
    def drain_seconds(self) -> float:
        """For how long a process may let what it is doing end."""
        workers = (worker.settings.drain_seconds for worker in self.workers)
        return max(self.engine.server.drain_seconds, *workers)

    def roles(self) -> dict[str, AnyProcess]:
        """Each process by its role: "engine", "follower 1", ..., "worker 0", ..., "prefill 0", ..."""
        return {
            "engine": self.engine,
            **{f"follower {i}": follower for i, follower in enumerate(self.engine.followers, 1)},
            **{f"worker {i}": worker for i, worker in enumerate(self.workers)},
            **{f"prefill {i}": prefill for i, prefill in enumerate(self.prefill)},
        }

    def keys(self) -> dict[str, AnyProcess]:
        """Each process by its key path in the file: "engine", "engine.followers[0]", "workers[0]", ..."""
        return {
            "engine": self.engine,
            **{f"engine.followers[{i}]": follower for i, follower in enumerate(self.engine.followers)},
            **{f"workers[{i}]": worker for i, worker in enumerate(self.workers)},
            **{f"prefill[{i}]": prefill for i, prefill in enumerate(self.prefill)},
        }

    def address(self, process: Process) -> str:
        """The address of a process's host."""
        return self.hosts[process.host]

    def listens(self, process: EngineProcess | WorkerProcess | PrefillProcess) -> str:
        """Where the others find a process, as "host:port"; of the engine, where its followers do."""
        port = process.coordinator_port if isinstance(process, EngineProcess) else process.port
        return address_of(self.address(process), port)

    def connected(self) -> Cluster:
        """This cluster with every address in the settings as `hosts` has it."""
        workers = tuple(
            replace(worker, settings=replace(worker.settings, listen=self.listens(worker)))
            for worker in self.workers
        )
        alone = not self.engine.followers
        settings = replace(
            self.engine.settings,
            attention=",".join(map(self.listens, self.workers)),
            prefill=",".join(map(self.listens, self.prefill)) or None,
            coordinator=None if alone else self.listens(self.engine),
            num_hosts=None if alone else len(self.compute),
            host_id=None if alone else 0,
        )
        return replace(self, engine=replace(self.engine, settings=settings), workers=workers)

    def compute_settings(self, host_id: int) -> EngineConfig:
        """The settings of a compute host."""
        return replace(self.engine.settings, host_id=host_id if self.engine.followers else None)

    def prefill_settings(self, number: int) -> EngineConfig:
        """The settings of a prefill host: the engine's, but for what is about its workers and hosts."""
        return replace(
            self.engine.settings,
            compute_devices=self.prefill[number].compute_devices,
            attention=None,
            partition="heads",
            exchange="auto",
            prefill=None,
            coordinator=None,
            num_hosts=None,
            host_id=None,
            num_pages=None,
            timings=False,
            trace=None,
        )
