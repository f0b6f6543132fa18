"""The serve command as a process of a benchmark's own: started, waited for, measured, ended.

It knows the command's lines on stderr and `/ready`, and nothing of what is asked of the server.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 600.0
"""What loading and compiling may take."""

POLL_SECONDS = 0.1

END_SECONDS = 40.0
"""What the server may take to end, before it is killed."""


class ServerProcess:
    """`python -m lamina_jax.serve MODEL` on a free port of 127.0.0.1.

    Attributes:
        url: where it listens, once `wait_ready` has returned.
        lines: what it has said on stderr, with the seconds from its start.
    """

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "lamina_jax.serve", model, "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.url = ""
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until it serves.

        Raises:
            SystemExit: it has ended, or takes too long; with its last lines.
        """
        deadline = time.monotonic() + seconds
        while not (self._listening.is_set() and self._answers()):
            time.sleep(POLL_SECONDS)  # its start is not to be held up by our asking
            if (code := self.process.poll()) is not None:
                self._reader.join(5)
                raise SystemExit(f"the server has ended with exit code {code}:\n{self._said()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"the server is not ready after {seconds:.0f} s:\n{self._said()}")

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of the process that answers HTTP, and of those that it has started ("engine")."""
        server = self.process.pid
        return {"server": cpu_seconds(server), "engine": sum(map(cpu_seconds, descendants(server)))}

    def end(self) -> None:
        """Ask it to, then make it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_SECONDS)
        self._reader.join(5)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append((time.monotonic() - self.started, line))
                if found := re.match(r"listening on (http://\S+:\d+)", line):
                    self.url = found[1]
                    self._listening.set()

    def _answers(self) -> bool:
        with (
            suppress(urllib.error.URLError, TimeoutError),
            urllib.request.urlopen(f"{self.url}/ready", timeout=5),
        ):
            return True
        return False

    def _said(self) -> str:
        return "".join(line for _, line in self.lines[-20:])


@contextmanager
def serving(model: str, flags: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server that is ready, and ends with the block."""
    server = ServerProcess(model, flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 where there is no such process, or no /proc."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, children.read_text().split())
    return found + [grandchild for child in found for grandchild in descendants(child)]
