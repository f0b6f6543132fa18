"""A cluster as Kubernetes manifests: every process a pod. Starts nothing, and no jax here.

Compute hosts are one group of a LeaderWorkerSet, which starts all of them anew when one fails; attention
workers and prefill hosts are StatefulSets. Secrets are mounted as files, which the manifests name but do not
hold.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.places import Side
from lamina_jax.cluster.pod import FOLDER, Pod, Probes, name_of, pod_template
from lamina_jax.cluster.processes import AnyProcess, Cluster, WorkerProcess
from lamina_jax.cluster.relocate import devices_of, relocated, renumbered, spread
from lamina_jax.cluster.yaml import to_yaml
from lamina_jax.config import ConfigError, ServerConfig

EVERYWHERE = "0.0.0.0"

DATA_PORT_ABOVE = 1000
"""A worker's data port, which a policy names, is so much above its port if the file leaves it to be any."""

WAIT_SECONDS = 1800.0
"""For which pods wait for each other at least: nodes are made meanwhile, and images fetched."""

SECRETS = {
    "token_file": "token/token",
    "tls_cert": "tls/tls.crt",
    "tls_key": "tls/tls.key",
    "tls_ca": "tls/ca.crt",
}
API_KEYS = "api-keys/keys"

ONE_SLICE = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
"""All hosts of a group in one TPU slice, which is a node pool."""

OWN = {"follower": {"--host-id": "$(LWS_WORKER_INDEX)"}}
"""Of a component's flags, what each pod has of its own: LeaderWorkerSet tells it."""

Object = dict[str, Any]
Rule = tuple[dict[str, int] | None, list[str] | None]
"""Who may reach something: (ports, or all of them; components, or everybody)."""


def emit_kubernetes(cluster: Cluster) -> str:
    """The manifests, as YAML.

    Raises:
        ConfigError: a cluster that cannot run there; it names the key.
    """
    _check(cluster)
    on_pods = _on_pods(cluster)
    return _head(cluster) + to_yaml(_Manifests(cluster, on_pods).objects())


