"""Hosts find each other over loopback, or are told by name why not; a lost one is noticed. No jax."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificates, secret
from worker_talk import until

from lamina_jax.config import ConfigError, SecurityConfig
from lamina_jax.hosts.alarm import Alarm
from lamina_jax.hosts.follower import Follower
from lamina_jax.hosts.leader import Leader
from lamina_jax.hosts.messages import End, Read, Traffic, World

FACTS = {"version of lamina_jax": "1", "dtype": "float32"}


class Ended(Alarm):
    """An alarm that notes what the process would end with."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        super().__init__(self.codes.append)
        self.reasons: list[str] = []
        self.tell(self.reasons.append)


class Hosts:
    """Host 0 at a free port, and followers of it."""

    def __init__(self, num_hosts: int = 2, security: SecurityConfig | None = None) -> None:
        self.alarm, self.security = Ended(), security or SecurityConfig()
        self.leader = Leader("127.0.0.1:0", num_hosts, FACTS, self.security, self.alarm)

    def join(self, host_id: int = 1, seconds: float = 1.0, **changed: Any) -> tuple[Follower, Ended]:
        alarm = Ended()
        settings: dict[str, Any] = {
            "coordinator": f"127.0.0.1:{self.leader.port}",
            "num_hosts": self.leader.num_hosts,
            "facts": FACTS,
            "security": self.security,
        }
        follower = Follower(
            **settings | changed, host_id=host_id, alarm=alarm, seconds=seconds, report=lambda *_: None
        )
        return follower, alarm

    def stop(self) -> None:
        self.alarm.disarm()
        self.leader._grpc.stop(None).wait(5)

    def gather(self, seconds: float = 5.0) -> list[tuple[str, int, int]]:
        reports: list[tuple[str, int, int]] = []
        self.leader.gather(seconds, lambda *report: reports.append(report))
        return reports


@pytest.fixture
def start() -> Iterator[Callable[..., Hosts]]:
    with ExitStack() as stack:

        def make(*arguments: Any) -> Hosts:
            hosts = Hosts(*arguments)
            stack.callback(hosts.stop)
            return hosts

        yield make


def test_orders_come_in_order_and_reports_come_back(start: Callable[..., Hosts]) -> None:
    hosts = start(3)
    followers = [hosts.join(host)[0] for host in (2, 1)]
    hosts.gather()
    hosts.leader.send(World("127.0.0.1:9", hosts.leader.group))
    assert hosts.leader.agree(17) == 17
    hosts.leader.send(Read())
    for follower in followers:
        assert follower.enter() == "127.0.0.1:9"
        assert follower.group == hosts.leader.group != ""
        assert follower.agree(99) == 17
        assert follower.next_order(5) == Read()
        assert follower.next_order(0.01) is None
        follower.compiled(lambda *_: None)
        follower.send(Traffic(3, 4, 5))
    hosts.leader.compiled(lambda *_: None)
    assert until(lambda: hosts.leader.traffic() == {1: Traffic(3, 4, 5), 2: Traffic(3, 4, 5)})


def test_at_the_end_nobody_is_lost(start: Callable[..., Hosts]) -> None:
    hosts = start()
    follower, alarm = hosts.join()
    hosts.gather()
    ending = threading.Thread(target=hosts.leader.close)
    ending.start()
    assert follower.next_order(5) == End()
    follower.close()
    ending.join(5)
    assert not ending.is_alive()
    assert (alarm.codes, hosts.alarm.codes) == ([], [])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"host_id": 0}, "host_id=0 must be in 1 .. 1"),
        ({"host_id": 2}, "host_id=2 must be in 1 .. 1"),
        ({"num_hosts": 3}, "num_hosts is 3 there, and 2 on host 0"),
        (
            {"facts": FACTS | {"version of lamina_jax": "2"}},
            "version of lamina_jax is 2 there, and 1 on host 0",
        ),
        ({"facts": FACTS | {"dtype": "bfloat16"}}, "dtype is bfloat16 there, and float32 on host 0"),
        ({"facts": {}}, "version of lamina_jax is None there"),
        ({"facts": FACTS | {"more": "1"}}, "more is 1 there, and None on host 0"),
    ],
)
def test_a_host_that_does_not_fit_is_told_why(
    start: Callable[..., Hosts], changed: dict[str, Any], said: str
) -> None:
    hosts = start()
    with pytest.raises(ConfigError, match=f"refuses this one: {said}"):
        hosts.join(**changed)
    with pytest.raises(ConfigError, match=r"compute host 1 of 2 has not joined within 0\.1 s"):
        hosts.gather(0.1)


