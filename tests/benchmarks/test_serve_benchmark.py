"""`bench serve`: its key, its tables, its plot, what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_server import MAX_MODEL_LEN, FakeEngine, Running, pages_are_back, running
from scripted_server import DONE, Scripted, tokens
from serve_flags import arguments

from lamina_jax.benchmarks import serve
from lamina_jax.benchmarks.latencies import Record


def test_what_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key of a file, in every request; ids as the prompt; ignore_eos where asked for."""
    key_file = tmp_path / "keys"
    key_file.write_text("# ours\n\nsecret-of-sixteen\nanother-one-of-them\n")
    server = Scripted(tokens(1), DONE)
    with server.served() as url:
        flags = (
            "--url",
            url,
            "--api-key-file",
            key_file,
            "--requests",
            3,
            "--prompt-tokens",
            5,
            "--ignore-eos",
        )
        serve.run(arguments(*flags))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-of-sixteen"}
    assert len(server.headers) == 4
    for body in server.bodies:
        assert body["model"] == "scripted"
        assert len(body["prompt"]) == 5
        assert body["max_tokens"] == 64
        assert body["ignore_eos"] is True
        assert body["stream"] is True
    assert "secret" not in "".join(capsys.readouterr())


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(serve.API_KEY, raising=False)
    assert serve.read_api_key(None) is None
    monkeypatch.setenv(serve.API_KEY, "secret")
    assert serve.read_api_key(None) == "secret"
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(SystemExit, match="has no key"):
        serve.read_api_key(tmp_path / "keys")


@pytest.fixture(scope="module")
def fake() -> Iterator[Running]:
    with running(FakeEngine().build) as server:
        yield server


def test_the_tables_of_a_load(fake: Running, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(fake.client.base_url).rstrip("/")
    flags = ("--url", url, "--requests", 12, "--rate", 200, "--ids-below", 96, "--ignore-eos")
    lengths = ("--prompt-tokens", "1:20", "--output-tokens", "2:30")
    results = serve.run(arguments(*flags, *lengths, "--ttft-slo", 1e6, "--tpot-slo", 1e6))
    expected, _ = serve.planned(arguments(*flags, *lengths), MAX_MODEL_LEN)
    assert [row["output_tokens"] for row in results["requests"]] == [one.max_tokens for one in expected]
    assert [row["prompt_tokens"] for row in results["requests"]] == [len(one.prompt) for one in expected]
    figures = results["figures"]
    assert (figures["requests_ok"], figures["requests_failed"]) == (12, 0)
    assert figures["goodput_per_second"] == pytest.approx(figures["requests_per_second"])
    assert json.loads(json.dumps(results)) == results
    printed = capsys.readouterr().out
    assert "fake: 12 requests, Poisson at 200/s; 1 to 20 + 2 to 30 tokens, seed 0" in printed
    for name in ("TTFT (time to first token), ms", "TPOT", "ITL", "E2E", "goodput, requests/s"):
        assert name in printed
    fake.wait_for("/stats", pages_are_back)


def test_failures_are_in_the_table(fake: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids that the vocabulary does not have."""
    url = str(fake.client.base_url).rstrip("/")
    results = serve.run(
        arguments("--url", url, "--requests", 4, "--ids-below", 100_000, "--prompt-tokens", 20)
    )
    assert results["figures"]["requests_failed"] == 4
    assert results["figures"]["errors"] == {"HTTP 400": 4}
    assert "HTTP 400" in capsys.readouterr().out


def test_flags_that_cannot_stand_together() -> None:
    with pytest.raises(SystemExit, match="--max-num-seqs 4: flags for a server"):
        serve.run(arguments("--url", "http://127.0.0.1:1", "--", "--max-num-seqs", 4))
    with pytest.raises(SystemExit, match="leave --url out"):
        serve.run(arguments("--url", "http://127.0.0.1:1", "--overhead"))


@pytest.mark.parametrize(
    ("module", "flags", "extra"), [("aiohttp", (), "bench"), ("matplotlib", ("--plot", "x.png"), "plots")]
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, flags: tuple[str, ...], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("load_client", "serve_plot"):
        monkeypatch.delitem(sys.modules, f"lamina_jax.benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit, match=rf"needs {module}: install lamina_jax\[{extra}\]"):
        serve.run(arguments("--url", "http://127.0.0.1:1", *flags))


@pytest.mark.parametrize("name", ["load.png", "load.svg"])
def test_the_plot(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    from lamina_jax.benchmarks.serve_plot import draw

    random = np.random.default_rng(0)
    records = [
        Record(
            sent=0.1 * index,
            prompt_tokens=1,
            arrivals=np.cumsum(random.random(count)).tolist(),
            counts=[1] * count,
        )
        for index, count in enumerate((1, 2, 30))
    ]
    draw(records, 20.0, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(SystemExit, match="nothing to draw"):
        draw([Record(sent=0.0, prompt_tokens=1, error="HTTP 500")], 1.0, tmp_path / name)
