"""Workers of this process, with an echo for a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from echo_session import EchoSession
from worker_talk import StartWorker

from lamina_jax.config import AttendConfig, SecurityConfig
from lamina_jax.exchange.control import WorkerClient
from lamina_jax.worker.server import WorkerServer


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Starts a worker in this process; its fields, `security` and the engine's `client_security`."""
    with ExitStack() as stack:

        def start(
            security: SecurityConfig | None = None,
            client_security: SecurityConfig | None = None,
            **fields: object,
        ) -> tuple[WorkerServer, WorkerClient]:
            config = AttendConfig(**{"listen": "127.0.0.1:0", "devices": "cpu:0-1", **fields})
            security = security or SecurityConfig()
            server = stack.enter_context(closing(WorkerServer(config, security, EchoSession)))
            server.start()
            client = WorkerClient(f"127.0.0.1:{server.port}", client_security or security)
            return server, stack.enter_context(closing(client))

        yield start