def test_two_hosts_with_one_id(start: Callable[..., Hosts]) -> None:
    hosts = start()
    hosts.join()
    with pytest.raises(
        ConfigError, match=r"host_id=1 is taken, by .*process.*: give each host an id of its own"
    ):
        hosts.join()
    hosts.gather()


def test_an_id_is_free_again_while_others_are_waited_for(start: Callable[..., Hosts]) -> None:
    hosts = start(3)
    hosts.join(1)[0].close()
    assert until(lambda: not hosts.leader._seats)
    hosts.join(1)
    with pytest.raises(ConfigError, match="compute host 2 of 3 has not joined"):
        hosts.gather(0.1)


def test_who_is_missing_is_reported_and_named(start: Callable[..., Hosts]) -> None:
    hosts = start(4)
    hosts.join(2)
    reports: list[tuple[str, int, int]] = []
    with pytest.raises(ConfigError, match=r"compute host 1, 3 of 4 has not joined.*--host-id 1"):
        hosts.leader.gather(0.1, lambda *report: reports.append(report))
    assert reports[0] == ("waiting for compute hosts 1, 3", 2, 4)


def test_no_host_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        ConfigError, match=rf"there is no compute host 0 at coordinator={address} \(waited 0.5 s"
    ):
        Follower(address, 2, 1, FACTS, SecurityConfig(), Ended(), 0.5, lambda *_: None)


def test_a_coordinator_that_cannot_be_listened_on_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"coordinator='{address}' cannot be listened on"):
            Leader(address, 2, FACTS, SecurityConfig(), Ended())
    with pytest.raises(ConfigError, match=r"coordinator: '0\.0\.0\.0' can be reached from other machines"):
        Leader("0.0.0.0:0", 2, FACTS, SecurityConfig(), Ended())


def test_a_follower_that_goes_ends_all(start: Callable[..., Hosts]) -> None:
    hosts = start(3)
    (one, one_ended), (_, two_ended) = hosts.join(1), hosts.join(2)
    hosts.gather()
    one._channel.close()
    assert until(lambda: hosts.alarm.codes == [1] and two_ended.codes == [1])
    assert "compute host 1" in hosts.alarm.reasons[0]
    assert "has left, or is silent" in hosts.alarm.reasons[0]
    assert "compute host 1" in two_ended.reasons[0]
    one_ended.disarm()


def test_what_a_follower_says_of_its_end_is_heard_by_all(start: Callable[..., Hosts]) -> None:
    hosts = start(3)
    (one, one_ended), (_, two_ended) = hosts.join(1), hosts.join(2)
    hosts.gather()
    one.lost("attention worker 1.2.3.4:5: it is gone")
    assert one_ended.codes == [1]
    assert until(lambda: hosts.alarm.codes == [1] and two_ended.codes == [1])
    for reasons in (hosts.alarm.reasons, two_ended.reasons):
        assert "1.2.3.4:5: it is gone" in reasons[0]


def test_a_leader_that_goes_ends_all(start: Callable[..., Hosts]) -> None:
    hosts = start()
    _, ended = hosts.join()
    hosts.gather()
    hosts.alarm.disarm()
    hosts.leader._grpc.stop(None)
    assert until(lambda: ended.codes == [1])
    assert f"compute host 0 at 127.0.0.1:{hosts.leader.port}: it has left, or is silent" in ended.reasons[0]


def test_a_leader_that_fails_says_why(start: Callable[..., Hosts]) -> None:
    hosts = start()
    _, ended = hosts.join()
    hosts.gather()
    hosts.leader.fail("no room for the weights")
    assert until(lambda: ended.codes == [1])
    assert "ends: no room for the weights" in ended.reasons[0]
    assert hosts.alarm.codes == []


def test_a_wrong_token_is_refused(start: Callable[..., Hosts], tmp_path: Path) -> None:
    right = SecurityConfig(token_file=secret(tmp_path / "token", "a secret\n"))
    hosts = start(2, right)
    with pytest.raises(ConfigError, match="refuses this one: the token is missing or another one"):
        hosts.join(security=SecurityConfig())
    hosts.join()
    hosts.gather()


def test_tls_of_both_sides(start: Callable[..., Hosts], tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    names = {"tls_cert": "worker.pem", "tls_key": "worker.key", "tls_ca": "ca.pem"}
    hosts = start(2, SecurityConfig(**{key: str(files / name) for key, name in names.items()}))
    hosts.join(seconds=5.0)
    hosts.gather()
