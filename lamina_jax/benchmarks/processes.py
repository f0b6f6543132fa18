"""Our commands as processes of a benchmark's own: started, waited for, measured, ended.

It knows their lines on stderr and the server's `/ready`, and nothing of what is asked of them.
"""

from __future__ import annotations

import json
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
from typing import Any, TypeVar

START_SECONDS = 600.0
"""What loading and compiling may take."""

ANSWER_SECONDS = 300.0
POLL_SECONDS = 0.1

END_SECONDS = 40.0
"""What a process may take to end, before it is killed."""


P = TypeVar("P", bound="Process")


class Process:
    """A command that is ready at once, or as subclasses say.

    Args:
        cores: those that it runs on ("0-1"), so that XLA sees no others; None: all.
        cache: a folder for compiled programs; None: where they always are.

    Attributes:
        lines: what it has said on stderr, with the seconds from its start.
    """

    def __init__(self, command: Sequence[str], cores: str | None = None, cache: Path | None = None) -> None:
        self._name, self.lines = " ".join(command), list[tuple[float, str]]()
        self.process = subprocess.Popen(
            pinned(command, cores),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=with_cache(cache),
        )
        self.started = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ready(self) -> bool:
        """Whether it does what it is for."""
        return True

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until it is `ready`.

        Raises:
            SystemExit: it has ended, or takes too long; with its last lines.
        """
        deadline = time.monotonic() + seconds
        while not self.ready():
            time.sleep(POLL_SECONDS)  # its start is not to be held up by our asking
            if (code := self.process.poll()) is not None:
                self._reader.join(5)
                raise SystemExit(f"{self._name} has ended with exit code {code}:\n{self._said()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._name} is not ready after {seconds:.0f} s:\n{self._said()}")

    def end(self) -> None:
        """Ask it to, then make it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_SECONDS)
        self._reader.join(5)

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first line that matches."""
        return next((found for _, line in list(self.lines) if (found := re.search(pattern, line))), None)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append((time.monotonic() - self.started, line))

    def _said(self) -> str:
        return "".join(line for _, line in self.lines[-20:])


@contextmanager
def running(process: P) -> Iterator[P]:
    """The process, ready; it ends with the block."""
    try:
        process.wait_ready()
        yield process
    finally:
        process.end()


class Listening(Process):
    """An attention worker or a prefill host on 127.0.0.1, ready when it listens.

    Attributes:
        port, data_port: where.
    """

    port = data_port = 0

    def ready(self) -> bool:
        found = self.find(r"listening on .+ \(port (\d+), data port (\d+)\)")
        if found:
            self.port, self.data_port = map(int, found.groups())
        return found is not None


class ServerProcess(Process):
    """`python -m lamina_jax.serve MODEL` on a free port of 127.0.0.1.

    Attributes:
        url: where it listens, once it is ready.
    """

    url = ""

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        super().__init__([sys.executable, "-m", "lamina_jax.serve", model, "--port", "0", *flags])

    def ready(self) -> bool:
        found = self.find(r"listening on (http://\S+:\d+)")
        if found is not None:
            self.url = found[1]
            with suppress(urllib.error.URLError, TimeoutError):
                urllib.request.urlopen(f"{self.url}/ready", timeout=5).close()
                return True
        return False

    def fetch(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a GET, or a POST of `body`, gives."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of the process that answers HTTP, and of those that it has started ("engine")."""
        server = self.process.pid
        return {"server": cpu_seconds(server), "engine": sum(map(cpu_seconds, descendants(server)))}


def attend_command(memory_fraction: float) -> list[str]:
    """What starts an attention worker with one device, on any port."""
    listen = ["--listen", "127.0.0.1:0", "--devices", "cpu:0", "--memory-fraction", str(memory_fraction)]
    return [sys.executable, "-m", "lamina_jax.attend", *listen]


def pinned(command: Sequence[str], cores: str | None) -> list[str]:
    """`command` on some cores only; ends with this process."""
    if cores is None:
        return [*command]
    pin = [sys.executable, "-m", "lamina_jax.cluster.pin", "--parent", str(os.getpid()), "--cores", cores]
    return [*pin, "--", *command]


def with_cache(folder: Path | None) -> dict[str, str]:
    """The environment in which compiled programs are kept in `folder`; None: where they always are."""
    return {**os.environ} | ({} if folder is None else {"JAX_COMPILATION_CACHE_DIR": str(folder)})


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
