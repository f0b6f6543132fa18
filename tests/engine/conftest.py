"""Attention workers for tests of engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from lamina_jax.config import AttendConfig, SecurityConfig
from lamina_jax.worker.server import WorkerServer
from lamina_jax.worker.transfer import session_for


@pytest.fixture
def workers() -> Iterator[Callable[..., str]]:
    """Starts workers of this process, all on the same devices, so that a program is compiled once; or
    `apart`, each on its own: a device runs programs in the order in which they were queued, and workers
    that are ahead of it would wait for each other."""
    with ExitStack() as stack:

        def start(count: int, devices: int = 1, *, apart: bool = False) -> str:
            addresses = []
            for i in range(count):
                first = 1 + i * devices if apart else 1
                config = AttendConfig(listen="127.0.0.1:0", devices=f"cpu:{first}-{first + devices - 1}")
                server = stack.enter_context(closing(WorkerServer(config, SecurityConfig(), session_for)))
                server.start()
                addresses.append(f"127.0.0.1:{server.port}")
            return ",".join(addresses)

        yield start
