"""The two faces of a prefill host: gRPC for its engine, data connections for workers. They own no state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import grpc

from lamina_jax.config import ConfigError
from lamina_jax.exchange.channel import Channel, ChannelClosed
from lamina_jax.exchange.frames import Header, Kind, ProtocolError
from lamina_jax.exchange.prefill import SERVICE, Accepted, PrefillDescription, decode_prefill, encode
from lamina_jax.exchange.pull import most_pull_bytes, read_pull
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.prefill.prompts import Prompt, Prompts
from lamina_jax.worker.lease import Refused

KEEP_SECONDS = 600.0
"""How long a prompt is kept for an engine that neither lets go of it nor dies."""


class PrefillService:
    """The methods of `Prefill`; every one runs in a thread of the gRPC server's pool."""

    def __init__(self, facts: PrefillDescription, prompts: Prompts) -> None:
        self._facts, self._prompts = facts, prompts

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.Server.add_generic_rpc_handlers`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self.describe, None, encode),
                "Prefill": grpc.unary_stream_rpc_method_handler(self.prefill, None, encode),
            },
        )

    def describe(self, _: bytes, context: grpc.ServicerContext) -> PrefillDescription:
        return self._facts

    def prefill(self, data: bytes, context: grpc.ServicerContext) -> Iterator[Accepted]:
        try:
            prompt = self._prompts.submit(*decode_prefill(data))
        except Refused as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except (ConfigError, ValueError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        try:
            if not context.add_callback(lambda: self._prompts.end(prompt, "its engine has let go of it")):
                return
            yield Accepted()
            prompt.over.wait(KEEP_SECONDS)
        finally:
            self._prompts.end(prompt, f"it was not wanted in {KEEP_SECONDS:g} s")
        context.abort(grpc.StatusCode.ABORTED, prompt.reason)


class KvSource:
    """Answers the PULL frames of workers.

    Args:
        geometry: of the whole cache, as this host has it.
    """

    def __init__(self, prompts: Prompts, geometry: CacheGeometry) -> None:
        self._prompts, self._geometry = prompts, geometry

    def serve(self, channel: Channel, ticket: bytes) -> None:
        """One worker's connection, until it hangs up or the prompt is over.

        Raises:
            Refused: there is no such prompt, or it is over.
            ProtocolError: a frame that a worker does not send.
        """
        prompt = self._prompts.find(ticket)
        prompt.attach(channel.close)
        with suppress(ChannelClosed):
            while True:
                self._answer(channel, prompt)

    def _answer(self, channel: Channel, prompt: Prompt) -> None:
        header, payload = channel.receive(self._room)
        length, heads = len(prompt.tokens), self._geometry.num_kv_heads
        wanted, positions = read_pull(payload[: header.length], length=length, num_kv_heads=heads)
        found = prompt.read(header.layer, wanted, positions, KEEP_SECONDS)
        size = sum(array.nbytes for array in found)
        channel.send(header._replace(kind=Kind.STORED, length=size), found)

    def _room(self, header: Header) -> int:
        if header.kind is not Kind.PULL or header.length > most_pull_bytes():
            raise ProtocolError(f"a worker sends a prefill host no {header}")
        if header.layer >= self._geometry.num_layers:
            raise ProtocolError(f"{header} is beyond the {self._geometry.num_layers} layers")
        return header.length
