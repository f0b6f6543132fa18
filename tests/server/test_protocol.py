"""A body of many mistakes is told of one, and costs no more than it is long."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lamina_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

MANY = 2000


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ChatRequest, {"messages": [1] * MANY}),
        (CompletionRequest, {"prompt": [[1, "a"]] * MANY}),
        (CompletionRequest, {"stop": [1] * MANY}),
        (CompletionRequest, {"stop_token_ids": ["a"] * MANY}),
        (CompletionRequest, {"logit_bias": {f"a{i}": "b" for i in range(MANY)}}),
        (CompletionRequest, {f"field_{i}": 1 for i in range(MANY)}),
        (CompletionRequest, {"stream": True, "stream_options": {f"field_{i}": 1 for i in range(MANY)}}),
    ],
)
def test_a_body_of_many_mistakes_is_told_of_one(kind: type[GenerationRequest], wrong: dict[str, Any]) -> None:
    right = {"model": "m", kind.PROMPT: []}
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(right | wrong)
    assert raised.value.error_count() == 1
