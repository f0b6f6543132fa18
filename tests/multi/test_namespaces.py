"""Engine and worker in network namespaces of their own, joined by a cable: the same tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import make_certificates
from real_processes import PROMPT, SETTINGS, Process, Start, WorkerProcess, flags

pytestmark = [
    pytest.mark.multi,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a network namespace needs root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="making a network namespace needs iproute2's ip"),
]

WORKER_HOST, ENGINE_HOST = "10.97.31.1", "10.97.31.2"
TOKENS = 40


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """The worker's and the engine's; ended with all that is in them."""
    names = f"lamina-w{os.getpid()}", f"lamina-e{os.getpid()}"
    ends = f"lmw{os.getpid()}", f"lme{os.getpid()}"
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
        for name, end, host in zip(names, ends, (WORKER_HOST, ENGINE_HOST), strict=True):
            ip(f"-n {name} address add {host}/30 dev {end}")
            ip(f"-n {name} link set {end} up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def inside(name: str) -> tuple[str, ...]:
    return "ip", "netns", "exec", name


def tokens(
    name: str, checkpoint: str, address: str, security: dict[str, object], **options: object
) -> list[int]:
    """Of an engine in the namespace."""
    script = str(Path(__file__).parent / "print_tokens.py")
    settings = {**SETTINGS, "model": checkpoint, "attention": address, **options}
    told = {"prompt": PROMPT, "max_tokens": TOKENS, "security": security, "settings": settings}
    command = [*inside(name), sys.executable, script, json.dumps(told)]
    return json.loads(subprocess.run(command, check=True, timeout=100, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("exchange", ["auto", "grpc"])
def test_open_to_everyone(
    run: Start, namespaces: tuple[str, str], checkpoint: str, expected: list[int], exchange: str
) -> None:
    worker = run(WorkerProcess, WORKER_HOST, 0, "--insecure", before=inside(namespaces[0])).wait_listening()
    found = tokens(namespaces[1], checkpoint, worker.address, {"insecure": True}, exchange=exchange)
    assert found == expected[:TOKENS]


def test_token_and_tls(
    run: Start, namespaces: tuple[str, str], checkpoint: str, expected: list[int], tmp_path: Path
) -> None:
    files = make_certificates(tmp_path, WORKER_HOST)
    own = {"token_file": files / "token", "tls_cert": files / "worker.pem", "tls_key": files / "worker.key"}
    worker = run(WorkerProcess, WORKER_HOST, 0, *flags(own), before=inside(namespaces[0])).wait_listening()
    security = {"token_file": str(files / "token"), "tls_ca": str(files / "ca.pem")}
    assert tokens(namespaces[1], checkpoint, worker.address, security) == expected[:TOKENS]


def test_a_reachable_address_needs_protection(run: Start, namespaces: tuple[str, str]) -> None:
    worker: Process = run(WorkerProcess, WORKER_HOST, 0, before=inside(namespaces[0]))
    assert worker.exit_code() == 1
    assert "--token-file and --tls-cert" in worker.said
