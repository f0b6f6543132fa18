"""Device arrays over links of this process: in any order, and never waited for without an end."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from worker_talk import until

from lamina_jax.config import ConfigError, EngineConfig, SecurityConfig
from lamina_jax.core import WorkerLost
from lamina_jax.exchange import transfer_exchange
from lamina_jax.exchange.channel import ChannelClosed, Frame, Room
from lamina_jax.exchange.control import WorkerClient, WorkerError
from lamina_jax.exchange.control_messages import Description
from lamina_jax.exchange.frames import VERSION, Header, Kind
from lamina_jax.exchange.transfer import TransferLink, own_and_peer_ip
from lamina_jax.exchange.transfer_exchange import TransferWorker, check_worker

KEY = b"sixteen bytes..."
QUERY = Header(Kind.QUERY, 0, microbatch=1, layer=2, step=3)

Links = tuple[TransferLink, TransferLink]


@pytest.fixture
def links() -> Links:
    """Connected with each other."""
    device = jax.local_devices()[0]
    one, other = (TransferLink(device, "127.0.0.1", KEY) for _ in range(2))
    one.connect(other.address)
    other.connect(one.address)
    return one, other


def struct(size: int) -> jax.ShapeDtypeStruct:
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct((size,), np.float32, sharding=sharding)


def test_a_program_is_queued_behind_a_pull_that_stands_before_its_offer(links: Links) -> None:
    one, other = links
    # Both before: a device runs programs in the order in which they were queued.
    wanted, another = jax.block_until_ready((jnp.arange(8.0), jnp.zeros(8)))
    (pulled,) = one.pull(QUERY, [struct(8)])
    doubled = jax.jit(lambda x: x + x)(pulled)
    assert not doubled.is_ready()  # type: ignore[attr-defined]
    other.offer(QUERY._replace(layer=3), [another])
    other.offer(QUERY._replace(length=99), [wanted])  # what a frame is long is no part of its name
    np.testing.assert_array_equal(doubled, 2 * np.arange(8.0, dtype=np.float32))


def fails(arrays: Any) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as failed:
        jax.block_until_ready(arrays)
    return str(failed.value)


def test_other_shapes_than_pulled_raise(links: Links) -> None:
    one, other = links
    other.offer(QUERY, [jnp.zeros(4)])
    assert fails(one.pull(QUERY, [struct(8)]))
    assert one.connected


def test_a_cut_ends_what_waits_and_what_would(links: Links) -> None:
    one, other = links
    waits = one.pull(QUERY, [struct(8)])
    began = time.monotonic()
    one.cut()
    assert "closed" in fails(waits)
    assert time.monotonic() - began < 2.0
    assert not one.connected
    assert other.connected
    with pytest.raises(ChannelClosed, match="cut off"):
        one.pull(QUERY, [struct(8)])


def test_looking_at_connections_leaves_none_open(links: Links) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    until(lambda: links[0].connected)
    before = descriptors()
    assert all(links[0].connected for _ in range(100))
    assert descriptors() < before + 50  # JAX itself may open some


def test_where_nobody_listens(links: Links) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ChannelClosed, match=address):
        links[0].connect(address)


def test_the_address_that_is_used() -> None:
    assert own_and_peer_ip("localhost", 7101)[1] in ("127.0.0.1", "::1")
    assert own_and_peer_ip("127.0.0.1", 7101) == ("127.0.0.1", "127.0.0.1")
    with pytest.raises(ChannelClosed, match=r"no-such-host\.invalid"):
        own_and_peer_ip("no-such-host.invalid", 7101)


class NoChannel:
    bytes_sent = bytes_received = 0

    def send(self, header: Header, buffers: Sequence[np.ndarray]) -> None: ...

    def receive(self, room: Room) -> Frame:
        raise ChannelClosed("nothing comes")

    def close(self) -> None: ...


def test_a_worker_that_is_late_is_lost_and_named(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = TransferWorker("a:1", NoChannel(), links[0])
    waits = worker.pull(QUERY, [struct(8)])
    worker.look()
    worker.check()
    monkeypatch.setattr(transfer_exchange, "ANSWER_SECONDS", 0.0)
    worker.look()
    assert fails(waits)
    for call in (worker.check, lambda: worker.pull(QUERY, [struct(8)])):
        with pytest.raises(WorkerLost, match="a:1 is lost: it has not answered"):
            call()


def test_an_answer_in_time_is_not_late(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = TransferWorker("a:1", NoChannel(), links[0])
    links[1].offer(QUERY, [jnp.ones(8)])
    jax.block_until_ready(worker.pull(QUERY, [struct(8)]))
    monkeypatch.setattr(transfer_exchange, "ANSWER_SECONDS", 0.0)
    worker.look()
    worker.blame()
    worker.check()


def test_who_is_blamed_is_whose_link_has_ended(links: Links) -> None:
    worker = TransferWorker("a:1", NoChannel(), links[0])
    links[0].cut()
    worker.blame()
    with pytest.raises(WorkerLost, match=r"a:1.*connection"):
        worker.check()


def described(platform: str = "cpu", jax_version: str = jax.__version__) -> Description:
    return Description(version="0", frames_version=VERSION, jax_version=jax_version, platform=platform)


@pytest.mark.parametrize(
    ("address", "found", "named"),
    [
        ("127.0.0.1:1", lambda: described("gpu"), "one platform: it has gpu, this side cpu"),
        ("127.0.0.1:1", lambda: described(jax_version="0.1"), r"one JAX: it runs 0\.1"),
    ],
)
def test_workers_that_are_refused(address: str, found: Callable[[], Description], named: str) -> None:
    security = SecurityConfig()
    with (
        closing(WorkerClient(address, security)) as client,
        pytest.raises(WorkerError, match=f"127.0.0.1:1: exchange=jax.*{named}"),
    ):
        check_worker(client, found(), "cpu", security)


def test_a_network_must_be_declared_open() -> None:
    said = SecurityConfig(insecure=True)
    with closing(WorkerClient("10.0.0.7:1", said)) as client:
        with pytest.raises(WorkerError, match=r"10\.0\.0\.7:1: exchange=jax knows no TLS"):
            check_worker(client, described(), "cpu", SecurityConfig())
        check_worker(client, described(), "cpu", said)
        client.ssl_context = ssl.create_default_context()
        with pytest.raises(WorkerError, match="exchange=jax knows no TLS"):
            check_worker(client, described(), "cpu", said)


@pytest.mark.parametrize("setting", [{"timings": True}, {"trace": "steps.json"}])
def test_times_of_frames_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.*exchange=jax"):
        EngineConfig(attention="127.0.0.1:1", exchange="jax", **setting)
