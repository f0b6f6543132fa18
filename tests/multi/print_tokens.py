"""`python print_tokens.py SETTINGS`: what an LLM of these settings (JSON) continues PROMPT with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "worker"))
sys.path.insert(0, str(TESTS / "engine"))

from real_processes import PROMPT, SETTINGS

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import SecurityConfig

options = json.loads(sys.argv[1])
security = SecurityConfig(**options.pop("security"))
llm = LLM(**SETTINGS, **options, security=security)
sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
(output,) = llm.generate([PROMPT], sampling)
print(output.outputs[0].token_ids)
