"""The recall tasks: a small grammar of facts, questions and filler, and held-out prompts made of it.

A context holds facts such as `The code of amber falcon is 4821.` among other lines; a question asks for
one of them, and the answer repeats the sentence, so that its number can only come from the context:

    fact      The code of ADJECTIVE NOUN is NUMBER.
    question  Q: What is the code of ADJECTIVE NOUN?
              A: The code of ADJECTIVE NOUN is NUMBER.
    filler    The ADJECTIVE NOUN VERB PREPOSITION the ADJECTIVE NOUN.

NUMBER has four digits. One key (adjective and noun) in eight is held out: training never asks for it.
This module knows numpy and a tokenizer's `encode`, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

ADJECTIVES = (
    "amber", "bold", "brave", "bright", "calm", "clever", "cold", "dark", "deep", "dry", "fast", "gentle",
    "glad", "golden", "grand", "green", "happy", "heavy", "kind", "light", "little", "loud", "old",
    "plain", "proud", "quick", "quiet", "red", "silver", "soft", "warm", "wild",
)  # fmt: skip
NOUNS = (
    "badger", "bear", "bird", "boat", "bridge", "castle", "cloud", "crow", "eagle", "falcon", "forest",
    "fox", "garden", "harbor", "hill", "horse", "island", "lion", "meadow", "moon", "mountain", "otter",
    "owl", "pine", "river", "rose", "ship", "star", "stone", "tiger", "tower", "wolf",
)  # fmt: skip
VERBS = ("rests", "sings", "sleeps", "stands", "turns", "waits")
PREPOSITIONS = ("above", "behind", "below", "beside", "near", "under")

# About one line in so many is a fact in a held-out context.
LINES_PER_FACT = 4


class Key(NamedTuple):
    """What a fact is about."""

    adjective: str
    noun: str

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training."""
        return (ADJECTIVES.index(self.adjective) + 3 * NOUNS.index(self.noun)) % 8 == 0


ALL_KEYS = tuple(Key(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS)
TRAINING_KEYS = tuple(key for key in ALL_KEYS if not key.held_out)
HELD_OUT_KEYS = tuple(key for key in ALL_KEYS if key.held_out)


def statement(key: Key) -> str:
    """A fact, or an answer, up to its number."""
    return f"The code of {key.adjective} {key.noun} is"


def answer(number: int) -> str:
    """The number as it follows `statement`."""
    return f" {number:04d}"


def fact_line(key: Key, number: int) -> str:
    return f"{statement(key)}{answer(number)}.\n"


def question_line(key: Key) -> str:
    return f"What is the code of {key.adjective} {key.noun}?"


def question(key: Key) -> str:
    """A question and its answer's beginning: what follows is the number."""
    return f"Q: {question_line(key)}\nA: {statement(key)}"


def filler_line(rng: np.random.Generator) -> str:
    """A sentence that holds no fact but speaks of the same things."""
    first, second = (ALL_KEYS[i] for i in rng.integers(len(ALL_KEYS), size=2))
    verb, preposition = VERBS[rng.integers(len(VERBS))], PREPOSITIONS[rng.integers(len(PREPOSITIONS))]
    return f"The {first.adjective} {first.noun} {verb} {preposition} the {second.adjective} {second.noun}.\n"


def draw_facts(rng: np.random.Generator, keys: Sequence[Key], num: int) -> Iterator[tuple[Key, int]]:
    """`num` facts; no key and no number occurs twice."""
    chosen = rng.choice(len(keys), size=num, replace=False)
    numbers = rng.choice(10_000, size=num, replace=False)
    return ((keys[i], int(number)) for i, number in zip(chosen, numbers, strict=True))


def recall_prompts(
    seed: int, num: int, length_tokens: int, tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """Held-out prompts with the wanted fact at a random depth: `(prompt ids, answer ids)` each.

    Args:
        seed: the same seed gives the same prompts.
        num: how many.
        length_tokens: no prompt is longer; each is filled to within a line of it.
        tokenizer: the model's; its special tokens (bos) stand at the prompt's beginning.

    A model has answered when greedy decoding of the prompt starts with the answer's ids. The asked key
    and the other facts of its context are held out; the answer's number occurs in the prompt once.

    Raises:
        ValueError: `length_tokens` has no room for a fact and its question.
    """
    rng = np.random.default_rng([seed, length_tokens])
    return [_prompt(rng, length_tokens, tokenizer) for _ in range(num)]


def _prompt(
    rng: np.random.Generator, length_tokens: int, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    facts = draw_facts(rng, HELD_OUT_KEYS, len(HELD_OUT_KEYS))
    key, number = next(facts)
    head = tokenizer.encode("").ids
    asked = fact_line(key, number)
    tail = question(key)

    def size(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    room = length_tokens - len(head) - size(asked) - size(tail)
    if room < 0:
        raise ValueError(
            f"length_tokens={length_tokens} has no room for a fact and its question: add {-room} tokens"
        )
    lines: list[str] = []
    while True:
        other = next(facts, None) if rng.random() < 1 / LINES_PER_FACT else None
        line = filler_line(rng) if other is None else fact_line(*other)
        room -= size(line)
        if room < 0:
            break
        lines.append(line)
    lines.insert(int(rng.integers(len(lines) + 1)), asked)
    prompt = tokenizer.encode("".join(lines) + tail).ids
    return prompt, tokenizer.encode(answer(number), add_special_tokens=False).ids
