"""What has to be the same on all compute hosts, by name, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import lamina_jax
from lamina_jax.config import EngineConfig
from lamina_jax.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from lamina_jax.models import ModelConfig

_OF_ONE_HOST = {
    "model",  # a path; what is in it counts
    "host_id",
    "num_hosts",  # has a message of its own
    "coordinator",
    "worker_wait_seconds",
    "timings",
    "trace",
    "compilation_cache",
    "cpu_kernels",
    "max_waiting",
    "prefill_stall_ms",
    "num_pages",  # host 0 says how many
    "security",
}
"""Settings that hosts may have of their own, or that host 0 alone obeys."""


def facts_of(config: EngineConfig, shape: ModelConfig, folder: Path, jax_version: str) -> dict[str, str]:
    """Versions, settings and the model, as text."""
    settings = {name: value for name, value in vars(config).items() if name not in _OF_ONE_HOST}
    return {
        "version of lamina_jax": lamina_jax.__version__,
        "version of jax": jax_version,
        **{name: str(value) for name, value in settings.items()},
        **{f"config.json: {name}": str(value) for name, value in asdict(shape).items()},
        "fingerprint of the weights' files": fingerprint(folder),
    }


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first fact that is not the same, in words; None: all are."""
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name)} there, and {ours.get(name)} on host 0"
    return None
