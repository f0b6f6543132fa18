"""docs/api.md says what the code does, and speaks of every field that OpenAI's client can send."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat

from lamina_jax.core import SamplingParams
from lamina_jax.server.field_table import field_table
from lamina_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
BOTH = pytest.mark.parametrize("request_class", [CompletionRequest, ChatRequest])


@BOTH
def test_the_document_holds_the_table(request_class: type[GenerationRequest]) -> None:
    assert field_table(request_class) in DOCUMENT.read_text(encoding="utf-8"), (
        "docs/api.md is behind: put in what `python -m lamina_jax.server.field_table` prints"
    )


@BOTH
def test_every_field_is_described(request_class: type[GenerationRequest]) -> None:
    assert all(field.description for field in request_class.model_fields.values())


@pytest.mark.parametrize(
    ("request_class", "theirs"),
    [
        (CompletionRequest, completion.CompletionCreateParamsBase),
        (ChatRequest, chat.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openais_is_known(request_class: type[GenerationRequest], theirs: type) -> None:
    ours = request_class.model_fields.keys() | request_class.REFUSED.keys()
    assert not theirs.__annotations__.keys() - ours
    assert not request_class.model_fields.keys() & request_class.REFUSED.keys()


@BOTH
def test_all_of_sampling_params_can_be_asked_for(request_class: type[GenerationRequest]) -> None:
    assert {field.name for field in fields(SamplingParams)} <= request_class.model_fields.keys()
