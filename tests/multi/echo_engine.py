"""`python echo_engine.py ADDRESS`: leases a worker, sends it a frame, and stays."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from echo_session import SPEC
from worker_talk import data_channel, echo

from lamina_jax.config import SecurityConfig
from lamina_jax.exchange.control import connect

(client,) = connect(sys.argv[1:], SecurityConfig())
lease = client.lease(SPEC)
channel = data_channel(client, lease.session_id)
print(echo(channel, b"leased").decode(), flush=True)
time.sleep(600)
