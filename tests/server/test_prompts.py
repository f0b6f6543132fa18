"""Prompts that can have no place in the model's context are refused at once."""

from __future__ import annotations

import pytest
from fake_server import tokenizer

from lamina_jax.server.prompts import PromptTooLong, encode_prompt
from lamina_jax.weights.tokenizer import Tokenizer


class NeverAsked(Tokenizer):
    """Has tokens of one character, and is to see no text."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        raise AssertionError(f"{len(text)} characters were tokenised")


def test_a_text_that_no_tokens_hold_is_not_tokenised() -> None:
    with pytest.raises(PromptTooLong, match=r"^prompt: 8 characters .* max_model_len=8"):
        encode_prompt(NeverAsked(tokenizer().inner), "a" * 8, max_model_len=8, special_tokens=False)
    prompt = encode_prompt(tokenizer(), "a" * 8, max_model_len=9, special_tokens=False)
    assert len(prompt.token_ids) == 8


def test_token_ids_are_counted() -> None:
    with pytest.raises(PromptTooLong, match=r"^prompt: 8 tokens .* max_model_len=8"):
        encode_prompt(None, [1] * 8, max_model_len=8, special_tokens=False)
