"""The engine's side of the control plane: find attention workers, and lease them.

Every failure is a `WorkerError`, which names the worker and says what to change. A lease is one gRPC
stream: HTTP/2 pings notice within 3 s that the other process is dead, stopped or cut off, and gRPC's own
threads answer them however busy the process is. No thread of ours waits. Knows nothing of frames.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc

import lamina_jax
from lamina_jax.compilation import Footprint
from lamina_jax.config import ConfigError, SecurityConfig, host_and_port
from lamina_jax.exchange.control_messages import (
    CONTROL_BYTES,
    SERVICE,
    Description,
    LeaseRequest,
    Ready,
    decode_description,
    decode_event,
    decode_footprint,
    encode,
)
from lamina_jax.exchange.frames import VERSION
from lamina_jax.exchange.peers import PeerError, Report, wait_for_all
from lamina_jax.exchange.security import (
    SESSION_KEY,
    Metadata,
    check_address,
    client_tls,
    open_channel,
    read_token,
    token_metadata,
)
from lamina_jax.exchange.status import explain
from lamina_jax.pool.spec import WorkerSpec

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    # What decides when a ping is late; 60 s unless said.
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
)
"""Options of both sides, which matter while a call is under way: a peer silent for 2.5 s is gone."""

PREPARE_SECONDS = 1800.0
"""What a worker may take to compile all of its programs."""

CLIENT_OPTIONS = (
    *KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also what connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),  # a proxy for the outside world is none for a cluster
)
"""Of whoever calls a process of the cluster, and tries again while that is not up."""

CONTROL_OPTIONS = (
    *CLIENT_OPTIONS,
    ("grpc.max_send_message_length", CONTROL_BYTES),
    ("grpc.max_receive_message_length", CONTROL_BYTES),
)


class WorkerError(PeerError):
    """An attention worker that cannot be used."""

    kind = "attention worker"


class WorkerClient:
    """One attention worker, as an engine sees it. Making one connects to nothing.

    Args:
        address: "host:port" of its gRPC server.
        deadline_seconds: of every call but the compilation that a lease begins with.

    Attributes:
        ssl_context: for data sockets to it; None: plain ones.
        metadata: what every call to it carries.

    Raises:
        ConfigError: no address, one that is not protected, or files of `security` that cannot be used.
    """

    def __init__(self, address: str, security: SecurityConfig, deadline_seconds: float = 5.0) -> None:
        self.address, self.host = address, host_and_port("attention", address)[0]
        check_address(self.host, security, "attention")
        self._deadline = deadline_seconds
        self.ssl_context: ssl.SSLContext | None
        self._credentials: grpc.ChannelCredentials | None
        self.ssl_context, self._credentials = client_tls(security) or (None, None)
        self.metadata: Metadata = token_metadata(read_token(security))
        self._channel = self.open_channel(CONTROL_OPTIONS)

    def open_channel(self, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """One more connection to the worker, as secure as this one; for a data stream."""
        return open_channel(self.address, self._credentials, options)

    def describe(self, deadline_seconds: float | None = None) -> Description:
        """What the worker is and has.

        Raises:
            WorkerError: it does not answer, refuses, or is of another version.
        """
        call = self._channel.unary_unary(f"/{SERVICE}/Describe", None, decode_description)
        deadline = deadline_seconds or self._deadline
        try:
            found: Description = call(b"", timeout=deadline, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
        self._check_version(found)
        return found

    def measure(self, spec: WorkerSpec, *, group: str = "") -> Footprint:
        """What the programs of such a lease need on each of the worker's devices, beside its pages.

        Raises:
            WorkerError: it is another engine's, cannot compile for `spec`, or is lost meanwhile.
        """
        call = self._channel.unary_unary(f"/{SERVICE}/Measure", encode, decode_footprint)
        try:
            request = LeaseRequest("", spec, group)
            found: Footprint = call(request, timeout=PREPARE_SECONDS, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
        return found

    def lease(
        self, spec: WorkerSpec, report: Report = lambda phase, done, total: None, *, group: str = ""
    ) -> Lease:
        """Make the worker this engine's, or its group's; returns when its programs are compiled.

        Raises:
            WorkerError: it is another engine's, has no room for `spec`, or is lost meanwhile.
        """
        self.describe()
        call = self._channel.unary_stream(f"/{SERVICE}/Lease", encode, decode_event)
        engine = f"{socket.gethostname()}, process {os.getpid()}"
        stream = call(LeaseRequest(engine, spec, group), metadata=self.metadata)
        limit = threading.Timer(PREPARE_SECONDS, stream.cancel)
        limit.daemon = True
        limit.start()
        try:
            for event in stream:
                if isinstance(event, Ready):
                    return Lease(self, stream, event)
                report(f"compiling on {self.address}", event.done, event.total)
            raise WorkerError(self.address, "it ended the lease before it was ready")
        except grpc.RpcError as error:
            raise self._error(error, leased=True) from None
        except BaseException:
            stream.cancel()
            raise
        finally:
            limit.cancel()

    def future(self, method: str, message: Any, deadline_seconds: float) -> Any:
        """Begin a call of another method; its `grpc.Future`, of bytes."""
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", encode, None)
        return call.future(message, timeout=deadline_seconds, metadata=self.metadata)

    def close(self) -> None:
        """Hang up; a lease ends with it."""
        self._channel.close()

    def _check_version(self, found: Description) -> None:
        ours, theirs = lamina_jax.__version__, found.version
        if _minor(ours) != _minor(theirs) or found.frames_version != VERSION:
            raise WorkerError(
                self.address,
                f"it runs lamina_jax {theirs} (frames {found.frames_version}), this engine {ours} "
                f"(frames {VERSION}): run one release on both",
            )

    def _error(self, error: grpc.RpcError, *, leased: bool = False) -> WorkerError:
        reason, temporary = explain(self.address, error, leased=leased)
        return WorkerError(self.address, reason, temporary=temporary)


class Lease:
    """A worker that is this engine's.

    Attributes:
        session_id: opens a data channel: in a HELLO frame, or in the metadata of a stream.
        pages: KV pages that the worker holds ready.
        transfer: address of its transfer server, where the spec asks for one.
        metadata: of the data stream's call.
        lost: why the worker was lost, if it was; `close` loses nothing.
    """

    lost: str | None = None

    def __init__(self, client: WorkerClient, stream: Any, ready: Ready) -> None:
        self.session_id, self.pages, self.transfer = ready.session_id, ready.pages, ready.transfer
        self.metadata: Metadata = (*client.metadata, (SESSION_KEY, ready.session_id))
        self._address, self._stream = client.address, stream
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[str], None]] = []
        self._closed = False
        if not stream.add_callback(self._end):
            self._end()

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` once when the worker is lost, at once if it is; in a thread of gRPC."""
        with self._lock:
            if self.lost is None:
                self._callbacks.append(callback)
                return
        callback(self.lost)

    def close(self) -> None:
        """Give the worker back. No callback comes any more."""
        with self._lock:
            self._closed = True
        self._stream.cancel()

    def _end(self) -> None:
        reason = explain(self._address, self._stream, leased=True).reason
        with self._lock:
            if self._closed:
                return
            self.lost = reason
            callbacks = tuple(self._callbacks)
        for callback in callbacks:
            callback(reason)


def connect(
    addresses: Sequence[str],
    security: SecurityConfig,
    deadline_seconds: float = 60.0,
    report: Report = lambda phase, done, total: None,
) -> list[WorkerClient]:
    """Clients of workers that all answer, in the order of `addresses`; waits for those not up yet.

    Args:
        report: told who is still missing.

    Raises:
        WorkerError: one that waiting does not mend, or is still missing at the deadline.
        ConfigError: an address or a file that cannot be used.
    """
    if twice := {address for address in addresses if list(addresses).count(address) > 1}:
        raise ConfigError(
            f"attention names {', '.join(sorted(twice))} twice: a worker has one share of the cache"
        )
    clients = [WorkerClient(address, security) for address in addresses]
    try:
        wait_for_all(clients, deadline_seconds, report)
    except BaseException:
        for client in clients:
            client.close()
        raise
    return clients


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
