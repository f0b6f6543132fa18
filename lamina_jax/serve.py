"""`python -m lamina_jax.serve [MODEL]`: an OpenAI-compatible server for one model.

With no arguments it serves the bundled model on 127.0.0.1:8000. The port is bound first, then the model
is loaded; `/health` answers at once, `/ready` when the first request can be served. With `--cluster FILE`
it is the engine of a cluster file.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from lamina_jax.cluster.dry_run import describe
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.pin import check_cores
from lamina_jax.cluster.processes import Cluster
from lamina_jax.config import ConfigError, EngineConfig, SecurityConfig, ServerConfig
from lamina_jax.flags import Parser, add_flags, from_flags
from lamina_jax.server.api_keys import read_keys
from lamina_jax.server.engine_host import EngineProcess
from lamina_jax.server.listener import listen
from lamina_jax.server.messages import Start


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
        check_cores(cluster.engine.cores)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return serve(cluster.engine.settings, cluster.engine.server, cluster)


def serve(engine_config: EngineConfig, server_config: ServerConfig, cluster: Cluster | None = None) -> int:
    """Serve one model, as the engine of `cluster` if there is one; the exit code."""
    try:
        keys = read_keys(server_config.api_key_file)
        listener = listen(server_config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if cluster is None:
        engine = EngineProcess(Start(engine_config, log_format=server_config.log_format))
    else:
        cores, log_format = cluster.engine.cores, server_config.log_format
        start = Start(engine_config, cores, str(cluster.file), log_format)
        engine = EngineProcess(start, cluster.engine.environment)
    # Only now, beside the engine's process, which imports jax: the web server's packages take a while, too.
    from lamina_jax.server.lifecycle import Server
    from lamina_jax.server.log_format import configure_logging
    from lamina_jax.weights.hub import find_model
    from lamina_jax.weights.tokenizer import load_tokenizer

    configure_logging(server_config.log_format)
    model = engine_config.model
    server = Server(engine, lambda: load_tokenizer(find_model(model)), model, server_config, keys)
    return asyncio.run(server.run(listener))


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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the server took the signals over
        sys.exit(130)
