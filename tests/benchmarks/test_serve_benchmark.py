"""The load client: its load, its figures, what it makes of a server's answers, and its command."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_server import MAX_MODEL_LEN, FakeEngine, Running, pages_are_back, running

from lamina_jax.benchmarks import http_overhead, serve, workload
from lamina_jax.benchmarks.latencies import Record, goodput, summary
from lamina_jax.benchmarks.load_client import UNFINISHED, Target, send_all, served_model
from lamina_jax.benchmarks.server_process import ServerProcess, serving
from lamina_jax.benchmarks.workload import Planned

DEADLINE = 20.0


def arguments(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def planned(count: int, **changes: Any) -> list[Planned]:
    return [Planned(**{"at": 0.0, "prompt": [1, 2, 3], "max_tokens": 5} | changes) for _ in range(count)]


class Scripted:
    """A server that answers every completion with the same lines; it counts, and keeps what it is sent."""

    def __init__(self, *writes: bytes, status: int = 200, pause: float = 0.0) -> None:
        self.writes, self.status, self.pause = writes, status, pause
        self.at_once = self.most_at_once = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    async def models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        return web.json_response({"data": [{"id": "scripted"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        response = web.StreamResponse(status=self.status)
        await response.prepare(request)
        *writes, last = self.writes
        for write in writes:
            await asyncio.sleep(self.pause)
            await response.write(write)
        self.at_once -= 1  # before the client can know that it is over
        await response.write(last)
        return response

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its URL."""
        loop, listening, url = asyncio.new_event_loop(), threading.Event(), []

        async def serve() -> None:
            app = web.Application()
            app.add_routes(
                [web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)]
            )
            self.runner = web.AppRunner(app)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
            host, port = self.runner.addresses[0]
            url.append(f"http://{host}:{port}")
            listening.set()

        def run() -> None:
            loop.run_until_complete(serve())
            loop.run_forever()
            loop.run_until_complete(self.runner.cleanup())
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        assert listening.wait(DEADLINE)
        try:
            yield url[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(DEADLINE)


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def tokens(*ids: int, text: str = "") -> bytes:
    return event(choices=[{"text": text, "token_ids": list(ids)}])


DONE = b"data: [DONE]\n\n"


def the_record(server: Scripted, **changes: Any) -> Record:
    """Of one request to it."""
    with server.served() as url:
        ((record,), _) = send_all(Target(url=url, model="scripted", **changes), planned(1))
    return record


# The load


@pytest.mark.parametrize(("text", "bounds"), [("7", (7, 7)), ("2:9", (2, 9))])
def test_lengths_are_one_or_between_two(text: str, bounds: tuple[int, int]) -> None:
    assert workload.length_bounds(text) == bounds


@pytest.mark.parametrize("text", ["0", "9:2", "x", "", "3:", "1:2:3"])
def test_other_lengths_are_refused(text: str) -> None:
    if text == "3:":
        assert workload.length_bounds(text) == (3, 3)
        return
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


# The figures


def test_figures_by_hand() -> None:
    records = [
        Record(sent=0.0, prompt_tokens=4, arrivals=[0.1, 0.2, 0.4], counts=[1, 1, 1]),
        Record(sent=1.0, prompt_tokens=6, arrivals=[0.3, 0.5], counts=[1, 4]),
        Record(sent=2.0, prompt_tokens=8, arrivals=[0.2], counts=[1]),
        Record(sent=2.0, prompt_tokens=9, arrivals=[9.9], counts=[1], error="HTTP 429"),
    ]
    figures = summary(records, 2.0)
    assert figures["requests_ok"] == 3
    assert figures["requests_failed"] == 1
    assert figures["errors"] == {"HTTP 429": 1}
    assert figures["requests_per_second"] == 1.5
    assert figures["prompt_tokens"] == 18
    assert figures["output_tokens"] == 9
    assert figures["output_tokens_per_second"] == 4.5
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)
    assert figures["ttft_ms"]["max"] == pytest.approx(300)
    assert figures["tpot_ms"]["mean"] == pytest.approx((150 + 50) / 2), "of those with two tokens or more"
    assert figures["itl_ms"]["mean"] == pytest.approx((100 + 200 + 200) / 3), "an event is an arrival"
    assert figures["e2e_ms"]["p50"] == pytest.approx(400)
    assert goodput(records, 2.0, ttft_ms=200.001, tpot_ms=None) == 1.0
    assert goodput(records, 2.0, ttft_ms=None, tpot_ms=60) == 1.0, "one token has no TPOT"
    assert goodput(records, 2.0, ttft_ms=250, tpot_ms=60) == 0.5


def test_figures_where_nothing_came() -> None:
    figures = summary([Record(sent=0.0, prompt_tokens=1, error="ClientConnectorError")], 1.0)
    assert figures["output_tokens"] == 0
    assert [figures[f"{name}_ms"] for name in ("ttft", "tpot", "itl", "e2e")] == [None] * 4


# What it makes of a server's answers


def test_events_are_read_however_they_are_split() -> None:
    usage = event(choices=[], usage={"completion_tokens": 4})
    stream = tokens(5) + tokens(6, 7, text="x") + b": a comment\n\n" + tokens(8) + usage + DONE
    parts = [stream[start : start + 9] for start in range(0, len(stream), 9)]
    record = the_record(Scripted(*parts, pause=0.002))
    assert record.error is None
    assert record.counts == [1, 2, 1]
    assert record.output_tokens == 4
    assert record.arrivals == sorted(record.arrivals)
    assert record.arrivals[0] > 0


