"""`python print_tokens.py JSON`: an LLM continues a prompt; {prompt, max_tokens, security, settings}."""

from __future__ import annotations

import json
import sys

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import SecurityConfig

told = json.loads(sys.argv[1])
llm = LLM(**told["settings"], security=SecurityConfig(**told["security"]))
sampling = SamplingParams(max_tokens=told["max_tokens"], temperature=0, ignore_eos=True)
(output,) = llm.generate([told["prompt"]], sampling)
print(output.outputs[0].token_ids)
