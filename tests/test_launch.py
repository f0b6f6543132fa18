"""The launcher with stand-ins for its processes: one output, one end, one exit code, and no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina_jax.command import SAME_SIGNAL_SECONDS
from lamina_jax.launch import is_here, main

CLUSTER = """
[hosts]
here = "127.0.0.1"
[engine]
host = "here"
{engine}
[engine.server]
drain_seconds = 0.5
[[workers]]
host = "here"
port = 7101
drain_seconds = 0.1
"""

LAUNCHER = """
import json, sys
from lamina_jax import launch
from lamina_jax.cluster.commands import commands
from dataclasses import replace

launch.MARGIN_SECONDS = 0.5
programs = json.loads(sys.argv[1])
launch.commands = lambda cluster: [
    replace(command, argv=(sys.executable, "-c", program))
    for command, program in zip(commands(cluster), programs, strict=True)
]
sys.exit(launch.main(["local", "--cluster", sys.argv[2]]))
"""

TELL = "import os, signal, sys, time\nprint('pid', os.getpid())\n"
WAIT = TELL + "time.sleep(60)\n"
DRAIN = (
    "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('drained'), sys.exit(0)))\n" + WAIT
)
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT


class Launched:
    """The launcher in the background, with these programs as its engine and its worker."""

    def __init__(self, folder: Path, *programs: str, engine: str = "") -> None:
        file = folder / "cluster.toml"
        file.write_text(CLUSTER.format(engine=engine))
        arguments = [json.dumps(programs), str(file)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []

    def read_until(self, condition: Callable[[], bool]) -> None:
        assert self.process.stdout is not None
        while not condition():
            line = self.process.stdout.readline()
            assert line, self.lines
            self.lines.append(line.decode().rstrip("\n"))

    def pids(self, count: int) -> list[int]:
        """The processes that have told their ids; waits for so many."""
        self.read_until(lambda: len(self._pids()) == count)
        return self._pids()

    def _pids(self) -> list[int]:
        return [int(line.split()[-1]) for line in self.lines if "| pid " in line]

    def end(self) -> int:
        """Wait for the launcher; its exit code."""
        out, _ = self.process.communicate(timeout=20)
        self.lines += out.decode(errors="replace").splitlines()
        return self.process.returncode

    def said(self, role: str) -> list[str]:
        prefix = f"{role:<8} | "
        return [line.removeprefix(prefix) for line in self.lines if line.startswith(prefix)]


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_output_comes_line_by_line_behind_its_role(tmp_path: Path) -> None:
    engine = (
        "import sys, time\n"
        "for i in range(20): print('line', i, file=(sys.stdout, sys.stderr)[i % 2])\n"
        "sys.stdout.buffer.write(b'half \\xff'); sys.stdout.flush(); time.sleep(0.3); print(' whole\\r')\n"
        "sys.stdout.write('x' * 200_000); sys.stdout.flush(); sys.exit(0)\n"
    )
    launched = Launched(tmp_path, engine, DRAIN)
    assert launched.end() == 0
    lines = launched.said("engine")
    assert lines[:21] == [*(f"line {i}" for i in range(20)), "half \ufffd whole"]
    assert "".join(lines[21:]) == "x" * 200_000
    assert all(
        line[:8].strip() in ("engine", "worker 0", "launch") and line[8:11] == " | "
        for line in launched.lines
    )


def test_an_error_ends_the_others_and_is_the_exit_code(tmp_path: Path) -> None:
    launched = Launched(tmp_path, DRAIN, "import time; time.sleep(0.5); raise SystemExit(7)")
    assert launched.end() == 7
    assert launched.said("launch") == ["worker 0 ended with exit code 7: ending the others"]
    assert launched.said("engine")[-1] == "drained"
    wait_until_gone(*launched.pids(1))


def test_a_process_ended_by_a_signal_counts_as_a_shell_counts(tmp_path: Path) -> None:
    launched = Launched(tmp_path, DRAIN, DRAIN)
    os.kill(launched.pids(2)[1], signal.SIGKILL)
    assert launched.end() == 128 + signal.SIGKILL
    assert any("ended by SIGKILL: ending the others" in line for line in launched.said("launch"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    launched = Launched(tmp_path, DRAIN, WAIT)  # one that has no handler of its own ends as well
    pids = launched.pids(2)
    launched.process.send_signal(number)
    assert launched.end() == 0
    assert launched.said("engine")[-1] == "drained"
    wait_until_gone(*pids)


def test_one_that_will_not_end_is_killed_after_the_grace(tmp_path: Path) -> None:
    launched = Launched(tmp_path, STUBBORN, DRAIN)
    pids = launched.pids(2)
    started = time.monotonic()
    launched.process.terminate()
    assert launched.end() == 128 + signal.SIGKILL
    assert 1.0 <= time.monotonic() - started < 5  # drain_seconds, and the margin
    wait_until_gone(*pids)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    launched = Launched(tmp_path, STUBBORN, DRAIN)
    launched.pids(2)
    started = time.monotonic()
    launched.process.terminate()
    launched.read_until(lambda: bool(launched.said("launch")))
    time.sleep(SAME_SIGNAL_SECONDS)
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == 128 + signal.SIGKILL
    assert time.monotonic() - started < 1


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    slow = DRAIN.replace("(print(", "(time.sleep(0.5), print(")
    launched = Launched(tmp_path, slow, DRAIN)
    launched.pids(2)
    launched.process.terminate()
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == 0
    assert launched.said("engine")[-1] == "drained"


def test_a_launcher_that_is_killed_leaves_no_orphan(tmp_path: Path) -> None:
    launched = Launched(tmp_path, STUBBORN, DRAIN)
    pids = launched.pids(2)
    launched.process.kill()
    launched.process.wait(5)
    wait_until_gone(*pids)
    launched.process.communicate(timeout=5)


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {WAIT!r}])\n" + DRAIN
    launched = Launched(tmp_path, child, DRAIN)
    pids = launched.pids(3)
    launched.process.terminate()
    assert launched.end() == 0
    wait_until_gone(*pids)


def test_nobody_reads(tmp_path: Path) -> None:
    chatty = TELL + "while True: print('more'); time.sleep(0.05)\n"
    launched = Launched(tmp_path, chatty, chatty)
    pids = launched.pids(2)
    assert launched.process.stdout is not None
    launched.process.stdout.close()
    assert launched.process.wait(10) == 0
    wait_until_gone(*pids)


def test_cores_and_environment(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    tell = "import os; print(os.sched_getaffinity(0), os.environ['GREETING'])"
    extra = f'cores = "{core}"\nenvironment = {{ GREETING = "hello you" }}'
    launched = Launched(tmp_path, tell, DRAIN, engine=extra)
    assert launched.end() == 0
    assert launched.said("engine") == [f"{{{core}}} hello you"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("127.0.0.1", "192.0.2.1", ["hosts.here", "192.0.2.1", "127.0.0.1"]),
        ("port = 7101", 'port = 7101\ncores = "4095"', ["workers[0].cores", "4095", "0"]),
        ("port = 7101", "prot = 7101", ["workers[0].prot"]),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, words: list[str]
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER.format(engine="").replace(old, new))
    assert main(["local", "--cluster", str(file)]) == 1
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert not out
    for word in words:
        assert word in line


def test_a_wrong_flag_or_place_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["mars"], ["local", "--clustr", "x"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
        (_,) = capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no.such.invalid", False)],
)
def test_whose_address_it_is(address: str, here: bool) -> None:
    assert is_here(address) == here
