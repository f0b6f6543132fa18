"""Text to token ids and back, by a checkpoint's own `tokenizer.json`. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from lamina_jax.config import CheckpointError
from lamina_jax.weights.chat_template import ChatTemplate, load_chat_template

FILE = "tokenizer.json"

MOST_PENDING = 64
"""Tokens without a whole character after which there will be none; all of them are read at each new one."""


class Tokenizer:
    """A checkpoint's tokenizer. Special tokens are written as its file says, and left out when read.

    `chat_template` is None where the checkpoint has none.
    """

    def __init__(self, inner: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self.inner, self.chat_template = inner, chat_template
        self._texts: dict[int, str] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises `CheckpointError` where the folder has no usable tokenizer.json, or a malformed config."""
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {FILE}: without one, prompts are lists of token ids")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of malformed file
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from None
        return cls(inner, load_chat_template(folder))

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters that a token stands for at most."""
        return max(map(len, self.inner.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; with those that the tokenizer puts around a text, unless the text has its own."""
        return self.inner.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.inner.decode(token_ids, skip_special_tokens=True)

    def text_of(self, token_id: int) -> str:
        """One token alone, special tokens too; kept, since the same few are asked for all the time."""
        if token_id not in self._texts:
            self._texts[token_id] = self.inner.decode([token_id], skip_special_tokens=False)
        return self._texts[token_id]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none: then prompts and outputs are token ids alone.

    Raises:
        CheckpointError: there is a tokenizer.json, and it is malformed.
    """
    return Tokenizer.from_folder(folder) if (folder / FILE).exists() else None


class Detokenizer:
    """Turns the tokens of one growing text into pieces of it that hold whole characters.

    The pieces, with that of `flush` at the end, add up to the text of all tokens. Only where a model
    writes bytes that are no UTF-8 can it differ: what was given out is never taken back.

    Args:
        prompt_token_ids: the text before, which decides whether the first piece begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(_last_words(tokenizer, prompt_token_ids), skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty where a character is still unfinished."""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer.inner, token_id)
        except Exception:  # raised, bare, where invalid bytes change the reading of those before them
            return self.flush()
        if not piece:
            return self.flush() if len(self._pending) == MOST_PENDING else ""
        self._pending.clear()
        return piece

    def flush(self) -> str:
        """The text of the tokens that are still held back; the next token begins a new text."""
        text = self._tokenizer.decode(self._pending)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending.clear()
        return text


def texts_of_tokens(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of all; nothing where there is no tokenizer."""
    if tokenizer is None:
        return [""] * len(token_ids)
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.push(token) for token in token_ids]
    texts[-1:] = [text + detokenizer.flush() for text in texts[-1:]]
    return texts


def _last_words(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """A few last tokens that begin with a whole character; none if there are no such."""
    for count in (4, 16, 64):
        last = list(token_ids[-count:])
        if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(last):
            return last
    return []