def test_a_server_that_tells_no_token_ids_is_counted_by_its_usage() -> None:
    events = [event(choices=[{"text": text}]) for text in ("a", "", "b")]
    record = the_record(Scripted(*events, event(choices=[], usage={"completion_tokens": 3}), DONE))
    assert record.error is None
    assert len(record.arrivals) == 2
    assert record.output_tokens == 3


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (Scripted(tokens(1)), UNFINISHED),
        (Scripted(tokens(1), event(error={"code": "engine_died"})), "error event: engine_died"),
        (Scripted(b'{"error": {"code": "queue_full"}}', status=429), "HTTP 429 queue_full"),
        (Scripted(b"<html>", status=502), "HTTP 502"),
        (Scripted(b"data: {\n\n"), "JSONDecodeError"),
    ],
)
def test_what_fails_is_counted_by_kind(server: Scripted, error: str) -> None:
    assert the_record(server).error == error


def test_a_request_that_takes_too_long_is_given_up() -> None:
    record = the_record(Scripted(tokens(1), tokens(2), pause=1.0), seconds=0.3)
    assert record.error == "took longer than 0.3 s"


def test_nobody_there() -> None:
    nobody = Target(url="http://127.0.0.1:1", model="none")
    ((record,), _) = send_all(nobody, planned(1))
    assert record.error == "ClientConnectorError"
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1/v1/models"):
        served_model(nobody.url)


def test_concurrency_bounds_what_is_sent_at_once() -> None:
    server = Scripted(tokens(1), DONE, pause=0.05)
    with server.served() as url:
        records, _ = send_all(Target(url=url, model="scripted"), planned(9), concurrency=3)
    assert server.most_at_once == 3
    assert [record.error for record in records] == [None] * 9
    assert max(record.sent for record in records) > 0.05, "waiting for a turn is before being sent"


def test_requests_are_sent_when_they_arrive() -> None:
    done: list[Record] = []
    with Scripted(tokens(1), DONE).served() as url:
        target = Target(url=url, model="scripted")
        records, seconds = send_all(target, planned(1, at=0.3) + planned(1), done=done.append)
    assert records[0].sent == pytest.approx(0.3, abs=0.2)
    assert records[1].sent < 0.2
    assert seconds > 0.3
    assert done == [records[1], records[0]]


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


# The command


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
    monkeypatch.delitem(sys.modules, "lamina_jax.benchmarks.serve_plot", raising=False)
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


# What HTTP costs


def level(streams: int, alone: float, http: float) -> dict[str, Any]:
    """Two streams, one later than the other, with gaps of so many ms where both stream."""

    def figures(gap: float, processes: tuple[str, ...]) -> http_overhead.Figures:
        later = [1.0 + 1e-3 * gap * index for index in range(11)]
        arrivals = [[0.5, *later], later]
        records = [
            Record(sent=0.0, prompt_tokens=1, arrivals=times, counts=[1] * len(times)) for times in arrivals
        ]
        return http_overhead.figures(records, dict.fromkeys(processes, 0.0023))

    rounds = [
        {"alone": figures(alone, ("engine",)), "http": figures(http, ("client", "server", "engine"))},
    ]
    return {"streams": streams, "tokens": 11, **http_overhead._compared(rounds)}


def test_steady_gaps_are_those_while_all_stream() -> None:
    found = level(64, 2.0, 3.0)
    assert found["alone"]["steady_p99_ms"] == pytest.approx(2.0)
    assert found["alone"]["p99_ms"] > 100, "the first stream has waited for the second"
    assert found["alone"]["engine_cpu_us"] == pytest.approx(100)
    assert found["steady_p99_ratio"] == pytest.approx(1.5)
    assert found["microseconds_per_token"] == pytest.approx(1e6 * 0.010 / 23)
    early = Record(sent=0.0, prompt_tokens=1, arrivals=[0.1, 0.2], counts=[1, 1])
    late = Record(sent=0.3, prompt_tokens=1, arrivals=[0.1, 0.2], counts=[1, 1])
    assert http_overhead.figures([early, late], {})["steady_p99_ms"] is None


@pytest.mark.parametrize(("http", "verdict"), [(5.9, "steady: 1.97 x, met"), (9.0, "steady: 3.00 x, missed")])
def test_the_goal_of_the_overhead(capsys: pytest.CaptureFixture[str], http: float, verdict: str) -> None:
    http_overhead._print("some model", [level(1, 2.0, 3.0), level(64, 3.0, http)])
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(verdict)
    assert printed.count("through HTTP") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_of_its_own_and_the_engine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--placement", "collocated", "--max-model-len", "128", "--max-prefill-tokens", "32")
    flags = ("--quick", "--overhead", "--streams", 1, 6)
    results = serve.run(arguments(*flags, "--", *few, "--max-num-seqs", 4))
    for found, streams in zip(results["levels"], (1, 6), strict=True):
        assert found["alone"]["tokens"] == found["http"]["tokens"] == 32 * streams
        assert found["alone"]["p99_ms"] > 0
        assert found["http"]["engine_cpu_us"] > found["http"]["server_cpu_us"] > 0
    assert "CPU time per token, us" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(SystemExit, match=r"(?s)exit code 1:.*no/such/folder"), serving("no/such/folder"):
        pytest.fail("it is not there")
    server = ServerProcess("bundled", ["--max-num-seqs", "4"])
    try:
        with pytest.raises(SystemExit, match=r"not ready after 0 s"):
            server.wait_ready(0.1)
    finally:
        server.end()
    assert server.process.returncode is not None
