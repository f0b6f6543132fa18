"""How much memory devices have. Knows nothing of who will fill it, and with what."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from lamina_jax.config import ConfigError

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
    return host_memory() if device.platform == "cpu" else _device_memory(device)


def default_fraction(devices: Sequence[jax.Device]) -> float:
    """The share of `available_memory` that may be filled where nobody says otherwise."""
    return HOST_FRACTION if devices[0].platform == "cpu" else ACCELERATOR_FRACTION


def available_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes: the limits of accelerators together, or what is free now of the main memory that CPU devices
    share.

    Raises:
        ConfigError: it cannot be told.
    """
    return host_memory() if devices[0].platform == "cpu" else sum(map(_device_memory, devices))


def unused_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free now, over all devices."""
    if devices[0].platform == "cpu":
        return host_memory()
    return sum(_device_memory(device) - (device.memory_stats() or {})["bytes_in_use"] for device in devices)


def host_memory() -> int:
    """Bytes of main memory that are free to use."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        raise ConfigError("cannot tell how much memory this machine has: set num_pages") from None


def _device_memory(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(f"{device} does not say how much memory it has: set num_pages")
    return int(stats["bytes_limit"])
