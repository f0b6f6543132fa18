"""A cluster on Cloud TPU: a script that starts it, through gcloud, on the hosts of one slice or of several.

On each host its processes are units of systemd, which restarts them. The variables that give a process some
chips of its host, or some hosts of its slice, are libtpu's. Starts nothing, and no jax here.
"""

from __future__ import annotations

from dataclasses import replace

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.relocate import devices_of, relocated, renumbered, side_of, sides
from lamina_jax.cluster.shell import line, quoted
from lamina_jax.config import ConfigError

CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
"""How the chips of a process lie, by their number."""

FIRST_PORT = 8476
"""Of libtpu, in processes with a part of a host or slice: each process of a host has its own."""

_SCRIPT = """\
#!/usr/bin/env bash
# Written by `python -m lamina_jax.launch emit --for tpu --cluster {file}`.
#
#   {name}.sh start    on the hosts of the slices, as units of systemd, which restarts what fails
#   {name}.sh stop     each lets what it is doing end
#   {name}.sh logs     of all hosts, as they come
set -euo pipefail

addresses() {{  # of a slice's hosts, in order
    gcloud compute tpus tpu-vm describe "$1" --zone={zone} --flatten=networkEndpoints \\
        --format='value(networkEndpoints.ipAddress)'
}}
everywhere() {{  # slice, command: on all of its hosts
    gcloud compute tpus tpu-vm ssh "$1" --zone={zone} --worker=all --command="$2"
}}

case "${{1:-}}" in
stop) command='sudo systemctl stop "lamina-*"' ;;
logs) command='journalctl --follow --unit="lamina-*"' ;;
start) command= ;;
*) echo "$0 start | stop | logs" >&2; exit 2 ;;
esac
if [ -n "$command" ]; then
    set -m  # each slice's in a process group, which ends with this script: Ctrl-C ends the logs
    pids=() code=0
    trap 'kill -- "${{pids[@]/#/-}}" 2>/dev/null || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    for slice in {slices}; do
        everywhere "$slice" "$command" < /dev/null &
        pids+=($!)
    done
    for pid in "${{pids[@]}}"; do wait "$pid" || code=$?; done
    exit "$code"
fi
"""

_ON_HOST = """\
set -eu
unit() {{  # name, command
    sudo systemd-run --unit="lamina-$1" --collect --uid="$(id -un)" --working-directory={directory} \\
        --property=Restart=on-failure --property=RestartSec=5 \\
        --property=TimeoutStopSec={stop_seconds:.0f} "${{@:2}}"
}}
here=$(curl -sf -H 'Metadata-Flavor: Google' \\
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
case "$here" in
{cases}
*) echo "host $here of the slice is not used" ;;
esac
"""

STOP_MARGIN_SECONDS = 10.0


def emit_tpu(cluster: Cluster) -> str:
    """The script, for a machine on which gcloud is set up.

    Raises:
        ConfigError: a cluster that cannot run there; it names the key.
    """
    slices, numbers = _slices(cluster), _numbers(cluster)
    zone, names = quoted(cluster.places.tpu.zone), dict.fromkeys(slices.values())
    file = cluster.file
    parts = [
        _SCRIPT.format(file=file, name=file.stem, zone=zone, slices=" ".join(map(quoted, names))),
    ]
    for side, hosts in sides(cluster).items():
        used = " ".join(f'"${{all[{numbers[side, host]}]}}"' for host in hosts)
        parts.append(f'found=$(addresses {quoted(slices[side])})\nmapfile -t all <<< "$found"\n')
        parts.append(f"{side}=({used})\n")
    known = f"$(declare -p {' '.join(slices)})"
    for name in names:
        script = f"{known}\n$(cat <<'SCRIPT'\n{_on_hosts(cluster, name)}SCRIPT\n)"
        parts.append(f'\neverywhere {quoted(name)} "{script}"\n')
    return "".join(parts)


def _slices(cluster: Cluster) -> dict[Side, str]:
    """The slice of each side."""
    place = cluster.places.tpu
    if not place.zone:
        raise ConfigError(f"{cluster.file}: tpu.zone: missing: expected the zone of the slices")
    found: dict[Side, str] = {}
    for side in sides(cluster):
        found[side] = getattr(place, side)
        if not found[side]:
            raise ConfigError(f"{cluster.file}: tpu.{side}: missing: expected the name of a slice")
    return found


def _numbers(cluster: Cluster) -> dict[tuple[Side, str], int]:
    """Which host of its slice each host of each side is: a slice's hosts are used in order."""
    slices, numbers = _slices(cluster), {}
    found: dict[str, list[str]] = {}
    for side, names in sides(cluster).items():
        hosts = found.setdefault(slices[side], [])
        hosts += [name for name in names if name not in hosts]
        numbers.update({(side, name): hosts.index(name) for name in names})
    return numbers


def _on_hosts(cluster: Cluster, name: str) -> str:
    """What every host of a slice runs: its own processes, as units."""
    slices, numbers, place = _slices(cluster), _numbers(cluster), cluster.places.tpu
    moved = relocated(renumbered(cluster), lambda side, i: f"${{{side}[{i}]}}", "hosts of TPU slices")
    cases: dict[int, list[str]] = {}
    for command in commands(moved, place.python, by_flags=True):
        side = side_of(command.role)
        if slices[side] == name:
            units = cases.setdefault(numbers[side, cluster.roles()[command.role].host], [])
            variables = _variables(cluster, command.role, FIRST_PORT + len(units))
            started = line(replace(command, environment=variables | command.environment))
            units.append(f"    unit {command.role.replace(' ', '-')} {started}")
    return _ON_HOST.format(
        directory=quoted(place.directory),
        stop_seconds=cluster.drain_seconds + STOP_MARGIN_SECONDS,
        cases="\n".join("\n".join([f"{i})", *cases[i], "    ;;"]) for i in sorted(cases)),
    )


def _variables(cluster: Cluster, role: str, port: int) -> dict[str, str]:
    """What libtpu must know of a process that has not its whole slice to itself."""
    slices, side, place = _slices(cluster), side_of(role), cluster.places.tpu
    names = devices_of(cluster, role)
    platform, count = names[0].partition(":")[0], len(names)
    shared = list(slices.values()).count(slices[side]) > 1
    if platform != "tpu" or (side == "compute" and not shared):
        return {}
    if count not in CHIP_BOUNDS:
        raise ConfigError(f"{cluster.file}: {role}: {count} chips cannot be cut out: take 1, 2, 4 or 8")
    hosts, number, addresses = "1,1,1", 0, f"localhost:{port}"
    if side == "compute" and len(cluster.compute) > 1:
        if place.compute_bounds is None:
            raise ConfigError(
                f"{cluster.file}: tpu.compute_bounds: missing: say how the compute side's "
                f'{len(cluster.compute)} hosts lie in slice {slices[side]}, such as "2,1,1"'
            )
        port, hosts = FIRST_PORT, place.compute_bounds
        addresses = ",".join(f"${{compute[{i}]}}:{port}" for i in range(len(cluster.compute)))
        number = list(cluster.roles()).index(role)
    return {
        "TPU_VISIBLE_CHIPS": ",".join(name.partition(":")[2] for name in names),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": CHIP_BOUNDS[count],
        "TPU_PROCESS_BOUNDS": hosts,
        "TPU_PROCESS_ADDRESSES": addresses,
        "TPU_PROCESS_PORT": str(port),
        "CLOUD_TPU_TASK_ID": str(number),
    }
