"""Which devices form the compute mesh and which the memory mesh.

A choice is written "platform:indices", as in "cpu:0", "gpu:0,1" or "tpu:0-3"; devices are
those of this host. This module asks JAX for them, and knows nothing of models but their number of KV heads.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import jax

from lamina_jax.compilation import num_cores
from lamina_jax.config import ConfigError, indices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Devices:
    """The devices of the two meshes, which may overlap or be the same."""

    compute: tuple[jax.Device, ...]
    memory: tuple[jax.Device, ...]

    @property
    def share_silicon(self) -> bool:
        """Whether work on one mesh takes time from the other: the same devices, or one host's CPU."""
        cpus = {device.platform for device in self.compute + self.memory} == {"cpu"}
        return cpus or bool(set(self.compute) & set(self.memory))


def choose_devices(
    compute: str | None, memory: str | None, *, disaggregated: bool, num_kv_heads: int | None
) -> Devices:
    """Find the devices named, or choose them.

    Left to itself, a disaggregated engine takes one accelerator for each mesh where there are two; on
    a CPU one virtual device computes, and as many as there are cores (and as divide the KV heads) hold
    the cache, since XLA uses one core for an attention loop (native kernels use all, and need but the
    first of them). A collocated engine takes one device, and so does one whose attention workers are
    elsewhere.

    Args:
        num_kv_heads: that memory devices are to share evenly; None: they share something else.

    Raises:
        ConfigError: a device that does not exist, or a number of memory devices that does not divide
            the KV heads.
    """
    workers = memory_devices_for(num_cores(), num_kv_heads) if disaggregated else 0
    highest = max(_highest_cpu("compute_devices", compute), _highest_cpu("memory_devices", memory))
    # With no memory_devices named, they come behind those that compute.
    _make_cpu_devices(highest + 1 if memory else max(1, highest + 1) + workers)
    found_compute = _parse("compute_devices", compute) if compute else tuple(jax.local_devices()[:1])
    if not disaggregated:
        if memory:
            raise ConfigError("memory_devices is for placement=disaggregated: a collocated engine has none")
        return Devices(found_compute, found_compute)
    found_memory = _parse("memory_devices", memory) if memory else _default_memory(found_compute, workers)
    if num_kv_heads and num_kv_heads % len(found_memory):
        fitting = ", ".join(str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
        raise ConfigError(
            f"memory_devices={memory!r} names {len(found_memory)} devices, which do not divide the model's "
            f"{num_kv_heads} KV heads; {fitting} would"
        )
    return Devices(found_compute, found_memory)


def choose_worker_devices(choice: str | None) -> tuple[jax.Device, ...]:
    """The devices of an attention worker: those named, or all accelerators, or a virtual CPU device per core.

    Raises:
        ConfigError: a device that does not exist.
    """
    _make_cpu_devices(_highest_cpu("devices", choice) + 1 if choice else num_cores())
    return _parse("devices", choice) if choice else tuple(jax.local_devices())


def _default_memory(compute: tuple[jax.Device, ...], workers: int) -> tuple[jax.Device, ...]:
    others = [device for device in jax.local_devices() if device not in compute]
    if not others:
        log.warning("one device only (%s): it holds the KV cache too", compute[0])
        return compute[:1]
    if others[0].platform != "cpu":
        return tuple(others[:1])
    return tuple(others[: workers if len(others) >= workers else 1])


def memory_devices_for(cores: int, num_kv_heads: int | None) -> int:
    """How many of a CPU's virtual devices hold the cache: one per core, where the heads divide evenly."""
    if num_kv_heads is None:
        return cores
    return max(n for n in range(1, min(cores, num_kv_heads) + 1) if num_kv_heads % n == 0)


def _make_cpu_devices(count: int) -> None:
    """Ask for `count` virtual CPU devices, if the backend has not started."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        log.info("JAX runs already, with %d devices: taking what there is", jax.device_count())


def _highest_cpu(key: str, choice: str | None) -> int:
    if not choice or not choice.startswith("cpu:"):
        return -1
    return max(_indices(key, choice, choice.removeprefix("cpu:")))


def _parse(key: str, choice: str) -> tuple[jax.Device, ...]:
    platform, _, rest = choice.partition(":")
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:
        raise ConfigError(
            f"{key}={choice!r}: this machine has no {platform!r} devices; it has "
            f"{_summary(jax.local_devices())}"
        ) from None
    named = _indices(key, choice, rest) if rest else range(len(devices))
    missing = [i for i in named if i >= len(devices)]
    if missing:
        raise ConfigError(
            f"{key}={choice!r}: there is no {platform}:{missing[0]}; there are {_summary(devices)}"
        )
    return tuple(devices[i] for i in named)


def _indices(key: str, choice: str, text: str) -> list[int]:
    try:
        return indices(text)
    except ValueError as error:
        raise ConfigError(f"{key}={choice!r}: {error}") from None


def _summary(devices: list[jax.Device]) -> str:
    return f"{devices[0].platform}:0-{len(devices) - 1}" if len(devices) > 1 else f"{devices[0].platform}:0"
