"""A tokenizer and a model small enough to train in a test."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from lamina_jax.models import ModelConfig
from lamina_jax.training.documents import tokenizer_text
from lamina_jax.training.tokenizer import train_tokenizer

TEXTS = (
    'def greet(name):\n    """Say hello to one person."""\n    return f"hello {name}"\n' * 8,
    "import os\n\n\nclass Path:\n    # A path of this machine.\n    def __init__(self):\n        self.x = 1\n"
    * 8,
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(tokenizer_text(texts, seed=0, num_lines=4000), vocab_size=768)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=768,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=256,
        tie_embeddings=True,
    )
