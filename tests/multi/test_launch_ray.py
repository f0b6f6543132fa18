"""`launch ray` on a real Ray cluster whose nodes are all here: processes placed, started anew, and moved."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from worker_talk import until

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install -e '.[ray]'"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

START_SECONDS = 300.0
"""Of a service, on a machine that does other things, too."""

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
microbatches = 1
overlap = "on"
prefill_stall_ms = inf
max_prefill_tokens = 16
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

FOLLOWER = """
coordinator_port = {0}
[[engine.followers]]
host = "{1}"
"""


def with_follower(text: str, port: int, host: str) -> str:
    """A cluster file with a second compute host."""
    return text.replace("[engine.settings]", FOLLOWER.format(port, host) + "[engine.settings]")


NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
nodes = {}
for line in sys.stdin:
    address, *sides = line.split()
    if sides:
        resources = {f"lamina_{side}": 1 for side in sides}
        nodes[address] = cluster.add_node(num_cpus=1, resources=resources, node_ip_address=address)
    else:
        cluster.remove_node(nodes.pop(address))
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A Ray cluster on this machine: a head with no resource, and nodes at addresses like 127.0.0.2."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._say, self._hear = process.stdin, process.stdout
        self.address = self._hear.readline().strip()
        assert ":" in self.address

    def add(self, address: str, side: str) -> None:
        """A node with the resource of a side: "compute" or "memory"."""
        self._tell(f"{address} {side}")

    def remove(self, address: str) -> None:
        self._tell(address)

    def _tell(self, line: str) -> None:
        print(line, file=self._say, flush=True)
        assert self._hear.readline().strip() == "done"

    def close(self) -> None:
        self._say.close()
        self._hear.close()


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
def nodes() -> Iterator[Nodes]:
    """With a memory node, at 127.0.0.2, and two compute nodes."""
    command = [sys.executable, "-W", "ignore", "-c", NODES]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        with closing(Nodes(process)) as found:
            for address, side in (
                ("127.0.0.2", "memory"),
                ("127.0.0.4", "compute"),
                ("127.0.0.5", "compute"),
            ):
                found.add(address, side)
            yield found
        process.wait(60)
    finally:
        process.kill()


@dataclass
class Service:
    """A launcher, what it has printed, and the HTTP server that it has started."""

    process: subprocess.Popen[bytes]
    output: Path
    client: httpx.Client

    def ready(self) -> bool:
        assert self.process.poll() is None, self.said
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            time.sleep(0.2)
            return False

    def answers(self) -> bool:
        body = {"model": "bundled", "prompt": "import os\n", "max_tokens": 4, "temperature": 0}
        if not self.ready():
            return False
        try:
            answer = self.client.post("/v1/completions", json=body)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4

    @property
    def said(self) -> str:
        return self.output.read_text()

    def ends(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.said


@contextmanager
def launched(folder: Path, text: str, nodes: Nodes, port: int) -> Iterator[Service]:
    """A cluster file, launched; it has ended when the block is left."""
    file, output = folder / "pool.toml", folder / "output"
    file.write_text(text)
    command = [sys.executable, "-m", "lamina_jax.launch", "ray", "--cluster", str(file)]
    with output.open("wb") as stream:
        process = subprocess.Popen([*command, "--address", nodes.address], stdout=stream, stderr=stream)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Service(process, output, client)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def pids(*words: str) -> list[int]:
    """Processes with these words on their command lines."""
    found = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in found.splitlines()[1:]]
    return [
        int(pid) for pid, args in lines if all(word in args for word in words) and "cluster.pin" not in args
    ]


def test_a_worker_that_dies_is_started_anew_and_the_service_answers_again(
    tmp_path: Path, nodes: Nodes
) -> None:
    ports = free_ports(3)
    words = ("lamina_jax.attend", f":{ports[2]}")
    with launched(tmp_path, CLUSTER.format(*ports), nodes, ports[0]) as service:
        assert until(service.answers, START_SECONDS), service.said
        (first,) = pids(*words)
        os.kill(first, signal.SIGKILL)
        assert until(lambda: not service.ready(), 20), service.said
        assert until(service.answers, START_SECONDS), service.said
        (second,) = pids(*words)
        assert second != first
        service.ends()
    assert "(worker 1 " in service.said
    assert until(lambda: not pids(str(ports[1])), 20)


@pytest.mark.parametrize("host_id", [1, 0], ids=["follower", "engine"])
def test_a_compute_host_that_dies_is_started_anew_with_the_others(
    tmp_path: Path, nodes: Nodes, host_id: int
) -> None:
    *ports, coordinator = free_ports(4)
    text = with_follower(CLUSTER.format(*ports), coordinator, "a")
    words = ("lamina_jax.serve", f"--host-id {host_id}", f":{coordinator}")
    with launched(tmp_path, text, nodes, ports[0]) as service:
        assert until(service.answers, START_SECONDS), service.said
        (first,) = pids(*words)
        os.kill(first, signal.SIGKILL)
        assert until(lambda: not service.ready(), 20), service.said
        assert until(service.answers, START_SECONDS), service.said
        (second,) = pids(*words)
        assert second != first
        service.ends()
    assert "Ray starts it anew" in service.said


def test_what_ran_on_a_lost_node_waits_for_another_and_all_goes_on_there(
    tmp_path: Path, nodes: Nodes
) -> None:
    """First the node of both workers, then that of the engine, which has a follower on another one."""
    *ports, coordinator = free_ports(4)
    text = with_follower(CLUSTER.format(*ports), coordinator, "c").replace(
        "[security]", 'c = "10.0.0.3"\n[security]'
    )
    with launched(tmp_path, text, nodes, ports[0]) as service:
        assert until(service.answers, START_SECONDS), service.said
        assert pids("lamina_jax.attend", f"127.0.0.2:{ports[1]}")
        nodes.remove("127.0.0.2")
        lacking = "a node is lost; waiting for one with {'lamina_memory': 1.0} for worker 0, worker 1"
        assert until(lambda: lacking in service.said, 60), service.said
        assert until(lambda: not service.ready(), 60), service.said
        nodes.add("127.0.0.3", "memory")
        assert until(service.answers, START_SECONDS), service.said
        assert pids("lamina_jax.attend", f"127.0.0.3:{ports[1]}")

        (old,) = (ip for ip in ("127.0.0.4", "127.0.0.5") if pids(f"--coordinator {ip}:{coordinator}"))
        nodes.remove(old)
        lacking = "waiting for one with {'lamina_compute': 1.0} for engine"
        assert until(lambda: lacking in service.said, 60), service.said
        nodes.add("127.0.0.6", "compute")
        assert until(service.answers, START_SECONDS), service.said
        assert pids(f"--coordinator 127.0.0.6:{coordinator}")
        service.ends()
    assert service.said.count("is on another node now: starting all anew") == 2


def test_a_resource_that_no_node_has_is_named(tmp_path: Path, nodes: Nodes) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(CLUSTER.format(*free_ports(3)) + '[ray]\nmemory = "no_such"\n')
    code = f"""
from lamina_jax import launch
from lamina_jax.cluster import on_ray
on_ray.PLACING_SECONDS = 3.0
raise SystemExit(launch.main(["ray", "--cluster", {str(file)!r}, "--address", {nodes.address!r}]))
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
