"""Runs a cluster on Ray, which places its processes on a Ray cluster and starts them anew when they die.

Each host of the cluster file is a bundle of one placement group, on a node with the resource of its side;
each process belongs to an actor of its host's bundle. A bundle whose node is lost gets another one from Ray;
then all processes are started anew, since the others look for those of the lost node at its address. No jax
here.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.ray_role import MOVED, Role, node_address
from lamina_jax.cluster.relocate import devices_of, relocated, renumbered, side_of, sides
from lamina_jax.config import ConfigError, host_and_port

MOST_RESTARTS = 100
"""Of each process: what fails at every start must not go on for ever."""

PLACING_SECONDS = 120.0
"""For the first places of all processes. A lost node is waited for until somebody ends the launcher."""

AUTO = "auto"
CONNECT_SECONDS = 10.0
PROBE_SECONDS = 60.0
"""In which each bundle's node says its address."""

LOOK_SECONDS = 1.0
SHARE = 0.001
"""Of its host's resource that a process takes: the bundle has it, and all processes of the host are in it."""

DEVICES = {"gpu": "GPU", "cuda": "GPU", "tpu": "TPU"}
"""Ray's name for a platform's devices."""


def run_on_ray(cluster: Cluster, address: str, grace_seconds: float) -> int:
    """Run a cluster until a signal comes or a process ends for good; the exit code.

    Args:
        address: of the Ray cluster; "auto" is the one that this machine belongs to.
        grace_seconds: how long the processes may take to end.

    Raises:
        ConfigError: there is no Ray, no cluster of it there, or none with what the file asks for.
    """
    ray = _connected(address)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray has taken them over
        signal.signal(number, lambda number, frame: stopped.append(number))
    try:
        launch = _Launch(ray, cluster, stopped)
        launch.place(PLACING_SECONDS)
        while (code := launch.live(grace_seconds)) == MOVED:
            launch.place(None)
        return code
    finally:
        ray.shutdown()  # which ends the actors, and the placement group


def _connected(address: str) -> Any:
    """The package `ray`, which talks to the Ray cluster there."""
    try:
        import ray
    except ImportError:
        raise ConfigError("launch ray needs Ray: pip install 'lamina_jax[ray]'") from None
    try:
        if address != AUTO:  # Ray itself would go on asking for minutes
            socket.create_connection(host_and_port("address", address), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=True)
    except (OSError, RuntimeError) as error:  # of which ConnectionError is one
        raise ConfigError(f"--address {address}: no Ray cluster is there: {error}") from None
    return ray


