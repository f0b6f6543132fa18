"""What is written for Slurm, Kubernetes and Cloud TPU: valid for its reader, and as the cluster file says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax import attend, serve
from lamina_jax.cluster.file import read_cluster
from lamina_jax.cluster.kubernetes import WAIT_SECONDS, emit_kubernetes
from lamina_jax.cluster.slurm import emit_slurm
from lamina_jax.cluster.tpu import emit_tpu
from lamina_jax.cluster.yaml import to_yaml
from lamina_jax.config import ConfigError
from lamina_jax.launch import EMITTED, main

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = json.loads((ROOT / "tests" / "fixtures" / "kubernetes" / "schemas.json").read_text())
SHIPPED = sorted(path for place in EMITTED for path in (ROOT / "launch" / place).iterdir())

CLUSTER = """
[hosts]
a = "10.0.0.1"
b = "10.0.0.2"
c = "10.0.0.3"
[security]
insecure = true
[engine]
host = "a"
[engine.settings]
model = "bundled"
compute_devices = "{compute}"
partition = "tokens"
[engine.server]
port = 8123
{followers}
[[workers]]
host = "b"
port = 7101
devices = "{memory}:0"
environment = {{ WORD = "two words" }}
[[workers]]
host = "b"
port = 7102
devices = "{memory}:1"
environment = {{ WORD = "two words" }}
{more}
[tpu]
zone = "z"
compute = "slice-a"
memory = "slice-b"
prefill = "slice-c"
"""
FOLLOWER = '[[engine.followers]]\nhost = "c"\n'
PREFILL = '[[prefill]]\nhost = "b"\nport = 7301\ncompute_devices = "cpu:0"\n'


def write(
    folder: Path, *, compute: str = "cpu:0", memory: str = "cpu", followers: str = "", more: str = ""
) -> Path:
    file = folder / "pool.toml"
    file.write_text(CLUSTER.format(compute=compute, memory=memory, followers=followers, more=more))
    return file


def manifests(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    objects = [*yaml.safe_load_all(emit_kubernetes(read_cluster(file)))]
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}


def check_schema(thing: dict[str, Any]) -> None:
    reference = f"#/definitions/{SCHEMAS['kinds'][thing['kind']]}"
    schema = {"$ref": reference, "definitions": SCHEMAS["definitions"]}
    jsonschema_rs.Draft7Validator(schema).validate(thing)


def templates(thing: dict[str, Any]) -> list[dict[str, Any]]:
    if thing["kind"] == "LeaderWorkerSet":
        group = thing["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [thing["spec"]["template"]] if thing["kind"] == "StatefulSet" else []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_lies_in_launch_is_what_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    emit, ending = EMITTED[path.parent.name]
    assert path.suffix == f".{ending}"
    written = emit(read_cluster(Path("configs/clusters") / f"{path.stem}.toml"))
    assert path.read_text() == written, "run launch/emit.sh"


@pytest.mark.parametrize("followers", ["", FOLLOWER])
@pytest.mark.parametrize("more", ["", PREFILL])
@pytest.mark.parametrize(("compute", "memory"), [("cpu:0", "cpu"), ("gpu:0-3", "gpu"), ("tpu:0-3", "gpu")])
def test_manifests_are_valid_and_name_each_other(
    tmp_path: Path, followers: str, more: str, compute: str, memory: str
) -> None:
    objects = manifests(write(tmp_path, compute=compute, memory=memory, followers=followers, more=more))
    pods = [template for thing in objects.values() for template in templates(thing)]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for (kind, name), thing in objects.items():
        check_schema(thing)
        assert len(name) < 64
        selector = thing["spec"].get("selector", thing["spec"].get("podSelector"))
        if selector is not None:  # somebody is meant
            assert selector.get("matchLabels", selector) in labels
        if kind == "StatefulSet":
            assert ("Service", thing["spec"]["serviceName"]) in objects
        for rule in thing["spec"].get("ingress", []):
            for peer in rule.get("from", []):
                assert peer["podSelector"]["matchLabels"] in labels
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        names = {port["name"] for port in container.get("ports", [])}
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for (kind, _), thing in objects.items():
            if kind == "Service" and thing["metadata"]["labels"]["app.kubernetes.io/component"] == component:
                assert {port["targetPort"] for port in thing["spec"]["ports"]} <= names
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert len(objects) == 6 + bool(followers) + 3 * bool(more)


def test_a_manifest_that_is_wrong_is_found(tmp_path: Path) -> None:
    """The schemas can refuse."""
    objects = manifests(write(tmp_path))
    (workers,) = (thing for (kind, _), thing in objects.items() if kind == "StatefulSet")
    workers["spec"]["template"]["spec"]["containers"][0]["comand"] = ["python"]
    with pytest.raises(jsonschema_rs.ValidationError, match="comand"):
        check_schema(workers)


def test_pods_run_what_the_file_says(tmp_path: Path) -> None:
    """The command lines are read by their commands."""
    file = write(tmp_path, compute="gpu:4-5", memory="gpu", followers=FOLLOWER, more=PREFILL)
    cluster, objects = read_cluster(file), manifests(file)
    leader, follower = templates(objects["LeaderWorkerSet", "lamina-pool-compute"])
    argv = leader["spec"]["containers"][0]["command"]
    assert argv[:3] == ["python", "-m", "lamina_jax.serve"]
    settings, server = serve.parse(argv[3:])
    name = "lamina-pool-worker"
    assert settings.attention == ",".join(f"{name}-{i}.{name}.default.svc:7101" for i in range(2))
    assert settings.prefill == "lamina-pool-prefill-0.lamina-pool-prefill.default.svc:7301"
    assert (settings.compute_devices, settings.partition) == ("gpu:0-1", "tokens")
    assert (settings.coordinator, settings.num_hosts) == ("$(LWS_LEADER_ADDRESS):7100", 2)
    assert (server.host, server.port, server.insecure) == ("0.0.0.0", 8123, True)
    own = follower["spec"]["containers"][0]["command"]
    assert own[own.index("--host-id") + 1] == "$(LWS_WORKER_INDEX)"
    assert leader["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}
    workers = objects["StatefulSet", name]
    (pod,) = templates(workers)
    (container,) = pod["spec"]["containers"]
    worker, security = attend.parse(container["command"][3:])
    assert workers["spec"]["replicas"] == 2
    assert (worker.listen, worker.data_port, worker.devices) == ("0.0.0.0:7101", 8101, "gpu:0")
    assert security == cluster.security
    assert container["livenessProbe"]["grpc"] == {"port": 7101}
    assert {"name": "WORD", "value": "two words"} in container["env"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > worker.drain_seconds


def test_a_prefill_pod_listens_on_its_own_address(tmp_path: Path) -> None:
    file = write(tmp_path, more=PREFILL + PREFILL.replace("7301", "7302"))
    prefill = manifests(file)["StatefulSet", "lamina-pool-prefill"]
    argv = prefill["spec"]["template"]["spec"]["containers"][0]["command"]
    options, _ = serve.cluster_flags().parse_known_args(argv[3:])
    assert (options.role, options.listen) == ("prefill", "0.0.0.0:7301")
    assert serve.parse(argv[3:])[0].model == "bundled"
    assert prefill["spec"]["replicas"] == 2


def callers(objects: dict[tuple[str, str], dict[str, Any]], component: str) -> dict[str, set[int] | None]:
    """Who may reach a component, and at which ports; None: at all."""
    found: dict[str, set[int] | None] = {}
    for rule in objects["NetworkPolicy", f"lamina-pool-{component}"]["spec"]["ingress"]:
        ports = {port["port"] for port in rule["ports"]} if "ports" in rule else None
        for peer in rule.get("from", [{}]):
            labels = peer.get("podSelector", {}).get("matchLabels", {})
            found[labels.get("app.kubernetes.io/component", "everybody")] = ports
    return found


@pytest.mark.parametrize("exchange", ["auto", "jax"])
@pytest.mark.parametrize("followers", ["", FOLLOWER])
def test_nobody_is_let_in_who_has_no_business(tmp_path: Path, followers: str, exchange: str) -> None:
    """JAX's collectives between compute hosts, and its transfers with workers, use ports that it chooses."""
    file = write(tmp_path, followers=followers, more=PREFILL)
    file.write_text(file.read_text().replace('"tokens"', f'"tokens"\nexchange = "{exchange}"'))
    objects, jax = manifests(file), exchange == "jax"
    compute: dict[str, set[int] | None] = dict.fromkeys(["engine", "follower"] if followers else ["engine"])
    workers: dict[str, set[int] | None] = {"worker": None} if jax else {}
    others = (compute if followers else {}) | workers
    assert callers(objects, "engine") == {"everybody": {8123}} | others
    if followers:
        assert callers(objects, "follower") == others
    assert callers(objects, "worker") == dict.fromkeys(compute, None if jax else {7101, 8101})
    assert callers(objects, "prefill") == compute | {"worker": None}


