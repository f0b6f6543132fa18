"""Makes tests/fixtures/parity anew: `make test-parity` runs it, in an environment with torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from reference import make_case
from reference_bfloat16 import save_references
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "parity"

COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **COMMON}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **COMMON}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **COMMON}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **COMMON}


def heads(query: int, kv: int, head_dim: int | None = None) -> dict[str, int]:
    """Head counts; without a head_dim it is hidden_size / query."""
    counts = {"num_attention_heads": query, "num_key_value_heads": kv}
    return counts if head_dim is None else {**counts, "head_dim": head_dim}


def sizes(vocab: int, hidden: int, inner: int) -> dict[str, int]:
    return {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner}


# Keys as transformers 5 writes them ("dtype", "rope_parameters") and as those before it did.
CASES: dict[str, dict[str, Any]] = {
    "llama_theta": LLAMA
    | sizes(131, 48, 40)
    | heads(6, 2)
    | {"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama_linear": LLAMA
    | sizes(150, 40, 36)
    | heads(5, 1)
    | {"torch_dtype": "float32", "tie_word_embeddings": True, "num_hidden_layers": 3}
    | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3_scaling": LLAMA
    | sizes(128, 48, 32)
    | heads(4, 4)
    | {"torch_dtype": "float32", "tie_word_embeddings": True, "rope_theta": 500.0}
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama_biases": LLAMA
    | sizes(129, 48, 24)
    | heads(6, 3, 10)
    | {"torch_dtype": "float32", "attention_bias": True, "mlp_bias": True},
    "qwen3_tied": QWEN3
    | sizes(157, 40, 36)
    | heads(4, 2, 16)
    | {
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "qwen3_untied": QWEN3
    | sizes(128, 40, 20)
    | heads(5, 1, 12)
    | {"dtype": "float32", "num_hidden_layers": 3}
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}},
    "mistral_window": MISTRAL
    | sizes(131, 48, 24)
    | heads(4, 2)
    | {"torch_dtype": "float32", "sliding_window": 12, "rope_theta": 10000.0},
    "mistral_head_dim": MISTRAL
    | sizes(133, 40, 28)
    | heads(4, 1, 16)
    | {"dtype": "float32", "sliding_window": None}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "qwen2_tied": QWEN2
    | sizes(149, 48, 24)
    | heads(6, 2)
    | {"torch_dtype": "float32", "tie_word_embeddings": True, "rope_theta": 1000000.0}
    | {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
    "qwen2_untied": QWEN2
    | sizes(127, 40, 20)
    | heads(4, 4)
    | {"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "qwen2_window": QWEN2
    | sizes(129, 40, 20)
    | heads(2, 1)
    | {"torch_dtype": "float32", "rope_theta": 10000.0, "num_hidden_layers": 3}
    | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
}

SHARDED = "llama_linear"
"""The case whose weights are in two files and an index."""


def shard(folder: Path) -> None:
    """model.safetensors into two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "model.safetensors").unlink()


def make_all(fixtures: Path) -> None:
    """Every case, beside the present ones, which they replace when all are made."""
    with tempfile.TemporaryDirectory(dir=fixtures.parent) as folder:
        made = Path(folder, fixtures.name)
        for number, (name, config) in enumerate(CASES.items()):
            make_case(made / name, config, seed=number)
            print(f"made {name}")
        shard(made / SHARDED)
        save_references(made / "bfloat16.npz")
        shutil.rmtree(fixtures, ignore_errors=True)
        made.rename(fixtures)


if __name__ == "__main__":
    # One thread gives the same sums on every machine, and on a small model is the fastest.
    torch.set_num_threads(1)
    make_all(FIXTURES)
