"""`python -m lamina_jax.serve [MODEL]`: an OpenAI-compatible server for one model.

With no arguments it serves the bundled model on 127.0.0.1:8000. The port is bound first, then the model
is loaded; `/health` answers at once, `/ready` when the first request can be served. With `--cluster FILE`
it is the engine of a cluster file.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lamina_jax.cluster.dry_run import describe
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.pin import pin
from lamina_jax.cluster.processes import Cluster
from lamina_jax.config import ConfigError, EngineConfig, SecurityConfig, ServerConfig
from lamina_jax.core import WorkerLost
from lamina_jax.flags import Parser, add_flags, from_flags
from lamina_jax.server.listener import ListenError, listen

if TYPE_CHECKING:
    from lamina_jax.server.engine_thread import Build, Engine


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    configs = parse(argv)
    options, others = cluster_flags().parse_known_args(argv)
    if options.cluster is None and not options.dry_run:
        return serve(*configs)
    try:
        cluster = the_cluster(options.cluster, others)
        if options.dry_run:
            print(describe(cluster))
            return 0
        os.environ.update(cluster.engine.environment)  # before jax reads it
        pin(cluster.engine.cores)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return serve(cluster.engine.settings, cluster.engine.server, cluster)


def serve(engine_config: EngineConfig, server_config: ServerConfig, cluster: Cluster | None = None) -> int:
    """Serve one model, as the engine of `cluster` if there is one; the exit code."""
    try:
        listener = listen(server_config)
    except ListenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # After the port is bound, since the web server's packages and jax take a while to import.
    from lamina_jax.server.lifecycle import Server, leave
    from lamina_jax.server.report import configure_logging

    configure_logging()
    server = Server(build(engine_config, cluster), engine_config.model, server_config)
    code = asyncio.run(server.run(listener))
    if not server.ended_cleanly:
        leave(code)
    return code


def parse(argv: Sequence[str] | None) -> tuple[EngineConfig, ServerConfig]:
    """The configuration that a command line says; ends the process with code 2 where it is wrong."""
    parser = Parser(
        prog="python -m lamina_jax.serve",
        description=__doc__,
        allow_abbrev=False,
        parents=[cluster_flags()],
    )
    add_flags(parser, EngineConfig, positional="model")
    add_flags(parser, ServerConfig)
    add_flags(parser, SecurityConfig)
    options = parser.parse_args(argv)
    try:
        security = from_flags(SecurityConfig, options)
        return from_flags(EngineConfig, options, security=security), from_flags(ServerConfig, options)
    except ConfigError as error:
        parser.error(str(error))


def cluster_flags() -> Parser:
    """The flags beside which there are no others."""
    parser = Parser(prog="python -m lamina_jax.serve", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--cluster", metavar="FILE", help="be the engine of a cluster file, which says all else"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --cluster: print who would run what, and start nothing"
    )
    return parser


def the_cluster(name: str | None, others: Sequence[str]) -> Cluster:
    """The cluster that `--cluster` names.

    Raises:
        ConfigError: there is no name, there are other flags, or the file is wrong.
    """
    if name is None:
        raise ConfigError("--dry-run is for a cluster file: add --cluster FILE")
    if others:
        raise ConfigError(f"--cluster and {' '.join(others)} cannot stand together: write it into {name}")
    return read_cluster(find_cluster_file(name))


def build(config: EngineConfig, cluster: Cluster | None = None) -> Build:
    """How the engine's thread makes its engine; jax is imported there, while the port answers already."""

    def start(report: Callable[[str, int, int], None]) -> Engine:
        report("importing jax", 0, 0)
        from lamina_jax.cluster.forecast import check_heads
        from lamina_jax.engine.build import build_engine, find_model
        from lamina_jax.models.hf_config import CheckpointError, read_config
        from lamina_jax.server.engine_thread import StartError

        try:
            if cluster is not None:
                check_heads(cluster, read_config(find_model(config.model)))
            return build_engine(config, report)
        except (ConfigError, CheckpointError, WorkerLost) as error:
            raise StartError(str(error)) from None

    return start


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the server took the signals over
        sys.exit(130)
