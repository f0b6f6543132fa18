"""`python echo_worker.py FLAGS`: the attend command, with an echo for a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from echo_session import EchoSession

from lamina_jax.attend import parse, run

os._exit(run(*parse(None), EchoSession))
