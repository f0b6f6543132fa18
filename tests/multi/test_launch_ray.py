"""`launch ray` on a real Ray cluster of two nodes, both here: roles placed by resource, and started anew."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from worker_talk import until

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install -e '.[ray]'"),
    pytest.mark.timeout(500),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

CLUSTER = """
[hosts]
a = "10.0.0.1"
b = "10.0.0.2"
[security]
insecure = true
[engine]
host = "a"
[engine.settings]
dtype = "float32"
max_num_seqs = 1
max_model_len = 64
page_size = 8
num_pages = 16
compute_devices = "cpu:0"
[engine.server]
port = {0}
drain_seconds = 5
[[workers]]
host = "b"
port = {1}
devices = "cpu:0"
drain_seconds = 5
[[workers]]
host = "b"
port = {2}
devices = "cpu:0"
drain_seconds = 5
"""

NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"lamina_compute": 1}})
cluster.add_node(num_cpus=1, resources={"lamina_memory": 1})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives out, as Ray's own processes take many of these meanwhile."""
    found: list[int] = []
    with ExitStack() as held:
        for port in range(20000 + os.getpid() % 8000, 32000):
            with suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                found.append(port)
            if len(found) == count:
                break
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster of two nodes."""
    command = [sys.executable, "-W", "ignore", "-c", NODES]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    nodes = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        found = nodes.stdout.readline().strip()
        assert ":" in found
        yield found
    finally:
        nodes.stdin.close()
        nodes.stdout.close()
        try:
            nodes.wait(60)
        finally:
            nodes.kill()


@contextmanager
def launched(file: Path, address: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The launcher, and the file of its output."""
    output = file.parent / "output"
    command = [sys.executable, "-m", "lamina_jax.launch", "ray", "--cluster", str(file), "--address", address]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield process, output
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def pids(*words: str) -> list[int]:
    """Processes with these words on their command lines."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in found.splitlines()[1:]]
    return [
        int(pid) for pid, args in lines if all(word in args for word in words) and "cluster.pin" not in args
    ]


def test_a_worker_that_dies_is_started_anew_and_the_service_answers_again(
    tmp_path: Path, address: str
) -> None:
    ports, file = free_ports(3), tmp_path / "pool.toml"
    file.write_text(CLUSTER.format(*ports))
    words = ("lamina_jax.attend", f":{ports[2]}")
    with launched(file, address) as (process, output):
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as client:

            def ready() -> bool:
                assert process.poll() is None, output.read_text()
                try:
                    return client.get("/ready").status_code == 200
                except httpx.TransportError:
                    time.sleep(0.2)
                    return False

            def answers() -> bool:
                body = {"model": "bundled", "prompt": "import os\n", "max_tokens": 4, "temperature": 0}
                if not ready():
                    return False
                answer = client.post("/v1/completions", json=body)
                return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4

            assert until(answers, 200), output.read_text()
            (first,) = pids(*words)
            os.kill(first, signal.SIGKILL)
            assert until(lambda: not ready(), 20), output.read_text()
            assert until(answers, 200), output.read_text()
            (second,) = pids(*words)
            assert second != first
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, output.read_text()
    assert "(worker 1 " in output.read_text()
    assert until(lambda: not pids(str(ports[1])), 20)


def test_a_resource_that_no_node_has_is_named(tmp_path: Path, address: str) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(CLUSTER.format(*free_ports(3)) + '[ray]\nmemory = "no_such"\n')
    code = f"""
from lamina_jax import launch
from lamina_jax.cluster import on_ray
on_ray.PLACING_SECONDS = 3.0
raise SystemExit(launch.main(["ray", "--cluster", {str(file)!r}, "--address", {address!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for word in (str(file), "no_such", "lamina_compute", "[ray]"):
        assert word in line


def test_no_ray_cluster_there(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(CLUSTER.format(*free_ports(3)))
    command = [sys.executable, "-m", "lamina_jax.launch", "ray", "--cluster", str(file)]
    more = ["--address", "127.0.0.1:1"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "error: --address 127.0.0.1:1: no Ray cluster" in done.stderr
