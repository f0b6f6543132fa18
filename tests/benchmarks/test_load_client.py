"""What the load client sends, when, and what it makes of a server's answers."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_server import DONE, Scripted, event, tokens

from lamina_jax.benchmarks.latencies import Record
from lamina_jax.benchmarks.load_client import UNFINISHED, Target, send_all, served_model
from lamina_jax.benchmarks.workload import Planned


def planned(count: int, **changes: Any) -> list[Planned]:
    return [Planned(**{"at": 0.0, "prompt": [1, 2, 3], "max_tokens": 5} | changes) for _ in range(count)]


def the_record(server: Scripted, **changes: Any) -> Record:
    """Of one request to it."""
    with server.served() as url:
        ((record,), _) = send_all(Target(url=url, model="scripted", **changes), planned(1))
    return record


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
