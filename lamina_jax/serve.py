"""`python -m lamina_jax.serve [MODEL]`: an OpenAI-compatible server for one model.

With no arguments it serves the bundled model on 127.0.0.1:8000. The port is bound first, then the model
is loaded; `/health` answers at once, `/ready` when the first request can be served.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence

from lamina_jax.config import ConfigError, EngineConfig, SecurityConfig, ServerConfig
from lamina_jax.flags import Parser, add_flags, from_flags
from lamina_jax.server.engine_thread import Build, Engine, StartError
from lamina_jax.server.listener import ListenError, listen


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    engine_config, server_config = parse(argv)
    try:
        listener = listen(server_config)
    except ListenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # After the port is bound, since the web server's packages take a while to import.
    from lamina_jax.server.lifecycle import Server, leave
    from lamina_jax.server.report import configure_logging

    configure_logging()
    server = Server(build(engine_config), engine_config.model, server_config)
    code = asyncio.run(server.run(listener))
    if not server.ended_cleanly:
        leave(code)
    return code


def parse(argv: Sequence[str] | None) -> tuple[EngineConfig, ServerConfig]:
    """The configuration that a command line says; ends the process with code 2 where it is wrong."""
    parser = Parser(prog="python -m lamina_jax.serve", description=__doc__, allow_abbrev=False)
    add_flags(parser, EngineConfig, positional="model")
    add_flags(parser, ServerConfig)
    add_flags(parser, SecurityConfig)
    options = parser.parse_args(argv)
    try:
        security = from_flags(SecurityConfig, options)
        return from_flags(EngineConfig, options, security=security), from_flags(ServerConfig, options)
    except ConfigError as error:
        parser.error(str(error))


def build(config: EngineConfig) -> Build:
    """How the engine's thread makes its engine; jax is imported there, while the port answers already."""

    def start(report: Callable[[str, int, int], None]) -> Engine:
        report("importing jax", 0, 0)
        from lamina_jax.engine.build import build_engine
        from lamina_jax.models.hf_config import CheckpointError

        try:
            return build_engine(config, report)
        except (ConfigError, CheckpointError) as error:
            raise StartError(str(error)) from None

    return start


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the server took the signals over
        sys.exit(130)
