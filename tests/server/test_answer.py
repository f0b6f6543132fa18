"""The chunks of a stream add up to the whole answer, however the news is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.core import CompletionOutput, Logprob, Logprobs, RequestOutput
from lamina_jax.server.answer import Answer
from lamina_jax.server.chat_answer import ChatAnswer
from lamina_jax.server.completion_answer import CompletionAnswer
from lamina_jax.server.prompts import Prompt
from lamina_jax.server.protocol import ChatRequest, CompletionRequest

PROMPT_TEXTS = ["ab", "c"]
"""The texts of a prompt's two tokens, 1 and 2."""
PROMPT, ECHOED = Prompt([1, 2]), Prompt([1, 2], echo=PROMPT_TEXTS)


@dataclass
class Case:
    """Outputs of one request: `steps[prompt][choice]` is a list of (new text, new token ids)."""

    n: int
    steps: list[list[list[tuple[str, list[int]]]]]


STEP = st.tuples(st.text(max_size=3), st.lists(st.integers(0, 99), max_size=2))
"""What a step adds: a token may have no text yet."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, prompts = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    steps = st.lists(STEP, min_size=1, max_size=5)
    return Case(n, [[draw(steps) for _ in range(n)] for _ in range(prompts)])


def known(token: int) -> Logprobs:
    """The token is the second best, "z" the best."""
    return {token: Logprob(-2.0, 2, f"<{token}>"), 100: Logprob(-1.0, 1, "z")}


def news_of(choices: list[list[tuple[str, list[int]]]], *, logprobs: bool) -> list[RequestOutput]:
    """What each step adds to the continuations of a prompt; one that has fewer steps has ended."""
    longest = max(map(len, choices))
    prompt_logprobs = [None, known(2)] if logprobs else None
    return [
        RequestOutput(
            request_id="r",
            outputs=[
                CompletionOutput(
                    index=index,
                    text=steps[step][0],
                    token_ids=list(steps[step][1]),
                    finish_reason="length" if step == len(steps) - 1 else None,
                    logprobs=[known(token) for token in steps[step][1]] if logprobs else None,
                )
                for index, steps in enumerate(choices)
                if step < len(steps)
            ],
            finished=step == longest - 1,
            # One at a step, and at the last what is left.
            prompt_logprobs=prompt_logprobs and prompt_logprobs[step : step + 1 if step < longest - 1 else 2],
        )
        for step in range(longest)
    ]


def answers(case: Case, make: Callable[[], Answer], *, logprobs: bool) -> tuple[dict[str, Any], list[Any]]:
    """The answer as a whole, and the chunks of it as a stream."""
    whole, streamed, chunks = make(), make(), []
    for prompt, choices in enumerate(case.steps):
        for news in news_of(choices, logprobs=logprobs):
            whole.take(prompt, copy.deepcopy(news))
            chunks += list(streamed.chunks(prompt, news))
    assert streamed.usage() == whole.usage()
    return whole.whole(), chunks


def of_choice(chunks: list[Any], index: int) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


@given(cases(), st.booleans(), st.sampled_from([None, 0, 1]))
def test_chunks_of_completions_add_up(case: Case, echo: bool, logprobs: int | None) -> None:
    request = CompletionRequest(
        model="m",
        prompt=["a"] * len(case.steps),
        n=case.n,
        echo=echo,
        logprobs=logprobs,
        return_token_ids=True,
    )
    prompts = [ECHOED if echo else PROMPT] * len(case.steps)
    whole, chunks = answers(
        case, lambda: CompletionAnswer("c", request, prompts), logprobs=logprobs is not None
    )
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(case.steps) * case.n))
    for expected in whole["choices"]:
        mine = of_choice(chunks, expected["index"])
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [one for choice in mine for one in choice["token_ids"]] == expected["token_ids"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert expected["text"].startswith("abc" if echo else "")
        if logprobs is None:
            assert expected["logprobs"] is None
            continue
        table = expected["logprobs"]
        for column in table:
            assert [one for choice in mine for one in choice["logprobs"][column]] == table[column]
        ids = expected["token_ids"]
        assert table["tokens"] == (PROMPT_TEXTS if echo else []) + [f"<{token}>" for token in ids]
        assert table["token_logprobs"] == ([None, -2.0] if echo else []) + [-2.0] * len(ids)
        if table["tokens"]:
            lengths = list(map(len, table["tokens"]))
            assert table["text_offset"] == list(accumulate(lengths[:-1], initial=0))


@given(cases(), st.sampled_from([None, 0, 1, 2]))
def test_chunks_of_a_chat_add_up(case: Case, top: int | None) -> None:
    fields = {} if top is None else {"logprobs": True, "top_logprobs": top}
    request = ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], n=case.n, **fields)
    case.steps = case.steps[:1]
    whole, chunks = answers(case, lambda: ChatAnswer("c", request, [PROMPT]), logprobs=top is not None)
    for expected in whole["choices"]:
        mine = of_choice(chunks, expected["index"])
        assert (
            "".join(choice["delta"].get("content", "") for choice in mine) == expected["message"]["content"]
        )
        assert ["role" in choice["delta"] for choice in mine] == [True] + [False] * (len(mine) - 1)
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        if top is None:
            assert expected["logprobs"] is None
            continue
        told = expected["logprobs"]["content"]
        assert [one for choice in mine for one in choice["logprobs"]["content"]] == told
        assert all(len(entry["top_logprobs"]) == top for entry in told)
        assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in told)


def test_no_tokens_asked_for_tells_about_the_prompt_alone() -> None:
    request = CompletionRequest(model="m", prompt="a", max_tokens=0, echo=True, logprobs=1)
    case = Case(1, [[[("x", [7])]]])
    whole, chunks = answers(case, lambda: CompletionAnswer("c", request, [ECHOED]), logprobs=True)
    for choice in (whole["choices"][0], chunks[0]["choices"][0]):
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"] == {
            "tokens": ["ab", "c"],
            "token_logprobs": [None, -2.0],
            "top_logprobs": [None, {"<2>": -2.0, "z": -1.0}],
            "text_offset": [0, 2],
        }
    assert len(chunks) == 1
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_the_prompts_log_probabilities_are_told_once() -> None:
    request = CompletionRequest(model="m", prompt="a", prompt_logprobs=1)
    case = Case(1, [[[("x", [7]), ("y", [8]), ("z", [9])]]])  # the prompt's are whole at the second step
    whole, chunks = answers(case, lambda: CompletionAnswer("c", request, [PROMPT]), logprobs=True)
    expected = [
        None,
        {"2": {"logprob": -2.0, "rank": 2, "decoded_token": "<2>"}, "100": known(2)[100]._asdict()},
    ]
    assert whole["choices"][0]["prompt_logprobs"] == expected
    assert [choice.get("prompt_logprobs") for choice in of_choice(chunks, 0)] == [expected, None]


def test_what_json_or_text_cannot_hold() -> None:
    request = ChatRequest(model="m", messages=[{}], logprobs=True, top_logprobs=2)
    entry = {5: Logprob(-float("inf"), 9, "\N{REPLACEMENT CHARACTER}"), 6: Logprob(-0.5, 1, None)}
    output = RequestOutput(
        request_id="r",
        outputs=[CompletionOutput(text="", token_ids=[5], finish_reason="length", logprobs=[entry])],
        finished=True,
    )
    answer = ChatAnswer("c", request, [Prompt([1])])
    answer.take(0, output)
    (told,) = answer.whole()["choices"][0]["logprobs"]["content"]
    assert (told["logprob"], told["bytes"]) == (-9999.0, None)
    assert [other["token"] for other in told["top_logprobs"]] == ["token_id:6"]


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_a_stream(continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    body = {"model": "m", "prompt": "a", "stream": True, "stream_options": options}
    request = CompletionRequest.model_validate(body)
    case = Case(1, [[[("x", [7]), ("y", [8, 9])]]])
    _, chunks = answers(case, lambda: CompletionAnswer("c", request, [PROMPT]), logprobs=False)
    counted = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == ([1, 3] if continuous else [None, None])
