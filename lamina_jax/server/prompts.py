"""Prompts as the engine takes them: token ids, and what the server has to know of them besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lamina_jax.weights.tokenizer import Tokenizer, texts_of_tokens

TextOrIds = str | list[int]

MOST_TOKEN_ID = 2**31 - 1
"""Of any vocabulary."""


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


def encode_prompts(
    tokenizer: Tokenizer | None, given: Sequence[TextOrIds], *, special_tokens: bool, echo: bool = False
) -> list[Prompt]:
    """Prompts from texts or token ids. A long text takes its time.

    Args:
        special_tokens: whether the tokenizer puts its own around a text.
        echo: whether the text of each token is wanted; without a tokenizer it is empty.

    Raises:
        ValueError, TypeError: text, where the checkpoint has no tokenizer; text that is no Unicode; a token
            id that is in no vocabulary.
    """
    return [_encode(tokenizer, prompt, special_tokens, echo) for prompt in given]


def _encode(tokenizer: Tokenizer | None, given: TextOrIds, special_tokens: bool, echo: bool) -> Prompt:
    text, ids = (given, []) if isinstance(given, str) else (None, given)
    if text is not None:
        if tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: give the prompt as token ids")
        ids = tokenizer.encode(text, special_tokens=special_tokens)
    for token in ids:
        if not 0 <= token <= MOST_TOKEN_ID:
            raise ValueError(f"prompt: token id {token} is not in the vocabulary")
    return Prompt(ids, text, texts_of_tokens(tokenizer, ids) if echo else [])
