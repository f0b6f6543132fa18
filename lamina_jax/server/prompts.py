"""Prompts as the engine takes them: token ids, and what the server has to know of them besides."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_jax.weights.tokenizer import Tokenizer, texts_of_tokens

TextOrIds = str | list[int]

MOST_TOKEN_ID = 2**31 - 1
"""Of any vocabulary."""


class PromptTooLong(ValueError):
    """A prompt leaves no room for a token in the model's context."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: at least one, if the engine is to take it.
        text: that they come from, if they come from text.
        echo: the text of each token, where the answer begins with the prompt; else empty.
    """

    token_ids: list[int]
    text: str | None = None
    echo: list[str] = field(default_factory=list)


def encode_prompt(
    tokenizer: Tokenizer | None,
    given: TextOrIds,
    *,
    max_model_len: int,
    special_tokens: bool,
    echo: bool = False,
) -> Prompt:
    """A prompt from a text or token ids. A long text takes its time.

    Args:
        max_model_len: the tokens of a prompt and its continuation.
        special_tokens: whether the tokenizer puts its own around a text.
        echo: whether the text of each token is wanted; without a tokenizer it is empty.

    Raises:
        PromptTooLong: a text that no tokens could hold is not even looked at.
        ValueError, TypeError: text, where the checkpoint has no tokenizer; text that is no Unicode; a token
            id that is in no vocabulary.
    """
    text, ids = (given, []) if isinstance(given, str) else (None, given)
    if text is not None:
        if tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: give the prompt as token ids")
        _check_length(len(text), "characters", max_model_len * tokenizer.longest_token, max_model_len)
        ids = tokenizer.encode(text, special_tokens=special_tokens)
    _check_length(len(ids), "tokens", max_model_len, max_model_len)
    for token in ids:
        if not 0 <= token <= MOST_TOKEN_ID:
            raise ValueError(f"prompt: token id {token} is not in the vocabulary")
    return Prompt(ids, text, texts_of_tokens(tokenizer, ids) if echo else [])


def _check_length(length: int, unit: str, too_many: int, max_model_len: int) -> None:
    if length >= too_many:
        raise PromptTooLong(
            f"prompt: {length} {unit} leave no room for a new token within max_model_len={max_model_len}: "
            "shorten the prompt or raise max_model_len"
        )
