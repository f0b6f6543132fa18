"""The official client of OpenAI against a live server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from fake_server import DEADLINE, MAX_MODEL_LEN, Running, continuation, token_ids


@pytest.fixture
def client(fake: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=str(fake.client.base_url.join("/v1")), api_key="none", timeout=DEADLINE, max_retries=0
    ) as client:
        yield client


def test_a_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(model="fake", prompt="hello", max_tokens=8, temperature=0)
    assert done.object == "text_completion"
    assert done.choices[0].text == continuation("hello", 8)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.total_tokens == 13


def test_several_prompts_as_token_ids(client: openai.OpenAI) -> None:
    prompts = [token_ids(text) for text in ("one", "two", "three")]
    done = client.completions.create(model="fake", prompt=prompts, max_tokens=4)
    assert [choice.text for choice in done.choices] == [
        continuation(text, 4) for text in ("one", "two", "three")
    ]


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="hello",
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    *parts, usage = chunks
    assert "".join(part.choices[0].text for part in parts) == continuation("hello", 40)
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 40


def test_leaving_a_stream_early(client: openai.OpenAI, fake: Running) -> None:
    with client.completions.create(model="fake", prompt="hello", max_tokens=100, stream=True) as stream:
        next(iter(stream))
    fake.wait_for("/stats", lambda response: response.json()["pages_used"] == 0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert model.model_extra == {"max_model_len": MAX_MODEL_LEN}


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fake", prompt="a" * 1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="a", temperature=0.5)
    assert refused.value.param == "temperature"
