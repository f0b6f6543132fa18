"""A cluster as a heterogeneous job of Slurm: a script for sbatch. Starts nothing, and no jax here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.relocate import relocated, side_of, sides
from lamina_jax.cluster.shell import line, quoted

MOST_RESTARTS = 3
"""Times that a job which failed is queued again: what fails at once would do so for ever."""

_BEFORE = """\
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

nodes() { scontrol show hostnames "$1"; }
"""

_START = """
pids=()
start() {  # component, node, role, command
    srun --het-group="$1" --nodelist="$2" --nodes=1 --ntasks=1 --overlap --cpu-bind=none "${@:4}" \\
        > >(sed -u "s/^/$3 | /") 2>&1 &
    pids+=($!)
}
end() { kill "${pids[@]}" 2>/dev/null || true; }  # srun passes SIGTERM on: each lets what it is doing end
trap end EXIT
trap 'trap "" TERM INT; end; wait; exit 143' TERM INT
"""

_AFTER = f"""
code=0
wait -n "${{pids[@]}}" || code=$?  # the first that ends
end
wait || true
if [ "$code" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_RESTARTS} ]; then
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
"""


def emit_slurm(cluster: Cluster) -> str:
    """The script: `sbatch FILE` runs it. Hosts are what Slurm gives, in the order of the file's.

    Raises:
        ConfigError: a cluster that cannot run there; it names the key.
    """
    on_nodes = relocated(cluster, lambda side, i: f"${{{side}[{i}]}}", "nodes of Slurm")
    groups = list(sides(on_nodes))
    lines = ["#!/usr/bin/env bash", *_header(on_nodes, groups), _BEFORE]
    for i, side in enumerate(groups):
        lines.append(f'mapfile -t {side} < <(nodes "$SLURM_JOB_NODELIST_HET_GROUP_{i}")')
    lines.append(_START)
    processes = on_nodes.roles()
    started = commands(on_nodes, on_nodes.places.slurm.python, by_flags=True)
    for command in sorted(started, key=lambda command: command.role == "engine"):  # which serves, last
        node, group = on_nodes.address(processes[command.role]), groups.index(side_of(command.role))
        lines.append(f"start {group} {quoted(node)} '{command.role}' {line(command)}")
    return "\n".join([*lines, _AFTER])


def _header(cluster: Cluster, groups: list[Side]) -> Iterator[str]:
    """A component for each side, its nodes taken whole: --exclusive leaves memory out."""
    yield f"# Written by `python -m lamina_jax.launch emit --for slurm --cluster {cluster.file}`, for sbatch."
    yield f"#SBATCH --job-name={shlex.quote(cluster.file.stem)} --requeue"
    for i, side in enumerate(groups):
        if i:
            yield "#SBATCH hetjob"
        yield f"#SBATCH --nodes={len(sides(cluster)[side])} --ntasks-per-node=1 --exclusive --mem=0"
        for option, value in getattr(cluster.places.slurm, side).items():
            yield f"#SBATCH --{option}={shlex.quote(value)}"
