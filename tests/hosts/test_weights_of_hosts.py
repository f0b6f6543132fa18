"""Every compute host reads of the weights' files its own shards, and no more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from real_processes import free_ports

from lamina_jax.weights.loader import num_bytes
from lamina_jax.weights.safetensors import find_tensors

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).with_name("load_weights.py")
HOSTS = 2


@pytest.mark.parametrize("devices", [1, 2], ids="{}-of-each".format)
def test_a_host_reads_its_own_shards(checkpoint: str, devices: int) -> None:
    """Which the hosts compare with the file, too."""
    common = (f"127.0.0.1:{free_ports(1)[0]}", str(HOSTS))
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *common, str(host), str(devices), checkpoint],
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(HOSTS)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert [process.returncode for process in processes] == [0] * HOSTS, said

    sizes = {name: num_bytes(tensor) for name, tensor in find_tensors(Path(checkpoint)).items()}
    share = sum(size if "norm" in name else size // HOSTS for name, size in sizes.items())
    for text in said:
        found = re.search(r"read (\d+) of (\d+) bytes of weights", text)
        assert found, text
        assert (int(found[1]), int(found[2])) == (share, sum(sizes.values()))
