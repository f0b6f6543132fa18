"""What a cluster file says of the places that have hosts of their own: Kubernetes, Slurm, Cloud TPU and Ray.

Plain data; how a cluster is written down for each stands in a module of that name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Side = Literal["compute", "memory", "prefill"]


@dataclass(frozen=True, kw_only=True)
class KubernetesPlace:
    """[kubernetes]: every process is a pod.

    Args:
        namespace: of all objects.
        image: of all containers, without a tag: that is the platform of a pod's devices, cpu, cuda or tpu.
        models: the persistent volume claim that keeps what Hugging Face's tools have downloaded; the bundled
            model needs none.
        compute, memory, prefill: labels of the nodes on which these pods run.
        compute_requests, memory_requests, prefill_requests: what each of these pods asks of its node beside
            its devices, such as cpu = "16", memory = "64Gi".
    """

    namespace: str = "default"
    image: str = "lamina_jax"
    models: str | None = None
    compute: dict[str, str] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    prefill: dict[str, str] = field(default_factory=dict)
    compute_requests: dict[str, str] = field(default_factory=dict)
    memory_requests: dict[str, str] = field(default_factory=dict)
    prefill_requests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SlurmPlace:
    """[slurm]: the hosts of each side are one component of a heterogeneous job.

    Args:
        python: in which lamina_jax is installed, on every node.
        compute, memory, prefill: options of sbatch for these nodes, such as partition = "h100".
    """

    python: str = "python"
    compute: dict[str, str] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    prefill: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TpuPlace:
    """[tpu]: the hosts of each side are those of a slice, in order; both sides may share one.

    Args:
        zone: of all slices.
        compute, memory, prefill: the name of each side's slice.
        compute_bounds: where compute hosts have but a part of their slice, how these hosts lie, such as
            "2,1,1".
        python: in which lamina_jax is installed, on every host.
        directory: in which everything is started.
    """

    zone: str = ""
    compute: str = ""
    memory: str = ""
    prefill: str = ""
    compute_bounds: str | None = None
    python: str = "python3"
    directory: str = "."


@dataclass(frozen=True, kw_only=True)
class RayPlace:
    """[ray]: each host is a bundle of a placement group.

    Args:
        compute, memory, prefill: the resource that Ray's nodes of each side have.
    """

    compute: str = "lamina_compute"
    memory: str = "lamina_memory"
    prefill: str = "lamina_prefill"


@dataclass(frozen=True, kw_only=True)
class Places:
    """What a file says of each of them."""

    kubernetes: KubernetesPlace = field(default_factory=KubernetesPlace)
    slurm: SlurmPlace = field(default_factory=SlurmPlace)
    tpu: TpuPlace = field(default_factory=TpuPlace)
    ray: RayPlace = field(default_factory=RayPlace)
