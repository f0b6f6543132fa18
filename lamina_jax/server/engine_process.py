"""The engine's own process: `python -m lamina_jax.server.engine_process FD`, which the server starts.

FD is a stream socket that it was given; `Start` is the first message on it. The process lives as long as
somebody is at the other end, and not a moment longer, whatever it does at the time.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from functools import partial

from lamina_jax.cluster.pin import die_with, pin
from lamina_jax.engine.engine import Engine
from lamina_jax.hosts.alarm import Alarm, leave
from lamina_jax.server.engine_loop import Build, EngineLoop
from lamina_jax.server.frames import STARTS, receive
from lamina_jax.server.log_format import configure_logging
from lamina_jax.server.messages import Start


def main() -> None:
    """Be what the first message says."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    start: Start = receive(connection, STARTS)
    configure_logging(start.log_format)
    alarm = Alarm()
    run(partial(build, start, alarm), connection, alarm)
    if start.config.coordinator is not None:
        leave(0)  # the other compute hosts have ended, and JAX would wait for them


def run(build: Build, connection: socket.socket, alarm: Alarm) -> None:
    """Run an engine until nobody wants it any more. Signals are for the server: they are blocked here."""
    die_with(os.getppid())  # also while it is stopped
    loop = EngineLoop(build, connection, left=lambda: os._exit(1))
    alarm.tell(loop.fail)
    loop.run()


def build(start: Start, alarm: Alarm, report: Callable[[str, int, int], None]) -> Engine:
    """The engine that `start` describes; jax is imported here, once the cores are set.

    Args:
        alarm: rung when another compute host is lost.
    """
    pin(start.cores)
    report("importing jax", 0, 0)
    from lamina_jax.engine.build import build_engine

    if start.cluster is not None:
        _check_cluster(start.cluster)
    return build_engine(start.config, report, alarm=alarm)


def _check_cluster(name: str) -> None:
    """Refuse a cluster that cannot share its model's heads, by the keys of its file."""
    from pathlib import Path

    from lamina_jax.cluster.file import read_cluster
    from lamina_jax.cluster.forecast import check_heads
    from lamina_jax.models.hf_config import read_config
    from lamina_jax.weights.hub import find_model

    cluster = read_cluster(Path(name))
    check_heads(cluster, read_config(find_model(cluster.engine.settings.model)))


if __name__ == "__main__":
    main()
