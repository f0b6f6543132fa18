"""`python -m lamina_jax.launch PLACE`: runs a cluster file, or writes it out for what runs it.

`local` and `ssh` start every process, here or each on its host, and end them together; `ray` has Ray place
them; `emit` writes a job of Slurm, manifests of Kubernetes, or a script for Cloud TPU. Nothing here starts
anew what has failed: that is what these, Ray and systemd do.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.dry_run import check_reach
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.kubernetes import emit_kubernetes
from lamina_jax.cluster.on_ray import run_on_ray
from lamina_jax.cluster.pin import check_cores
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.slurm import emit_slurm
from lamina_jax.cluster.ssh import ssh_commands
from lamina_jax.cluster.together import run_together
from lamina_jax.cluster.tpu import emit_tpu
from lamina_jax.command import refuse
from lamina_jax.config import ConfigError
from lamina_jax.flags import Parser

MARGIN_SECONDS = 5.0
"""Between a process's own limit for ending and the one at which it is killed."""


EMITTED: dict[str, tuple[Callable[[Cluster], str], str]] = {
    "slurm": (emit_slurm, "sbatch"),
    "kubernetes": (emit_kubernetes, "yaml"),
    "tpu": (emit_tpu, "sh"),
}
"""What writes a cluster out, and the ending of its file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a cluster until a signal comes or a process ends, or write it out; the exit code."""
    options = parse(argv)
    try:
        cluster = read_cluster(find_cluster_file(options.cluster))
        return int(options.run(cluster, options))
    except ConfigError as error:
        return refuse(error)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What a command line says, `run` being what to do; ends the process with code 2 where it is wrong."""
    parser = Parser(prog="python -m lamina_jax.launch", description=__doc__, allow_abbrev=False)
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")

    def place(name: str, text: str, run: Callable[[Cluster, argparse.Namespace], int]) -> Parser:
        added: Parser = places.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument(
            "--cluster",
            default="local",
            metavar="FILE",
            help="a cluster file, or the name of one that comes with the package (default: local)",
        )
        return added

    place("local", "run all processes on this machine", run_local)
    ssh = place("ssh", "run each process on its host, through ssh", run_ssh)
    ssh.add_argument(
        "--python",
        default="python3",
        metavar="PATH",
        help="of every host, with lamina_jax (default: python3)",
    )
    ssh.add_argument(
        "--directory",
        default=".",
        metavar="DIR",
        help="of every host, where relative paths begin (default: home)",
    )
    ray = place("ray", "run all processes on a Ray cluster, which starts anew what dies", run_ray)
    ray.add_argument(
        "--address", default="auto", metavar="HOST:PORT", help="of the Ray cluster (default: this machine's)"
    )
    emit = place("emit", "write out what runs it", run_emit)
    emit.add_argument("--for", dest="target", required=True, choices=sorted(EMITTED), help="what runs it")
    emit.add_argument(
        "--output", type=Path, metavar="DIR", help="a folder for the file; otherwise it goes to stdout"
    )
    return parser.parse_args(argv)


def run_local(cluster: Cluster, options: argparse.Namespace) -> int:
    """Run all processes here."""
    check_place(cluster)
    return run_together(commands(cluster), grace_seconds(cluster))


def run_ssh(cluster: Cluster, options: argparse.Namespace) -> int:
    """Run each process on its host."""
    check_reach(cluster)
    grace = grace_seconds(cluster)
    # A host ends its process by itself within the grace; the connection may then take as long again.
    return run_together(ssh_commands(cluster, options.python, options.directory, grace), 2 * grace)


def run_ray(cluster: Cluster, options: argparse.Namespace) -> int:
    """Run all processes on a Ray cluster."""
    return run_on_ray(cluster, options.address, grace_seconds(cluster))


def run_emit(cluster: Cluster, options: argparse.Namespace) -> int:
    """Write the cluster out."""
    emit, ending = EMITTED[options.target]
    text = emit(cluster)
    if options.output is None:
        print(text, end="")
        return 0
    file = options.output / f"{cluster.file.stem}.{ending}"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {file} cannot be written: {error.strerror or error}") from None
    print(file)
    return 0


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
    return cluster.drain_seconds + MARGIN_SECONDS


if __name__ == "__main__":
    sys.exit(main())
