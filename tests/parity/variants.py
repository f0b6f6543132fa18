"""The bundled model's weights as a model of each family: trained, so that its logits tell tokens apart.

Random weights give so many near-ties that bfloat16 cannot be judged by the best token. What a family has
beside Llama's tensors (biases, head norms) is drawn small. Imports no jax and no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

BUNDLED = Path(__file__).parent.parent.parent / "lamina_jax" / "data" / "bundled"

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 100},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 2,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}
"""What config.json says of each family, beside its sizes."""


def save_variant(family: str, folder: Path) -> None:
    """A checkpoint in bfloat16."""
    bundled = json.loads((BUNDLED / "config.json").read_text())
    sizes = {key: value for key, value in bundled.items() if not key.endswith("_bias")}
    config = sizes | {"model_type": family} | VARIANTS[family]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(BUNDLED / "model.safetensors")
    rng = np.random.default_rng(0)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn"
        if family == "qwen2":
            for which in "qkv":
                size = len(tensors[f"{name}.{which}_proj.weight"])
                tensors[f"{name}.{which}_proj.bias"] = bfloat16(0.1 * rng.normal(size=size))
        if family == "qwen3":
            for which in "qk":
                values = 2 + 0.2 * rng.normal(size=config["head_dim"])
                tensors[f"{name}.{which}_norm.weight"] = bfloat16(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16)
