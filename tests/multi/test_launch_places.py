"""What is written for Slurm and Cloud TPU, and `launch ssh`: run with stand-ins for srun, gcloud and ssh.

They run here what the real ones would run elsewhere; the processes are stand-ins, too, which say what they
were told. One test starts the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from real_processes import free_ports
from worker_talk import until

from lamina_jax.cluster.file import read_cluster
from lamina_jax.cluster.slurm import emit_slurm
from lamina_jax.cluster.tpu import emit_tpu

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]

CLUSTER = """
[hosts]
a = "127.0.0.1"
b = "127.0.0.2"
c = "127.0.0.3"
[security]
insecure = true
[engine]
host = "a"
[engine.settings]
compute_devices = "cpu:0"
{settings}
[engine.server]
port = {0}
drain_seconds = 1
[[engine.followers]]
host = "b"
environment = {{ WORD = "two words" }}
[[workers]]
host = "c"
port = {1}
devices = "cpu:0"
drain_seconds = 1
[[workers]]
host = "c"
port = {2}
devices = "cpu:0"
drain_seconds = 1
[slurm]
python = "{python}"
[tpu]
zone = "z"
compute = "big"
memory = "small"
python = "{python}"
directory = "{directory}"
"""

STAND_IN = """#!/usr/bin/env bash
# A Python that runs what starts others, and otherwise says what it is to run, until it is told to end.
if [[ "$2" == lamina_jax.cluster.* ]]; then exec {real} "$@"; fi
trap 'echo drained; exit 0' TERM
echo "runs $* in $PWD with ${{WORD:-nothing}}"
if [ -e {folder}/die ] && [[ "$*" == *attend*:{port}* ]]; then exit 7; fi
while true; do sleep 0.05; done
"""

FAKES = {
    "scontrol": """
if [ "$1" = show ]; then tr , '\\n' <<< "$3"; else echo "$@" >> {folder}/scontrol; fi
""",
    "srun": """
while [[ "$1" == --* ]]; do options+=" $1"; shift; done
echo "srun$options"
exec "$@"
""",
    "ssh": """
while [[ "$1" == -o ]]; do shift 2; done
echo "ssh $1"
cd {folder}; exec bash -c "$2"
""",
    "gcloud": """
name=$5; hosts={folder}/slice-$name
if [ "$4" = describe ]; then cat "$hosts"; exit; fi
for word in "$@"; do case "$word" in --command=*) command=${{word#--command=}} ;; esac; done
for ((i = 0; i < $(wc -l < "$hosts"); i++)); do HERE=$i bash -c "$command"; done
""",
    "curl": 'echo "$HERE"\n',
    "sudo": 'exec "$@"\n',
    "systemctl": "echo systemctl $*; exit 3\n",
    "journalctl": "echo journalctl $*; exec {folder}/bin/follows\n",
    "follows": "while true; do sleep 0.05; done\n",
    "systemd-run": """
while [[ "$1" == --* ]]; do options+=" $1"; shift; done
echo "systemd-run$options"
timeout 1 "$@" || true
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the stand-ins, and the cluster file as `pool.toml`."""
    ports, python = free_ports(3), tmp_path / "python"
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.write_text("#!/usr/bin/env bash\n" + text.format(folder=tmp_path))
        fake.chmod(0o755)
    python.write_text(STAND_IN.format(real=sys.executable, folder=tmp_path, port=ports[2]))
    python.chmod(0o755)
    text = CLUSTER.format(*ports, settings="", python=python, directory=tmp_path)
    (tmp_path / "pool.toml").write_text(text)
    (tmp_path / "slice-big").write_text("10.0.0.1\n10.0.0.2\n")
    (tmp_path / "slice-small").write_text("10.0.0.11\n10.0.0.12\n")
    return tmp_path


@contextmanager
def running(folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command in the background, and the file of its output."""
    output = folder / "output"
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "127.0.0.1,127.0.0.2",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "127.0.0.3",
    }
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder, env=environment)
    try:
        yield process, output
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()


def ssh(folder: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "lamina_jax.launch", "ssh", "--cluster", str(folder / "pool.toml")]
    return [*command, "--python", str(folder / "python"), "--directory", str(folder), *more]


def slurm(folder: Path) -> list[str]:
    (folder / "job").write_text(emit_slurm(read_cluster(folder / "pool.toml")))
    return ["bash", str(folder / "job")]