class _Manifests:
    """The objects of one cluster.

    Args:
        cluster: as its file has it.
        on_pods: with the addresses, devices and secrets of pods.
    """

    def __init__(self, cluster: Cluster, on_pods: Cluster) -> None:
        self._cluster, self._on_pods, self._place = cluster, on_pods, cluster.places.kubernetes
        self._name = name_of(cluster)
        self._argv = {c.role: c.argv for c in commands(on_pods, "python", by_flags=True)}

    def objects(self) -> list[Object]:
        http = self._on_pods.engine.server.port
        workers, prefill = self._cluster.workers, self._cluster.prefill
        followers = ["follower"] if self._cluster.engine.followers else []
        compute = ["engine", *followers]
        # JAX's collectives and its transfer servers, which call each other, take ports that they choose.
        transfer = self._on_pods.engine.settings.exchange == "jax"
        peers = (compute if followers else []) + (["worker"] if transfer else [])
        among: list[Rule] = [(None, peers)] if peers else []
        ports = _worker_ports(self._on_pods)
        found = [
            self._service("engine", "engine", {"http": http}, headless=False),
            self._compute(),
            self._policy("engine", [({"http": http}, None), *among]),
            *(self._policy(follower, among) for follower in followers),
            *self._set("worker", len(workers), ports),
            self._policy("worker", [(None if transfer else ports, compute)]),
        ]
        if prefill:
            found += self._set("prefill", len(prefill), {"grpc": prefill[0].port})
            found.append(self._policy("prefill", [(None, [*compute, "worker"])]))
        return found

    def _compute(self) -> Object:
        """The group of all compute hosts."""
        server, followers = self._on_pods.engine.server, self._cluster.engine.followers
        ports = {"http": server.port}
        if followers:
            ports["coordinator"] = self._cluster.engine.coordinator_port
        leader = self._template("engine", "engine", ports, Probes.of_engine(server.port))
        template: Object = {
            "size": len(self._cluster.compute),
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": self._template("follower 1", "follower", {}, Probes()) if followers else leader,
        }
        spec = {"replicas": 1, "startupPolicy": "LeaderCreated", "leaderWorkerTemplate": template}
        group = self._object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "compute", "engine", spec)
        if followers and devices_of(self._cluster, "engine")[0].startswith("tpu"):
            group["metadata"]["annotations"] = ONE_SLICE
        return group

    def _set(self, component: str, count: int, ports: dict[str, int]) -> list[Object]:
        """`count` pods with names of their own, and the service that names them."""
        labels = self._labels(component)
        probes = Probes.of_grpc(self._on_pods.security, ports["grpc"])
        spec = {
            "serviceName": f"{self._name}-{component}",
            "replicas": count,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": self._template(f"{component} 0", component, ports, probes),
        }
        return [
            self._service(component, component, ports, headless=True),
            self._object("apps/v1", "StatefulSet", component, component, spec),
        ]

    def _template(self, role: str, component: str, ports: dict[str, int], probes: Probes) -> Object:
        process = self._cluster.roles()[role]
        own = dict(OWN.get(component, {}))
        if "grpc" in ports:
            own["--listen"] = f"{EVERYWHERE}:{ports['grpc']}"
        return pod_template(
            Pod(
                argv=[own.get(flag, word) for flag, word in pairwise(("", *self._argv[role]))],
                component=component,
                labels=self._labels(component),
                ports=ports,
                probes=probes,
                environment=process.environment,
                stop_seconds=self._cluster.drain_seconds,
            ),
            self._cluster,
            role,
        )

    def _service(self, suffix: str, component: str, ports: dict[str, int], *, headless: bool) -> Object:
        spec: Object = {
            "selector": self._labels(component),
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in ports.items()],
        }
        if headless:  # a name for each pod, from its start: others wait for it there
            spec = {"clusterIP": "None", "publishNotReadyAddresses": True, **spec}
        return self._object("v1", "Service", suffix, component, spec)

    def _policy(self, component: str, rules: list[Rule]) -> Object:
        """Who may reach a component."""
        ingress = []
        for ports, callers in rules:
            rule: Object = {}
            if callers is not None:
                rule["from"] = [{"podSelector": {"matchLabels": self._labels(caller)}} for caller in callers]
            if ports is not None:
                rule["ports"] = [{"protocol": "TCP", "port": port} for port in ports.values()]
            ingress.append(rule)
        spec = {
            "podSelector": {"matchLabels": self._labels(component)},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        }
        return self._object("networking.k8s.io/v1", "NetworkPolicy", component, component, spec)

    def _object(self, version: str, kind: str, suffix: str, component: str, spec: Object) -> Object:
        metadata = {
            "name": f"{self._name}-{suffix}",
            "namespace": self._place.namespace,
            "labels": self._labels(component),
        }
        return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}

    def _labels(self, component: str) -> dict[str, str]:
        return {
            "app.kubernetes.io/name": "lamina-jax",
            "app.kubernetes.io/instance": self._name,
            "app.kubernetes.io/component": component,
        }


def _on_pods(cluster: Cluster) -> Cluster:
    """The cluster with what its settings are inside pods."""
    name, namespace = name_of(cluster), cluster.places.kubernetes.namespace
    first = cluster.workers[0]
    data_port = first.settings.data_port or first.port + DATA_PORT_ABOVE
    alike = tuple(
        replace(worker, port=first.port, settings=replace(worker.settings, data_port=data_port))
        for worker in cluster.workers
    )
    prefill = tuple(replace(host, port=cluster.prefill[0].port) for host in cluster.prefill)

    def address(side: Side, number: int) -> str:
        if side == "compute":
            return "$(LWS_LEADER_ADDRESS)"  # the only one that others are told
        component = "worker" if side == "memory" else "prefill"
        return f"{name}-{component}-{number}.{name}-{component}.{namespace}.svc"

    pods = relocated(spread(renumbered(replace(cluster, workers=alike, prefill=prefill))), address, "pods")
    paths = {key: f"{FOLDER}/{path}" for key, path in SECRETS.items() if getattr(cluster.security, key)}
    settings = replace(
        pods.engine.settings,
        security=replace(cluster.security, **paths),  # type: ignore[arg-type]
        worker_wait_seconds=max(pods.engine.settings.worker_wait_seconds, WAIT_SECONDS),
    )
    engine = replace(pods.engine, settings=settings, server=_server(cluster))
    return replace(pods, engine=engine)


