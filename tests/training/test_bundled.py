"""The model that comes with the package: its size, and its recall in its own plain forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina_jax
from lamina_jax.train import HELD_OUT_SEED
from lamina_jax.training.evaluation import evaluate_plain, load_plain
from lamina_jax.training.recall import recall_prompts

FOLDER = Path(lamina_jax.__file__).parent / "data" / "bundled"
NEEDED_AT_512 = 0.95


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20


def test_text_comes_back_as_it_was() -> None:
    _, tokenizer = load_plain(FOLDER)
    for text in ("import os\n\n\ndef f(x):\n\treturn  x\n", "naïve café, 東京 🙂\r\n", " 0 00 12345 "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("length", "num"), [(128, 48), (512, 48)])
def test_it_recalls_facts_that_it_never_saw(length: int, num: int) -> None:
    model, tokenizer = load_plain(FOLDER)
    prompts = recall_prompts(HELD_OUT_SEED + 1, num, length, tokenizer)
    assert evaluate_plain(model, prompts) >= NEEDED_AT_512
