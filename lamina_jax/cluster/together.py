"""Runs commands on this machine as one: one output, one end, one exit code. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from lamina_jax.cluster.commands import Command
from lamina_jax.command import SAME_SIGNAL_SECONDS

COLOURS = (36, 32, 33, 35, 34, 31)
LONGEST_LINE = 1 << 16
LAST_WORDS_SECONDS = 1.0
"""For output that is still in the pipes when a process has ended."""


def run_together(commands: Sequence[Command], grace_seconds: float, out: TextIO = sys.stdout) -> int:
    """Run all commands until one of them ends, or a signal comes; then end the others.

    They get SIGTERM, or the end of their standard input; after `grace_seconds` or at a second signal SIGKILL;
    and SIGKILL if this process dies.
    What they print goes to `out` line by line, behind the name of the role.

    Returns:
        The first exit code that is not 0, as a shell counts (128 + n where signal n ended a process).
    """
    return asyncio.run(_Together(commands, grace_seconds, out).run())


class _Together:
    def __init__(self, commands: Sequence[Command], grace_seconds: float, out: TextIO) -> None:
        self._commands, self._grace_seconds, self._out = commands, grace_seconds, out
        self._coloured = out.isatty() and "NO_COLOR" not in os.environ
        self._roles = ["launch", *(command.role for command in commands)]
        self._processes: dict[str, Process] = {}
        self._code = 0
        self._stopped: float | None = None
        self._told, self._hurry = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        try:
            for command in self._commands:
                self._processes[command.role] = await _start(command)
            lives = [asyncio.create_task(self._follow(role, p)) for role, p in self._processes.items()]
            await self._told.wait()
            await self._end(lives)
        finally:
            self._kill()
        return self._code

    def _stop(self) -> None:
        """A signal came."""
        now = asyncio.get_running_loop().time()
        if self._stopped is None:
            self._stopped = now
            self._print("launch", "ending; a second signal ends at once")
        elif now > self._stopped + SAME_SIGNAL_SECONDS:
            self._hurry.set()
        self._told.set()

    async def _follow(self, role: str, process: Process) -> None:
        """Pass a process's output through, and note its end."""
        output = asyncio.create_task(self._pass_on(role, process))
        code = await process.wait()
        # A process of its own may hold its output open for longer.
        await asyncio.wait([output], timeout=LAST_WORDS_SECONDS)
        output.cancel()
        told = self._told.is_set()
        self._told.set()
        if told and code in (0, -signal.SIGTERM):
            return
        self._print("launch", f"{role} ended{_how(code)}" + ("" if told else ": ending the others"))
        self._code = self._code or (code if code >= 0 else 128 - code)

    async def _pass_on(self, role: str, process: Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(LONGEST_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._print(role, line.decode(errors="replace").rstrip("\r"))
        if rest:
            self._print(role, rest.decode(errors="replace"))

    async def _end(self, lives: Sequence[asyncio.Task[None]]) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                if process.stdin is None:
                    process.terminate()
                else:
                    process.stdin.close()
        hurry = asyncio.create_task(self._hurry.wait())
        ended = asyncio.create_task(asyncio.wait(lives))
        await asyncio.wait({hurry, ended}, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        self._kill()
        await ended
        hurry.cancel()

    def _kill(self) -> None:
        """Each with the processes that it has started."""
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _print(self, role: str, line: str) -> None:
        prefix = f"{role:<{max(map(len, self._roles))}} |"
        if self._coloured:
            prefix = f"\033[{COLOURS[self._roles.index(role) % len(COLOURS)]}m{prefix}\033[0m"
        try:
            print(prefix, line, file=self._out, flush=True)
        except BrokenPipeError:  # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
            self._told.set()


async def _start(command: Command) -> Process:
    pinned = [sys.executable, "-m", "lamina_jax.cluster.pin", "--parent", str(os.getpid())]
    if command.cores is not None:
        pinned += ["--cores", command.cores]
    return await asyncio.create_subprocess_exec(
        *pinned,
        "--",
        *command.argv,
        stdin=PIPE if command.ends_with_input else DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.environment,
        process_group=0,  # Ctrl-C is for this process, which ends the others in order
    )


def _how(code: int) -> str:
    return f" with exit code {code}" if code >= 0 else f" by {signal.Signals(-code).name}"
