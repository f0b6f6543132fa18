"""`python -m lamina_jax.serve [MODEL]`: an OpenAI-compatible server for one model.

With no arguments it serves the bundled model on 127.0.0.1:8000. The port is bound first, then the model
is loaded; `/health` answers at once, `/ready` when the first request can be served. With `--cluster FILE`
it is the engine of a cluster file, or another of its compute hosts, or one of its prefill hosts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback
from collections.abc import Sequence

from lamina_jax.cluster.dry_run import describe
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.pin import check_cores, pin
from lamina_jax.cluster.processes import Cluster, Process
from lamina_jax.command import end_by_signal, refuse, say
from lamina_jax.config import CheckpointError, ConfigError, EngineConfig, SecurityConfig, ServerConfig
from lamina_jax.core import WorkerLost
from lamina_jax.flags import Parser, add_flags, from_flags
from lamina_jax.hosts.detect import placed_by
from lamina_jax.server.api_keys import read_keys
from lamina_jax.server.engine_host import EngineProcess
from lamina_jax.server.listener import listen
from lamina_jax.server.messages import Start


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    options, others = cluster_flags().parse_known_args(argv)
    try:
        if {"-h", "--help"} & set(others) or (options.cluster is None and not options.dry_run):
            return by_flags(options, *parse(argv))
        cluster = the_cluster(options.cluster, others)
        if options.dry_run:
            print(describe(cluster))
            return 0
        return by_file(cluster, options.role, options.host_id)
    except ConfigError as error:
        return refuse(error)


def by_flags(options: argparse.Namespace, engine: EngineConfig, server: ServerConfig) -> int:
    """Be what a command line without a cluster file says; the exit code.

    Raises:
        ConfigError: flags that do not go together.
    """
    if (options.role == "prefill") != (options.listen is not None):
        raise ConfigError("--role prefill and --listen HOST:PORT belong together: give both, or neither")
    if options.role == "prefill":
        return prefill(engine, options.listen)
    engine = placed_by(engine, os.environ)
    return follow(engine) if engine.host_id else serve(engine, server)


def by_file(cluster: Cluster, role: str, host_id: int | None) -> int:
    """Be one of a cluster's processes; the exit code.

    Raises:
        ConfigError: the cluster has no such process, or its host not the cores for it.
    """
    if role == "prefill":
        number = the_number(cluster, "prefill", host_id, len(cluster.prefill))
        become(cluster.prefill[number])
        return prefill(cluster.prefill_settings(number), cluster.listens(cluster.prefill[number]))
    number = the_number(cluster, "engine.followers", host_id or 0, len(cluster.compute))
    if number == 0:
        check_cores(cluster.engine.cores)
        return serve(cluster.engine.settings, cluster.engine.server, cluster)
    become(cluster.compute[number])
    return follow(cluster.compute_settings(number))


def become(process: Process) -> None:
    """Take a process's cores and variables, before jax is imported."""
    pin(process.cores)
    os.environ.update(process.environment)


def follow(config: EngineConfig) -> int:
    """Be a compute host that host 0 leads: until that ends, or is lost. Ends this process.

    At a signal it waits for host 0 to end, which drains; a second one ends it at once.
    """
    from lamina_jax.hosts.alarm import Alarm, leave
    from lamina_jax.server.log_format import configure_logging

    configure_logging()
    alarm = Alarm()

    def end(number: int) -> None:
        if not alarm.armed:
            leave(128 + number)
        alarm.code = 0
        say("ending with host 0; a second signal ends at once")

    end_by_signal(end)
    try:
        from lamina_jax.engine.build import run_follower

        run_follower(config, alarm, progress)
    except (CheckpointError, ConfigError, WorkerLost) as error:
        leave(refuse(error))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)  # JAX would wait for the other hosts
    return 0


def progress(phase: str, done: int, total: int) -> None:
    """One line of each phase, at its beginning."""
    if not done:
        say(f"{phase}{f', {total} in all' if total else ''}")


def prefill(config: EngineConfig, listen: str) -> int:
    """Be a prefill host; the exit code."""
    from lamina_jax.prefill.command import run
    from lamina_jax.server.log_format import configure_logging

    configure_logging()
    return run(config, listen)


def serve(engine_config: EngineConfig, server_config: ServerConfig, cluster: Cluster | None = None) -> int:
    """Serve one model, as the engine of `cluster` if there is one; the exit code."""
    try:
        keys = read_keys(server_config.api_key_file)
        listener = listen(server_config)
    except ConfigError as error:
        return refuse(error)
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
    """The flags that are about which process this is; with `--cluster` there are no others."""
    parser = Parser(prog="python -m lamina_jax.serve", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--cluster", metavar="FILE", help="be a process of a cluster file, which says all else: its engine"
    )
    parser.add_argument(
        "--host-id",
        type=int,
        metavar="N",
        help="which of them this is; host 0 schedules. With --cluster and --role prefill: which prefill host",
    )
    parser.add_argument(
        "--role",
        choices=("engine", "prefill"),
        default="engine",
        help="prefill: compute the KV of prompts, which the attention workers of an engine pull",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="with --role prefill: where engine and workers find it"
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


def the_number(cluster: Cluster, key: str, host_id: int | None, count: int) -> int:
    """`host_id`, if the file describes so many hosts under `key`.

    Raises:
        ConfigError: it does not, or none was given.
    """
    if host_id is None or not 0 <= host_id < count:
        ids = f"0 to {count - 1}" if count else "none"
        raise ConfigError(
            f"{cluster.file}: {key}: there is no host with --host-id {host_id}; there are {ids}"
        )
    return host_id


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the server took the signals over
        sys.exit(130)
