"""A cluster on hosts whose addresses another place gives: Slurm's nodes, pods, the hosts of a TPU slice.

Knows nothing of how a place is written down. No jax here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from lamina_jax.cluster.claims import device_names
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.processes import Cluster, PrefillProcess, Process, WorkerProcess
from lamina_jax.config import ConfigError, is_loopback

Kind = TypeVar("Kind", bound=Process)


def side_of(role: str) -> Side:
    """The side of a process, by its role."""
    sides: dict[str, Side] = {"worker": "memory", "prefill": "prefill"}
    return sides.get(role.split(maxsplit=1)[0], "compute")


def sides(cluster: Cluster) -> dict[Side, list[str]]:
    """The names of each side's hosts, in the order in which the file uses them."""
    found: dict[Side, list[str]] = {}
    for role, process in cluster.roles().items():
        names = found.setdefault(side_of(role), [])
        if process.host not in names:
            names.append(process.host)
    return found


def relocated(cluster: Cluster, address: Callable[[Side, int], str], reached: str) -> Cluster:
    """A cluster on other hosts: each host of each side is one of its own.

    Args:
        address: of a side's host, by its number.
        reached: where they are, for the error.

    Raises:
        ConfigError: they are reached over a network, and nothing protects them.
    """
    _check_security(cluster, reached)
    numbers = {(side, name): i for side, names in sides(cluster).items() for i, name in enumerate(names)}
    hosts = {f"{side} {i}": address(side, i) for (side, _), i in numbers.items()}

    def moved(process: Kind, side: Side) -> Kind:
        return replace(process, host=f"{side} {numbers[side, process.host]}")

    engine = moved(cluster.engine, "compute")
    followers = tuple(moved(follower, "compute") for follower in engine.followers)
    server = engine.server
    if not is_loopback(server.host):
        server = replace(server, host=hosts[engine.host])
    return replace(
        cluster,
        hosts=hosts,
        engine=replace(engine, followers=followers, server=server),
        workers=tuple(moved(worker, "memory") for worker in cluster.workers),
        prefill=tuple(moved(prefill, "prefill") for prefill in cluster.prefill),
    ).connected()


def spread(cluster: Cluster) -> Cluster:
    """A cluster of which each process has a host of its own, by the name of its role."""
    engine = cluster.engine
    followers = tuple(replace(process, host=f"follower {i}") for i, process in enumerate(engine.followers, 1))
    return replace(
        cluster,
        hosts={role: cluster.address(process) for role, process in cluster.roles().items()},
        engine=replace(engine, host="engine", followers=followers),
        workers=tuple(replace(process, host=f"worker {i}") for i, process in enumerate(cluster.workers)),
        prefill=tuple(replace(process, host=f"prefill {i}") for i, process in enumerate(cluster.prefill)),
    )


def devices_of(cluster: Cluster, role: str) -> list[str]:
    """The names of a process's devices.

    Raises:
        ConfigError: the file leaves them to be chosen at start; it names the key.
    """
    process = cluster.roles()[role]
    if isinstance(process, WorkerProcess):
        key, devices = f"workers[{cluster.workers.index(process)}].devices", process.settings.devices
    elif isinstance(process, PrefillProcess):
        key, devices = f"prefill[{cluster.prefill.index(process)}].compute_devices", process.compute_devices
    else:
        key, devices = "engine.settings.compute_devices", cluster.engine.settings.compute_devices
    if devices is None or ":" not in devices:
        raise ConfigError(f"{cluster.file}: {key}: say which devices, such as gpu:0-3: so many are asked for")
    return device_names(devices)


def renumbered(cluster: Cluster) -> Cluster:
    """A cluster of which each process sees its own devices only, and counts them from 0.

    Raises:
        ConfigError: devices that the file leaves to be chosen at start.
    """

    def own(role: str) -> str:
        names = devices_of(cluster, role)
        count = f"0-{len(names) - 1}" if len(names) > 1 else "0"
        return f"{names[0].partition(':')[0]}:{count}"

    settings = replace(cluster.engine.settings, compute_devices=own("engine"))
    return replace(
        cluster,
        engine=replace(cluster.engine, settings=settings),
        workers=tuple(
            replace(worker, settings=replace(worker.settings, devices=own(f"worker {i}")))
            for i, worker in enumerate(cluster.workers)
        ),
        prefill=tuple(
            replace(host, compute_devices=own(f"prefill {i}")) for i, host in enumerate(cluster.prefill)
        ),
    )


def _check_security(cluster: Cluster, reached: str) -> None:
    security = cluster.security
    if not (security.insecure or (security.token_file and security.tls_ca)):
        raise ConfigError(
            f"{cluster.file}: security: {reached} are reached over a network: give token_file, tls_cert, "
            "tls_key and tls_ca, or insecure = true if everyone on that network may use the cache"
        )
