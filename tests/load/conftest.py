"""What load tests share: a tiny checkpoint that takes text and chats, and a way to start commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import TEMPLATE, tokenizer
from real_processes import Process, Start
from tiny_models import TINY, save_random

MODEL = replace(TINY, vocab_size=96, num_layers=2, num_kv_heads=2, max_position=512)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights with logits well apart; the tokenizer of the fake server, one token a character."""
    folder: Path = save_random(tmp_path_factory.mktemp("tiny"), MODEL)
    tokenizer().inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "$"}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def run() -> Iterator[Start]:
    """`run(class, ...)` starts a process, which is killed at the end if it still runs."""
    with ExitStack() as stack:

        def start(kind: type[Process], *arguments: object, **more: object) -> Process:
            return stack.enter_context(closing(kind(*arguments, **more)))  # type: ignore[arg-type]

        yield start