@pytest.mark.parametrize("place", [ssh, slurm])
def test_every_process_runs_on_its_host_and_all_end_together(folder: Path, place: object) -> None:
    with running(folder, *place(folder)) as (process, output):  # type: ignore[operator]
        assert until(lambda: output.read_text().count("| runs ") == 4, 60), output.read_text()
        process.terminate()
        code = process.wait(30)
    text = output.read_text()
    assert code == (0 if place is ssh else 143)
    lines = {line.split(" | ")[0].strip(): line for line in text.splitlines() if "| runs " in line}
    assert set(lines) == {"engine", "follower 1", "worker 0", "worker 1"}
    assert "--coordinator 127.0.0.1:7100 --num-hosts 2 --host-id 1" in lines["follower 1"]
    assert lines["follower 1"].endswith("with two words")
    assert "--listen 127.0.0.3:" in lines["worker 1"]
    assert all(f"in {folder} with" in line for line in lines.values())
    assert text.count("| drained") == 4
    said = "ssh 127.0.0.3" if place is ssh else "srun --het-group=1 --nodelist=127.0.0.3"
    assert text.count(said) == 2


@pytest.mark.parametrize("place", [ssh, slurm])
def test_the_first_death_ends_all_and_is_the_exit_code(folder: Path, place: object) -> None:
    (folder / "die").touch()
    with running(folder, *place(folder)) as (process, output):  # type: ignore[operator]
        assert process.wait(60) == 7, output.read_text()
    if place is slurm:
        assert (folder / "scontrol").read_text() == "requeue 42\n"


def test_what_runs_elsewhere_ends_when_the_launcher_is_killed(folder: Path) -> None:
    with running(folder, *ssh(folder)) as (process, output):
        assert until(lambda: output.read_text().count("| runs ") == 4, 60), output.read_text()
        process.kill()
        process.wait(10)

        def left() -> list[str]:
            found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            return [line for line in found.splitlines() if str(folder / "python") in line]

        assert until(lambda: not left(), 20), left()


def test_every_host_of_a_slice_runs_its_own(folder: Path) -> None:
    script = folder / "pool.sh"
    script.write_text(emit_tpu(read_cluster(folder / "pool.toml")))
    with running(folder, "bash", str(script), "start") as (process, output):
        assert process.wait(60) == 0, output.read_text()
    lines = [line for line in output.read_text().splitlines() if line.startswith("runs ")]
    assert [line.split()[2].partition(".")[2] for line in lines] == ["serve", "serve", "attend", "attend"]
    assert "--host-id 0" in lines[0]
    assert "--coordinator 10.0.0.1:7100 --num-hosts 2 --host-id 1" in lines[1]
    assert lines[1].endswith("with two words")
    assert all("--listen 10.0.0.11:" in line for line in lines[2:])  # one host has both workers
    assert "host 1 of the slice is not used" in output.read_text()
    with running(folder, "bash", str(script)) as (process, output):
        assert process.wait(20) == 2


def test_what_is_told_to_all_hosts_of_all_slices(folder: Path) -> None:
    """A failure is not lost, and following the logs ends with Ctrl-C, on every slice."""
    script = folder / "pool.sh"
    script.write_text(emit_tpu(read_cluster(folder / "pool.toml")))
    with running(folder, "bash", str(script), "stop") as (process, output):
        assert process.wait(20) == 3, output.read_text()
    assert output.read_text().count("systemctl stop lamina-*") == 4
    (folder / "slice-big").write_text("10.0.0.1\n")
    (folder / "slice-small").write_text("10.0.0.11\n")
    with running(folder, "bash", str(script), "logs") as (process, output):
        assert until(lambda: output.read_text().count("journalctl --follow") == 2, 20), output.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder / "bin" / "follows") not in found


def test_a_job_of_real_processes_answers(folder: Path) -> None:
    """One compute host, two workers: the script's flags start what the file says."""
    ports = free_ports(3)
    settings = "dtype = 'float32'\nmax_num_seqs = 1\nmax_model_len = 64\npage_size = 8\nnum_pages = 16"
    text = CLUSTER.format(*ports, settings=settings, python=sys.executable, directory=folder)
    start, _, rest = text.partition("[[engine.followers]]")
    (folder / "pool.toml").write_text(start + rest[rest.index("[[workers]]") :])
    (folder / "job").write_text(emit_slurm(read_cluster(folder / "pool.toml")))
    with running(folder, "bash", str(folder / "job")) as (process, output):
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as client:

            def ready() -> bool:
                assert process.poll() is None, output.read_text()
                try:
                    return client.get("/ready").status_code == 200
                except httpx.TransportError:
                    time.sleep(0.2)
                    return False

            assert until(ready, 300), output.read_text()
            body = {"model": "bundled", "prompt": "import os\n", "max_tokens": 4, "temperature": 0}
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, output.read_text()
