"""Perplexity of a text under a model, disaggregated and collocated, for each dtype of the KV cache.

The text is scored through the engine's own prompt log-probabilities: it is prefilled in chunks, and all but
the first chunk of a window read what the earlier ones cached. So a fault of the split, or of the cache's
dtype, shows as a difference to the first row. See `lamina_jax.benchmarks.windows` for how a long text is cut.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.quick import add_quick
from lamina_jax.benchmarks.reference import (
    NO_REFERENCE,
    add_reference_python,
    reference_command,
    reference_python,
)
from lamina_jax.benchmarks.table import format_rows
from lamina_jax.benchmarks.windows import Window, windows
from lamina_jax.core import SamplingParams
from lamina_jax.llm import LLM
from lamina_jax.models.hf_config import read_config
from lamina_jax.weights.hub import find_model
from lamina_jax.weights.tokenizer import load_tokenizer

PLACEMENTS = "disaggregated", "collocated"
"""In this order: the first engine decides how many virtual CPU devices there are, and it needs more."""

KV_DTYPES = "float32", "bfloat16", "int8", "fp8"


@dataclass(frozen=True)
class Score:
    """Of a text under a model.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        seconds: that it took to score.
    """

    nll: float
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="bundled", help="a folder, or 'bundled'")
    parser.add_argument("--text", type=Path, default=Path("README.md"), help="a file in UTF-8")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only so many of its first tokens")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window, at most")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: half a window)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens prefilled at once")
    dtypes = "auto", "float32", "bfloat16"
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes[:1], help="of the weights")
    add_quick(parser, "the first 2048 tokens", max_tokens=2048)
    add_reference_python(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; the results as plain dicts."""
    reference = reference_python(args.reference_python)
    if reference is None:
        print(f"no row transformers: {NO_REFERENCE}", file=sys.stderr)
    folder = find_model(args.model)
    shape = read_config(folder)
    context = min(args.context, shape.max_position - 1)
    try:
        cut = windows(_tokens(folder, args), context, args.stride or max(1, context // 2))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    counted = sum(window.counted for window in cut)
    print(
        f"{args.text}: {counted} tokens in {len(cut)} windows of at most {context}, prefilled in chunks of "
        f"{args.chunk}",
        file=sys.stderr,
    )
    results = []
    for dtype in dict.fromkeys(shape.dtype if name == "auto" else name for name in args.dtype):
        for row, score in _scores(folder, dtype, context, args.chunk, cut, reference):
            results.append(
                {**row, "nll": score.nll, "perplexity": score.perplexity, "seconds": score.seconds}
            )
            print(f"scored: {', '.join(row.values())}", file=sys.stderr)
    print(f"{args.model}, {args.text}: {counted} tokens, windows of {context}\n")
    print(table(results, counted))
    return [{**result, "tokens": counted, "windows": len(cut), "context": context} for result in results]


def _tokens(folder: Path, args: argparse.Namespace) -> list[int]:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise SystemExit(f"{folder} has no tokenizer.json: its text cannot become tokens")
    return tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.max_tokens]


def _scores(
    folder: Path, dtype: str, context: int, chunk: int, cut: Sequence[Window], reference: str | None
) -> Iterator[tuple[dict[str, str], Score]]:
    """Every row for one dtype of the weights: what it is, and its score. The cache's own choice is first."""
    for placement, kv_dtype in product(PLACEMENTS, sorted(KV_DTYPES, key=lambda name: name != dtype)):
        settings: dict[str, Any] = {"placement": placement, "dtype": dtype, "kv_dtype": kv_dtype}
        with LLM(
            str(folder),
            **settings,
            max_model_len=context + 1,
            max_num_seqs=1,
            max_prefill_tokens=min(chunk, context),
            prefill_stall_ms=math.inf,
        ) as llm:
            yield settings, score(llm, cut)
        del llm
        gc.collect()  # two models may not fit
    if reference is not None:
        yield {"placement": "transformers", "dtype": dtype}, score_by_reference(reference, folder, dtype, cut)


def score(llm: LLM, cut: Sequence[Window]) -> Score:
    """The windows under a model whose `max_model_len` has room for one more token."""
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    started = time.perf_counter()
    outputs = llm.generate([window.tokens for window in cut], asked)
    seconds = time.perf_counter() - started
    logprobs = []
    for window, output in zip(cut, outputs, strict=True):
        assert output.prompt_logprobs is not None
        told = list(zip(window.tokens, output.prompt_logprobs, strict=True))[-window.counted :]
        logprobs += [entries[token].logprob for token, entries in told if entries is not None]
    assert len(logprobs) == sum(window.counted for window in cut)
    return Score(-math.fsum(logprobs) / len(logprobs), seconds)


def score_by_reference(python: str, folder: Path, dtype: str, cut: Sequence[Window]) -> Score:
    """The windows under the same checkpoint as transformers reads it."""
    command = reference_command(python, "transformers_perplexity.py", {"model": str(folder), "dtype": dtype})
    with closing(Column("transformers", command)) as column:
        column.line()
        told = [column.answer(window._asdict()) for window in cut]
    nll, seconds = (math.fsum(one[name] for one in told) for name in ("nll", "seconds"))
    return Score(nll / sum(window.counted for window in cut), seconds)


def table(results: Sequence[dict[str, Any]], counted: int) -> str:
    """A row for each result; NLL in nats per token, and how far it is from the first row's."""
    columns = [
        ("", "{placement}"),
        ("weights", "{dtype}"),
        ("KV cache", "{kv_dtype}"),
        ("perplexity", "{perplexity:.4f}"),
        ("NLL", "{nll:.5f}"),
        ("to the first", "{more:+.5f}"),
        ("tokens/s", "{speed:.0f}"),
    ]
    first = results[0]["nll"]
    return format_rows(
        columns, [{**row, "more": row["nll"] - first, "speed": counted / row["seconds"]} for row in results]
    )
