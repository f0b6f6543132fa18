"""What ends when its standard input does, as ssh's connection ends it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

TETHER = (sys.executable, "-m", "lamina_jax.cluster.tether", "--grace", "0.3", "--", sys.executable, "-c")
WAIT = "import signal, sys, time\n{}\nprint('up', flush=True)\ntime.sleep(60)"
DRAIN = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
FAIL = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def start(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*TETHER, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("first", "code"), [("", 0), (DRAIN, 0), (FAIL, 3), (STUBBORN, 128 + signal.SIGKILL)]
)
@pytest.mark.parametrize("hang_up", [True, False])
def test_a_program_ends_with_the_input_or_by_a_signal(first: str, code: int, hang_up: bool) -> None:
    with start(WAIT.format(first)) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        process.stdin.close() if hang_up else process.send_signal(signal.SIGHUP)
        assert process.wait(20) == code


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_program_that_ends_by_itself_has_its_own_code(program: str, code: int) -> None:
    with start(program) as process:
        assert process.wait(20) == code
