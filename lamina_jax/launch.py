"""`python -m lamina_jax.launch local`: starts every process of a cluster file, and ends them together."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.pin import check_cores
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.together import run_together
from lamina_jax.config import ConfigError
from lamina_jax.flags import Parser

MARGIN_SECONDS = 5.0
"""Between a process's own limit for ending and the one at which it is killed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a cluster until a signal comes or a process ends; the exit code."""
    parser = Parser(prog="python -m lamina_jax.launch", description=__doc__, allow_abbrev=False)
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")
    local = places.add_parser("local", help="all processes on this machine", allow_abbrev=False)
    local.add_argument(
        "--cluster",
        default="local",
        metavar="FILE",
        help="a cluster file, or the name of one that comes with the package (default: local)",
    )
    options = parser.parse_args(argv)
    try:
        cluster = read_cluster(find_cluster_file(options.cluster))
        check_place(cluster)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_together(commands(cluster), grace_seconds(cluster))


def check_place(cluster: Cluster) -> None:
    """Refuse a cluster that cannot run on this machine alone.

    Raises:
        ConfigError: a host that is another machine, or cores that this one lacks; it names the key.
    """
    for name, address in cluster.hosts.items():
        if not is_here(address):
            raise ConfigError(
                f"{cluster.file}: hosts.{name}: {address} is no address of this machine, and "
                "`launch local` starts nothing elsewhere: give 127.0.0.1"
            )
    for key, process in cluster.keys().items():
        try:
            check_cores(process.cores)
        except ConfigError as error:
            raise ConfigError(f"{cluster.file}: {key}.{error}") from None


def is_here(address: str) -> bool:
    """Whether this machine can listen on an address."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
    except OSError:
        return False
    return True


def grace_seconds(cluster: Cluster) -> float:
    """How long the processes may take to end: as long as the file lets them drain, and a little more."""
    workers = (worker.settings.drain_seconds for worker in cluster.workers)
    return max(cluster.engine.server.drain_seconds, *workers) + MARGIN_SECONDS


if __name__ == "__main__":
    sys.exit(main())
