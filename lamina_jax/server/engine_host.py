"""The server's hold on its engine's process: it starts it, sees how it ended, and can kill it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from lamina_jax.command import SIGNALS
from lamina_jax.server.frames import pack
from lamina_jax.server.messages import Start

COMMAND = (sys.executable, "-m", "lamina_jax.server.engine_process")


@runtime_checkable
class EngineHost(Protocol):
    """Where an engine runs. `connection` is the server's end of the socket that it listens to."""

    connection: socket.socket

    def ended(self) -> str | None:
        """How it has ended; None: it still runs."""

    def kill(self) -> None:
        """End it now, whatever it does."""


class EngineProcess:
    """An `EngineHost` that is a process.

    It begins at once, and ends when this one does, however that ends. To be made in the main thread.

    Args:
        start: its first message, if it awaits one.
        environment: variables that are set for it, beside this process's own.
        command: what it is; the number of its socket follows.
    """

    def __init__(
        self,
        start: Start | None,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            # Signals reach the whole group, and the server alone answers them. A process inherits what is
            # blocked: none can reach it before it has seen to that itself.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **(environment or {})},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if start is not None:
            self.connection.sendall(pack(start))

    def ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"has ended with exit code {code}"
        return f"was ended by {_NAMES.get(-code, f'signal {-code}')}"

    def kill(self) -> None:
        self._process.kill()


_NAMES = {number.value: number.name for number in signal.Signals}
