"""Lease by lease: who gets the worker, when it is free again, and that the engine hears of it."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import grpc
import pytest
from echo_session import ROOM, SPEC, EchoSession, spec
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_talk import StartWorker, data_channel, echo, free, room, until

import lamina_jax
from lamina_jax.config import ConfigError, SecurityConfig
from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.control import WorkerClient, WorkerError, connect
from lamina_jax.exchange.control_messages import SERVICE
from lamina_jax.exchange.frames import HEADER_BYTES, Header, Kind
from lamina_jax.worker import leases
from lamina_jax.worker import server as worker_server
from lamina_jax.worker.lease import Refused


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TAKE_SECONDS", 0.5)


def test_describe_says_what_the_worker_is(start_worker: StartWorker) -> None:
    server, client = start_worker(memory_fraction=0.01)
    before = time.monotonic_ns()
    found = client.describe()
    assert before < found.clock_ns < time.monotonic_ns()
    assert (found.platform, found.devices, found.version) == ("cpu", 2, lamina_jax.__version__)
    assert 0 < found.memory_bytes < 2**40
    assert found.held_by == ""
    client.lease(SPEC)
    assert "process" in client.describe().held_by
    assert server.port != found.data_port


def test_what_a_lease_would_need_is_measured_while_nobody_has_the_worker(start_worker: StartWorker) -> None:
    _, client = start_worker()
    assert client.measure(SPEC) == EchoSession.footprint
    with pytest.raises(WorkerError, match=r"out of tape$"):
        client.measure(spec(page_size=2))
    client.lease(SPEC, group="hosts")
    with pytest.raises(WorkerError, match="held by another engine"):
        client.measure(SPEC)
    assert client.measure(SPEC, group="hosts") == EchoSession.footprint  # the next host of the same engine


def test_a_lease_reports_compiles_and_answers(start_worker: StartWorker) -> None:
    _, client = start_worker()
    reports: list[tuple[str, int, int]] = []
    lease = client.lease(SPEC, lambda *report: reports.append(report))
    assert [report[1:] for report in reports] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert client.address in reports[0][0]
    assert (len(lease.session_id), lease.pages, lease.lost) == (16, 8, None)
    channel = data_channel(client, lease.session_id)
    assert echo(channel, b"one") == b"one"
    assert echo(channel, b"") == b""


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_closing_a_lease_frees_the_worker_for_the_next(start_worker: StartWorker, kind: str) -> None:
    server, client = start_worker()
    for _ in range(3):
        lease = client.lease(SPEC)
        lost: list[str] = []
        lease.on_lost(lost.append)
        channel = data_channel(client, lease.session_id, kind)
        assert echo(channel, b"abc") == b"abc"
        lease.close()
        with pytest.raises(ChannelClosed):
            channel.receive(room)
    assert free(server)
    assert lost == []  # who closes a lease has not lost it


def test_the_grpc_data_stream_is_the_leases_too(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease, done = client.lease(SPEC), threading.Event()

    def requests() -> object:
        yield Header(Kind.QUERY, 5).pack() + b"hello"
        done.wait(10)

    channel = client.open_channel(())
    stream = channel.stream_stream(f"/{SERVICE}/Exchange")
    answers = stream(requests(), metadata=lease.metadata)
    answer = next(answers)
    assert answer[:HEADER_BYTES] == Header(Kind.ANSWER, 5).pack()
    assert answer[HEADER_BYTES:] == b"hello"
    assert server.leases.traffic.bytes_received == HEADER_BYTES + 5
    with pytest.raises(grpc.RpcError, match="data stream already"):
        next(stream(requests(), metadata=lease.metadata))
    with pytest.raises(grpc.RpcError, match="no lease has this session id"):
        next(stream(requests(), metadata=client.metadata))
    lease.close()
    with pytest.raises(grpc.RpcError):
        next(answers)
    assert free(server)
    done.set()
    channel.close()


def test_nothing_is_left_of_a_lease(start_worker: StartWorker) -> None:
    """Sessions (and so their pages), threads and descriptors, however it was used."""

    def cycle(number: int) -> None:
        lease = client.lease(SPEC)
        if number % 3:
            channel = data_channel(client, lease.session_id, ("tcp", "unix")[number % 2])
            assert echo(channel, b"x") == b"x"
            if number % 3 == 2:
                channel.close()
        lease.close()
        assert free(server)

    def held() -> tuple[int, int, int]:
        gc.collect()
        return len(EchoSession.alive), threading.active_count(), len(os.listdir("/proc/self/fd"))

    server, client = start_worker()
    gc.freeze()  # what other tests left is not looked through again and again
    for number in range(6):
        cycle(number)
    assert until(lambda: held()[0] == 0)
    before = held()
    for number in range(12):
        cycle(number)
    assert until(lambda: all(now <= then + 1 for now, then in zip(held(), before, strict=True)))
    gc.unfreeze()


@pytest.mark.parametrize("method", ["Describe", "Lease"])
def test_any_message_is_answered_or_refused(start_worker: StartWorker, method: str) -> None:
    _, client = start_worker()
    call = client.open_channel(()).unary_stream(f"/{SERVICE}/{method}")

    @settings(max_examples=30)
    @given(st.binary(max_size=256))
    def send(message: bytes) -> None:
        with suppress(grpc.RpcError):
            for _ in call(message, timeout=5):
                pass

    send()
    assert client.describe().held_by == ""


def test_another_engine_is_told_who_holds_the_worker(start_worker: StartWorker) -> None:
    _, client = start_worker()
    lease = client.lease(SPEC)
    with pytest.raises(WorkerError, match=r"held by another engine, .*process") as refusal:
        client.lease(SPEC)
    assert refusal.value.temporary
    assert client.address in str(refusal.value)
    assert lease.lost is None


def test_hosts_of_one_group_share_the_worker(start_worker: StartWorker) -> None:
    server, client = start_worker()
    leases = [client.lease(replace(SPEC, first_device=device), group="one") for device in (0, 1)]
    channels = [data_channel(client, lease.session_id) for lease in leases]
    assert [echo(channel, text) for channel, text in zip(channels, (b"1", b"2"), strict=True)] == [b"1", b"2"]
    assert len({tuple(session.devices) for session in EchoSession.alive}) == 2
    for group in ("another", ""):
        with pytest.raises(WorkerError, match="held by another engine"):
            client.lease(SPEC, group=group)
    channels[0].close()
    assert until(lambda: leases[0].lost is not None and len(server.leases.held) == 1)
    assert echo(channels[1], b"3") == b"3"
    leases[1].close()
    assert free(server)


def test_an_order_to_pull_finds_its_lease_by_group_and_heads(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease, _ = (client.lease(replace(SPEC, kv_start=start), group="one") for start in (2, 0))
    assert server.leases.holding("one", 2).session_id == lease.session_id
    for group, kv_start in (("one", 1), ("another", 2), ("", 2)):
        with pytest.raises(Refused, match=f"no lease of this group has the KV heads from {kv_start} on"):
            server.leases.holding(group, kv_start)
    server.leases.holding("one", 2).end("over")
    with pytest.raises(Refused):
        server.leases.holding("one", 2)


def test_pages_are_counted_over_all_leases_of_a_group(start_worker: StartWorker) -> None:
    server, client = start_worker(memory_fraction=0.01)
    most = client.describe().memory_bytes // SPEC.geometry.bytes_per_page
    wanted = spec(num_pages=most // 2 + 1)
    lease = client.lease(wanted, group="one")
    with pytest.raises(WorkerError, match="of which other hosts of this engine have"):
        client.lease(wanted, group="one")
    lease.close()
    assert free(server)
    client.lease(wanted, group="one")


def test_one_of_many_engines_gets_the_worker(start_worker: StartWorker) -> None:
    _, client = start_worker()

    def attempt(_: int) -> bool:
        try:
            client.lease(SPEC)
        except WorkerError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_a_second_data_connection_is_refused_and_disturbs_nothing(start_worker: StartWorker) -> None:
    _, client = start_worker()
    lease = client.lease(SPEC)
    first = data_channel(client, lease.session_id)
    assert echo(first, b"1") == b"1"
    second = data_channel(client, lease.session_id, "unix")
    header, payload = second.receive(room)
    assert header.kind is Kind.FAILED
    assert b"data stream already" in payload.tobytes()
    assert echo(first, b"2") == b"2"
    assert lease.lost is None


def test_the_lease_ends_with_its_data_connection(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease, lost = client.lease(SPEC), threading.Event()
    lease.on_lost(lambda reason: lost.set())
    channel = data_channel(client, lease.session_id)
    echo(channel, b"x")
    channel.close()
    assert lost.wait(5)
    assert "data stream has ended" in str(lease.lost)
    assert free(server)
    late: list[str] = []
    lease.on_lost(late.append)
    assert late == [lease.lost]


def test_a_session_that_fails_says_why(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id)
    assert echo(channel, b"", step=2) == b"out of tape\nsecond line"
    assert free(server)
    assert until(lambda: lease.lost is not None)
    assert "out of tape" in str(lease.lost)


def test_a_frame_without_room_is_refused(start_worker: StartWorker) -> None:
    server, client = start_worker()
    lease = client.lease(SPEC)
    channel = data_channel(client, lease.session_id)
    with pytest.raises(ChannelClosed):
        echo(channel, bytes(ROOM + 1))
    assert free(server)
    assert until(lambda: lease.lost is not None)
    assert "may not come here" in str(lease.lost)


def test_compilation_ends_when_the_engine_leaves(start_worker: StartWorker) -> None:
    """64 programs of half a second each are not waited for."""
    server, client = start_worker()
    hang_up = WorkerClient(client.address, SecurityConfig())

    def leave(phase: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hang_up.lease(spec(page_size=1), leave)
    assert free(server)
    assert client.lease(SPEC).pages == 8


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec(page_size=2), "cannot prepare .*out of tape$"),
        (
            spec(num_pages=1 << 31),
            "KV pages need 1,048,576 MiB, and it may use .*num_pages.*--memory-fraction",
        ),
        (replace(SPEC, geometry=spec(num_kv_heads=4).geometry, devices=4), "4 devices .* it has 2"),
        (replace(SPEC, buckets=()), "buckets=0 cannot be"),
    ],
)
def test_what_cannot_be_prepared_is_refused(start_worker: StartWorker, wanted: object, words: str) -> None:
    server, client = start_worker()
    with pytest.raises(WorkerError, match=words) as refusal:
        client.lease(wanted)  # type: ignore[arg-type]
    assert not refusal.value.temporary
    assert free(server)


def test_a_worker_that_drains_refuses_leases_and_waits_for_the_one(start_worker: StartWorker) -> None:
    server, client = start_worker(drain_seconds=20)
    lease = client.lease(SPEC)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(server.drain)
        assert until(lambda: server.leases._draining)
        with pytest.raises(WorkerError, match="shutting down"):
            client.lease(SPEC)
        assert not drained.done()
        lease.close()
        drained.result(5)


def test_a_drain_ends_a_lease_that_stays(start_worker: StartWorker) -> None:
    server, client = start_worker(drain_seconds=0.1)
    lease = client.lease(SPEC)
    server.drain()
    assert until(lambda: lease.lost is not None)
    assert "shutting down" in str(lease.lost)


def test_connect_waits_for_workers_in_any_order(start_worker: StartWorker) -> None:
    _, first = start_worker()
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    reports: list[str] = []

    def start_late(phase: str, done: int, total: int) -> None:
        reports.append(phase)
        assert (done, total) == (1, 2)
        if len(reports) == 2:
            start_worker(listen=f"127.0.0.1:{port}")

    names = [f"127.0.0.1:{port}", first.address]
    clients = connect(names, SecurityConfig(), 30, start_late)
    assert [client.address for client in clients] == names
    assert reports[0] == f"waiting for attention workers: {names[0]}"
    for client in clients:
        client.close()


def test_connect_names_who_is_missing() -> None:
    with pytest.raises(WorkerError, match=r"127.0.0.1:9: nothing listens .*attend --listen 127.0.0.1:9.*:10"):
        connect(["127.0.0.1:9", "127.0.0.1:10"], SecurityConfig(), 0.2)
    with pytest.raises(ConfigError, match=r"127.0.0.1:9 twice"):
        connect(["127.0.0.1:9", "127.0.0.1:9"], SecurityConfig())


@pytest.mark.parametrize(
    ("name", "value"), [("VERSION", 77), ("lamina_jax", SimpleNamespace(__version__="9.1.0"))]
)
def test_another_version_is_refused(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(worker_server, name, value)
    _, client = start_worker()
    with pytest.raises(WorkerError, match="run one release on both"):
        connect([client.address], SecurityConfig(), 5)


def test_a_stranger_is_no_worker() -> None:
    with ThreadPoolExecutor(1) as pool:
        stranger = grpc.server(pool)
        port = stranger.add_insecure_port("127.0.0.1:0")
        stranger.start()
        with pytest.raises(WorkerError, match="does not answer as a lamina_jax worker"):
            connect([f"127.0.0.1:{port}"], SecurityConfig(), 5)
        stranger.stop(0).wait()
