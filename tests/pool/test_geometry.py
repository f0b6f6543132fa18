"""The head table: every head has one place on either side, and k and v one sender."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError
from lamina_jax.pool.geometry import head_table


@given(st.data())
def test_heads_meet_their_own(data: st.DataObject) -> None:
    """Wherever heads can be shared at all: query heads in order on both sides, beside their KV heads."""
    kv_heads, group = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    heads = kv_heads * group
    workers = data.draw(st.sampled_from([w for w in range(1, kv_heads + 1) if kv_heads % w == 0]))
    shards = data.draw(st.integers(1, heads))
    try:
        table = head_table(heads, kv_heads, shards, workers)
    except ConfigError as error:
        fitting = str(error).split("memory devices; ")[1].removesuffix(" would").split(", ")
        assert str(shards) not in fitting
        for count in fitting:
            head_table(heads, kv_heads, int(count), workers)
        return

    pieces = table.pieces
    assert [h for piece in pieces for h in range(piece.q_start, piece.q_stop)] == list(range(heads))
    for piece in pieces:
        needed = {h // group for h in range(piece.q_start, piece.q_stop)}
        assert needed == set(range(piece.kv_start, piece.kv_stop))
        assert piece.shard == piece.q_start // (heads // shards)
        assert piece.worker == piece.q_start // (heads // workers)
    sent = [h for piece in pieces if piece.sends_kv for h in range(piece.kv_start, piece.kv_stop)]
    assert sent == list(range(kv_heads))
    assert [j for w in range(workers) for j in table.of_worker(w)] == list(range(len(pieces)))
    assert all(pieces[j].worker == w for w in range(workers) for j in table.of_worker(w))
    assert table.per_shard * shards == table.per_worker * workers == len(pieces) == max(shards, workers)


def test_shards_beyond_the_kv_heads_share_them() -> None:
    table = head_table(8, 2, shards=4, workers=1)
    assert table.copies == 2
    assert [str(piece) for piece in table.pieces] == [
        "query heads 0-1, KV head 0",
        "query heads 2-3, KV head 0 (k and v come from a shard before)",
        "query heads 4-5, KV head 1",
        "query heads 6-7, KV head 1 (k and v come from a shard before)",
    ]


@pytest.mark.parametrize(("shards", "workers"), [(3, 1), (16, 4), (6, 2)])
def test_uneven_is_refused(shards: int, workers: int) -> None:
    with pytest.raises(ConfigError, match=r"8 query and 4 KV heads.* 1, 2, 4, 8 would"):
        head_table(8, 4, shards, workers)


def test_the_documented_table_is_printed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tensor_parallelism.md").read_text(encoding="utf-8")
    code, table = re.findall(r"```(?:python|text)\n(.*?)```", text, re.DOTALL)[:2]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/tensor_parallelism.md", "exec"), {})
    assert printed.getvalue() == table
