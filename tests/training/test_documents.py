"""Training sequences: what is weighted can be known from what stands before it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from lamina_jax.training import recall
from lamina_jax.training.documents import ASKED, UNKNOWABLE, DocumentMaker, RecallDocument


@pytest.fixture(scope="module")
def maker(texts: list[str], tokenizer: Tokenizer) -> DocumentMaker:
    return DocumentMaker(texts, tokenizer, max_position=512, seed=3)


def test_a_batch_depends_on_seed_and_step_alone(
    maker: DocumentMaker, texts: list[str], tokenizer: Tokenizer
) -> None:
    again = DocumentMaker(texts, tokenizer, max_position=512, seed=3).batch(5, 4, 64)
    for name in ("tokens", "positions", "weights"):
        np.testing.assert_array_equal(getattr(maker.batch(5, 4, 64), name), getattr(again, name))
    assert (maker.batch(6, 4, 64).tokens != again.tokens).any()


def test_shapes_and_positions(maker: DocumentMaker) -> None:
    batch = maker.batch(0, 16, 128)
    assert batch.tokens.shape == (16, 129)
    assert batch.positions.shape == batch.weights.shape == (16, 128)
    assert (batch.positions[:, 0] == 0).all()
    assert batch.positions.max() < maker.max_position
    assert (np.diff(batch.positions) >= 1).all()
    assert (np.diff(batch.positions) > 1).any(), "some documents are stretched"


def test_positions_jump_only_where_a_line_begins(maker: DocumentMaker) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        document = RecallDocument(rng, maker)
        document.write(128)
        positions = maker._stretched(rng, document.line_starts, 128)
        assert set(1 + np.flatnonzero(np.diff(positions) > 1)) <= set(document.line_starts)


@pytest.mark.parametrize("seed", range(12))
def test_asked_numbers_were_told_before_and_told_ones_were_not(
    maker: DocumentMaker, tokenizer: Tokenizer, seed: int
) -> None:
    document = RecallDocument(np.random.default_rng(seed), maker)
    document.write(400)
    told: dict[str, list[int]] = {}
    digits = re.compile(r" \d\d")
    statement = re.compile(r"The code of (\w+ \w+) is$")
    number = 0
    while number < len(document.tokens) - 1:
        weight = document.weights[number]
        if weight in (ASKED, UNKNOWABLE) and digits.fullmatch(tokenizer.decode([document.tokens[number]])):
            found = statement.search(tokenizer.decode(document.tokens[:number]))
            assert found, "a weighted number follows a statement"
            value = document.tokens[number : number + 2]
            assert document.weights[number : number + 2] == [weight, weight]
            if weight == ASKED:
                assert told[found[1]] == value
            else:
                assert found[1] not in told
                told[found[1]] = value
            assert recall.Key(*found[1].split()) in recall.TRAINING_KEYS
            number += 1
        number += 1
    assert told


def test_a_document_is_what_the_tokenizer_would_say(maker: DocumentMaker, tokenizer: Tokenizer) -> None:
    """Pieces are encoded one by one; a served prompt is encoded whole."""
    for seed in range(12):
        document = RecallDocument(np.random.default_rng(seed), maker)
        document.filler_share = 0.0
        document.write(200)
        text = tokenizer.decode(document.tokens, skip_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False).ids == document.tokens
