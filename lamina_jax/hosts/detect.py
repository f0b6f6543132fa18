"""Which compute host this process is, as Slurm, Kubernetes or Cloud TPU tell it in variables.

A pure function of a mapping: it looks at no process, no file and no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from lamina_jax.config import ConfigError, EngineConfig, address_of

PORT = 7100
"""At which host 0 gathers the others, where nobody says another."""

Environment = Mapping[str, str]


class Place(NamedTuple):
    """Where host 0 gathers the others, how many hosts there are, and which this is."""

    coordinator: str
    num_hosts: int
    host_id: int


def placed_by(config: EngineConfig, environment: Environment) -> EngineConfig:
    """`config`, with what `coordinator="auto"` stands for in this environment.

    Raises:
        ConfigError: nothing of it is there, or not all.
    """
    if config.coordinator != "auto":
        return config
    return replace(config, **find_place(environment)._asdict())


def find_place(environment: Environment, port: int = PORT) -> Place:
    """What the first of Slurm, Kubernetes and Cloud TPU that is there says.

    Raises:
        ConfigError: none is; or the one that is lacks a variable, or has one that cannot be understood.
    """
    for names, find in _FINDERS:
        if names[0] in environment:
            return find(environment, port)
    looked_for = "; ".join(", ".join(names) for names, _ in _FINDERS)
    raise ConfigError(
        f"coordinator='auto': this process was started by nobody who says which host it is (looked for "
        f"{looked_for}): give --coordinator HOST:PORT --num-hosts N --host-id I"
    )


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes them: "tpu[003-007,9],gpu1" begins with "tpu003".

    Raises:
        ConfigError: it has none.
    """
    found = re.match(r"([^\[\],\s]+)(?:\[(\d+)[^\]]*\]([^,\s]*))?", nodes)
    if found is None:
        raise ConfigError(f"coordinator='auto': {nodes!r} is no list of nodes")
    before, number, after = found.groups(default="")
    return before + number + after


def _slurm(environment: Environment, port: int) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    address = first_host(nodes) if nodes else _text(environment, "SLURM_LAUNCH_NODE_IPADDR")
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _place(address, port, _number(environment, count), _number(environment, "SLURM_PROCID"))


def _leader_worker_set(environment: Environment, port: int) -> Place:
    return _place(
        _text(environment, "LWS_LEADER_ADDRESS"),
        port,
        _number(environment, "LWS_GROUP_SIZE"),
        _number(environment, "LWS_WORKER_INDEX"),
    )


def _job_set(environment: Environment, port: int) -> Place:
    """A JobSet names its pods JOBSET-JOB-REPLICA-INDEX, under a service of the JobSet's own name; how many
    there are stands in no variable of its own, so that the manifest sets NUM_HOSTS."""
    job_set, job = _text(environment, "JOBSET_NAME"), _text(environment, "REPLICATED_JOB_NAME")
    replica = environment.get("JOB_INDEX", "0")
    return _place(
        f"{job_set}-{job}-{replica}-0.{job_set}",
        port,
        _number(environment, "NUM_HOSTS"),
        _number(environment, "JOB_COMPLETION_INDEX"),
    )


def _cloud_tpu(environment: Environment, port: int) -> Place:
    names = [name.strip() for name in _text(environment, "TPU_WORKER_HOSTNAMES").split(",")]
    return _place(names[0], port, len(names), _number(environment, "TPU_WORKER_ID"))


_FINDERS: tuple[tuple[tuple[str, ...], Callable[[Environment, int], Place]], ...] = (
    (
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST or SLURM_LAUNCH_NODE_IPADDR"),
        _slurm,
    ),
    (("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"), _leader_worker_set),
    (("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX", "NUM_HOSTS"), _job_set),
    (("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"), _cloud_tpu),
)
"""By the variable that gives each away, first of those that it needs. A TPU slice under Kubernetes has the
variables of both, so Cloud TPU comes last."""


def _place(host: str, port: int, num_hosts: int, host_id: int) -> Place:
    if not 0 <= host_id < num_hosts:
        raise ConfigError(f"coordinator='auto': this is host {host_id} of {num_hosts}, counted from 0")
    return Place(address_of(host, port), num_hosts, host_id)


def _text(environment: Environment, name: str) -> str:
    if not environment.get(name, "").strip():
        raise ConfigError(
            f"coordinator='auto': {name} is not set: give --coordinator HOST:PORT --num-hosts N --host-id I"
        )
    return environment[name].strip()


def _number(environment: Environment, name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise ConfigError(f"coordinator='auto': {name}={text!r} is no number")
    return int(text)
