"""Training sequences: windows of the corpus, and documents full of recall tasks.

This module knows the grammar and a tokenizer, and nothing of models or of optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from lamina_jax.training import recall
from lamina_jax.training.tokenizer import ASSISTANT, BOS, EOS, USER

# Loss weights inside a recall document: a number that the context tells, one that it does not, the rest.
ASKED, UNKNOWABLE, ORDINARY = 4.0, 0.0, 0.2

# Sequences of up to so many tokens are dense: little but facts and questions, from which recall forms fast.
DENSE_LENGTH = 128
DENSE_RECALL_SHARE, RECALL_SHARE = 0.85, 0.35
CHAT_SHARE = 0.15
FILLER_SHARES = (0.0, 0.4, 0.75)
TOKENS_PER_FACT = 32

Fact = tuple[recall.Key, int]


@dataclass(frozen=True)
class Batch:
    """B sequences of S + 1 tokens: inputs are [:, :-1], targets [:, 1:].

    tokens int32[B, S + 1], positions int32[B, S], weights f32[B, S] of each target in the loss.
    """

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


class DocumentMaker:
    """Makes batches; batch number `step` of one seed is always the same.

    Args:
        texts: the corpus, a text per file.
        tokenizer: of `lamina_jax.training.tokenizer`.
        max_position: positions stay below it.
        seed: of everything drawn here.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_position: int, seed: int) -> None:
        self.max_position, self.seed = max_position, seed
        vocabulary = tokenizer.get_vocab()
        self.bos, self.eos = vocabulary[BOS], vocabulary[EOS]
        self.user, self.assistant = vocabulary[USER], vocabulary[ASSISTANT]
        self.encode = lru_cache(maxsize=4096)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        files = [np.asarray([self.bos, *file.ids, self.eos], np.int32) for file in encoded]
        self.corpus = np.concatenate(files)
        self.file_starts = np.cumsum([0, *map(len, files[:-1])])
        ends_line = np.asarray(
            [tokenizer.decode([token]).endswith("\n") for token in range(tokenizer.get_vocab_size())]
        )
        self.line_starts = 1 + np.flatnonzero(ends_line[self.corpus])

    def batch(self, step: int, size: int, length: int) -> Batch:
        """`size` sequences of `length` inputs, a fixed share of them recall documents."""
        rng = np.random.default_rng([self.seed, step])
        share = DENSE_RECALL_SHARE if length <= DENSE_LENGTH else RECALL_SHARE
        num_recall = int(np.floor(size * share + rng.random()))
        rows = [
            self._recall(rng, length + 1) if row < num_recall else self._text(rng, length + 1)
            for row in range(size)
        ]
        tokens, positions, weights = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        return Batch(tokens, positions[:, :-1], weights[:, 1:])

    def _text(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = self.file_starts + 1 if rng.random() < 0.15 else self.line_starts
        start = rng.choice(starts[starts < len(self.corpus) - size])
        tokens = np.concatenate([[self.bos], self.corpus[start : start + size - 1]])
        return tokens.astype(np.int32), np.arange(size, dtype=np.int32), np.ones(size, np.float32)

    def _recall(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        document = RecallDocument(rng, self, dense=size <= DENSE_LENGTH + 1)
        document.write(size)
        tokens = np.asarray(document.tokens[:size], np.int32)
        weights = np.asarray(document.weights[:size], np.float32)
        return tokens, self._stretched(rng, document.line_starts, size), weights

    def _stretched(self, rng: np.random.Generator, line_starts: list[int], size: int) -> np.ndarray:
        """Positions with jumps between lines, as if lines had been cut out of a longer context.

        So short sequences show the model every distance that `max_position` allows.
        """
        steps = np.ones(size, np.int64)
        steps[0] = 0
        spare = self.max_position - size
        cuts = [start for start in line_starts if 0 < start < size]
        if cuts and spare > 0 and rng.random() < 0.5:
            chosen = rng.choice(cuts, size=min(len(cuts), int(rng.integers(1, 6))), replace=False)
            shares = rng.dirichlet(np.ones(len(chosen)))
            steps[chosen] += np.floor(shares * rng.integers(spare + 1)).astype(np.int64)
        return np.cumsum(steps).astype(np.int32)

    def corpus_filler(self, rng: np.random.Generator) -> list[int]:
        """A few tokens of the corpus that begin and end with a line."""
        start = rng.choice(self.line_starts)
        snippet = self.corpus[start : start + int(rng.integers(8, 49))]
        snippet = snippet[(snippet != self.bos) & (snippet != self.eos)]
        return [*snippet.tolist(), *self.encode("\n")]


class RecallDocument:
    """One document in the making: blocks of facts among filler, each followed by questions."""

    def __init__(self, rng: np.random.Generator, maker: DocumentMaker, *, dense: bool = False) -> None:
        self.rng, self.maker = rng, maker
        self.tokens: list[int] = [maker.bos]
        self.weights: list[float] = [0.0]
        self.line_starts: list[int] = []
        self.filler_share = 0.0 if dense else float(rng.choice(FILLER_SHARES))
        self.question_share = 0.2 if dense else 0.5
        self.chat = bool(rng.random() < CHAT_SHARE)

    def write(self, size: int) -> None:
        """Fills the document to at least `size` tokens."""
        largest = max(2, int(size * (1 - self.filler_share)) // TOKENS_PER_FACT)
        keys = recall.TRAINING_KEYS
        facts = recall.draw_facts(self.rng, keys, len(keys))
        known: list[Fact] = []
        while len(self.tokens) < size:
            block = list(islice(facts, int(self.rng.integers(1, largest + 1))))
            known += block
            if self.chat:
                self._special(self.maker.user)
            for fact in block:
                self._filler()
                self._fact(*fact)
            self._filler()
            self._ask_all(block or known, known)

    def _ask_all(self, block: list[Fact], known: list[Fact]) -> None:
        for turn, index in enumerate(self.rng.permutation(len(block))):
            old = self.rng.random() < 0.3
            key, number = known[self.rng.integers(len(known))] if old else block[index]
            if self.chat:
                self._chat_question(key, number, first=turn == 0)
                continue
            if turn:
                self._filler()
            if self.rng.random() < self.question_share:
                self._put(recall.question(key))
                self._number(number, ASKED)
            else:
                self._fact(key, number, ASKED)

    def _chat_question(self, key: recall.Key, number: int, *, first: bool) -> None:
        if not first:
            self._special(self.maker.user)
        self._put(recall.question_line(key))
        self._special(self.maker.eos)
        self._special(self.maker.assistant)
        self._put(recall.statement(key), starts_line=False)
        self._put(recall.answer(number), ASKED, starts_line=False)
        self._put(".", starts_line=False)
        self._special(self.maker.eos)

    def _fact(self, key: recall.Key, number: int, weight: float = UNKNOWABLE) -> None:
        self._put(recall.statement(key))
        self._number(number, weight)

    def _number(self, number: int, weight: float) -> None:
        self._put(recall.answer(number), weight, starts_line=False)
        self._put(".\n", starts_line=False)

    def _filler(self) -> None:
        while self.rng.random() < self.filler_share:
            if self.rng.random() < 0.7:
                self._put(recall.filler_line(self.rng))
            else:
                self._put_ids(self.maker.corpus_filler(self.rng))

    def _put(self, text: str, weight: float = ORDINARY, *, starts_line: bool = True) -> None:
        self._put_ids(self.maker.encode(text), weight, starts_line=starts_line)

    def _put_ids(self, ids: Sequence[int], weight: float = ORDINARY, *, starts_line: bool = True) -> None:
        if starts_line:
            self.line_starts.append(len(self.tokens))
        self.tokens += ids
        self.weights += [weight] * len(ids)

    def _special(self, token: int) -> None:
        self._put_ids([token], starts_line=False)


def tokenizer_text(texts: Sequence[str], seed: int, num_lines: int = 30_000) -> list[str]:
    """What the tokenizer is trained on: the corpus and enough of the grammar to know its words.

    Every number is listed often enough for each pair of digits to become a token.
    """
    rng = np.random.default_rng(seed)

    def line() -> str:
        told, asked = (recall.ALL_KEYS[i] for i in rng.integers(len(recall.ALL_KEYS), size=2))
        return (
            recall.fact_line(told, int(rng.integers(10_000)))
            + recall.question(asked)
            + recall.filler_line(rng)
        )

    every_number = "".join(map(recall.answer, range(10_000)))
    return [*texts, *(line() for _ in range(num_lines)), *[every_number] * (1 + num_lines // 1500)]
