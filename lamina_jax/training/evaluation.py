"""Recall of a model's own plain forward pass: the figure that every way of serving it must reproduce.

This module knows models and prompts, and nothing of training or of serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import Storage, as_function, build
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.loader import load_model
from lamina_jax.weights.tokenizer import Tokenizer as CheckpointTokenizer

MAX_TOKENS_AT_ONCE = 8192

Prompt = tuple[list[int], list[int]]
"""(prompt token ids, answer token ids)"""


def load_plain(folder: Path) -> tuple[nnx.Module, Tokenizer]:
    """The model of a Hugging Face folder, computing in float32 on the default device, and its tokenizer.

    Raises:
        CheckpointError: the folder is no supported checkpoint, or has no tokenizer.json.
    """
    tokenizer = CheckpointTokenizer.from_folder(folder)
    model = build(read_config(folder), Storage(jnp.dtype("float32"), "in_out"))
    load_model(folder, model)
    return model, tokenizer.inner


def evaluate_plain(model: nnx.Module, prompts: Sequence[Prompt]) -> float:
    """The share of prompts whose greedy continuation starts with the whole answer, in [0, 1].

    The answer is fed behind the prompt and each of its tokens must be the best guess at its place, which
    is what greedy decoding finds token by token.

    Args:
        prompts: of any lengths; answers all of one length.
    """
    tokens, logits_at, answers = _padded(prompts)
    fn, params = as_function(model)

    @jax.jit
    def best_guesses(params: object, tokens: jax.Array, logits_at: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        logits = jax.vmap(lambda row, at: fn(params, row, positions, at))(tokens, logits_at)
        return jnp.argmax(logits, axis=-1)

    at_once = max(1, MAX_TOKENS_AT_ONCE // tokens.shape[1])
    guesses = [
        np.asarray(best_guesses(params, tokens[i : i + at_once], logits_at[i : i + at_once]))
        for i in range(0, len(tokens), at_once)
    ]
    return float(np.mean(np.all(np.concatenate(guesses) == answers, axis=1)))


def _padded(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens int32[B, S] padded on the right, where no token can see it; logits_at, answers int32[B, A]."""
    sizes = {len(answer) for _, answer in prompts}
    if len(sizes) != 1:
        raise ValueError(f"answers must be of one length, got lengths {sorted(sizes)}")
    answers = np.asarray([answer for _, answer in prompts], np.int32)
    lengths = np.asarray([len(prompt) for prompt, _ in prompts], np.int32)
    tokens = np.zeros((len(prompts), int(lengths.max()) + answers.shape[1] - 1), np.int32)
    for row, (prompt, answer) in zip(tokens, prompts, strict=True):
        fed = [*prompt, *answer[:-1]]
        row[: len(fed)] = fed
    offsets = np.arange(answers.shape[1], dtype=np.int32)
    return tokens, lengths[:, None] - 1 + offsets[None, :], answers
