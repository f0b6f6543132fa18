"""The chunks of a stream add up to the whole answer, however the outputs are cut."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.core import CompletionOutput, RequestOutput
from lamina_jax.server.protocol import Answer, CompletionRequest

STEP = st.tuples(st.text(max_size=3), st.lists(st.integers(0, 99), max_size=2))
"""The text and the token ids that a step adds: a token may have no text yet."""


def outputs(steps: list[tuple[str, list[int]]]) -> list[RequestOutput]:
    """The whole continuation after each step."""
    so_far = list(accumulate(steps, lambda a, b: (a[0] + b[0], a[1] + b[1])))
    return [
        RequestOutput(
            request_id="r",
            prompt=None,
            prompt_token_ids=[1, 2],
            outputs=[CompletionOutput(text=text, token_ids=ids, finish_reason="length" if last else None)],
            finished=last,
        )
        for last, (text, ids) in zip([False] * (len(steps) - 1) + [True], so_far, strict=True)
    ]


@given(st.lists(st.lists(STEP, min_size=1, max_size=6), min_size=1, max_size=3))
def test_chunks_add_up(prompts: list[list[tuple[str, list[int]]]]) -> None:
    request = CompletionRequest(model="m", prompt=["a"] * len(prompts), return_token_ids=True, stream=True)
    whole, streamed = Answer("c", request), Answer("c", request)
    chunks = []
    for index, steps in enumerate(prompts):
        grown = outputs(steps)
        whole.take(index, grown[-1])
        chunks += [streamed.chunk(index, output) for output in grown]
    choices = [choice for chunk in chunks if chunk is not None for choice in chunk["choices"]]
    assert all(choice["text"] or choice["token_ids"] or choice["finish_reason"] for choice in choices)
    for expected in whole.whole()["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [token for choice in mine for token in choice["token_ids"]] == expected["token_ids"]
        assert [choice["finish_reason"] for choice in mine][-1] == "length"
    assert streamed.usage() == whole.usage()
