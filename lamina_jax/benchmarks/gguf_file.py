"""Writes a checkpoint folder as the one file that llama.cpp reads. The format is the library's business.

For timing only: the file has no tokenizer, so that llama.cpp decodes token ids and no text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lamina_jax.config import CheckpointError
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.safetensors import find_tensors, opened

SUFFIXES = ".weight", ".bias"
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def write_gguf(folder: Path, dtype: str, file: Path) -> None:
    """Write the Qwen3 model of a Hugging Face folder to `file`; one tensor is in memory at a time.

    Args:
        dtype: of matrices, "float32" or "bfloat16"; vectors are float32, as llama.cpp wants them.

    Raises:
        CheckpointError: another family, a tensor that GGUF has no name for, or what `lamina_jax.weights`
            does not read, either.
    """
    config = read_config(folder)
    if config.family != "qwen3" or config.rope.scaling != "default" or any(config.windows):
        raise CheckpointError(
            f"{folder} is a {config.family} model with {config.rope.scaling!r} rope scaling: "
            f"for llama.cpp only Qwen3 models without scaling and windows are written"
        )
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_layers)
    tensors = find_tensors(folder)
    # Written beside the final file and moved, so that half a file is never taken for one.
    unfinished = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(unfinished, "qwen3")
    _describe(writer, config)
    for name, tensor in tensors.items():
        kind = _dtype(len(tensor.shape), dtype)
        known_as = names.get_name(name, SUFFIXES)
        if known_as is None:
            raise CheckpointError(f"{folder}: GGUF has no name for the tensor {name!r} of a Qwen3 model")
        writer.add_tensor_info(
            known_as,
            tensor.shape,
            np.dtype(np.float32),  # not looked at, but it must not be that of bytes
            int(np.prod(tensor.shape)) * kind.itemsize,
            raw_dtype=gguf.GGMLQuantizationType["BF16" if kind.itemsize == 2 else "F32"],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        with opened(tensor.file) as weights:
            values = weights.get_tensor(name).astype(_dtype(len(tensor.shape), dtype))
        writer.write_tensor_data(values.view(np.uint8))
    writer.close()
    unfinished.replace(file)


def _dtype(rank: int, dtype: str) -> np.dtype[Any]:
    return np.dtype(DTYPES[dtype] if rank > 1 else np.float32)


def _describe(writer: Any, config: ModelConfig) -> None:
    """The model's shape, and that there is no tokenizer."""
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
