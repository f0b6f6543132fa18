"""The table that people read, as the documentation shows it."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
from toy_models import decoder_block, inputs, model, weights

from lamina_jax import slice_at_attention

DOCS = Path(__file__).parents[2] / "docs" / "slicing.md"


def test_the_documented_example_prints_the_documented_table(capsys):
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL))
    exec(compile(blocks["python"], str(DOCS), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == blocks["text"]


def test_the_table_tells_costs_and_bytes():
    table = slice_at_attention(model(decoder_block), weights(4, jnp.bfloat16), *inputs()).explain()
    rows = table.splitlines()
    assert [row.split()[0] for row in rows[2:-1]] == ["0", "2", "1-3", "2", "4"]
    assert "1 dot_general, 1 gather" in rows[2]
    assert "bf16[4,16] 128 B" in rows[3]
    assert rows[-1] == f"in all: carried {4 * 128:,} B, wire {4 * (256 + 128 + 128 + 256):,} B"


def test_without_attention_there_is_one_row():
    rows = slice_at_attention(jnp.sin, jnp.ones(3)).explain().splitlines()
    assert len(rows) == 4
    assert rows[-1] == "in all: carried 0 B, wire 0 B"
