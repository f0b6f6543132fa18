"""The load: lengths, arrivals, traces."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from serve_flags import arguments

from lamina_jax.benchmarks import serve, workload


@pytest.mark.parametrize(("text", "bounds"), [("7", (7, 7)), ("2:9", (2, 9)), ("3:", (3, 3))])
def test_lengths_are_one_or_between_two(text: str, bounds: tuple[int, int]) -> None:
    assert workload.length_bounds(text) == bounds


@pytest.mark.parametrize("text", ["0", "9:2", "x", "", "1:2:3"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="LEAST:MOST"):
        workload.length_bounds(text)


def test_poisson_arrivals_have_their_rate() -> None:
    at = workload.poisson(20_000, 50.0, np.random.default_rng(0))
    gaps = np.diff(at)
    assert at[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert not workload.poisson(3, float("inf"), np.random.default_rng(0)).any()


def test_a_seed_makes_the_same_load_again() -> None:
    flags = ("--requests", 30, "--rate", 5, "--prompt-tokens", "3:40", "--output-tokens", "1:9")
    first, _ = serve.planned(arguments(*flags, "--ids-below", 7), None)
    assert serve.planned(arguments(*flags, "--ids-below", 7), None)[0] == first
    assert serve.planned(arguments(*flags, "--ids-below", 7, "--seed", 1), None)[0] != first
    assert {len(request.prompt) for request in first} <= set(range(3, 41))
    assert {token for request in first for token in request.prompt} == set(range(7))
    assert {request.max_tokens for request in first} <= set(range(1, 10))


ROWS = [(10.0, 300, 20), (10.5, 2, 1), (12.25, 30, 600)]


@pytest.fixture(params=["trace.csv", "trace.jsonl", "trace.csv.gz", "trace.jsonl.gz"])
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lines = [",".join(workload.COLUMNS), *(f"{at},{prompt},{output}" for at, prompt, output in ROWS)]
    if "jsonl" in request.param:
        lines = [json.dumps(dict(zip(workload.COLUMNS, row, strict=True))) for row in ROWS]
    text = ("\n".join(lines) + "\n").encode()
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_a_trace_gives_arrivals_and_lengths(trace: Path) -> None:
    requests, left_out = serve.planned(arguments("--trace", trace), None)
    assert left_out == 0
    assert [request.at for request in requests] == [0.0, 0.5, 2.25]
    assert [(len(request.prompt), request.max_tokens) for request in requests] == [row[1:] for row in ROWS]


def test_a_trace_is_cut_scaled_and_sent_at_another_rate(trace: Path) -> None:
    flags = ("--trace", trace, "--requests", 2, "--length-scale", 0.1, "--rate", "inf")
    requests, _ = serve.planned(arguments(*flags), None)
    assert [(request.at, len(request.prompt), request.max_tokens) for request in requests] == [
        (0.0, 30, 2),
        (0.0, 1, 1),
    ]


def test_requests_longer_than_the_context_are_left_out(trace: Path) -> None:
    requests, left_out = serve.planned(arguments("--trace", trace), 320)
    assert [len(request.prompt) for request in requests] == [300, 2]
    assert left_out == 1
    with pytest.raises(SystemExit, match="context of 2 tokens"):
        serve.planned(arguments("--trace", trace), 2)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (
            "a.csv",
            "arrival_s,input_tokens,output_tokens\n1,2,3\n1,0,3\n",
            "a.csv, line 3: expected arrival_s",
        ),
        ("a.csv", "when,in,out\n1,2,3\n", "line 2"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n", "has no requests"),
        ("a.jsonl", '{"arrival_s": 1, "input_tokens": "x", "output_tokens": 2}\n', "line 1"),
        ("a.jsonl", "no json\n", "Expecting value"),
    ],
)
def test_a_wrong_trace_is_refused_by_its_line(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=why):
        serve.planned(arguments("--trace", tmp_path / name), None)
    with pytest.raises(SystemExit, match="No such file"):
        serve.planned(arguments("--trace", tmp_path / "none.csv"), None)
