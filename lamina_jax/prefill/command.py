"""`python -m lamina_jax.serve MODEL --role prefill --listen HOST:PORT`, once its flags are understood."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from lamina_jax.config import CheckpointError, ConfigError, EngineConfig
from lamina_jax.prefill.server import PrefillServer
from lamina_jax.worker.ports import ListenError


def run(config: EngineConfig, listen: str) -> int:
    """Be a prefill host until SIGTERM or Ctrl-C; the exit code. A second signal ends at once."""
    try:
        server = PrefillServer(config, listen)
    except (ConfigError, ListenError) as error:
        return _fail(error)

    def end(number: int, frame: FrameType | None) -> None:
        if server.ended.is_set():
            os._exit(1)
        server.ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        facts = server.start()
        _say(
            f"listening on {listen} (port {server.port}, data port {facts.data_port}): prompts of up to "
            f"{facts.max_tokens:,} tokens on {facts.device}"
        )
        server.ended.wait()
    except (ConfigError, CheckpointError, ListenError) as error:
        return _fail(error)
    finally:
        server.close()
    return int(server.failed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(error: Exception) -> int:
    _say(f"error: {error}")
    return 1
