"""Small random models computed by transformers and torch, the outside reference. Imports no lamina_jax.

A case is a Hugging Face folder with `reference.npz` in it: for each prompt of LENGTHS, `prompt_i` and
`tokens_i` int32[length] and int32[64] (greedy), `logits_i` float32[up to 4, V] at the prompt's last
positions, and `gaps_i` float32[64]: by how much the chosen token's logit was the largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

LENGTHS = (3, 17, 70, 130)
LAST_POSITIONS = 4
NEW_TOKENS = 64
transformers.utils.logging.disable_progress_bar()

CLEAR_GAP = 2e-3
"""Seeds are tried until every choice is clearer than what a comparison may call a tie, 1e-3."""


def make_case(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A checkpoint of `config` with random weights, and what transformers makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for attempt in range(100):
        tensors = random_tensors(folder, seed + 1000 * attempt)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        reference = compute_reference(load(folder), seed)
        if min(float(reference[f"gaps_{i}"].min()) for i in range(len(LENGTHS))) > CLEAR_GAP:
            np.savez_compressed(folder / "reference.npz", **reference)
            return
    raise RuntimeError(f"{folder.name}: no seed without near-ties; change the model's size")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The folder's model as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def random_tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a size at which attention tells tokens apart, norms and biases that are not neutral."""
    config = transformers.AutoConfig.from_pretrained(folder)
    shapes = {
        name: parameter.shape
        for name, parameter in transformers.AutoModelForCausalLM.from_config(config).named_parameters()
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * values if name.endswith("norm.weight") else 0.3 * values
    return tensors


@torch.inference_mode()
def compute_reference(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Logits and greedy tokens, every step recomputed from the start, without a cache."""
    rng = np.random.default_rng(seed)
    reference: dict[str, np.ndarray] = {}
    for i, length in enumerate(LENGTHS):
        tokens = torch.from_numpy(rng.integers(0, model.config.vocab_size, size=(1, length)))
        reference[f"prompt_{i}"] = tokens[0].numpy().astype(np.int32)
        reference[f"logits_{i}"] = model(tokens).logits[0, -LAST_POSITIONS:].numpy()
        gaps = []
        for _ in range(NEW_TOKENS):
            best = model(tokens).logits[0, -1].topk(2)
            gaps.append(float(best.values[0] - best.values[1]))
            tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
        reference[f"tokens_{i}"] = tokens[0, length:].numpy().astype(np.int32)
        reference[f"gaps_{i}"] = np.array(gaps, np.float32)
    return reference
