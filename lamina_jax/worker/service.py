"""The gRPC face of a worker: Describe, Lease, and the data stream Exchange. Owns no state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

import lamina_jax
from lamina_jax.config import ConfigError
from lamina_jax.exchange import control_pb2 as pb
from lamina_jax.exchange.control import CONTROL_BYTES, SERVICE
from lamina_jax.exchange.frames import VERSION, ProtocolError
from lamina_jax.exchange.grpc import encode, serve_stream
from lamina_jax.exchange.security import SESSION_KEY, shows_token
from lamina_jax.exchange.specs import spec_from_message
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.lease import Event, Refused
from lamina_jax.worker.leases import Leases


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a worker says of itself; see control.proto."""

    jax_version: str
    platform: str
    device_kind: str
    devices: int
    memory_bytes: int
    data_port: int
    unix_path: str
    listen: str


class PoolService:
    """The methods of `Pool`; every one runs in a thread of the gRPC server's pool."""

    def __init__(self, facts: Facts, leases: Leases) -> None:
        self._facts, self._leases = facts, leases

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.Server.add_generic_rpc_handlers`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, _reader(pb.DescribeRequest), pb.Description.SerializeToString
                ),
                "Lease": grpc.unary_stream_rpc_method_handler(
                    self.lease, _reader(pb.LeaseRequest), pb.LeaseEvent.SerializeToString
                ),
                "Exchange": grpc.stream_stream_rpc_method_handler(self.exchange),
            },
        )

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        lease = self._leases.lease
        return pb.Description(
            version=lamina_jax.__version__,
            frames_version=VERSION,
            held_by="" if lease is None else lease.engine,
            clock_ns=time.monotonic_ns(),
            **vars(self._facts),
        )

    def lease(self, request: pb.LeaseRequest, context: grpc.ServicerContext) -> Iterator[pb.LeaseEvent]:
        try:
            spec = spec_from_message(request.spec)
            self._check_room(spec)
        except ConfigError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        try:
            lease = self._leases.take(f"{request.engine or 'unnamed'} at {unquote(context.peer())}", spec)
        except Refused as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if not context.add_callback(lambda: lease.end("the engine has left, or is silent")):
            lease.end("the engine has left")
        for event in lease.events():
            yield _message(event, lease.session_id)
        context.abort(grpc.StatusCode.ABORTED, lease.reason)

    def exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        shown = dict(context.invocation_metadata()).get(SESSION_KEY, b"")
        try:
            lease = self._leases.find(shown if isinstance(shown, bytes) else shown.encode())
            with lease.stream(context.cancel) as session:
                for header, buffers in lease.answers(session, serve_stream(requests, session.room)):
                    yield encode(header, buffers)
        except (Refused, ProtocolError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _check_room(self, spec: WorkerSpec) -> None:
        wanted, usable = spec.geometry.num_pages * spec.geometry.bytes_per_page, self._facts.memory_bytes
        if wanted > usable:
            raise ConfigError(
                f"{spec.geometry.num_pages} KV pages need {wanted / 2**20:,.0f} MiB, and it may use "
                f"{usable / 2**20:,.0f} MiB: ask for fewer with num_pages, or raise its --memory-fraction"
            )
        if spec.devices > self._facts.devices:
            raise ConfigError(f"{spec.devices} devices are asked for, and it has {self._facts.devices}")


class TokenCheck(grpc.ServerInterceptor):
    """Lets a call in that shows the token. Health is open to all: probes have none."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def intercept_service(
        self, continuation: Callable[[Any], Any], call: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        if call.method.startswith("/grpc.health.v1.") or shows_token(call.invocation_metadata, self._token):
            return continuation(call)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the token is missing or another one: give both sides --token-file with the same secret",
    )
    yield b""


def _reader(message: Any) -> Callable[[bytes], Any]:
    """Parses a message of bounded size; gRPC refuses the call where this raises."""

    def read(data: bytes) -> Any:
        if len(data) > CONTROL_BYTES:
            raise ValueError(f"a message of {len(data)} bytes, {CONTROL_BYTES} are allowed")
        return message.FromString(data)

    return read


def _message(event: Event, session_id: bytes) -> pb.LeaseEvent:
    if isinstance(event, int):
        return pb.LeaseEvent(ready=pb.Ready(session_id=session_id, pages=event))
    return pb.LeaseEvent(progress=pb.Progress(done=event[0], total=event[1]))
