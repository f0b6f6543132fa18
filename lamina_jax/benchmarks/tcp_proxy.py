"""A TCP proxy that is a worse network: it delays, throttles, stalls and cuts. Linux only.

`Proxy` runs it in a process of its own, so that it takes no turns with the threads of whoever measures.
It knows nothing of what passes: bytes go through a kernel pipe (splice) and are never copied to Python.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from time import monotonic

PIPE_BYTES = 1 << 20
"""At most so much of one direction of a connection is on its way: in 10 ms of delay, 100 MB/s."""

MOST_AT_ONCE, LEAST_AT_ONCE = 1 << 16, 1 << 11

WAKING_SECONDS = 1e-4
"""The kernel wakes a sleeper about so late; the last of a wait is spent awake."""

_TURNS = 8  # of one flow before the others have theirs
_START_SECONDS = 20.0


class Proxy:
    """Passes connections to `listen` on to `target`, in a process of its own.

    Args:
        listen: "host:port"; port 0 takes any free one.
        target: "host:port"; a connection that it does not take is closed.
        delay_seconds: what every byte takes, each way.
        bytes_per_second: of all connections together, each way.
    """

    def __init__(
        self, listen: str, target: str, delay_seconds: float = 0.0, bytes_per_second: float = math.inf
    ) -> None:
        self._arguments = [listen, target, str(delay_seconds), str(bytes_per_second)]

    def start(self) -> tuple[str, int]:
        """Listen; the address.

        Raises:
            RuntimeError: it cannot listen there.
        """
        command = [sys.executable, "-m", __name__, *self._arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._answer()

    def stall(self) -> None:
        """No byte passes until `resume`; connections are still taken."""
        self._say("stall")

    def resume(self) -> None:
        """Bytes pass again, those that were held first."""
        self._say("resume")

    def cut(self) -> None:
        """Reset all connections, wherever in a message they are; new ones are taken."""
        self._say("cut")

    def close(self) -> None:
        """End the process, and with it all connections."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _say(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        self._answer()

    def _answer(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], _START_SECONDS)[0]:
            host, _, port = self._process.stdout.readline().rpartition(":")
            if port:
                return host, int(port)
        self.close()
        raise RuntimeError(f"the proxy has ended: {' '.join(self._arguments)}")


class Link:
    """One direction of the network.

    Args:
        delay: in seconds.
        rate: bytes per second; infinity: it takes no time to send.
    """

    def __init__(self, delay: float, rate: float) -> None:
        self._delay, self._rate, self._free_at = delay, rate, 0.0
        # A millisecond's worth, so that what is small does not wait for what comes behind it.
        self.at_once = int(min(max(rate / 1000, LEAST_AT_ONCE), MOST_AT_ONCE))

    def due(self, size: int) -> float:
        """When `size` bytes that came now leave it."""
        self._free_at = max(self._free_at, monotonic()) + size / self._rate
        return self._free_at + self._delay


class Flow:
    """One direction of a connection: bytes in a pipe, which leave it when they are due."""

    def __init__(self, source: socket.socket, target: socket.socket, link: Link) -> None:
        self.source, self.target, self._link = source, target, link
        self._out, self._in = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._held: deque[tuple[float, int]] = deque()  # when due, how many bytes
        self._ended = self.full = self.blocked = self.over = False

    @property
    def reads(self) -> bool:
        """Whether it takes more from its source."""
        return not (self._ended or self.full)

    @property
    def due(self) -> float:
        """When something leaves it next, if its target takes it."""
        return self._held[0][0] if self._held else math.inf

    def take(self) -> None:
        """What has come from the source. Raises OSError where the connection is broken."""
        source, most = self.source.fileno(), self._link.at_once
        for turn in range(_TURNS):
            try:
                size = os.splice(source, self._in, most, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                self.full = turn == 0 and bool(self._held)
                return
            if not size:
                self._ended = True
                return
            self._held.append((self._link.due(size), size))

    def give(self) -> None:
        """All that is due. Raises OSError where the connection is broken."""
        self.blocked = False
        now = monotonic()
        while self._held and self._held[0][0] <= now:
            due, size = self._held[0]
            try:
                sent = os.splice(self._out, self.target.fileno(), size, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                self.blocked = True
                return
            self.full = False
            if sent == size:
                self._held.popleft()
            else:
                self._held[0] = (due, size - sent)
        if self._ended and not self._held and not self.over:
            self.over = True
            self.target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)


class Loop:
    """All connections, in one thread.

    Args:
        up, down: from the clients to `target`, and back.
    """

    def __init__(self, listener: socket.socket, target: tuple[str, int], up: Link, down: Link) -> None:
        self._listener, self._target, self._up, self._down = listener, target, up, down
        self._connections: list[tuple[Flow, Flow]] = []
        self._stalled = False

    def run(self) -> None:
        """Pass bytes on, and do what is said on stdin, until that ends."""
        while True:
            flows = [] if self._stalled else [flow for pair in self._connections for flow in pair]
            reading = [flow for flow in flows if flow.reads]
            blocked = [flow for flow in flows if flow.blocked]
            next_due = min((flow.due for flow in flows if not flow.blocked), default=math.inf)
            readable, writable, _ = select.select(
                [sys.stdin, self._listener, *(flow.source for flow in reading)],
                [flow.target for flow in blocked],
                [],
                None if next_due == math.inf else max(0.0, next_due - monotonic() - WAKING_SECONDS),
            )
            if sys.stdin in readable and not self._obey(sys.stdin.readline().strip()):
                return
            if self._listener in readable:
                self._accept()
            for pair in [] if self._stalled else list(self._connections):
                self._pass_on(pair, readable, writable)

    def _pass_on(
        self, pair: tuple[Flow, Flow], readable: Sequence[object], writable: Iterable[object]
    ) -> None:
        try:
            for flow in pair:
                if flow.reads and flow.source in readable:
                    flow.take()
                if not flow.blocked or flow.target in writable:
                    flow.give()
        except OSError:
            self._drop(pair)
        if all(flow.over for flow in pair):
            self._drop(pair)

    def _obey(self, command: str) -> bool:
        match command:
            case "stall" | "resume":
                self._stalled = command == "stall"
            case "cut":
                for pair in list(self._connections):
                    self._drop(pair)
            case _:
                return False
        self.tell()
        return True

    def tell(self) -> None:
        """Where it listens, which also says that a command is done."""
        print("{}:{}".format(*self._listener.getsockname()[:2]), flush=True)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=2.0)
        except OSError:
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append((Flow(client, server, self._up), Flow(server, client, self._down)))

    def _drop(self, pair: tuple[Flow, Flow]) -> None:
        """End a connection; with a reset where something of it is still on its way."""
        if pair not in self._connections:
            return
        self._connections.remove(pair)
        for flow in pair:
            if not all(flow.over for flow in pair):
                with suppress(OSError):
                    flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            flow.source.close()
            flow.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Be the process: it listens, and takes "stall", "resume" and "cut" as lines on stdin."""
    listen, target, delay, rate = sys.argv[1:]
    up, down = (Link(float(delay), float(rate)) for _ in range(2))
    try:
        listener = socket.create_server(_address(listen))
    except OSError as error:
        sys.exit(f"error: {error}")
    with listener:
        loop = Loop(listener, _address(target), up, down)
        loop.tell()
        loop.run()


if __name__ == "__main__":
    main()
