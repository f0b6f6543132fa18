"""Bytes that nobody should send, at every port of a worker and a server: both serve on, and do not grow."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import grpc
import numpy as np
import pytest
from echo_session import SPEC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_processes import Process, ServeProcess, WorkerProcess, free_ports
from worker_talk import until

from lamina_jax.config import SecurityConfig
from lamina_jax.exchange.control import Lease, WorkerClient
from lamina_jax.exchange.control_messages import SERVICE, LeaseRequest, Ready, decode_event, encode
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.grpc import METHOD

pytestmark = [pytest.mark.multi, pytest.mark.timeout(300)]

GROWTH = {"rss_kb": 16_000, "descriptors": 2, "threads": 8}
"""Allocators and pools of threads keep some of what they needed once."""


class Target:
    """A worker that nobody has, another with its server, and all of their ports."""

    def __init__(self, stack: ExitStack, checkpoint: str) -> None:
        (metrics,) = free_ports(1)
        more = ("--metrics-port", str(metrics))
        self.worker = stack.enter_context(closing(WorkerProcess("127.0.0.1", 0, *more))).wait_listening()
        self.held = stack.enter_context(closing(WorkerProcess())).wait_listening()
        self.server = stack.enter_context(closing(ServeProcess(checkpoint, [self.held.address])))
        self.server.wait_ready()
        self.client = stack.enter_context(closing(WorkerClient(self.worker.address, SecurityConfig())))
        self.addresses: list[str | tuple[str, int]] = []
        for worker in (self.worker, self.held):
            client = stack.enter_context(closing(WorkerClient(worker.address, SecurityConfig())))
            self.addresses += [("127.0.0.1", worker.port), ("127.0.0.1", worker.data_port)]
            self.addresses.append(client.describe().unix_path)
        url = self.server.http.base_url
        self.addresses += [("127.0.0.1", metrics), (url.host, url.port or 0)]

    @property
    def processes(self) -> dict[str, Process]:
        return {"worker": self.worker, "held worker": self.held, "server": self.server}

    def lease_once(self) -> None:
        """As an engine that comes and goes."""
        self.client.lease(SPEC).close()
        assert until(lambda: self.client.describe().held_by == "")

    def sizes(self) -> dict[str, dict[str, int]]:
        return {name: process.sizes() for name, process in self.processes.items()}


@pytest.fixture(scope="module")
def target(checkpoint: str) -> Iterator[Target]:
    with ExitStack() as stack:
        yield Target(stack, checkpoint)


def check(
    target: Target, before: dict[str, dict[str, int]], expected: list[int], **growth_allowed: int
) -> None:
    """All serve as they did, and are about as large."""
    assert target.server.complete(16) == expected[:16]
    target.lease_once()

    def growth() -> dict[str, dict[str, int]]:
        after = target.sizes()
        return {name: {what: after[name][what] - was[what] for what in was} for name, was in before.items()}

    most = GROWTH | growth_allowed
    calm = until(lambda: all(grown[what] <= most[what] for grown in growth().values() for what in grown), 20)
    print(growth())
    assert calm, growth()


def frames() -> st.SearchStrategy[bytes]:
    """Frames of any kind and numbers, whose bytes may be fewer or more than they say, or others."""
    number = st.integers(0, 255)
    length = st.one_of(st.integers(0, 512), st.integers(0, 2**32 - 1))
    header = st.tuples(st.sampled_from(Kind), length, number, number, number).map(lambda told: Header(*told))
    frame = st.builds(lambda h, payload: h.pack() + payload, header, st.binary(max_size=512))
    return st.builds(mutated, frame, st.lists(st.tuples(st.integers(0, 600), number), max_size=3))


def mutated(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        if place < len(changed):
            changed[place] = value
    return bytes(changed)


HTTP = [b"GET /ready HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999\r\n\r\n{"]
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
JUNK = st.one_of(
    st.binary(max_size=4096),
    st.lists(frames(), max_size=4).map(b"".join),
    st.builds(lambda data: HTTP2 + data, st.binary(max_size=256)),
    st.builds(lambda begin, data: begin + data, st.sampled_from(HTTP), st.binary(max_size=256)),
)


def throw(address: str | tuple[str, int], data: bytes, *, patient: bool) -> None:
    """Send bytes and hang up, at once or after whatever comes back."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock, suppress(OSError):
        sock.settimeout(0.05)
        sock.connect(address)
        sock.sendall(data)
        if patient:
            sock.recv(4096)