def test_pods_are_what_the_restricted_standard_asks_for(tmp_path: Path) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards"""
    for thing in manifests(write(tmp_path, compute="gpu:0", followers=FOLLOWER, more=PREFILL)).values():
        for pod in templates(thing):
            security = pod["spec"]["securityContext"]
            assert security["runAsNonRoot"]
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            (container,) = pod["spec"]["containers"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {next(iter(volume.keys() - {"name"})) for volume in pod["spec"]["volumes"]} <= {
                "emptyDir",
                "secret",
                "persistentVolumeClaim",
            }


def test_pods_ask_for_what_the_file_says_and_wait_for_each_other(tmp_path: Path) -> None:
    file = write(tmp_path, compute="gpu:0-1", followers=FOLLOWER)
    table = '[kubernetes]\ncompute_requests = { cpu = "16", memory = "64Gi" }\n'
    file.write_text(file.read_text() + table)
    objects = manifests(file)
    for pod in templates(objects["LeaderWorkerSet", "lamina-pool-compute"]):
        (container,) = pod["spec"]["containers"]
        requests = {"cpu": "16", "memory": "64Gi"}
        assert container["resources"] == {"requests": requests, "limits": {"nvidia.com/gpu": 2}}
        own = container["command"]
        assert float(own[own.index("--worker-wait-seconds") + 1]) == WAIT_SECONDS
    (worker,) = templates(objects["StatefulSet", "lamina-pool-worker"])
    assert "resources" not in worker["spec"]["containers"][0]


def test_secrets_are_files_that_are_named_only(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "clusters" / "h100-h20.toml").read_text()
    (tmp_path / "pool.toml").write_text(text)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("the secret itself")
    written = emit_kubernetes(read_cluster(tmp_path / "pool.toml"))
    assert "the secret itself" not in written
    engine, _ = templates(manifests(tmp_path / "pool.toml")["LeaderWorkerSet", "lamina-pool-compute"])
    volumes = {v["name"]: v["secret"] for v in engine["spec"]["volumes"] if "secret" in v}
    assert volumes == {
        name: {"secretName": f"lamina-pool-{name}", "defaultMode": 0o440}
        for name in ("token", "tls", "api-keys")
    }
    for name in volumes:
        assert f"kubectl create secret generic lamina-pool-{name} " in written


@pytest.mark.parametrize(
    ("target", "old", "new", "words"),
    [
        ("slurm", "insecure = true", "", ["security", "token_file", "nodes of Slurm"]),
        ("kubernetes", "insecure = true", "", ["security", "token_file", "pods"]),
        ("kubernetes", 'compute_devices = "cpu:0"', "", ["engine.settings.compute_devices", "gpu:0-3"]),
        ("kubernetes", 'devices = "cpu:1"', "", ["workers[1].devices", "gpu:0-3"]),
        ("kubernetes", "two words", "one", ["workers[1]", "differs from workers[0]"]),
        ("kubernetes", 'host = "a"', 'host = "a"\ncores = "0"', ["engine.cores", "kubelet"]),
        ("kubernetes", '"bundled"', '"a/b"', ["kubernetes.models", "a/b"]),
        ("tpu", 'zone = "z"', "", ["tpu.zone"]),
        ("tpu", 'memory = "slice-b"', "", ["tpu.memory"]),
        ("slurm", "[tpu]", "[slurm]\nmemory = 'h20'\n[tpu]", ["slurm.memory", "a table"]),
        ("slurm", "[tpu]", "[slurm]\npartition = 'h20'\n[tpu]", ["slurm.partition", "no such key", "memory"]),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, old: str, new: str, words: list[str]
) -> None:
    file = write(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    assert main(["emit", "--for", target, "--cluster", str(file)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {file}: ")
    for word in words:
        assert word in err


def test_a_key_file_is_asked_for_where_others_reach_the_server(tmp_path: Path) -> None:
    file = write(tmp_path)
    text = file.read_text().replace(
        "insecure = true",
        "\n".join(f'{key} = "x"' for key in ("token_file", "tls_cert", "tls_key", "tls_ca")),
    )
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"engine\.server\.api_key_file: missing"):
        emit_kubernetes(read_cluster(file))


@pytest.mark.parametrize("more", ["", PREFILL])
def test_scripts_are_bash(tmp_path: Path, more: str) -> None:
    cluster = read_cluster(write(tmp_path, compute="tpu:0-3", memory="tpu", followers=FOLLOWER, more=more))
    for script in (emit_slurm(cluster), emit_tpu(cluster)):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    assert emit_slurm(cluster).count("#SBATCH hetjob") == 1 + bool(more)


def test_a_part_of_a_slice_is_cut_out_by_variables(tmp_path: Path) -> None:
    file = write(tmp_path, compute="tpu:0-3", memory="tpu", followers=FOLLOWER)
    text = file.read_text().replace("slice-b", "slice-a")
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"tpu\.compute_bounds: missing.* 2 hosts.* slice-a"):
        emit_tpu(read_cluster(file))
    file.write_text(text.replace('zone = "z"', 'zone = "z"\ncompute_bounds = "2,1,1"'))
    (engine,) = (line for line in emit_tpu(read_cluster(file)).splitlines() if "unit engine" in line)
    for word in ("TPU_VISIBLE_CHIPS=0,1,2,3", "TPU_PROCESS_BOUNDS=2,1,1", "${compute[1]}:8476"):
        assert word in engine


def test_three_chips_cannot_be_cut_out(tmp_path: Path) -> None:
    file = write(tmp_path, memory="tpu")
    file.write_text(file.read_text().replace("tpu:0", "tpu:0-2").replace("tpu:1", "tpu:3-5"))
    with pytest.raises(ConfigError, match=r"worker 0: 3 chips"):
        emit_tpu(read_cluster(file))


def test_output_is_a_file_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert main(["emit", "--for", "slurm", "--cluster", str(file), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pool.sbatch'}\n"
    assert (tmp_path / "pool.sbatch").read_text() == emit_slurm(read_cluster(file))
    assert main(["emit", "--for", "slurm", "--cluster", str(file), "--output", str(tmp_path / "no")]) == 1
    assert "--output" in capsys.readouterr().err


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "yes",
        "No",
        "null",
        "~",
        "1",
        "1.5",
        "1e3",
        "0x1f",
        "a: b",
        "- a",
        "#",
        "a #b",
        " a",
        "a ",
        "",
        ".inf",
        "=",
    ]
)


@given(
    st.recursive(
        WORDS | st.integers() | st.booleans(),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(WORDS, below, max_size=3),
        max_leaves=12,
    )
)
def test_yaml_is_read_back(value: Any) -> None:
    documents = [{"first": value}, {"second": [value, [value]]}]
    assert [*yaml.safe_load_all(to_yaml(documents))] == documents
