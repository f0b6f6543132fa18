"""Several compute hosts as processes of this machine, and the tiny model that they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_processes import SETTINGS, Process, ServeProcess, Start, flags, free_ports
from tiny_models import TINY

MODEL = replace(TINY, num_layers=2, num_kv_heads=4)


class FollowerProcess(Process):
    """A compute host that another one leads."""

    def __init__(self, checkpoint: str, attention: Sequence[str], *more: str) -> None:
        command = (sys.executable, "-m", "lamina_jax.serve", checkpoint, *flags(SETTINGS))
        super().__init__(*command, "--attention", ",".join(attention), *more)


class Hosts:
    """Compute hosts over workers: `server` leads `followers`."""

    def __init__(
        self,
        run: Start,
        checkpoint: str,
        attention: Sequence[str],
        num_hosts: int = 2,
        ids: Sequence[int] = (1,),
        more: Sequence[str] = (),
    ) -> None:
        coordinator = f"127.0.0.1:{free_ports(1)[0]}"
        self.flags = ("--coordinator", coordinator, "--num-hosts", str(num_hosts), *more)
        self.server: ServeProcess = run(ServeProcess, checkpoint, attention, *self.flags, "--host-id", "0")
        self.followers: list[FollowerProcess] = [
            run(FollowerProcess, checkpoint, attention, *self.flags, "--host-id", str(host)) for host in ids
        ]


class HostsOfEngines:
    """Two compute hosts in one JAX world, which run engines one after the other (host_of_engines.py)."""

    COUNT = 2

    def __init__(self, folder: Path) -> None:
        self._errors = [folder / f"host{i}" for i in range(self.COUNT)]
        self._processes: list[subprocess.Popen[str]] = []

    def answer(self, settings: dict[str, Any], batches: Any) -> dict[str, Any]:
        """What an engine of these settings answers; after a failure the next one has new processes."""
        place = {"coordinator": f"127.0.0.1:{free_ports(1)[0]}", "num_hosts": self.COUNT}
        line = json.dumps({"settings": settings | place, "batches": batches}) + "\n"
        try:
            processes = self._processes = self._processes or [self._start(i) for i in range(self.COUNT)]
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            answers = [json.loads(process.stdout.readline() or "{}") for process in processes]  # type: ignore[union-attr]
            assert "tokens" in answers[0], [answers, *(error.read_text()[-4000:] for error in self._errors)]
            assert answers[1:] == [{}]
        except BaseException:
            self.close()
            raise
        found: dict[str, Any] = answers[0]
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    def _start(self, host: int) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("host_of_engines.py")
        helpers = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with self._errors[host].open("w") as errors:
            return subprocess.Popen(
                [sys.executable, str(program), str(host)],
                env=helpers,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
