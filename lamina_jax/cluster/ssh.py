"""The commands that run a cluster's processes on their hosts, through the ssh client. Starts nothing.

What ssh needs beyond an address (users, ports, keys) stands in its own configuration.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

from lamina_jax.cluster.commands import Command, commands
from lamina_jax.cluster.processes import Cluster

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",  # never ask: nobody answers
    "-o",
    "ConnectTimeout=15",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)


def ssh_commands(cluster: Cluster, python: str, directory: str, grace_seconds: float) -> list[Command]:
    """What runs here, so that each process runs on its host, and ends when its standard input does.

    Args:
        python: in which lamina_jax is installed, on every host.
        directory: in which every process is started; relative paths of the settings begin there.
        grace_seconds: how long a process may take to end.
    """
    hosts = {role: cluster.address(process) for role, process in cluster.roles().items()}
    return [
        replace(
            command,
            argv=(*SSH, hosts[command.role], _remote(command, python, directory, grace_seconds)),
            cores=None,
            environment={},
            ends_with_input=True,
        )
        for command in commands(cluster, python, by_flags=True)
    ]


def _remote(command: Command, python: str, directory: str, grace_seconds: float) -> str:
    """One line for the host's shell."""
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    tether = [python, "-m", "lamina_jax.cluster.tether", "--grace", str(grace_seconds)]
    cores = [] if command.cores is None else ["--cores", command.cores]
    words = ["env", "PYTHONUNBUFFERED=1", *variables, *tether, *cores, "--", *command.argv]
    return f"cd {shlex.quote(directory)} && exec {shlex.join(words)}"
