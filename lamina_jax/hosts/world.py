"""The JAX world of several compute hosts: they join host 0 first, so that every mistake has a name."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping

import jax

from lamina_jax.config import ConfigError, EngineConfig, address_of, host_and_port
from lamina_jax.hosts.alarm import Alarm
from lamina_jax.hosts.detect import Place
from lamina_jax.hosts.follower import Follower
from lamina_jax.hosts.leader import Leader
from lamina_jax.hosts.messages import World

ENTER_SECONDS = 60
"""All hosts are there when they enter: what lasts longer is a port that a firewall closes."""


def lead(
    config: EngineConfig, facts: Mapping[str, str], alarm: Alarm, report: Callable[[str, int, int], None]
) -> Leader:
    """Be host 0: returns when all hosts are there, in one world.

    Raises:
        ConfigError: they are not; the text names who is missing, or what is wrong.
    """
    place = _place(config)
    leader = Leader(place.coordinator, place.num_hosts, facts, config.security, alarm)
    leader.gather(config.worker_wait_seconds, report)
    address = _free_address(place.coordinator)
    leader.send(World(address, leader.group))
    _enter(address, place.num_hosts, 0)
    # Not as a daemon: the end of Python waits for it.
    threading.Thread(target=_close_at_the_end, args=(leader,), name="end of the hosts").start()
    return leader


def join(
    config: EngineConfig, facts: Mapping[str, str], alarm: Alarm, report: Callable[[str, int, int], None]
) -> Follower:
    """Be another host: returns when all hosts are there, in one world.

    Raises:
        ConfigError: there is no host 0, or it refuses this one.
    """
    place = _place(config)
    follower = Follower(*place, facts, config.security, alarm, config.worker_wait_seconds, report)
    report("waiting for the other compute hosts", 0, 0)
    _enter(follower.enter(), place.num_hosts, place.host_id)
    return follower


def _close_at_the_end(leader: Leader) -> None:
    """A script that ends without a word has ended in good order: the other hosts end like it."""
    threading.main_thread().join()
    leader.close()


def _place(config: EngineConfig) -> Place:
    if config.coordinator is None or config.num_hosts is None or config.host_id is None:
        raise ConfigError(
            f"coordinator={config.coordinator!r} has to be found first, with num_hosts and host_id"
        )
    return Place(config.coordinator, config.num_hosts, config.host_id)


def _free_address(coordinator: str) -> str:
    """A free port beside our own coordinator's, on host 0."""
    host, _ = host_and_port("coordinator", coordinator)
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family) as taken:
        return address_of(host, taken.getsockname()[1])


def _enter(address: str, num_hosts: int, host_id: int) -> None:
    """Be one process of the world, before JAX has started a backend; returns when all are."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Else a peer's death aborts this process with no word of ours.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM over
    jax.distributed.initialize(
        address,
        num_hosts,
        host_id,
        initialization_timeout=ENTER_SECONDS,
        coordinator_bind_address=address if host_id == 0 else None,
    )
