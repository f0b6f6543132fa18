"""The server, with an engine's process over the fake model: `python fake_serve.py JSON`, settings of both."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from lamina_jax.config import ServerConfig
from lamina_jax.server.engine_host import EngineProcess
from lamina_jax.server.listener import listen

settings = {"start_seconds": 0.0, "step_seconds": 0.0} | json.loads(sys.argv[1])
fake = Path(__file__).with_name("fake_engine_process.py")
times = [str(settings.pop(name)) for name in ("start_seconds", "step_seconds")]
config = ServerConfig(port=0, **settings)
listener = listen(config)
engine = EngineProcess(None, command=[sys.executable, str(fake), *times])

from fake_server import tokenizer  # noqa: E402 - the engine starts beside what this imports

from lamina_jax.server.lifecycle import Server  # noqa: E402

sys.exit(asyncio.run(Server(engine, tokenizer, "fake", config).run(listener)))
