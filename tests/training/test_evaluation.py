"""The plain-forward check itself: what counts as an answer."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig, Storage, build, initialise
from lamina_jax.training.evaluation import evaluate_plain, load_plain
from lamina_jax.training.export import export


class Counts(nnx.Module):
    """A model that always expects the next number, modulo 10."""

    def __call__(self, tokens: jax.Array, positions: jax.Array, logits_at: jax.Array) -> jax.Array:
        return jax.nn.one_hot((tokens[logits_at] + 1) % 10, 10)


def test_an_answer_counts_when_all_of_it_is_right() -> None:
    prompts = [([1, 2], [3, 4]), ([5, 6, 7, 8], [9, 0]), ([3], [4, 4]), ([3], [5, 6])]
    assert evaluate_plain(Counts(), prompts) == 0.5
    assert evaluate_plain(Counts(), prompts[:2]) == 1.0


def test_answers_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length, got lengths \[1, 2\]"):
        evaluate_plain(Counts(), [([1], [2]), ([1], [2, 3])])


def test_an_exported_folder_loads_as_it_was(
    tiny_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = build(tiny_config, Storage(jnp.dtype("float32"), "in_out"))
    initialise(model, seed=0)
    export(model, tiny_config, tokenizer, tmp_path)
    loaded, found = load_plain(tmp_path)
    assert found.to_str() == tokenizer.to_str()
    tokens = jnp.arange(8, dtype=jnp.int32)
    expected, got = (m(tokens, tokens, tokens) for m in (model, loaded))
    np.testing.assert_allclose(got, expected, atol=0.05)  # stored in bfloat16
