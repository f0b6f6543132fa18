"""litellm and langchain-openai against a live server; a library that is not installed is left out.

Run with litellm 1.106.2 and langchain-openai 1.7.3.
"""

from __future__ import annotations

import pytest
from fake_server import Running

pytestmark = [
    pytest.mark.load,
    # Their own imports and connections are theirs.
    pytest.mark.filterwarnings("default"),
]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def base_url(live: Running) -> str:
    return str(live.client.base_url.join("/v1"))


def test_litellm(base_url: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {"base_url": base_url, "api_key": "none", "max_tokens": 8, "temperature": 0, "timeout": 60}
    done = litellm.completion(model="hosted_vllm/bundled", messages=MESSAGES, **asked)
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.completion_tokens <= 8
    chunks = litellm.completion(model="hosted_vllm/bundled", messages=MESSAGES, stream=True, **asked)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == done.choices[0].message.content
    )
    text = litellm.text_completion(model="text-completion-openai/bundled", prompt="import ", **asked)
    assert text.choices[0].text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="hosted_vllm/nothing", messages=MESSAGES, **asked)


def test_langchain(base_url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="bundled",
        base_url=base_url,
        api_key="none",
        max_tokens=8,
        temperature=0,
        timeout=60,
        max_retries=0,
    )
    messages = [(message["role"], message["content"]) for message in MESSAGES]
    done = model.invoke(messages)
    assert done.response_metadata["finish_reason"] in ("stop", "length")
    assert done.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in model.stream(messages)) == done.content
    assert [answer.content for answer in model.batch([messages] * 3)] == [done.content] * 3
    completion = langchain.OpenAI(
        model="bundled", base_url=base_url, api_key="none", max_tokens=4, temperature=0, max_retries=0
    )
    assert completion.invoke("import ")
