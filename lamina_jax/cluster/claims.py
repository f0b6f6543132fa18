"""What processes of one machine cannot share: ports, the cores that they are pinned to, accelerators.

A machine is what has an address; all loopback addresses are one. No jax here.
"""

from __future__ import annotations

from collections.abc import Iterator

from lamina_jax.cluster.processes import (
    AnyProcess,
    Cluster,
    EngineProcess,
    FollowerProcess,
    PrefillProcess,
)
from lamina_jax.config import ConfigError, indices, is_loopback

_SEES = {"CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"}
"""Variables by which a process sees other accelerators, under the same numbers."""


def check_claims(cluster: Cluster) -> None:
    """Refuse a cluster in which two processes claim the same of one machine.

    Raises:
        ConfigError: it names both keys; or the one whose value claims nothing that there can be.
    """
    owners: dict[tuple[str, str], str] = {}
    for where, process in cluster.keys().items():
        machine = machine_of(cluster.address(process))
        try:
            claims = [(f"{where}.{key}", claimed) for key, claimed in _claims(cluster, process)]
        except ConfigError as error:
            raise ConfigError(f"{cluster.file}: {where}.{error}") from None
        for key, claimed in claims:
            owner = owners.setdefault((machine, claimed), key)
            if owner != key:
                raise ConfigError(
                    f"{cluster.file}: {key}: {claimed} of {machine} is {owner} already: choose another"
                )


def device_names(choice: str) -> list[str]:
    """Of devices such as "gpu:0-1" each one's name; a platform alone ("tpu") is all of them, one name.

    Raises:
        ValueError: a text of another form.
    """
    platform, colon, numbers = choice.partition(":")
    if not platform.isalpha():
        raise ValueError("expected a platform and numbers, such as cpu:0 or gpu:0-1")
    return [f"{platform}:{number}" for number in indices(numbers)] if colon else [platform]


def machine_of(address: str) -> str:
    """The machine that has an address."""
    return "this machine" if is_loopback(address) else address


def _claims(cluster: Cluster, process: AnyProcess) -> Iterator[tuple[str, str]]:
    """(key, what it claims) of one process. CPU devices are virtual: each process has its own."""
    if isinstance(process, EngineProcess):
        devices_key, devices = "settings.compute_devices", process.settings.compute_devices
        yield from _port("server.port", process.server.port, any_free=True)
        if process.followers:
            yield from _port("coordinator_port", process.coordinator_port)
    elif isinstance(process, FollowerProcess):
        devices_key, devices = "host", cluster.engine.settings.compute_devices
    elif isinstance(process, PrefillProcess):
        devices_key, devices = "compute_devices", process.compute_devices
        yield from _port("port", process.port)
    else:
        devices_key, devices = "devices", process.settings.devices
        yield from _port("port", process.port)
        yield from _port("data_port", process.settings.data_port, any_free=True)
        yield from _port("metrics_port", process.settings.metrics_port, any_free=True)
    try:
        key, value = "cores", process.cores
        for core in indices(value) if value is not None else ():
            yield key, f"core {core}"
        key, value = devices_key, None if _SEES & process.environment.keys() else devices
        for name in device_names(value) if value is not None else ():
            if not name.startswith("cpu"):
                yield key, name
    except ValueError as error:
        raise ConfigError(f"{key}: {error}, got {value!r}") from None


def _port(key: str, port: int | None, *, any_free: bool = False) -> Iterator[tuple[str, str]]:
    if port is None or (port == 0 and any_free):
        return
    if not 0 < port < 65536:
        raise ConfigError(f"{key}: expected a port, 1 to 65535, got {port}")
    yield key, f"port {port}"
