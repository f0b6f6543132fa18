"""What transformers makes, in float32 and in bfloat16, of text that a variant of the bundled model writes.

For each family: `tokens` uint16[16, 256], sampled at temperature 1; of every position's float32 logits the
best id `best` uint16, its logit `top` float32 and its lead over the second `gap` float16; and the share of
positions where transformers' own bfloat16 has the same best id, `agreement`. Imports no lamina_jax.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from reference import load
from variants import VARIANTS, save_variant

TEXTS, LENGTH = 16, 256


def save_references(file: Path) -> None:
    arrays = {}
    for family in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            save_variant(family, Path(folder))
            for key, values in compute(Path(folder)).items():
                arrays[f"{family}_{key}"] = values
    np.savez_compressed(file, **arrays)


@torch.inference_mode()
def compute(folder: Path) -> dict[str, np.ndarray]:
    model = load(folder)
    tokens = sample(model)
    best = model(tokens).logits.topk(2)
    ids, values = best.indices[..., 0], best.values
    own = load(folder, torch.bfloat16)(tokens).logits.argmax(-1)
    return {
        "tokens": tokens.numpy().astype(np.uint16),
        "best": ids.numpy().astype(np.uint16),
        "top": values[..., 0].numpy(),
        "gap": (values[..., 0] - values[..., 1]).numpy().astype(np.float16),
        "agreement": (own == ids).double().mean().numpy(),
    }


def sample(model: torch.nn.Module) -> torch.Tensor:
    """int64[TEXTS, LENGTH], each begun by token 0."""
    rng = np.random.default_rng(0)
    tokens = last = torch.zeros((TEXTS, 1), dtype=torch.int64)
    cache = None
    for _ in range(LENGTH - 1):
        out = model(last, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        sums = out.logits[:, -1].double().softmax(-1).cumsum(-1)
        drawn = torch.from_numpy(rng.random((TEXTS, 1))) * sums[:, -1:]
        last = torch.searchsorted(sums, drawn, right=True)
        tokens = torch.cat([tokens, last], dim=1)
    return tokens
