"""The grammar: an answer is in its context once, and what is held out stays so."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lamina_jax.training import recall

FACT = re.compile(r"The code of (\w+) (\w+) is (\d{4})\.\n")
ASKED = re.compile(r"A: The code of (\w+) (\w+) is$")


def test_training_and_held_out_keys_are_disjoint_and_share_every_word() -> None:
    assert not set(recall.TRAINING_KEYS) & set(recall.HELD_OUT_KEYS)
    assert len(recall.HELD_OUT_KEYS) == len(recall.ALL_KEYS) // 8
    for words, part in ((recall.ADJECTIVES, "adjective"), (recall.NOUNS, "noun")):
        for keys in (recall.TRAINING_KEYS, recall.HELD_OUT_KEYS):
            assert {getattr(key, part) for key in keys} == set(words)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), length=st.integers(60, 400))
def test_a_prompt_holds_its_answer_exactly_once(tokenizer: Tokenizer, seed: int, length: int) -> None:
    [(prompt, answer)] = recall.recall_prompts(seed, 1, length, tokenizer)
    text = tokenizer.decode(prompt)
    facts = {(adjective, noun): number for adjective, noun, number in FACT.findall(text)}
    (asked,) = ASKED.findall(text)
    number = tokenizer.decode(answer)
    assert number == f" {facts[asked]}"
    assert text.count(number.strip()) == 1
    assert len(facts) == len(FACT.findall(text)), "no key has two numbers"
    assert {recall.Key(*key) for key in facts} <= set(recall.HELD_OUT_KEYS)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), length=st.integers(60, 400))
def test_a_prompt_fills_its_length(tokenizer: Tokenizer, seed: int, length: int) -> None:
    [(prompt, answer)] = recall.recall_prompts(seed, 1, length, tokenizer)
    longest_line = 40
    assert length - longest_line < len(prompt) <= length
    assert prompt[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(prompt + answer) == tokenizer.decode(prompt) + tokenizer.decode(answer)


def test_prompts_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    first = recall.recall_prompts(7, 5, 200, tokenizer)
    assert first == recall.recall_prompts(7, 5, 200, tokenizer)
    assert first != recall.recall_prompts(8, 5, 200, tokenizer)


def test_facts_stand_at_every_depth(tokenizer: Tokenizer) -> None:
    depths = []
    for prompt, _ in recall.recall_prompts(0, 60, 300, tokenizer):
        text = tokenizer.decode(prompt)
        (asked,) = ASKED.findall(text)
        depths.append(text.index(recall.statement(recall.Key(*asked))) / len(text))
    assert min(depths) < 0.1
    assert max(depths) > 0.75
    assert 0.3 < sum(depths) / len(depths) < 0.6


def test_too_short_a_context_is_refused_with_what_is_missing(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"length_tokens=10 has no room .* add \d+ tokens"):
        recall.recall_prompts(0, 1, 10, tokenizer)
