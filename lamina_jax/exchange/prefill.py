"""The engine's side of prefill hosts: find them, and have prompts prefilled there.

The gRPC service `lamina_jax.Prefill` has two methods. Their messages are in msgpack:

    Describe   anything -> PrefillDescription
    Prefill    PrefillRequest -> a stream of one Accepted: the host prefills the prompt, and keeps its KV for
               as long as this stream lives

Knows nothing of workers, pages or requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import msgspec
import numpy as np
from msgspec import Struct

import lamina_jax
from lamina_jax.config import ConfigError, SecurityConfig, address_of, host_and_port
from lamina_jax.exchange.control import CONTROL_OPTIONS
from lamina_jax.exchange.frames import VERSION
from lamina_jax.exchange.peers import PeerError
from lamina_jax.exchange.pull import TICKET_BYTES
from lamina_jax.exchange.security import check_address, client_tls, open_channel, read_token, token_metadata
from lamina_jax.exchange.status import explain

SERVICE = "lamina_jax.Prefill"
REQUEST_BYTES = 1 << 24
"""No message is larger."""

ACCEPT_SECONDS = 5.0
"""What a host may take to say whether it takes a prompt."""


class PrefillDescription(Struct, frozen=True, kw_only=True):
    """What a prefill host is.

    Attributes:
        version: of lamina_jax.
        frames_version: of the data connections' frames.
        checkpoint: fingerprint of what it serves, and in which dtypes.
        max_tokens: longest prompt that it takes.
        data_port: of its data listener, on the host that was asked.
        device: kind and number of its devices.
    """

    version: str
    frames_version: int
    checkpoint: str
    max_tokens: int
    data_port: int
    device: str = ""


class PrefillRequest(Struct, frozen=True):
    """`ticket`: names the prompt to workers; `tokens`: int32, little-endian."""

    ticket: bytes
    tokens: bytes


class Accepted(Struct, frozen=True):
    """The host will prefill the prompt when its turn comes; workers may ask for its KV from now on."""


encode = msgspec.msgpack.encode
_DESCRIPTION = msgspec.msgpack.Decoder(PrefillDescription)
_ACCEPTED = msgspec.msgpack.Decoder(Accepted)
_REQUEST = msgspec.msgpack.Decoder(PrefillRequest)


def decode_prefill(data: bytes) -> tuple[bytes, np.ndarray]:
    """The ticket and the tokens int32[n] of a PrefillRequest.

    Raises:
        ConfigError: no engine sends this; the text says what is wrong.
    """
    try:
        request = _REQUEST.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"no request for a prefill: {error}") from None
    if len(request.ticket) != TICKET_BYTES or not request.tokens or len(request.tokens) % 4:
        raise ConfigError(
            f"no request for a prefill: a ticket of {len(request.ticket)} bytes, tokens of "
            f"{len(request.tokens)} bytes"
        )
    return request.ticket, np.frombuffer(request.tokens, "<i4")


class PrefillError(PeerError):
    """A prefill host that cannot be used; `busy`: but for now."""

    kind = "prefill host"

    def __init__(self, address: str, reason: str, *, temporary: bool = True, busy: bool = False) -> None:
        super().__init__(address, reason, temporary=temporary)
        self.busy = busy


class PrefillHost:
    """One prefill host, as an engine sees it. Making one connects to nothing.

    Args:
        address: "host:port" of its gRPC server.
        checkpoint: fingerprint of what the engine serves.
        max_tokens: longest prompt that the engine may send.

    Raises:
        ConfigError: no address, one that is not protected, or files of `security` that cannot be used.
    """

    def __init__(self, address: str, security: SecurityConfig, checkpoint: str, max_tokens: int) -> None:
        self.address, self._host = address, host_and_port("prefill", address)[0]
        check_address(self._host, security, "prefill")
        self._checkpoint, self._max_tokens = checkpoint, max_tokens
        self._metadata = token_metadata(read_token(security))
        options = [*CONTROL_OPTIONS, ("grpc.max_send_message_length", REQUEST_BYTES)]
        _, credentials = client_tls(security) or (None, None)
        self._channel = open_channel(address, credentials, options)

    def describe(self, deadline_seconds: float) -> PrefillDescription:
        """What the host is.

        Raises:
            PrefillError: it does not answer, refuses, or serves something else.
        """
        call = self._channel.unary_unary(f"/{SERVICE}/Describe", None, _DESCRIPTION.decode)
        try:
            found: PrefillDescription = call(b"", timeout=deadline_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
        self._check(found)
        return found

    def prefill(self, tokens: Sequence[int], ticket: bytes, ended: Callable[[], None]) -> RemotePrompt:
        """Have a prompt prefilled; returns when the host has taken it.

        Args:
            ended: called, in a thread of gRPC, when the host lets go of it or is lost.

        Raises:
            PrefillError: it is not to be had, or busy.
        """
        port = self.describe(ACCEPT_SECONDS).data_port
        call = self._channel.unary_stream(f"/{SERVICE}/Prefill", encode, _ACCEPTED.decode)
        request = PrefillRequest(ticket, np.asarray(tokens, "<i4").tobytes())
        stream = call(request, metadata=self._metadata)
        limit = threading.Timer(ACCEPT_SECONDS, stream.cancel)
        limit.daemon = True
        limit.start()
        try:
            next(stream)
        except grpc.RpcError as error:
            raise self._error(error) from None
        except StopIteration:
            raise PrefillError(self.address, "it let go of a prompt at once") from None
        finally:
            limit.cancel()
        return RemotePrompt(address_of(self._host, port), self.address, stream, ended)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _check(self, found: PrefillDescription) -> None:
        if found.version.split(".")[:2] != lamina_jax.__version__.split(".")[:2] or (
            found.frames_version != VERSION
        ):
            raise PrefillError(
                self.address,
                f"it runs lamina_jax {found.version}, this engine {lamina_jax.__version__}: run one release "
                "on both",
                temporary=False,
            )
        if found.checkpoint != self._checkpoint:
            raise PrefillError(
                self.address,
                "it serves another checkpoint, or has another dtype or kv_dtype: give it the engine's",
                temporary=False,
            )
        if found.max_tokens < self._max_tokens:
            raise PrefillError(
                self.address,
                f"it takes prompts of {found.max_tokens} tokens, the engine of {self._max_tokens}: give both "
                "the same max_model_len",
                temporary=False,
            )

    def _error(self, error: grpc.RpcError) -> PrefillError:
        busy = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        command = "python -m lamina_jax.serve MODEL --role prefill --listen"
        reason, temporary = explain(self.address, error, command=command)
        return PrefillError(self.address, reason, temporary=temporary, busy=busy)


class RemotePrompt:
    """A prompt whose KV a prefill host makes and keeps; a context manager that lets go of it.

    Attributes:
        address: "host:port" where workers get the KV.
    """

    def __init__(self, address: str, host: str, stream: Any, ended: Callable[[], None]) -> None:
        self.address, self._host, self._stream = address, host, stream
        if not stream.add_callback(ended):
            ended()

    @property
    def lost(self) -> PrefillError | None:
        """Why the host has let go of it, if it has."""
        if self._stream.is_active():
            return None
        return PrefillError(self._host, explain(self._host, self._stream, leased=True).reason)

    def __enter__(self) -> RemotePrompt:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.cancel()
