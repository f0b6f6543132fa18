"""The gRPC face of a worker, whose methods `control_messages` lists. Owns no state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import unquote

import grpc
from msgspec.structs import replace

from lamina_jax.compilation import Footprint
from lamina_jax.config import ConfigError
from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.control_messages import SERVICE, Description, LeaseEvent, decode_request
from lamina_jax.exchange.control_messages import encode as encode_message
from lamina_jax.exchange.frames import ProtocolError
from lamina_jax.exchange.grpc import encode, serve_stream
from lamina_jax.exchange.pull import Pulled, decode_drop, decode_order
from lamina_jax.exchange.security import SESSION_KEY
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.lease import Refused, first_line
from lamina_jax.worker.leases import Leases
from lamina_jax.worker.pull import Dial


class PoolService:
    """The methods of `Pool`; every one runs in a thread of the gRPC server's pool.

    Args:
        facts: what does not change of what the worker says of itself.
        dial: connects with prefill hosts.
    """

    def __init__(self, facts: Description, leases: Leases, dial: Dial) -> None:
        self._facts, self._leases, self._dial = facts, leases, dial

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.Server.add_generic_rpc_handlers`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self.describe, None, encode_message),
                "Measure": grpc.unary_unary_rpc_method_handler(self.measure, None, encode_message),
                "Lease": grpc.unary_stream_rpc_method_handler(self.lease, None, encode_message),
                "Pull": grpc.unary_unary_rpc_method_handler(self.pull, None, encode_message),
                "Drop": grpc.unary_unary_rpc_method_handler(self.drop),
                "Exchange": grpc.stream_stream_rpc_method_handler(self.exchange),
            },
        )

    def describe(self, _: bytes, context: grpc.ServicerContext) -> Description:
        held_by = ", ".join(lease.engine for lease in self._leases.held)
        return replace(self._facts, held_by=held_by, clock_ns=time.monotonic_ns())

    def measure(self, data: bytes, context: grpc.ServicerContext) -> Footprint:
        try:
            request = decode_request(data)
            self._check_devices(request.spec)
            footprint = self._leases.measure(request.spec, request.group)
        except Refused as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except (ConfigError, RuntimeError) as error:  # XLA cannot compile it
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, first_line(error))
        return footprint

    def lease(self, data: bytes, context: grpc.ServicerContext) -> Iterator[LeaseEvent]:
        try:
            request = decode_request(data)
            self._check_devices(request.spec)
            engine = f"{request.engine or 'unnamed'} at {unquote(context.peer())}"
            lease = self._leases.take(engine, request.spec, self._facts.memory_bytes, request.group)
        except ConfigError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Refused as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if not context.add_callback(lambda: lease.end("the engine has left, or is silent")):
            lease.end("the engine has left")
        yield from lease.events()
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

    def pull(self, data: bytes, context: grpc.ServicerContext) -> Pulled:
        try:
            order = decode_order(data)
            pulled = self._leases.holding(order.group, order.kv_start).pull(order, self._dial)
        except (ConfigError, Refused, ProtocolError, ChannelClosed) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return Pulled(pulled)

    def drop(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            order = decode_drop(data)
            self._leases.holding(order.group, order.kv_start).pulls.drop(order.ticket)
        except (ConfigError, Refused) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return b""

    def _check_devices(self, spec: WorkerSpec) -> None:
        wanted = spec.first_device + spec.devices
        if wanted > self._facts.devices:
            raise ConfigError(f"{wanted} devices are asked for, and it has {self._facts.devices}")
