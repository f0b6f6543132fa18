"""A follower's side of several compute hosts: it joins host 0, hears what to do, and when that is lost.

Knows nothing of jax or of models; see `lamina_jax.hosts.leader`.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grpc

from lamina_jax.config import ConfigError, SecurityConfig, host_and_port
from lamina_jax.exchange.control import CLIENT_OPTIONS
from lamina_jax.exchange.security import check_address, client_tls, open_channel, read_token, token_metadata
from lamina_jax.hosts.alarm import LAST_WORDS_SECONDS, Alarm
from lamina_jax.hosts.messages import (
    MOST_BYTES,
    SERVICE,
    Accepted,
    Agreed,
    Compiled,
    End,
    Hello,
    Order,
    Report,
    Trouble,
    World,
    decode_order,
    encode,
)

_OPTIONS = (
    *CLIENT_OPTIONS,
    ("grpc.max_send_message_length", MOST_BYTES),
    ("grpc.max_receive_message_length", MOST_BYTES),
)

PAUSE_SECONDS = 0.3
"""Between two tries to find host 0."""

_T = TypeVar("_T")


class Follower:
    """One of several compute hosts, but host 0; it has joined when it is made.

    Args:
        seconds: how long host 0 may take to be there.
        alarm: is rung when host 0 is lost, or ends because something else is.
        report: told that it is waited for.

    Raises:
        ConfigError: there is no host 0, or it refuses this one; the text says why.
    """

    def __init__(
        self,
        coordinator: str,
        num_hosts: int,
        host_id: int,
        facts: Mapping[str, str],
        security: SecurityConfig,
        alarm: Alarm,
        seconds: float,
        report: Callable[[str, int, int], None],
    ) -> None:
        host, _ = host_and_port("coordinator", coordinator)
        check_address(host, security, "coordinator")
        self.num_hosts, self.host_id, self.group = num_hosts, host_id, ""
        self._address, self._alarm = coordinator, alarm
        self._inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._metadata = token_metadata(read_token(security))
        _, credentials = client_tls(security) or (None, None)
        self._channel = open_channel(coordinator, credentials, _OPTIONS)
        process = f"{socket.gethostname()}, process {os.getpid()}"
        hello = Hello(host_id, num_hosts, dict(facts), process)
        orders = self._join(hello, seconds, report)
        alarm.tell(lambda reason: self.send(Trouble(reason)))
        threading.Thread(target=self._listen, args=(orders,), name="host 0", daemon=True).start()

    def send(self, message: Report) -> None:
        """Have host 0 get a message; returns at once."""
        self._outbox.put(encode(message))

    def enter(self) -> str:
        """Wait until all hosts are there; the address of the JAX world's coordinator."""
        world = self.wait_for(World)
        self.group = world.group
        return world.address

    def agree(self, num_pages: int) -> int:
        """See `lamina_jax.hosts.member.Member`."""
        return self.wait_for(Agreed).num_pages

    def compiled(self, report: Callable[[str, int, int], None]) -> None:
        """See `lamina_jax.hosts.member.Member`."""
        self.send(Compiled())

    def fail(self, reason: str) -> None:
        """See `lamina_jax.hosts.member.Member`."""
        self._alarm.disarm()
        self.send(Trouble(reason))
        time.sleep(LAST_WORDS_SECONDS)

    def lost(self, reason: str) -> None:
        """See `lamina_jax.hosts.member.Member`."""
        self._alarm.ring(reason)

    def wait_for(self, kind: type[_T]) -> _T:
        """The next message, which is of this kind; host 0 has deadlines, and its loss rings the alarm.

        Raises:
            ConfigError: it is another one.
        """
        message = self._inbox.get()
        if not isinstance(message, kind):
            raise ConfigError(
                f"compute host 0 at {self._address} said {type(message).__name__}, not {kind.__name__}"
            )
        return message

    def next_order(self, seconds: float) -> Order | None:
        """The next message; None: none came within so many seconds."""
        try:
            return self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Hang up."""
        self._alarm.disarm()
        self._outbox.put(None)
        self._channel.close()

    def _join(self, hello: Hello, seconds: float, report: Callable[[str, int, int], None]) -> Iterator[bytes]:
        """The stream of what host 0 says."""
        until = time.monotonic() + seconds
        call = self._channel.stream_stream(f"/{SERVICE}/Join")
        while True:
            self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            self._outbox.put(encode(hello))
            orders: Any = call(iter(self._outbox.get, None), metadata=self._metadata)
            try:
                if not isinstance(decode_order(next(orders)), Accepted):
                    raise ConfigError(f"compute host 0 at {self._address} does not answer as one")
                return orders
            except (grpc.RpcError, StopIteration) as error:
                self._outbox.put(None)
                unavailable = orders.code() is grpc.StatusCode.UNAVAILABLE
                if not unavailable or time.monotonic() + PAUSE_SECONDS > until:
                    raise ConfigError(self._explain(orders, seconds)) from error
            report(f"waiting for compute host 0 at {self._address}", 0, 0)
            time.sleep(PAUSE_SECONDS)

    def _explain(self, call: Any, seconds: float) -> str:
        code, details = call.code(), call.details()
        if code is grpc.StatusCode.UNAVAILABLE:
            return (
                f"there is no compute host 0 at coordinator={self._address} (waited {seconds:g} s; {details})"
                ": start it with --host-id 0, correct the address, or raise worker_wait_seconds"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return (
                f"what listens at coordinator={self._address} is no compute host 0 of lamina_jax: correct it"
            )
        return f"compute host 0 at {self._address} refuses this one: {details}"

    def _listen(self, orders: Iterator[bytes]) -> None:
        """Take what host 0 says, until it ends."""
        reason = "it has left, or is silent"
        try:
            for data in orders:
                message = decode_order(data)
                if isinstance(message, Trouble):
                    self._alarm.ring(f"compute host 0 at {self._address} ends: {message.reason}", heard=False)
                    return
                if isinstance(message, End):
                    self._alarm.disarm()
                self._inbox.put(message)
        except ConfigError as error:
            reason = str(error)
        except grpc.RpcError:
            pass
        self._alarm.ring(f"compute host 0 at {self._address}: {reason}", heard=False)
