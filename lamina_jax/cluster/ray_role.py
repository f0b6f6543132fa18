"""A process of a cluster as an actor of Ray. Knows nothing of the others, or of who placed it."""

from __future__ import annotations

import os
import subprocess
import sys

from lamina_jax.cluster.commands import Command

WRONG_COMMAND = 2
"""The exit code of a process that another start would not help."""

MOVED = -1
"""In place of an exit code: this is another host than the one where the others look for the process."""


class Role:
    """An actor: it runs one process, and ends with it, so that Ray starts both anew, unless it was told to.

    Args:
        command: the process.
        address: of the host where the others look for it.
    """

    def __init__(self, command: Command, address: str) -> None:
        self._command, self._address, self._told = command, address, False
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        """What Ray puts before each line that the process prints."""
        return self._command.role

    def run(self) -> int:
        """Run the process until it ends; its exit code, or `MOVED` if it was not started."""
        found = node_address()
        if found != self._address:
            print(f"placed anew on {found}, it was on {self._address}", flush=True)
            return MOVED
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


def node_address() -> str:
    """Of the node of Ray that this process runs on."""
    import ray

    return str(ray.util.get_node_ip_address())
