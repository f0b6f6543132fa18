"""Text and token ids, and the incremental detokenizer against decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights.tokenizer import (
    MOST_PENDING,
    Detokenizer,
    Tokenizer,
    load_tokenizer,
    texts_of_tokens,
)


def byte_level() -> tokenizers.Tokenizer:
    """In the manner of GPT-2, Llama 3 and Qwen."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["hello world, hello naïve 漢字 🎉"] * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """In the manner of Llama 2: words begin with a mark for the space, the first of a text is taken off."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "h",
        "e",
        "l",
        "o",
        "▁h",
    ]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("▁", "h")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


TOKENIZERS = {"byte level": Tokenizer(byte_level()), "byte fallback": Tokenizer(byte_fallback())}
EACH = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
TEXT = st.text(st.sampled_from("helo wé漢🎉\n"), max_size=12)


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_special_tokens_are_written_as_the_file_says_and_not_read(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("hello")
    assert ids[0] == 0
    assert tokenizer.decode([*ids, 1]) == "hello"
    assert tokenizer.vocab_size > 256


@EACH
@given(text=TEXT)
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text


@EACH
@given(text=TEXT)
def test_texts_of_tokens_add_up_too(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = texts_of_tokens(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert texts_of_tokens(None, ids) == [""] * len(ids)


@given(text=TEXT, cut=st.integers(0, 30))
def test_pieces_add_up_wherever_the_text_breaks_off(text: str, cut: int) -> None:
    """Not so with byte fallback, where half a character spoils the reading of the bytes before it."""
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(text)[:cut]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@EACH
def test_a_character_comes_whole_or_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎊")
    assert len(ids) >= 4
    *parts, rest = pieces(tokenizer, ids)
    assert [part for part in parts if part] == ["🎊"]
    assert rest == ""
    *parts, rest = pieces(tokenizer, ids[:-1])
    assert "".join(parts) == ""
    assert set(rest) == {"\N{REPLACEMENT CHARACTER}"}


@EACH
@given(prompt=TEXT, text=st.text(st.sampled_from("helo "), min_size=1, max_size=6))
def test_a_continuation_keeps_its_first_space(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before, both = tokenizer.encode("h" + prompt), tokenizer.encode("h" + prompt + " " + text)
    if both[: len(before)] == before:
        after = "".join(pieces(tokenizer, both[len(before) :], before))
        assert tokenizer.decode(before) + after == tokenizer.decode(both)


@EACH
@given(data=st.data())
def test_random_tokens_never_raise(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """An untrained model writes bytes that are no UTF-8, and ids that the tokenizer does not know."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    assert all(isinstance(piece, str) for piece in pieces(tokenizer, ids))


@EACH
def test_bytes_that_are_no_text_are_not_kept_for_ever(tokenizer: Tokenizer) -> None:
    *_, last = tokenizer.encode("🎊")  # ends a character that never begins
    parts = pieces(tokenizer, [last] * 1000)
    assert "".join(parts) == tokenizer.decode([last] * 1000)
    assert sum(map(bool, parts)) == 1 + 1000 // MOST_PENDING


def test_no_tokenizer_is_none_and_a_broken_one_an_error(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json.*lists of token ids"):
        Tokenizer.from_folder(tmp_path)
    for broken in ("", "{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file"):
            load_tokenizer(tmp_path)
