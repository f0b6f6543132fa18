"""How many KV pages there are, from the memory of the devices that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.devices import Devices
from lamina_jax.memory import available_memory, default_fraction
from lamina_jax.pool.geometry import CacheGeometry


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes, and the pages that they allow: of the cache over its whole mesh, of the weights on each of
    the compute mesh's `compute_devices`."""

    num_pages: int
    page_bytes: int
    weight_bytes: int
    available_bytes: int
    memory_fraction: float
    weights_share_memory: bool
    compute_devices: int

    def table(self, page_size: int) -> str:
        """The budget as lines to print; sizes in MiB."""
        rows = [
            ("memory of the cache's devices", self.available_bytes),
            (
                f"usable (memory_fraction={self.memory_fraction:g})",
                int(self.available_bytes * self.memory_fraction),
            ),
            (self._weights_row, self.weight_bytes),
            (f"KV cache: {self.num_pages} pages of {page_size} tokens", self.num_pages * self.page_bytes),
        ]
        return "\n".join(f"{name:<52}{size / 2**20:>12,.1f} MiB" for name, size in rows)

    @property
    def _weights_row(self) -> str:
        each = f" on each of {self.compute_devices} compute devices" if self.compute_devices > 1 else ""
        return f"weights{each}" + ("" if self.weights_share_memory else " (on other devices)")


def plan_budget(
    config: EngineConfig, geometry: CacheGeometry, devices: Devices, *, weight_bytes: int, max_model_len: int
) -> Budget:
    """As many pages as the memory allows, but no more than all sequences at full length need.

    Args:
        weight_bytes: on each compute device.

    Raises:
        ConfigError: not even one request of full length fits; the text names what to change.
    """
    fraction = default_fraction(devices.memory) if config.memory_fraction is None else config.memory_fraction
    available = available_memory(devices.memory)
    on_host = devices.memory[0].platform == "cpu"
    # Weights that are loaded already are gone from a host's free memory, but not from a device's limit.
    sharing = len(devices.compute) if on_host else len(set(devices.compute) & set(devices.memory))
    usable = int(available * fraction) - weight_bytes * sharing
    per_request = -(-max_model_len // geometry.page_size)
    wanted = config.num_pages or min(config.max_num_seqs * per_request, usable // geometry.bytes_per_page)
    if config.num_pages is None and wanted < per_request:
        raise ConfigError(
            f"a request of max_model_len={max_model_len} tokens needs {per_request} KV pages "
            f"({per_request * geometry.bytes_per_page / 2**20:,.0f} MiB), and memory_fraction={fraction:g} "
            f"leaves {max(usable, 0) / 2**20:,.0f} MiB: lower max_model_len, raise memory_fraction or set "
            "num_pages"
        )
    return Budget(
        num_pages=wanted,
        page_bytes=geometry.bytes_per_page,
        weight_bytes=weight_bytes,
        available_bytes=available,
        memory_fraction=fraction,
        weights_share_memory=sharing > 0,
        compute_devices=len(devices.compute),
    )
