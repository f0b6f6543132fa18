"""`python -m lamina_jax.attend --listen HOST:PORT`: an attention worker, which holds KV pages for an engine.

It loads no weights and no model: the engine that leases it says what to prepare. The ports are bound
first, then the devices are found.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lamina_jax.command import end_by_signal, refuse, say
from lamina_jax.config import AttendConfig, ConfigError, SecurityConfig
from lamina_jax.flags import Parser, add_flags, from_flags
from lamina_jax.server.log_format import configure_logging

if TYPE_CHECKING:
    from lamina_jax.worker.server import MakeSession


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    config, security = parse(argv)
    from lamina_jax.worker.transfer import session_for

    make_session = partial(session_for, cpu_kernels=config.cpu_kernels, insecure=security.insecure)
    return run(config, security, make_session)


def parse(argv: Sequence[str] | None) -> tuple[AttendConfig, SecurityConfig]:
    """The configuration that a command line says; ends the process with code 2 where it is wrong."""
    parser = Parser(prog="python -m lamina_jax.attend", description=__doc__, allow_abbrev=False)
    add_flags(parser, AttendConfig)
    add_flags(parser, SecurityConfig)
    options = parser.parse_args(argv)
    try:
        return from_flags(AttendConfig, options), from_flags(SecurityConfig, options)
    except ConfigError as error:
        parser.error(str(error))


def run(config: AttendConfig, security: SecurityConfig, make_session: MakeSession) -> int:
    """Be a worker until a signal comes; the exit code. The first signal drains, the second ends at once."""
    from lamina_jax.compilation_cache import keep_programs
    from lamina_jax.worker.ports import ListenError
    from lamina_jax.worker.server import WorkerServer

    configure_logging()
    keep_programs(config.compilation_cache)
    try:
        server = WorkerServer(config, security, make_session)
    except (ConfigError, ListenError) as error:
        return refuse(error)
    try:
        stop = threading.Event()
        end_by_signal(lambda _: stop.set())
        facts = server.start()
        where = f"port {server.port}, data port {facts.data_port}"
        say(
            f"listening on {config.listen} ({where}): {facts.devices} x {facts.device_kind}, "
            f"{facts.memory_bytes / 2**20:,.0f} MiB for KV pages"
        )
        stop.wait()
        say("ending; a second signal ends at once")
        server.drain()
    except ConfigError as error:
        return refuse(error)
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # before the worker took the signals over
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would wait for threads that compile, or run a program of a lease that has ended.
    os._exit(code)
