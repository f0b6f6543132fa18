"""How many KV pages there are, from the memory of the devices that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.devices import Devices
from lamina_jax.engine.limits import Limits
from lamina_jax.memory import available_memory, default_fraction
from lamina_jax.pool.geometry import CacheGeometry


@dataclass(frozen=True, kw_only=True)
class Available:
    """Memory that may hold pages.

    Attributes:
        bytes: of all devices of the cache together.
        fraction: of it that may be used, `EngineConfig.memory_fraction` or what it defaults to.
        weights: how many compute devices' weights are to be taken from it.
    """

    bytes: int
    fraction: float
    weights: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes, and the pages that they allow.

    Attributes:
        num_pages: of each part of the cache; `parts`: how many there are.
        page_bytes: of one page, over all devices of a part.
        weight_bytes: on each of the compute mesh's `compute_devices`.
    """

    num_pages: int
    parts: int
    page_bytes: int
    weight_bytes: int
    available: Available
    compute_devices: int

    def table(self, page_size: int) -> str:
        """The budget as lines to print; sizes in MiB."""
        of_each = f" on each of {self.parts} workers" if self.parts > 1 else ""
        size, fraction = self.available.bytes, self.available.fraction
        rows = [
            ("memory of the cache's devices", size),
            (f"usable (memory_fraction={fraction:g})", int(size * fraction)),
            (self._weights_row, self.weight_bytes),
            (
                f"KV cache: {self.num_pages} pages of {page_size} tokens{of_each}",
                self.parts * self.num_pages * self.page_bytes,
            ),
        ]
        return "\n".join(f"{name:<58}{size / 2**20:>12,.1f} MiB" for name, size in rows)

    @property
    def _weights_row(self) -> str:
        each = f" on each of {self.compute_devices} compute devices" if self.compute_devices > 1 else ""
        return f"weights{each}" + ("" if self.available.weights else " (on other devices)")


def plan_budget(
    config: EngineConfig,
    geometry: CacheGeometry,
    limits: Limits,
    available: Available,
    *,
    weight_bytes: int,
    compute_devices: int,
) -> Budget:
    """As many pages as the memory allows, but no more than all sequences at full length need.

    Args:
        weight_bytes: on each compute device.

    Raises:
        ConfigError: not even one request of full length fits; the text names what to change.
    """
    parts = limits.workers
    usable = int(available.bytes * available.fraction) - weight_bytes * available.weights
    longest = limits.pages_per_request
    each = -(-longest // parts) if limits.partition == "tokens" else longest
    requests = -(-limits.max_num_seqs // parts) if limits.partition == "requests" else limits.max_num_seqs
    wanted = config.num_pages or min(requests * each, usable // parts // geometry.bytes_per_page)
    if config.num_pages is None and wanted < each:
        raise ConfigError(
            f"a request of max_model_len={limits.max_model_len} tokens needs {longest} KV pages "
            f"({longest * geometry.bytes_per_page / 2**20:,.0f} MiB), and memory_fraction="
            f"{available.fraction:g} leaves {max(usable, 0) / 2**20:,.0f} MiB"
            + (f" on {parts} workers" if parts > 1 else "")
            + ": lower max_model_len, raise memory_fraction or set num_pages"
        )
    return Budget(
        num_pages=wanted,
        parts=parts,
        page_bytes=geometry.bytes_per_page,
        weight_bytes=weight_bytes,
        available=available,
        compute_devices=compute_devices,
    )


def available_on(devices: Devices, fraction: float | None) -> Available:
    """What the memory devices of this process have."""
    fraction = default_fraction(devices.memory) if fraction is None else fraction
    size = available_memory(devices.memory)
    on_host = devices.memory[0].platform == "cpu"
    # Weights that are loaded already are gone from a host's free memory, but not from a device's limit.
    sharing = len(devices.compute) if on_host else len(set(devices.compute) & set(devices.memory))
    return Available(bytes=size, fraction=fraction, weights=sharing)
