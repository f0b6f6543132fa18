"""`LLM.chat` over the fake engine: the same prompts as over HTTP, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
from fake_server import FakeEngine, continuation, conversation, token_ids

from lamina_jax import LLM, SamplingParams

GREEDY = SamplingParams(max_tokens=5, temperature=0)


def llm_over(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr("lamina_jax.llm.build_engine", lambda *_, **__: engine.build(lambda *_: None))
    return LLM("fake")


def said(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_one_conversation_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_over(FakeEngine(), monkeypatch)
    (output,) = llm.chat(said("a"), GREEDY)
    assert output.prompt_token_ids == token_ids(conversation("a"))
    assert output.outputs[0].text == continuation(conversation("a"), 5)
    outputs = llm.chat([said("a"), said("b", "c", "d")], GREEDY)
    assert [o.outputs[0].text for o in outputs] == [
        continuation(conversation("a"), 5),
        continuation(conversation("b", "c", "d"), 5),
    ]
    (bare,) = llm.chat(said("a"), GREEDY, add_generation_prompt=False)
    assert bare.prompt_token_ids == token_ids(conversation("a")[:-1])


def test_what_cannot_be_answered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no tools"):
        llm_over(FakeEngine(), monkeypatch).chat([{"role": "tool", "content": "a"}])
    with pytest.raises(ValueError, match=r"messages\[0\]\.role"):
        llm_over(FakeEngine(), monkeypatch).chat([{"content": "a"}])
    with pytest.raises(ValueError, match=r"'fake' has no chat template: use generate\(\)"):
        llm_over(FakeEngine(with_tokenizer=False), monkeypatch).chat(said("a"))
