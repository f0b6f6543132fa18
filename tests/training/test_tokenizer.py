"""The tokenizer is lossless, numbers are stable, and chats look as the documents do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lamina_jax.training.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer

WHITESPACE = st.text(alphabet=" \t\n\r\u00a0\u3000a1", max_size=30)


@given(text=st.one_of(st.text(max_size=60), WHITESPACE))
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(number=st.integers(0, 9999), before=st.sampled_from(["is", "x =", "(", "\n", "a", "", ":"]))
def test_a_number_is_the_same_tokens_whatever_stands_before_it(
    tokenizer: Tokenizer, number: int, before: str
) -> None:
    alone = tokenizer.encode(f" {number:04d}", add_special_tokens=False).tokens
    assert len(alone) == 2
    assert tokenizer.encode(f"{before} {number:04d}.").tokens[-3:-1] == alone


def test_a_text_begins_with_bos_once(tokenizer: Tokenizer) -> None:
    bos = tokenizer.token_to_id("<|bos|>")
    assert tokenizer.encode("def f():").ids.count(bos) == 1
    assert tokenizer.encode("").ids == [bos]
    assert tokenizer.decode([bos]) == ""


def test_the_chat_template_writes_turns_as_single_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, max_length=256)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(config["chat_template"])
    text = template.render(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
        add_generation_prompt=True,
    )
    assert text == "<|bos|><|system|>Be brief.<|eos|><|user|>Hi<|eos|><|assistant|>"
    tokens = (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).tokens
    )
    assert [token for token in tokens if token in SPECIAL_TOKENS] == [
        "<|bos|>", "<|system|>", "<|eos|>", "<|user|>", "<|eos|>", "<|assistant|>"
    ]  # fmt: skip


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2048"):
        train_tokenizer(["def f(): pass"], vocab_size=2048)
