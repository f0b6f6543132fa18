"""The row `transformers` of `bench perplexity`: windows of tokens scored by torch and transformers.

`python -P transformers_perplexity.py SETTINGS` (JSON: `model`, a folder, and `dtype`) reads windows from
stdin, a JSON list of [tokens, counted], and prints {"nll": sum over the counted tokens in nats, "seconds"}.
It is run by its path, by whichever Python has torch and transformers, and imports no lamina_jax.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    settings = json.loads(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
    windows = json.load(sys.stdin)
    started, total = time.perf_counter(), 0.0
    for tokens, counted in windows:
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids).logits[0, -counted - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, -counted:], reduction="sum").item()
    print(json.dumps({"nll": total, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
