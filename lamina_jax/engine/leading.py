"""Steps on several compute hosts: host 0 tells the others every call, and they make it in the same order.

So all hosts queue the same programs in the same order, which is what collectives need. Knows nothing of how
messages travel, nor of what a step does.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from lamina_jax.config import ConfigError
from lamina_jax.core import Sampled, StepPlan
from lamina_jax.engine.runner import ClosableRunner
from lamina_jax.hosts.follower import Follower
from lamina_jax.hosts.leader import Leader
from lamina_jax.hosts.member import Member
from lamina_jax.hosts.messages import Dispatch, End, Read, Traffic

NOTICE_SECONDS = 3.0
"""A lost host breaks a collective before its silence is noticed: so long the alarm gets to say who it was."""

TRAFFIC_SECONDS = 0.5
"""Between two words of a follower on its wire."""

log = logging.getLogger(__name__)


@runtime_checkable
class HostRunner(ClosableRunner, Protocol):
    """One host's own runner, whose programs all hosts run together."""

    def traffic(self) -> Traffic:
        """What this host has exchanged with workers so far."""
        ...


class LeadingRunner:
    """Runs step plans on all hosts; see `ModelRunner`. A host or worker that is lost ends all of them.

    Args:
        runner: this host's own.
        leader: tells the others.
    """

    def __init__(self, runner: HostRunner, leader: Leader) -> None:
        self.runner, self._leader = runner, leader

    def dispatch(self, plan: StepPlan) -> Any:
        self._leader.send(Dispatch(plan))
        with _noticing(self._leader):
            return self.runner.dispatch(plan)

    def read(self, step: Any) -> list[Sampled]:
        self._leader.send(Read())
        with _noticing(self._leader):
            return self.runner.read(step)

    def stats(self) -> dict[str, Any]:
        """With "compute_hosts": of each host its own wire and dispatch time."""
        traffic = {0: self.runner.traffic(), **self._leader.traffic()}
        hosts = [{"host_id": host, **per_step(traffic[host])} for host in sorted(traffic)]
        return {**self.runner.stats(), "compute_hosts": hosts}

    def close(self) -> None:
        """End the other hosts, and give the workers back."""
        log.info("compute host 0 at its end: %s", per_step(self.runner.traffic()))
        self._leader.close()
        self.runner.close()


def follow(runner: HostRunner, follower: Follower) -> None:
    """Make the calls that host 0 tells, until it says that this is the end.

    Raises:
        ConfigError: host 0 says what it does not say now.
        Exception: a step has failed, and within `NOTICE_SECONDS` nobody was found to be lost.
    """
    steps: deque[Any] = deque()
    told, due = Traffic(), 0.0
    while not isinstance(order := follower.next_order(TRAFFIC_SECONDS), End):
        with _noticing(follower):
            match order:
                case Dispatch(plan):
                    steps.append(runner.dispatch(plan))
                case Read() if steps:
                    runner.read(steps.popleft())
                case None:
                    due = 0.0
                case _:
                    raise ConfigError(f"compute host 0 said {type(order).__name__} between two steps")
        if (now := time.monotonic()) >= due and (traffic := runner.traffic()) != told:
            told, due = traffic, now + TRAFFIC_SECONDS
            follower.send(told)
    log.info("compute host %d at its end: %s", follower.host_id, per_step(runner.traffic()))
    runner.close()
    follower.close()


def per_step(traffic: Traffic) -> dict[str, float]:
    """Under the names that `ModelRunner.stats` has for them."""
    steps = max(traffic.steps, 1)
    return {
        "wire_bytes_per_step": traffic.tensor_bytes / steps,
        "wire_messages_per_step": traffic.messages / steps,
        "wire_metadata_bytes_per_step": traffic.metadata_bytes / steps,
        "dispatch_microseconds_per_step": 1e6 * traffic.dispatch_seconds / steps,
    }


@contextmanager
def _noticing(member: Member) -> Iterator[None]:
    """Let the alarm name whose loss has made a step fail; if nobody is lost, the others hear of the error."""
    try:
        yield
    except Exception as error:
        log.debug("a step has failed", exc_info=True)
        time.sleep(NOTICE_SECONDS)
        member.fail(f"{type(error).__name__}: {error}")
        raise
