"""Becomes the parent of another program, which ends when this one's standard input does.

`python -m lamina_jax.cluster.tether --grace SECONDS [--cores 0-3] -- PROGRAM ARGUMENT ...` (Linux)

Whoever started it over a network, through ssh, holds the other end: it hangs up, dies, or is cut off, and the
program gets SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """Run a program; its exit code as a shell counts it: 128 + n where signal n ended it, 0 if that was the
    SIGTERM that it was sent."""
    parser = argparse.ArgumentParser(prog="python -m lamina_jax.cluster.tether", description=__doc__)
    parser.add_argument("--grace", type=float, required=True, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--cores", help="run on these cores only")
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(argv)
    # This thread starts it: what is to die with its parent dies with the thread that started it.
    process = subprocess.Popen(
        [*_pinned(options.cores), "--", *options.program], stdin=subprocess.DEVNULL, process_group=0
    )
    hung_up = threading.Event()

    def hang_up(number: int, frame: FrameType | None) -> None:
        hung_up.set()

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hang_up)
    threading.Thread(target=_read_all, args=(hung_up,), daemon=True).start()
    threading.Thread(target=_end, args=(process, hung_up, options.grace), daemon=True).start()
    code = process.wait()
    _signal(process, signal.SIGKILL)  # what it has started, too
    if hung_up.is_set() and code == -signal.SIGTERM:
        return 0
    return code if code >= 0 else 128 - code


def _pinned(cores: str | None) -> list[str]:
    pinned = [sys.executable, "-m", "lamina_jax.cluster.pin", "--parent", str(os.getpid())]
    return pinned if cores is None else [*pinned, "--cores", cores]


def _read_all(hung_up: threading.Event) -> None:
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1 << 16):
            pass
    hung_up.set()


def _end(process: subprocess.Popen[bytes], hung_up: threading.Event, grace: float) -> None:
    hung_up.wait()
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To it alone where it may end in order, to all that it has started where it may not."""
    with suppress(ProcessLookupError):
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