def test_junk_at_every_port(target: Target, expected: list[int]) -> None:
    @settings(max_examples=60)
    @given(data=JUNK, patient=st.booleans())
    def property_(data: bytes, patient: bool) -> None:
        for address in target.addresses:
            throw(address, data, patient=patient)
        assert all(process.popen.poll() is None for process in target.processes.values())

    target.lease_once()
    property_()
    before = target.sizes()
    property_()
    check(target, before, expected)


def begin() -> bytes:
    """The first frame of an engine with SPEC, of its bucket (4, 1)."""
    rows, queries, pages = 4, 1, SPEC.pages_per_request
    sizes = rows * pages, rows, rows * pages, rows * queries, rows * queries
    numbers = np.concatenate([np.array([rows, queries], np.int32), *[np.zeros(n, np.int32) for n in sizes]])
    return Header(Kind.BEGIN, numbers.nbytes, step=1).pack() + numbers.tobytes()


def query() -> bytes:
    """A frame of q that follows it."""
    size = 4 * SPEC.geometry.num_heads * SPEC.geometry.head_dim * 4
    return Header(Kind.QUERY, size, step=1).pack() + bytes(size)


def answered(target: Target, lease: Lease, data: bytes) -> bytes:
    """What comes back on the lease's data stream."""
    with socket.create_connection(("127.0.0.1", target.worker.data_port), 5) as sock:
        hello = Header(Kind.HELLO, len(lease.session_id)).pack() + lease.session_id
        with suppress(OSError):
            sock.sendall(hello + data)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))
    return b""


def test_what_is_mutated_here_is_valid(target: Target) -> None:
    lease = target.client.lease(SPEC)
    answer = answered(target, lease, begin() + query())
    assert answer[3:4] == bytes([Kind.ANSWER])
    assert until(lambda: target.client.describe().held_by == "")


def test_messages_of_the_control_plane(target: Target, expected: list[int]) -> None:
    valid = encode(LeaseRequest("x", SPEC))
    changes = st.lists(st.tuples(st.integers(0, len(valid)), st.integers(0, 255)), min_size=1, max_size=3)
    request = st.one_of(st.binary(max_size=200), st.builds(mutated, st.just(valid), changes))
    channel = target.client.open_channel(())

    @settings(max_examples=25)
    @given(request=request)
    def property_(request: bytes) -> None:
        for method in ("Describe", "Lease"):
            call = channel.unary_stream(f"/{SERVICE}/{method}")(request, timeout=20)
            with suppress(grpc.RpcError):
                next(event for event in call if method == "Describe" or is_ready(event))
            call.cancel()
        assert until(lambda: target.client.describe().held_by == "", 30)

    target.lease_once()
    before = target.sizes()
    property_()
    # Every spec that is taken has programs of its own, of which JAX keeps something.
    check(target, before, expected, rss_kb=150_000)
    channel.close()


def is_ready(event: bytes) -> bool:
    return isinstance(decode_event(event), Ready)


def test_an_engine_with_a_lease_that_has_gone_mad(target: Target, expected: list[int]) -> None:
    changes = st.lists(st.tuples(st.integers(0, 800), st.integers(0, 255)), max_size=4)
    parts = st.lists(
        st.one_of(st.just(begin()), st.just(query()), frames(), st.binary(max_size=64)), max_size=6
    )
    data = st.builds(mutated, parts.map(b"".join), changes)

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(data=data, over_grpc=st.booleans())
    def property_(data: bytes, over_grpc: bool) -> None:
        lease = target.client.lease(SPEC)
        try:
            if over_grpc:
                call = target.client.open_channel(()).stream_stream(METHOD)
                with suppress(Exception):
                    list(call(iter([data]), metadata=lease.metadata, timeout=5))
            else:
                answered(target, lease, data)
        finally:
            lease.close()
        assert until(lambda: target.client.describe().held_by == "")

    property_()
    before = target.sizes()
    property_()
    check(target, before, expected)
