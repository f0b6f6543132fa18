"""Outputs: text in any split of any Unicode, stop strings across token borders, log-probabilities."""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.core import (
    MAX_LOGPROBS,
    CompletionOutput,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from lamina_jax.engine.outputs import Choice, PromptOutput, logprobs_at
from lamina_jax.weights.tokenizer import Tokenizer, load_tokenizer

TEXTS = st.text(max_size=30) | st.text(
    alphabet="ab\n é\N{GRINNING FACE}\N{CJK UNIFIED IDEOGRAPH-4E2D}", max_size=30
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(Path(str(resources.files("lamina_jax") / "data" / "bundled")))
    assert found is not None
    return found


def choice_for(tokenizer: Tokenizer | None, **sampling: object) -> Choice:
    params = SamplingParams(**({"max_tokens": 1000, "temperature": 0} | sampling))  # type: ignore[arg-type]
    return Choice(Request(request_id="r", prompt_token_ids=(5,), sampling=params), tokenizer)


def feed(choice: Choice, tokens: list[int]) -> tuple[list[str], CompletionOutput]:
    """The text after each token, until a stop string ends it or the tokens do; and the whole."""
    texts, whole = [], CompletionOutput()
    for place, token in enumerate(tokens):
        choice.take(token, "length" if place == len(tokens) - 1 else None, None)
        new = choice.news()
        assert new is not None
        whole.extend(new)
        texts.append(whole.text)
        if choice.finished:
            break
    assert choice.news() is None
    return texts, whole


@given(text=TEXTS)
@settings(max_examples=60)
def test_deltas_add_up_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, special_tokens=False)
    texts, whole = feed(choice_for(tokenizer), tokens)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert whole.text == tokenizer.decode(tokens)


@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab\n é", min_size=1, max_size=3), min_size=1, max_size=2))
@settings(max_examples=60)
def test_stop_strings_end_a_text_across_the_borders_of_tokens(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    tokens = tokenizer.encode(text, special_tokens=False)
    whole = tokenizer.decode(tokens)
    texts, output = feed(choice_for(tokenizer, stop=stop), tokens)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    if any(s in whole for s in stop):
        assert output.finish_reason == "stop"
        assert output.stop_reason in stop
        assert whole.startswith(output.text + str(output.stop_reason))
        assert not any(s in output.text for s in stop)
    else:
        assert output.text == whole


def test_min_tokens_keeps_stop_strings_from_ending_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a b a b a b", special_tokens=False)
    _, early = feed(choice_for(tokenizer, stop=" b"), tokens)
    _, late = feed(choice_for(tokenizer, stop=" b", min_tokens=3), tokens)
    assert early.text == "a"
    assert late.text.startswith("a b")
    assert late.finish_reason == "stop"
    assert len(late.token_ids) > 3


def test_a_stop_token_is_among_the_ids_and_not_in_the_text(tokenizer: Tokenizer) -> None:
    first, second = (
        tokenizer.encode("ab", special_tokens=False)[:1],
        tokenizer.encode("xy", special_tokens=False),
    )
    choice = choice_for(tokenizer, stop_token_ids=(second[0],))
    choice.take(first[0], None, None)
    choice.take(second[0], "stop", None)
    new = choice.news()
    assert new is not None
    assert new.token_ids == [first[0], second[0]]
    assert new.text == tokenizer.decode(first)
    assert new.stop_reason == second[0]


def test_log_probabilities_name_the_token_and_the_best(tokenizer: Tokenizer) -> None:
    top = np.tile(-np.arange(1, MAX_LOGPROBS + 1, dtype=np.float32), (2, 1))
    ids = np.tile(np.arange(10, 10 + MAX_LOGPROBS, dtype=np.int32), (2, 1))
    found = TokenLogprobs(
        chosen=np.array([-1, -50], np.float32), ranks=np.array([1, 99], np.int32), top_ids=ids, top=top
    )
    assert set(logprobs_at(found, 0, 10, 2, tokenizer)) == {10, 11}
    far = logprobs_at(found, 1, 7, 2, tokenizer)
    assert list(far) == [7, 10, 11]
    assert (far[7].logprob, far[7].rank, far[10].rank) == (-50.0, 99, 1)
    assert far[7].decoded_token == tokenizer.inner.decode([7], skip_special_tokens=False)
    assert list(logprobs_at(found, 1, 7, 0, None)) == [7]


def prompt_output(**sampling: Any) -> PromptOutput:
    params = SamplingParams(n=2, temperature=0, **sampling)
    request = Request(request_id="r", prompt_token_ids=(5,), sampling=params)
    children = [Request(request_id=f"r#{i}", prompt_token_ids=(5,), choice=i) for i in range(2)]
    return PromptOutput(request, children, None)


def test_only_what_is_new_is_told() -> None:
    prompt = prompt_output()
    prompt.choices[1].take(3, None, None)
    first = prompt.news()
    prompt.choices[1].take(4, "length", None)
    second = prompt.news()
    assert [(choice.index, choice.token_ids) for choice in first.outputs] == [(1, [3])], "a copy of its own"
    assert [(choice.index, choice.token_ids) for choice in second.outputs] == [(1, [4])]
    assert not second.finished
    prompt.choices[0].take(9, "stop", None)
    last = prompt.news()
    assert last.finished
    assert prompt.news().outputs == []
    whole = RequestOutput(request_id="r")
    for new in (first, second, last):
        whole.extend(new)
    assert [(c.index, c.token_ids, c.finish_reason) for c in whole.outputs] == [
        (0, [9], "stop"),
        (1, [3, 4], "length"),
    ]


def test_log_probabilities_of_a_prompt_are_told_once() -> None:
    prompt = prompt_output(prompt_logprobs=0)
    entries = [{token: Logprob(-1.0, 1)} for token in (7, 8, 9)]
    prompt.take_prompt(entries[:2])
    assert prompt.news().prompt_logprobs == [None, *entries[:2]]
    assert prompt.news().prompt_logprobs is None
    prompt.take_prompt(entries[2:])
    assert prompt.news().prompt_logprobs == entries[2:]


def test_an_end_shows_what_was_held_back(tokenizer: Tokenizer) -> None:
    """As the beginning of a stop string, or of a character."""
    choice = choice_for(tokenizer, stop="bcd")
    for token in tokenizer.encode("a bc", special_tokens=False):
        choice.take(token, None, None)
    shown = choice.news()
    choice.end("abort")
    rest = choice.news()
    assert shown is not None
    assert rest is not None
    assert (shown.text + rest.text, rest.text, rest.token_ids) == ("a bc", "bc", [])
    assert rest.finish_reason == "abort"
