"""An engine's process over the fake model: `python fake_engine_process.py START_SECONDS STEP_SECONDS FD`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

from fake_server import FakeEngine, GatedRunner

from lamina_jax.hosts.alarm import Alarm
from lamina_jax.server.engine_process import run

start_seconds, step_seconds = map(float, sys.argv[1:3])


def start(report: Callable[[str, int, int], None]) -> None:
    report("compiling", 1, 9)
    time.sleep(start_seconds)


runner = GatedRunner()
runner.step_seconds = step_seconds
run(FakeEngine(runner=runner, before=start).build, socket.socket(fileno=int(sys.argv[3])), Alarm())
