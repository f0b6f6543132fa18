"""Reads a cluster file; `docs/clusters.md` describes its keys. Knows nothing of models, and no jax.

What stands in each other's way is refused in `claims`, what does not fit the model in `forecast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lamina_jax
from lamina_jax.cluster.claims import check_claims
from lamina_jax.cluster.places import KubernetesPlace, Places, RayPlace, SlurmPlace, TpuPlace
from lamina_jax.cluster.processes import (
    Cluster,
    EngineProcess,
    FollowerProcess,
    PrefillProcess,
    Process,
    WorkerProcess,
)
from lamina_jax.cluster.table import Table, names, read_file
from lamina_jax.config import (
    AttendConfig,
    ConfigError,
    EngineConfig,
    SecurityConfig,
    ServerConfig,
    address_of,
    is_loopback,
)

ELSEWHERE = {
    "attention": "the engine's workers are those under [[workers]]",
    "prefill": "its prefill hosts are those under [[prefill]]",
    "coordinator": "it is engine.host and engine.coordinator_port",
    "num_hosts": "the compute hosts are the engine's and those under [[engine.followers]]",
    "host_id": "a compute host's place in the file is its number",
    "memory_fraction": "each worker has its own, under [[workers]]",
    "security": "it is a table of its own, [security]",
    "insecure": "it stands in [security], for all processes",
}
"""Settings that a process gets, but from another place of the file."""

PLACES = {"kubernetes": KubernetesPlace, "slurm": SlurmPlace, "tpu": TpuPlace, "ray": RayPlace}

Kind = TypeVar("Kind", bound=Process)


def find_cluster_file(name: str) -> Path:
    """The file of that path, or the one of that name that comes with the package, such as "local".

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(lamina_jax.__file__).parent
    # In a wheel the files lie in the package, in a checkout beside it.
    folders = [folder / "configs" / "clusters" for folder in (package, package.parent)]
    shipped = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.toml"))}
    if name not in shipped:
        raise ConfigError(f"there is no cluster file {name!r}: give a path, or one of {', '.join(shipped)}")
    return shipped[name]


def read_cluster(path: Path) -> Cluster:
    """Read a cluster file. Relative paths in it begin at its folder.

    Raises:
        ConfigError: it names the file, the key's path, and what is wrong with it.
    """
    top = read_file(path)
    top.only("hosts", "security", "engine", "workers", "prefill", *PLACES)
    hosts = top.part("hosts").strings()
    workers = tuple(_worker(table, hosts) for table in top.parts("workers"))
    if not workers:
        raise top.error("workers", "missing: describe at least one under [[workers]]")
    engine = _engine(top.part("engine"), hosts, workers, _security(top.part("security")))
    prefill = tuple(_process(table, PrefillProcess, hosts) for table in top.parts("prefill"))
    places = Places(**{name: top.part(name).read(kind) for name, kind in PLACES.items()})
    cluster = Cluster(file=path, hosts=hosts, engine=engine, workers=workers, prefill=prefill, places=places)
    check_claims(cluster)
    return cluster.connected()


def _worker(table: Table, hosts: dict[str, str]) -> WorkerProcess:
    own = names(WorkerProcess) - {"settings"}
    table.only(*sorted(own), *sorted(names(AttendConfig) - {"listen"}))
    worker = _process(table.some(own), WorkerProcess, hosts)
    listen = address_of(hosts[worker.host], worker.port)
    flags = table.some(table.values.keys() - own)
    return replace(worker, settings=flags.read(AttendConfig, listen=listen))


def _engine(
    table: Table, hosts: dict[str, str], workers: Sequence[WorkerProcess], security: SecurityConfig
) -> EngineProcess:
    attention = ",".join(worker.settings.listen for worker in workers)
    settings = table.part("settings").read(EngineConfig, ELSEWHERE, attention=attention, security=security)
    if settings.model.startswith("."):
        settings = replace(settings, model=str(table.file.parent / settings.model))
    server = table.part("server").read(ServerConfig, ELSEWHERE, insecure=security.insecure)
    if server.api_key_file is not None:
        server = replace(server, api_key_file=str(table.file.parent / server.api_key_file))
    followers = tuple(_process(part, FollowerProcess, hosts) for part in table.parts("followers"))
    here = [is_loopback(hosts[process.host]) for process in followers]
    if not all(here) and is_loopback(hosts.get(str(table.values.get("host")), "")):
        address = hosts[table.values["host"]]
        raise table.error(
            "host", f"{address} is reached by its own machine only, and it has followers elsewhere"
        )
    if "coordinator_port" in table.values and not followers:
        raise table.error("coordinator_port", "it is for followers, and there is no [[engine.followers]]")
    return _process(table, EngineProcess, hosts, settings=settings, server=server, followers=followers)


def _security(table: Table) -> SecurityConfig:
    security = table.read(SecurityConfig)
    tls = {key: getattr(security, key) for key in ("tls_cert", "tls_key", "tls_ca")}
    if any(tls.values()) and not all(tls.values()):
        missing = " and ".join(key for key, value in tls.items() if value is None)
        raise table.error("", f"give {missing} too: in a cluster both sides show certificates")
    paths = {key: value for key, value in vars(security).items() if isinstance(value, str)}
    from_here: dict[str, Any] = {key: str(table.file.parent / path) for key, path in paths.items()}
    return replace(security, **from_here)


def _process(table: Table, kind: type[Kind], hosts: dict[str, str], **given: Any) -> Kind:
    process = table.read(kind, **given)
    if process.host not in hosts:
        names = ", ".join(hosts) or "none"
        raise table.error("host", f"{process.host!r} is no name under [hosts], which has {names}")
    return process