class _Launch:
    """One cluster on Ray.

    Args:
        ray: the package.
        stopped: the signals that have come.
    """

    def __init__(self, ray: Any, cluster: Cluster, stopped: Sequence[int]) -> None:
        self._ray, self._cluster, self._stopped = ray, cluster, stopped
        self._hosts = [(side, name) for side, names in sides(cluster).items() for name in names]
        self._bundles = [_bundle(cluster, side, host) for side, host in self._hosts]
        self._group = ray.util.placement_group(self._bundles, strategy="PACK")
        self._said: list[str] = []

    def place(self, seconds: float | None) -> None:
        """Wait until every bundle has its node, or a signal comes.

        Raises:
            ConfigError: some have none after so many seconds; it names what they ask for.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while not self._stopped and not self._group.wait(LOOK_SECONDS):
            if until is not None and time.monotonic() > until:
                raise ConfigError(
                    f"{self._cluster.file}: ray: there was no room for {self._bundles} within "
                    f"{seconds:.0f} s; the Ray cluster has {self._ray.cluster_resources()}: start nodes with "
                    "these, or name others in [ray]"
                )
            if until is None:
                self._say_what_is_missing()

    def live(self, grace_seconds: float) -> int:
        """Start all processes where their bundles are, and follow them until one ends for good or a signal
        comes; then end the others. The exit code; `MOVED`: some process has another host now, or none yet."""
        if self._stopped:
            return 0
        try:
            actors = self._start()
        except self._ray.exceptions.GetTimeoutError:  # a node was lost meanwhile
            return MOVED
        runs = {actor.run.remote(): role for role, actor in actors.items()}
        ended: Sequence[Any] = ()
        while not ended and not self._stopped:
            ended, _ = self._ray.wait([*runs], timeout=LOOK_SECONDS)
            self._say_what_is_missing()
        code = self._code(runs[ended[0]], ended[0]) if ended else 0
        for actor in actors.values():
            actor.stop.remote()
        with suppress(self._ray.exceptions.RayError):
            self._ray.wait([*runs], num_returns=len(runs), timeout=grace_seconds)
        for actor in actors.values():
            self._ray.kill(actor)
        return code

    def _start(self) -> dict[str, Any]:
        """Each process's actor, by its role."""
        probe = self._ray.remote(node_address)
        asked = [probe.options(**self._within(*host)).remote() for host in self._hosts]
        found = dict(zip(self._hosts, self._ray.get(asked, timeout=PROBE_SECONDS), strict=True))
        cluster, names = self._cluster, sides(self._cluster)
        moved = relocated(renumbered(cluster), lambda side, i: found[side, names[side][i]], "nodes of Ray")
        actors = {}
        for command in commands(moved, by_flags=True):
            side, host = side_of(command.role), cluster.roles()[command.role].host
            options = self._within(side, host, **_devices(cluster, command.role))
            actor = self._ray.remote(Role).options(
                max_restarts=MOST_RESTARTS,
                max_task_retries=-1,  # a new actor runs the process again
                max_concurrency=2,  # `stop` while `run` runs
                **options,
            )
            actors[command.role] = actor.remote(command, found[side, host])
        return actors

    def _within(self, side: Side, host: str, **resources: float) -> dict[str, Any]:
        """The options of what runs in a host's bundle, with these resources of it."""
        own = resources | {getattr(self._cluster.places.ray, side): SHARE}
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._hosts.index((side, host))
        )
        gpus = own.pop("GPU", 0.0)
        return {"num_cpus": 0, "num_gpus": gpus, "resources": own, "scheduling_strategy": strategy}

    def _code(self, role: str, run: Any) -> int:
        """How a process has ended for good."""
        try:
            code = int(self._ray.get(run))
        except self._ray.exceptions.RayError as error:
            print(f"{role}: {error}: ending the others", file=sys.stderr, flush=True)
            return 1
        how = "is on another node now: starting all anew" if code == MOVED else f"ended with exit code {code}"
        print(f"{role} {how}" + ("" if code == MOVED else ": ending the others"), flush=True)
        return code

    def _say_what_is_missing(self) -> None:
        """A line when it changes which bundles have no node."""
        nodes = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        places: Mapping[int, str] = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        missing = [
            f"{self._bundles[i]} for {', '.join(_roles(self._cluster, *host))}"
            for i, host in enumerate(self._hosts)
            if places.get(i) not in nodes
        ]
        if missing and missing != self._said:
            print(
                f"a node is lost; waiting for one with {' and one with '.join(missing)}; the Ray cluster has "
                f"{self._ray.available_resources()} left",
                flush=True,
            )
        self._said = missing


def _roles(cluster: Cluster, side: Side, host: str) -> list[str]:
    """The processes of one side on one host."""
    return [
        role for role, process in cluster.roles().items() if process.host == host and side_of(role) == side
    ]


def _bundle(cluster: Cluster, side: Side, host: str) -> dict[str, float]:
    """What a host asks of a node."""
    bundle = {getattr(cluster.places.ray, side): 1.0}
    for role in _roles(cluster, side, host):
        for resource, count in _devices(cluster, role).items():
            bundle[resource] = bundle.get(resource, 0.0) + count
    return bundle


def _devices(cluster: Cluster, role: str) -> dict[str, float]:
    """The devices of a process, as Ray counts them."""
    names = devices_of(cluster, role)
    resource = DEVICES.get(names[0].partition(":")[0])
    return {} if resource is None else {resource: float(len(names))}