def _server(cluster: Cluster) -> ServerConfig:
    """The HTTP server of a pod, which others reach."""
    server = cluster.engine.server
    keys = f"{FOLDER}/{API_KEYS}" if server.api_key_file else None
    try:
        return replace(server, host=EVERYWHERE, api_key_file=keys)
    except ConfigError:
        raise ConfigError(
            f"{cluster.file}: engine.server.api_key_file: missing: a pod's server is reached by others: "
            "give it, or security.insecure = true if everyone in the cluster may use the model"
        ) from None


def _worker_ports(on_pods: Cluster) -> dict[str, int]:
    worker = on_pods.workers[0]
    return {"grpc": worker.port, "data": worker.settings.data_port}


def _check(cluster: Cluster) -> None:
    """Refuse what pods cannot have: pods of one kind are alike, and Kubernetes places them."""
    for key, process in cluster.keys().items():
        if process.cores is not None:
            raise ConfigError(
                f"{cluster.file}: {key}.cores: the kubelet pins pods, by its CPU manager: leave it out"
            )
    if cluster.engine.settings.model != "bundled" and cluster.places.kubernetes.models is None:
        raise ConfigError(
            f"{cluster.file}: kubernetes.models: missing: expected the persistent volume claim that keeps "
            f"engine.settings.model={cluster.engine.settings.model!r}"
        )
    groups: dict[str, tuple[AnyProcess, ...]] = {
        "engine.followers": cluster.engine.followers,
        "workers": cluster.workers,
        "prefill": cluster.prefill,
    }
    for key, pods in groups.items():
        for i, pod in enumerate(pods):
            if _template_of(pod) != _template_of(pods[0]):
                raise ConfigError(
                    f"{cluster.file}: {key}[{i}]: differs from {key}[0], and their pods are alike"
                )


def _template_of(process: AnyProcess) -> object:
    """What pods made of one template share."""
    if isinstance(process, WorkerProcess):
        settings = replace(process.settings, listen=EVERYWHERE + ":1", data_port=0, devices=None)
        return settings, process.environment
    return process.environment


def _head(cluster: Cluster) -> str:
    """What to do before `kubectl apply`, as comments."""
    name, place = name_of(cluster), cluster.places.kubernetes
    namespace = f"--namespace {place.namespace}"
    lines = [
        f"Written by `python -m lamina_jax.launch emit --for kubernetes --cluster {cluster.file}`.",
        "Needs the LeaderWorkerSet controller: https://lws.sigs.k8s.io",
    ]
    security, keys = cluster.security, cluster.engine.server.api_key_file
    create = f"  kubectl create secret generic {name}"
    if security.token_file or security.tls_ca or keys:
        lines += ["Secrets, which the pods mount as files:", ""]
    if security.token_file:
        lines.append(f"{create}-token {namespace} --from-file=token={security.token_file}")
    if security.tls_ca:
        lines.append(
            f"{create}-tls {namespace} --from-file=tls.crt={security.tls_cert} "
            f"--from-file=tls.key={security.tls_key} --from-file=ca.crt={security.tls_ca}"
        )
    if keys:
        lines.append(f"{create}-api-keys {namespace} --from-file=keys={keys}")
    if security.tls_ca:
        lines += ["", f"The certificate is for {', '.join(_tls_names(cluster))}."]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _tls_names(cluster: Cluster) -> list[str]:
    """By which pods reach each other."""
    name, namespace = name_of(cluster), cluster.places.kubernetes.namespace
    sets = ["worker", "prefill"] if cluster.prefill else ["worker"]
    # LeaderWorkerSet makes it LWS_LEADER_ADDRESS.
    leader = [f"{name}-compute-0.{name}-compute.{namespace}"] if cluster.engine.followers else []
    return [*leader, *(f"*.{name}-{component}.{namespace}.svc" for component in sets)]
