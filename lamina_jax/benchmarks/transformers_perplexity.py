"""The row `transformers` of `bench perplexity`: windows of tokens scored by torch and transformers.

`python -P transformers_perplexity.py SETTINGS` (JSON: `model`, a folder, and `dtype`) prints "ready" and
then, for every line {"tokens": [ids], "counted": n} that it reads, a line {"nll": sum over the last n of the
tokens in nats, "seconds"}. It is run by its path, by whichever Python has torch and transformers, and imports
no lamina_jax.
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
    print("ready", flush=True)
    for line in sys.stdin:
        window = json.loads(line)
        started, counted, ids = time.perf_counter(), window["counted"], torch.tensor([window["tokens"]])
        logits = model(input_ids=ids).logits[0, -counted - 1 : -1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, -counted:], reduction="sum").item()
        print(json.dumps({"nll": nll, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
