"""The column `transformers` of `bench decode`: torch and transformers, in a process of its own.

`python -P transformers_worker.py SETTINGS` (JSON: `model`, a folder, and `dtype`) prints "ready" and then,
for every line {"steps": n, "batch": b, "context": c} that it reads, what so many decode steps took as a line
of JSON. It is run by its path, by whichever Python has torch and transformers, and imports no lamina_jax.

Greedy steps in inference mode, attention by torch's `scaled_dot_product_attention`, a cache of random values
with `context` tokens of each request; threads as torch chooses them. Both of transformers' caches are tried
at each batch and context, and the faster is timed and named.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

ROOM = 8
"""A cache is put back to its context after so many steps; this is not timed."""

TRIED_STEPS = 2


def main() -> None:
    settings = json.loads(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, attn_implementation="sdpa"
    ).eval()
    print("ready", flush=True)
    cell, decoder = None, None
    for line in sys.stdin:
        asked = json.loads(line)
        if decoder is None or cell != (asked["batch"], asked["context"]):
            cell, decoder = (asked["batch"], asked["context"]), None  # the old cache is freed first
            decoder = fastest(model, *cell)
        print(json.dumps(decoder.run(asked["steps"])), flush=True)


class Decoder:
    """Decodes `batch` requests with `context` cached tokens each, over one kind of cache ("dynamic", which
    is transformers' default, or "static")."""

    def __init__(self, model: Any, kind: str, batch: int, context: int) -> None:
        self._model, self._kind, self._context = model, kind, context
        config = model.config
        self._cache = (
            DynamicCache(config=config)
            if kind == "dynamic"
            else StaticCache(config=config, max_cache_len=context + ROOM)
        )
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=model.dtype) for _ in "kv")
            self._cache.update(k, v, layer)
        self._tokens, self._grown = torch.zeros((batch, 1), dtype=torch.long), 0

    @torch.inference_mode()
    def run(self, steps: int) -> dict[str, Any]:
        """Tokens/s, seconds and CPUs used of so many steps."""
        seconds, cpu = 0.0, 0.0
        for _ in range(steps):
            if self._grown == ROOM:
                self._rewind()
            started = time.perf_counter(), time.process_time()
            output = self._model(input_ids=self._tokens, past_key_values=self._cache, use_cache=True)
            self._tokens = output.logits[:, -1:].argmax(dim=-1)
            seconds += time.perf_counter() - started[0]
            cpu += time.process_time() - started[1]
            self._grown += 1
        return {
            "tokens_per_second": len(self._tokens) * steps / seconds,
            "seconds": seconds,
            "steps": steps,
            "cpus": cpu / seconds,
            "cache": self._kind,
        }

    def _rewind(self) -> None:
        """The cache as it was with `context` tokens, one layer after the other."""
        for index, layer in enumerate(self._cache.layers):
            k, v = (x[:, :, : self._context].clone() for x in (layer.keys, layer.values))
            layer.reset()
            self._cache.update(k, v, index)
        self._grown = 0


def fastest(model: Any, batch: int, context: int) -> Decoder:
    """A decoder over the kind of cache that is faster here."""
    seconds = {}
    for kind in ("dynamic", "static"):
        decoder = Decoder(model, kind, batch, context)
        decoder.run(1)
        seconds[kind] = decoder.run(TRIED_STEPS)["seconds"]
        del decoder
    return Decoder(model, min(seconds, key=lambda kind: seconds[kind]), batch, context)


if __name__ == "__main__":
    main()
