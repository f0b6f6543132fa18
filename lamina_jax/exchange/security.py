"""How engine and attention workers know each other: a shared token, and TLS by certificate files.

Knows nothing of what they say to each other. A token travels as metadata of every gRPC call; a data
socket shows the id of a session, which only its engine was told.
"""

from __future__ import annotations

import hmac
import os
import ssl
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from lamina_jax.config import ConfigError, SecurityConfig, is_loopback

TOKEN_KEY = "authorization"
SESSION_KEY = "lamina-session-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


def check_address(host: str, security: SecurityConfig, what: str) -> None:
    """Refuse an address that other machines reach, unless a token and TLS protect it or nobody minds.

    Args:
        what: the setting that names the address.

    Raises:
        ConfigError: it is not protected; the text says by what it would be.
    """
    missing = [] if security.token_file else ["--token-file"]
    if not (security.tls_cert or security.tls_ca):
        missing.append("--tls-cert and --tls-key (worker), --tls-ca (engine)")
    if missing and not (is_loopback(host) or security.insecure):
        raise ConfigError(
            f"{what}: {host!r} can be reached from other machines: protect it by {' and '.join(missing)}, "
            "take a loopback address, or say --insecure if everyone on that network may use the cache"
        )


def read_token(security: SecurityConfig) -> str | None:
    """The secret in `token_file`, the newline behind it left out; None: there is none.

    Raises:
        ConfigError: the file cannot be read, everybody can read it, or it holds no printable ASCII.
    """
    path = security.token_file
    if path is None:
        return None
    try:
        mode, token = os.stat(path).st_mode, Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={path!r} cannot be read: {error}") from None
    if mode & stat.S_IROTH:
        raise ConfigError(f"token_file={path!r} can be read by every user of this machine: chmod o-r it")
    if not token or not token.isprintable():
        raise ConfigError(f"token_file={path!r} holds no secret: write one line of printable ASCII into it")
    return token


def token_metadata(token: str | None) -> Metadata:
    """What a call carries to show the token."""
    return () if token is None else ((TOKEN_KEY, f"Bearer {token}"),)


def shows_token(metadata: Iterable[tuple[str, str | bytes]], token: str | None) -> bool:
    """Whether a call's metadata carries the token, where there is one; takes the same time for any guess."""
    shown = dict(metadata).get(TOKEN_KEY, "")
    return token is None or hmac.compare_digest(str(shown).encode(), f"Bearer {token}".encode())


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


def server_tls(security: SecurityConfig) -> tuple[ssl.SSLContext, grpc.ServerCredentials] | None:
    """For a worker's sockets and its gRPC server; None where there is no tls_cert.

    Raises:
        ConfigError: a file that cannot be used, or a tls_ca beside no certificate.
    """
    if security.tls_cert is None:
        if security.tls_ca is not None:
            raise ConfigError(
                "tls_ca asks engines for certificates: give tls_cert and tls_key, the worker's own"
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, security)
    if security.tls_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    key, cert, ca = _contents(security)
    return context, grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=ca is not None)


def client_tls(security: SecurityConfig) -> tuple[ssl.SSLContext, grpc.ChannelCredentials] | None:
    """For an engine's sockets and its gRPC channels; None where there is no tls_ca.

    Raises:
        ConfigError: a file that cannot be used, or a tls_cert without the authority to check workers by.
    """
    if security.tls_ca is None:
        if security.tls_cert is not None:
            raise ConfigError("tls_cert shows who the engine is: give tls_ca too, by which it checks workers")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, security)
    key, cert, ca = _contents(security)
    return context, grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, Any]]
) -> grpc.Channel:
    """Over TLS where there are `credentials`."""
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def add_port(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """The port, with TLS where there are `credentials`; raises RuntimeError where it cannot be had."""
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)


def _load(context: ssl.SSLContext, security: SecurityConfig) -> None:
    """Take the files in, and so find what is wrong with them."""
    try:
        if security.tls_cert is not None:
            context.load_cert_chain(security.tls_cert, security.tls_key)
        if security.tls_ca is not None:
            context.load_verify_locations(security.tls_ca)
    except OSError as error:  # of which ssl.SSLError is one
        names = f"tls_cert={security.tls_cert!r}, tls_key={security.tls_key!r}, tls_ca={security.tls_ca!r}"
        raise ConfigError(f"{names}: cannot be used: {error}") from None


def _contents(security: SecurityConfig) -> list[bytes | None]:
    paths = security.tls_key, security.tls_cert, security.tls_ca
    return [None if path is None else Path(path).read_bytes() for path in paths]
