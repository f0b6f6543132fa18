"""Several compute hosts as processes of this machine, and the tiny model that they share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

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
