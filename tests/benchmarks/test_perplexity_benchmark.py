"""`bench perplexity`: how a text is cut, and that the engine's score is that of the plain forward pass."""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SMALL, TINY, save_random

from lamina_jax.benchmarks import perplexity
from lamina_jax.benchmarks.windows import windows
from lamina_jax.core import Logprob, RequestOutput
from lamina_jax.llm import LLM
from lamina_jax.models import Storage, build
from lamina_jax.weights.loader import load_model


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_every_token_but_the_first_is_counted_once(length, context, data):
    stride = data.draw(st.integers(1, context - 1))
    cut = windows(range(length), context, stride)
    counted = [token for window in cut for token in window.tokens[-window.counted :]]
    assert counted == list(range(1, length))
    assert all(1 <= window.counted < len(window.tokens) <= context for window in cut)


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, 4), (9, 8, 0), (9, 8, 8)])
def test_texts_and_strides_that_cannot_be_scored_are_refused(length, context, stride):
    with pytest.raises(ValueError, match=r"tokens|stride"):
        windows(range(length), context, stride)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("model"))


def plain_nll(folder, cut, length):
    """Mean over the counted tokens, from the model's function under a plain jit: no cache, no chunks."""
    model = build(TINY, Storage(jnp.dtype("float32"), "in_out"))
    load_model(folder, model)
    everywhere = jnp.arange(length, dtype=jnp.int32)
    logits_of = jax.jit(lambda tokens: model(tokens, everywhere, everywhere))
    total, counted = 0.0, 0
    for window in cut:
        padded = np.zeros(length, np.int32)  # behind the window, where none of its tokens looks
        padded[: len(window.tokens)] = window.tokens
        logprobs = np.asarray(jax.nn.log_softmax(logits_of(padded)), np.float64)
        for place in range(len(window.tokens) - window.counted, len(window.tokens)):
            total -= logprobs[place - 1, window.tokens[place]]
        counted += window.counted
    return total / counted


class ScriptedLLM(LLM):
    """Every token has the log-probability of minus its id."""

    def __init__(self):
        pass

    def generate(self, prompts, sampling_params=None):
        return [
            RequestOutput(
                request_id="",
                prompt_logprobs=[None, *({token: Logprob(-float(token), 1)} for token in prompt[1:])],
            )
            for prompt in prompts
        ]


def test_the_score_is_the_mean_over_the_counted_tokens():
    found = perplexity.score(ScriptedLLM(), windows(range(10), 4, 2))
    assert found.nll == pytest.approx(sum(range(1, 10)) / 9)


@pytest.mark.slow
@pytest.mark.parametrize("placement", perplexity.PLACEMENTS)
def test_the_score_is_that_of_the_plain_forward_pass(folder, placement):
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 150).tolist()
    cut = windows(tokens, 64, 40)
    settings = {**SMALL, "max_num_seqs": 1, "max_model_len": 65, "kv_dtype": "float32"}
    with LLM(str(folder), placement=placement, **settings) as llm:
        found = perplexity.score(llm, cut)
    assert found.nll == pytest.approx(plain_nll(folder, cut, 64), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_the_table_shows_how_far_a_row_is_from_the_first():
    rows = [
        {"placement": "disaggregated", "dtype": "float32", "kv_dtype": "float32", "nll": 1.0},
        {"placement": "transformers", "dtype": "float32", "nll": 1.25},
    ]
    said = perplexity.table(
        [{**row, "perplexity": math.exp(row["nll"]), "seconds": 2.0} for row in rows], 100
    )
    assert "+0.25000" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("50")


def parsed(*flags):
    parser = argparse.ArgumentParser()
    perplexity.add_arguments(parser)
    return parser.parse_args(flags)


def test_a_text_without_a_tokenizer_is_refused(folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("x")
    with pytest.raises(SystemExit, match=r"no tokenizer\.json"):
        perplexity.run(parsed(str(folder), "--text", str(text)))


def test_a_reference_that_fails_is_named(folder):
    with pytest.raises(SystemExit, match="ended with exit code"):
        perplexity.score_by_reference("/bin/false", folder, "float32", [])
