"""How much memory devices have. Knows nothing of who will fill it, and with what."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from lamina_jax.config import ConfigError
from lamina_jax.memory_groups import left_in_groups

ACCELERATOR_FRACTION = 0.9
HOST_FRACTION = 0.4


def memory_name(device: jax.Device) -> str:
    """The memory that a device works in: its own, or "host", which all CPU devices share."""
    return "host" if device.platform == "cpu" else str(device)


def memory_size(device: jax.Device) -> int:
    """Bytes of it: an accelerator's limit, or what is free now of main memory.

    Raises:
        ConfigError: it cannot be told.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(f"{device} does not say how much memory it has: set num_pages")
    return int(stats["bytes_limit"])


def default_fraction(devices: Sequence[jax.Device]) -> float:
    """The share of `available_memory` that may be filled where nobody says otherwise."""
    return HOST_FRACTION if devices[0].platform == "cpu" else ACCELERATOR_FRACTION


def available_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes: the limits of accelerators together, or what is free now of the main memory that CPU devices
    share.

    Raises:
        ConfigError: it cannot be told.
    """
    return sum(memory_size(device) for device in {memory_name(each): each for each in devices}.values())


def unused_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free now, over all devices."""
    used = (device.memory_stats() for device in devices if device.platform != "cpu")
    return available_memory(devices) - sum(stats["bytes_in_use"] for stats in used if stats)


def host_memory() -> int:
    """Bytes of main memory that are free to use: no more than this container, pod or job may still take."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *left_in_groups()])
    except (OSError, KeyError):
        raise ConfigError("cannot tell how much memory this machine has: set num_pages") from None
