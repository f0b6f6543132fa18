"""`python -m lamina_jax.serve MODEL --role prefill --listen HOST:PORT`, once its flags are understood."""

from __future__ import annotations

from lamina_jax.command import end_by_signal, refuse, say
from lamina_jax.config import CheckpointError, ConfigError, EngineConfig
from lamina_jax.prefill.server import PrefillServer
from lamina_jax.worker.ports import ListenError


def run(config: EngineConfig, listen: str) -> int:
    """Be a prefill host until SIGTERM or Ctrl-C; the exit code. A second signal ends at once."""
    try:
        server = PrefillServer(config, listen)
    except (ConfigError, ListenError) as error:
        return refuse(error)
    end_by_signal(lambda _: server.ended.set())
    try:
        facts = server.start()
        say(
            f"listening on {listen} (port {server.port}, data port {facts.data_port}): prompts of up to "
            f"{facts.max_tokens:,} tokens on {facts.device}"
        )
        server.ended.wait()
    except (ConfigError, CheckpointError, ListenError) as error:
        return refuse(error)
    finally:
        server.close()
    return int(server.failed)
