"""Runs a cluster on Ray, which places its processes on a Ray cluster and starts them anew when they die.

Each host of the cluster file is a bundle of one placement group, on a node with the resource of its side;
each process belongs to an actor of its host's bundle. No jax here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lamina_jax.cluster.commands import Command, commands
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.relocate import devices_of, relocated, renumbered, side_of, sides
from lamina_jax.config import ConfigError, host_and_port

MOST_RESTARTS = 100
"""Of each process: what fails at every start must not go on for ever."""

PLACING_SECONDS = 120.0
WRONG_COMMAND = 2
"""The exit code of a process that another start would not help."""

AUTO = "auto"
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 0.5
SHARE = 0.001
"""Of its host's resource that a process takes: the bundle has it, and all processes of the host are in it."""

DEVICES = {"gpu": "GPU", "cuda": "GPU", "tpu": "TPU"}
"""Ray's name for a platform's devices."""


class Role:
    """An actor: it runs one process, and ends when that ends otherwise than it was told."""

    def __init__(self, command: Command, address: str) -> None:
        self._command, self._address, self._told = command, address, False
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        """What Ray puts before each line that the process prints."""
        return self._command.role

    def run(self) -> int:
        """Run the process until it ends; its exit code.

        Raises:
            RuntimeError: this is another host than the one where the others look for it.
        """
        found = _address()
        if found != self._address:
            raise RuntimeError(
                f"{self._command.role} was placed anew at {found}, and the others look for it at "
                f"{self._address}: launch the cluster again"
            )
        pinned = [sys.executable, "-m", "lamina_jax.cluster.pin", "--parent", str(os.getpid())]
        if self._command.cores is not None:
            pinned += ["--cores", self._command.cores]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self._command.environment
        arguments = [*pinned, "--", sys.executable, *self._command.argv[1:]]
        self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, env=environment)
        code = self._process.wait()
        if code and code != WRONG_COMMAND and not self._told:
            print(f"ended with {code}: Ray starts it anew", flush=True)
            os._exit(1)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Let it end what it does."""
        self._told = True
        if self._process is not None:
            self._process.terminate()


def run_on_ray(cluster: Cluster, address: str, grace_seconds: float) -> int:
    """Run a cluster until a signal comes or a process ends for good; the exit code.

    Args:
        address: of the Ray cluster; "auto" is the one that this machine belongs to.
        grace_seconds: how long the processes may take to end.

    Raises:
        ConfigError: there is no Ray, no cluster of it there, or none with what the file asks for.
    """
    ray = _ray()
    try:
        if address != AUTO:  # Ray itself would go on asking for minutes
            socket.create_connection(host_and_port("address", address), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=True)
    except (OSError, RuntimeError) as error:  # of which ConnectionError is one
        raise ConfigError(f"--address {address}: no Ray cluster is there: {error}") from None
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray has taken them over
        signal.signal(number, lambda number, frame: stopped.append(number))
    try:
        group = _place(ray, cluster)
        actors = _start(ray, cluster, group)
        return _follow(ray, actors, grace_seconds, lambda: bool(stopped))
    finally:
        ray.shutdown()  # which ends the actors, and the placement group


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("launch ray needs Ray: pip install 'lamina_jax[ray]'") from None
    return ray


def _address() -> str:
    return str(_ray().util.get_node_ip_address())


def _hosts(cluster: Cluster) -> list[tuple[Side, str]]:
    """In the order of the bundles."""
    return [(side, name) for side, names in sides(cluster).items() for name in names]


def _place(ray: Any, cluster: Cluster) -> Any:
    """The placement group, ready."""
    bundles = []
    for side, host in _hosts(cluster):
        bundle = {getattr(cluster.places.ray, side): 1.0}
        for role, process in cluster.roles().items():
            if process.host == host and side_of(role) == side:
                for resource, count in _devices(cluster, role).items():
                    bundle[resource] = bundle.get(resource, 0.0) + count
        bundles.append(bundle)
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=PLACING_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(
            f"{cluster.file}: ray: there was no room for {bundles} within {PLACING_SECONDS:.0f} s; the Ray "
            f"cluster has {ray.cluster_resources()}: start nodes with these, or name others in [ray]"
        ) from None
    return group


def _devices(cluster: Cluster, role: str) -> dict[str, float]:
    """The devices of a process, as Ray counts them."""
    names = devices_of(cluster, role)
    resource = DEVICES.get(names[0].partition(":")[0])
    return {} if resource is None else {resource: float(len(names))}


def _start(ray: Any, cluster: Cluster, group: Any) -> dict[str, Any]:
    """Each process's actor, by its role."""
    hosts = _hosts(cluster)

    def within(side: Side, host: str, **resources: float) -> dict[str, Any]:
        own = resources | {getattr(cluster.places.ray, side): SHARE}
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=hosts.index((side, host))
        )
        gpus = own.pop("GPU", 0.0)
        return {"num_cpus": 0, "num_gpus": gpus, "resources": own, "scheduling_strategy": strategy}

    probe = ray.remote(_address)
    found = dict(
        zip(hosts, ray.get([probe.options(**within(*host)).remote() for host in hosts]), strict=True)
    )
    names = sides(cluster)
    moved = relocated(renumbered(cluster), lambda side, i: found[side, names[side][i]], "nodes of Ray")
    actors = {}
    for command in commands(moved, by_flags=True):
        side, host = side_of(command.role), cluster.roles()[command.role].host
        actors[command.role] = (
            ray.remote(Role)
            .options(
                max_restarts=MOST_RESTARTS,
                max_task_retries=-1,  # a new actor runs the process again
                max_concurrency=2,  # `stop` while `run` runs
                **within(side, host, **_devices(cluster, command.role)),
            )
            .remote(command, found[side, host])
        )
    return actors


def _follow(ray: Any, actors: dict[str, Any], grace_seconds: float, stopped: Callable[[], bool]) -> int:
    """Wait until a process ends for good, or a signal comes; then end the others. The exit code."""
    runs = {actor.run.remote(): role for role, actor in actors.items()}
    ended: Sequence[Any] = ()
    while not ended and not stopped():
        ended, _ = ray.wait([*runs], timeout=LOOK_SECONDS)
    code = 0
    for run in ended:
        try:
            code = code or ray.get(run)
            print(f"{runs[run]} ended with exit code {code}: ending the others", flush=True)
        except ray.exceptions.RayError as error:
            code = 1
            print(f"{runs[run]}: {error}: ending the others", file=sys.stderr, flush=True)
    for actor in actors.values():
        actor.stop.remote()
    with suppress(ray.exceptions.RayError):
        ray.wait([*runs], num_returns=len(runs), timeout=grace_seconds)
    return int(code)
