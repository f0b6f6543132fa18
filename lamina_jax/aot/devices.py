"""Accelerators as descriptions that XLA compiles for with no device present. Knows nothing of models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GB = 10**9


class Gpu(NamedTuple):
    """What XLA asks of a GPU, from NVIDIA's datasheets.

    Attributes:
        name: as the driver gives it.
        capability: CUDA compute capability.
        cores: streaming multiprocessors.
        floats: units for float32 of one of them.
        threads, shared_memory: of one of them; shared memory in KiB, of which a block may have all but one.
        cache: the second level's, MiB.
        bandwidth: of memory, GB/s.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    floats: int
    threads: int
    shared_memory: int
    cache: int
    bandwidth: int
    clock: float


class DeviceKind(NamedTuple):
    """A kind of accelerator: bytes of its memory, and what XLA's compiler has to be told of it."""

    memory: int
    gpu: Gpu | None = None

    @property
    def platform(self) -> str:
        return "tpu" if self.gpu is None else "cuda"


KINDS = {
    "v5e": DeviceKind(16 * GB),
    "v5p": DeviceKind(95 * GB),
    "v6e": DeviceKind(32 * GB),
    #                               name, capability, cores, floats, threads, shared, cache, bandwidth, clock
    "a100": DeviceKind(80 * GB, Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40, 2039, 1.41)),
    "h100": DeviceKind(80 * GB, Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 3352, 1.98)),
    "h20": DeviceKind(96 * GB, Gpu("NVIDIA H20", (9, 0), 78, 128, 2048, 228, 60, 4000, 1.98)),
    "l40s": DeviceKind(48 * GB, Gpu("NVIDIA L40S", (8, 9), 142, 128, 1536, 100, 48, 864, 2.52)),
    "b200": DeviceKind(180 * GB, Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228, 126, 8000, 1.965)),
}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind, named "kind:shape": "v5e:4x4" (chips of a slice), "h100:8" (GPUs of one host),
    "h100:2x8" (two such hosts). "v5e:2x4/1" and "v5e:2x4/2" are the first and the second half of its devices:
    of a slice that is split into a compute and a memory side.

    Raises:
        ValueError: a kind that is not in `KINDS`, or a shape that is not numbers between "x", of GPUs one or
            two; a half of an odd number.
    """

    name: str

    def __post_init__(self) -> None:
        kind, shape, slash, half = self._parts()
        sizes = shape.split("x")
        known = kind in KINDS and (KINDS[kind].gpu is None or len(sizes) <= 2)
        whole = all(size.isdecimal() and int(size) for size in sizes)
        if not known or not whole or (slash and (half not in ("1", "2") or self.size % 2)):
            raise ValueError(
                f"{self.name!r} is no topology: write KIND:SHAPE, as in v5e:4x4 or h100:2x8, or one of its "
                "halves, as in v5e:2x4/1, with a kind of "
                f"{', '.join(KINDS)}"
            )

    @property
    def kind(self) -> DeviceKind:
        return KINDS[self._parts()[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self._parts()[1].split("x"))

    @property
    def size(self) -> int:
        """How many devices, both halves together."""
        return math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Descriptions to make meshes of; needs the platform's compiler (`pip install lamina_jax[aot]`)."""
        topology: Any
        if self.kind.gpu is None:
            # A host of the slices here has four chips, unless the slice is smaller.
            bounds = {"chips_per_host_bounds": (1, 1, 1)} if self.size == 1 else {}
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=self.name.partition("/")[0], **bounds
            )
        else:
            hosts, each = self.shape if len(self.shape) == 2 else (1, self.size)
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name=self.kind.gpu.name,
                target_config=target_config(self.kind),
                topology=f"1x{hosts}x{each}",
            )
        devices, half, middle = list(topology.devices), self._parts()[3], self.size // 2
        return {"": devices, "1": devices[:middle], "2": devices[middle:]}[half]

    def _parts(self) -> tuple[str, str, str, str]:
        """Kind, shape, the slash and the half."""
        kind, _, rest = self.name.partition(":")
        return kind, *rest.partition("/")


def target_config(kind: DeviceKind) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text."""
    gpu = kind.gpu
    if gpu is None:
        raise ValueError(f"a device of platform {kind.platform} has no GpuTargetConfigProto")
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: {48 * 1024}
      shared_memory_per_core: {gpu.shared_memory * 1024}
      shared_memory_per_block_optin: {(gpu.shared_memory - 1) * 1024}
      threads_per_core_limit: {gpu.threads}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.floats}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {gpu.bandwidth * GB}
      l2_cache_size: {gpu.cache * 2**20}
      clock_rate_ghz: {gpu.clock}
      device_memory_size: {kind.memory}
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 patch: 0 }}
    device_description_str: "{gpu.name}"
    """
