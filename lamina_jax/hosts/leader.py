"""Host 0's side of several compute hosts: it gathers the others, says what all do, and hears who is lost.

Knows nothing of jax or of models: facts are text, and what it sends are the messages that it is given.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

import grpc

from lamina_jax.config import ConfigError, SecurityConfig, address_of, host_and_port
from lamina_jax.exchange.control import KEEPALIVE
from lamina_jax.exchange.security import TokenCheck, add_port, check_address, read_token, server_tls
from lamina_jax.hosts.alarm import LAST_WORDS_SECONDS, Alarm
from lamina_jax.hosts.facts import difference
from lamina_jax.hosts.messages import (
    MOST_BYTES,
    SERVICE,
    Accepted,
    Agreed,
    Compiled,
    End,
    Hello,
    Order,
    Traffic,
    Trouble,
    decode_report,
    encode,
)
from lamina_jax.hosts.threads import DaemonThreads

REPORT_BYTES = 1 << 20
"""Of one message of a follower."""

REFUSED_AT_ONCE = 8
"""Calls beside those of the followers that there are to be."""

END_SECONDS = 2.0
"""What followers get to give back what they hold."""

COMPILE_SECONDS = 1800.0
"""What they may take for their programs, longer than this host took for its own."""

LOOK_SECONDS = 0.5
"""Between two words on who is still missing."""

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
"""`report(phase, done, total)`."""


@dataclass
class _Seat:
    """A follower that has joined. `outbox`: of encoded messages; None ends its stream."""

    host_id: int
    name: str
    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    compiled: bool = False
    traffic: Traffic = field(default_factory=Traffic)


class Leader:
    """Listens at the coordinator's address from when it is made.

    Args:
        coordinator: "host:port".
        facts: what followers must have the same; see `lamina_jax.hosts.facts`.
        alarm: is rung when a follower is lost, once `gather` has returned.

    Raises:
        ConfigError: an address that cannot be listened on or is not protected, or files of `security`.
    """

    host_id = 0

    def __init__(
        self,
        coordinator: str,
        num_hosts: int,
        facts: Mapping[str, str],
        security: SecurityConfig,
        alarm: Alarm,
    ) -> None:
        host, port = host_and_port("coordinator", coordinator)
        check_address(host, security, "coordinator")
        self.num_hosts, self.group = num_hosts, secrets.token_hex(16)
        self._facts, self._alarm = facts, alarm
        self._seats: dict[int, _Seat] = {}
        self._changed = threading.Condition()
        self._complete = self._ended = False
        _, credentials = server_tls(security) or (None, None)
        self._grpc = grpc.server(
            DaemonThreads("hosts"),
            maximum_concurrent_rpcs=num_hosts + REFUSED_AT_ONCE,
            interceptors=[TokenCheck(read_token(security))],
            options=[
                *KEEPALIVE,
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", MOST_BYTES),
                ("grpc.max_receive_message_length", REPORT_BYTES),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._join)
        self._grpc.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {"Join": handler})]
        )
        try:
            self.port = add_port(self._grpc, address_of(host, port), credentials)
        except RuntimeError:
            raise ConfigError(
                f"coordinator={coordinator!r} cannot be listened on: it must be an address of host 0, with a "
                "port that nothing else has"
            ) from None
        self._grpc.start()
        alarm.tell(lambda reason: self.send(Trouble(reason)))

    def gather(self, seconds: float, report: Report) -> None:
        """Wait until all followers have joined; from then on a lost one rings the alarm.

        Raises:
            ConfigError: some have not; the text names them.
        """
        self._wait(self._missing, seconds, "waiting for compute hosts", report)
        with self._changed:
            missing = self._missing()
            self._complete = not missing
        if missing:
            self._grpc.stop(grace=0.2)
            names = ", ".join(map(str, missing))
            raise ConfigError(
                f"compute host {names} of {self.num_hosts} has not joined within {seconds:g} s: "
                f"start it with --host-id {missing[0]} and the same coordinator, or raise worker_wait_seconds"
            )

    def agree(self, num_pages: int) -> int:
        """See `lamina_jax.hosts.member.Member`."""
        self.send(Agreed(num_pages))
        return num_pages

    def compiled(self, report: Report) -> None:
        """Wait until every follower can run steps.

        Raises:
            ConfigError: some cannot; the text names them.
        """
        phase = "waiting for the programs of compute hosts"
        if late := self._wait(self._compiling, COMPILE_SECONDS, phase, report):
            names = ", ".join(map(str, late))
            raise ConfigError(f"compute host {names} has not compiled within {COMPILE_SECONDS:g} s")

    def fail(self, reason: str) -> None:
        """See `lamina_jax.hosts.member.Member`."""
        self._alarm.disarm()
        self.send(Trouble(reason))
        self._grpc.stop(grace=LAST_WORDS_SECONDS).wait(END_SECONDS)

    def lost(self, reason: str) -> None:
        """See `lamina_jax.hosts.member.Member`."""
        self._alarm.ring(reason)

    def send(self, message: Order) -> None:
        """Have all followers get a message, in order; returns at once."""
        data = encode(message)
        for seat in self._joined():
            seat.outbox.put(data)

    def traffic(self) -> dict[int, Traffic]:
        """What each follower has said last of its wire, by host id."""
        return {seat.host_id: seat.traffic for seat in self._joined()}

    def close(self) -> None:
        """Have the followers end, and wait for it; nothing rings any more."""
        self._alarm.disarm()
        with self._changed:
            self._ended = True
        self.send(End())
        with self._changed:
            self._changed.wait_for(lambda: not self._seats, END_SECONDS)
        self._grpc.stop(grace=0.2).wait(END_SECONDS)

    def _wait(self, late: Callable[[], list[int]], seconds: float, phase: str, report: Report) -> list[int]:
        """The hosts that are still `late` after so many seconds."""
        until = time.monotonic() + seconds
        while (missing := late()) and time.monotonic() < until:
            report(f"{phase} {', '.join(map(str, missing))}", self.num_hosts - len(missing), self.num_hosts)
            with self._changed:
                self._changed.wait(min(LOOK_SECONDS, max(0.0, until - time.monotonic())))
        return missing

    def _joined(self) -> list[_Seat]:
        with self._changed:
            return list(self._seats.values())

    def _missing(self) -> list[int]:
        with self._changed:
            return [host for host in range(1, self.num_hosts) if host not in self._seats]

    def _compiling(self) -> list[int]:
        return [seat.host_id for seat in self._joined() if not seat.compiled]

    def _join(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One follower's stream; runs in a thread of the server's pool."""
        try:
            hello = decode_report(next(requests))
        except (ConfigError, StopIteration) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error) or "no first message came")
        seat = _Seat(
            getattr(hello, "host_id", 0), f"{getattr(hello, 'process', '')} at {unquote(context.peer())}"
        )
        with self._changed:
            refusal = self._refusal(hello)
            if refusal is None:
                self._seats[seat.host_id] = seat
                self._changed.notify_all()
        if refusal is not None:
            log.warning("refused %s: %s", seat.name, refusal)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if not context.add_callback(lambda: self._left(seat)):
            self._left(seat)
        threading.Thread(target=self._listen, args=(seat, requests), name="follower", daemon=True).start()
        yield encode(Accepted())
        yield from iter(seat.outbox.get, None)

    def _refusal(self, hello: object) -> str | None:
        """Why a follower cannot join, if it cannot."""
        if not isinstance(hello, Hello):
            return "its first message is not Hello"
        if hello.num_hosts != self.num_hosts:
            return f"num_hosts is {hello.num_hosts} there, and {self.num_hosts} on host 0"
        if not 0 < hello.host_id < self.num_hosts:
            return f"host_id={hello.host_id} must be in 1 .. {self.num_hosts - 1}; host 0 is the engine"
        if taken := self._seats.get(hello.host_id):
            return f"host_id={hello.host_id} is taken, by {taken.name}: give each host an id of its own"
        return difference(self._facts, hello.facts)

    def _listen(self, seat: _Seat, requests: Iterator[bytes]) -> None:
        """Take what a follower says, until its stream ends."""
        try:
            for data in requests:
                match decode_report(data):
                    case Compiled():
                        seat.compiled = True
                        with self._changed:
                            self._changed.notify_all()
                    case Traffic() as traffic:
                        seat.traffic = traffic
                    case Trouble(reason):
                        self._lost(seat, reason)
        except ConfigError as error:
            self._lost(seat, str(error))
        except Exception:  # gRPC's own, when the stream ends: `_left` says so
            log.debug("compute host %d", seat.host_id, exc_info=True)

    def _left(self, seat: _Seat) -> None:
        """A follower's stream has ended; in a thread of gRPC."""
        with self._changed:
            if self._seats.get(seat.host_id) is not seat:
                return
            del self._seats[seat.host_id]
            self._changed.notify_all()
        seat.outbox.put(None)
        self._lost(seat, "it has left, or is silent")

    def _lost(self, seat: _Seat, reason: str) -> None:
        if self._complete and not self._ended:
            self._alarm.ring(f"compute host {seat.host_id} ({seat.name}): {reason}")
