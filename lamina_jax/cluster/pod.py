"""One pod of Kubernetes: its container, devices, files and probes. Knows no other object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lamina_jax.cluster.processes import Cluster
from lamina_jax.cluster.relocate import devices_of, side_of
from lamina_jax.config import SecurityConfig

IMAGE_TAGS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
RESOURCES = {"gpu": "nvidia.com/gpu", "cuda": "nvidia.com/gpu", "tpu": "google.com/tpu"}

FOLDER = "/etc/lamina"
"""Where secrets are mounted."""

USER = 1000
"""Of the images' processes; files of secrets are its group's."""

STOP_MARGIN_SECONDS = 10
START_SECONDS, START_PERIOD = 3600, 10
"""How long loading and compiling may take."""

ANSWER_SECONDS = 5
"""What a probe waits for: a pod that compiles has little time for it."""

SHARED_MEMORY = {"gpu", "cuda"}
"""Platforms whose collectives (NCCL's) want more of it than the 64 MiB of a container."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Probes:
    """Who asks a pod what: `ready` at its start and from then on, `alive` once it has started."""

    ready: Object | None = None
    alive: Object | None = None

    @classmethod
    def of_engine(cls, port: int) -> Probes:
        """Of the HTTP server, which answers without a key."""
        return cls(
            {"httpGet": {"path": "/ready", "port": port}}, {"httpGet": {"path": "/health", "port": port}}
        )

    @classmethod
    def of_grpc(cls, security: SecurityConfig, port: int) -> Probes:
        """Of the gRPC health service; over TLS, where the kubelet cannot ask it, of the port alone."""
        if security.tls_cert is not None:
            return cls({"tcpSocket": {"port": port}}, {"tcpSocket": {"port": port}})
        return cls({"grpc": {"port": port}}, {"grpc": {"port": port}})

    def of_container(self) -> Object:
        """The container's fields."""
        found: Object = {}
        if self.ready is not None:
            start = {"periodSeconds": START_PERIOD, "failureThreshold": START_SECONDS // START_PERIOD}
            found["startupProbe"] = self.ready | start
            found["readinessProbe"] = self.ready | {"periodSeconds": 5}
        if self.alive is not None:
            found["livenessProbe"] = self.alive | {"periodSeconds": 10, "failureThreshold": 6}
        return {name: probe | {"timeoutSeconds": ANSWER_SECONDS} for name, probe in found.items()}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """What its kind says of a pod.

    Args:
        argv: with the variables that Kubernetes puts in, $(NAME).
        ports: by name.
    """

    argv: list[str]
    component: str
    labels: dict[str, str]
    ports: dict[str, int]
    probes: Probes
    environment: dict[str, str] = field(default_factory=dict)
    stop_seconds: float


def name_of(cluster: Cluster) -> str:
    """The beginning of all names: the file's name, in the letters that Kubernetes takes."""
    letters = (
        letter if letter.isascii() and letter.isalnum() else "-" for letter in cluster.file.stem.lower()
    )
    return "lamina-" + "".join(letters).strip("-")[:32]


def pod_template(pod: Pod, cluster: Cluster, role: str) -> Object:
    """The template of pods like that of `role`."""
    names, place, side = devices_of(cluster, role), cluster.places.kubernetes, side_of(role)
    platform = names[0].partition(":")[0]
    mounts, volumes = _files(cluster, pod.component)
    if platform in SHARED_MEMORY:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    container: Object = {
        "name": pod.component,
        "image": f"{place.image}:{IMAGE_TAGS.get(platform, platform)}",
        "command": pod.argv,
        "env": [{"name": name, "value": value} for name, value in _environment(pod, cluster).items()],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
        **pod.probes.of_container(),
    }
    if pod.ports:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in pod.ports.items()]
    spec: Object = {
        "containers": [container],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": int(pod.stop_seconds) + STOP_MARGIN_SECONDS,
        "volumes": volumes,
    }
    resources: Object = {}
    if requests := getattr(place, f"{side}_requests"):
        resources["requests"] = requests
    if resource := RESOURCES.get(platform):
        resources["limits"] = {resource: len(names)}
        spec["tolerations"] = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if resources:
        container["resources"] = resources
    if labels := getattr(place, side):
        spec["nodeSelector"] = labels
    return {"metadata": {"labels": pod.labels}, "spec": spec}


def _environment(pod: Pod, cluster: Cluster) -> dict[str, str]:
    models = {"HF_HOME": "/models"} if cluster.places.kubernetes.models else {}
    return {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": "/cache", **models, **pod.environment}


def _files(cluster: Cluster, component: str) -> tuple[list[Object], list[Object]]:
    """What is mounted where, and what it is."""
    name, security = name_of(cluster), cluster.security
    mounts: list[Object] = [{"name": "cache", "mountPath": "/cache"}]
    volumes: list[Object] = [{"name": "cache", "emptyDir": {}}]
    wanted = {
        "token": security.token_file is not None,
        "tls": security.tls_ca is not None,
        "api-keys": component == "engine" and cluster.engine.server.api_key_file is not None,
    }
    for secret in (secret for secret, there in wanted.items() if there):
        mounts.append({"name": secret, "mountPath": f"{FOLDER}/{secret}", "readOnly": True})
        volumes.append({"name": secret, "secret": {"secretName": f"{name}-{secret}", "defaultMode": 0o440}})
    if (claim := cluster.places.kubernetes.models) and component != "worker":
        mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return mounts, volumes
