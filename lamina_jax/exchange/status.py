"""What became of a call to a worker, in words that say what to change."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import NamedTuple

import grpc

from lamina_jax.config import host_and_port


class Failure(NamedTuple):
    """Why a worker cannot be used, and whether that may pass."""

    reason: str
    temporary: bool


def explain(
    address: str,
    call: grpc.Call,
    *,
    leased: bool = False,
    command: str = "python -m lamina_jax.attend --listen",
) -> Failure:
    """A call that failed; `leased`: of a worker that had answered before; `command`: what starts one."""
    code, details = call.code(), call.details() or ""
    stranger = f"what listens there does not answer as a lamina_jax worker ({details})"
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED if leased:
            return Failure(f"it is gone ({details})", True)
        case grpc.StatusCode.UNAVAILABLE if "handshake failed" in details:
            reason = f"no TLS with it ({details}): its tls_cert and the engine's tls_ca must belong together"
            return Failure(reason, False)
        case grpc.StatusCode.UNAVAILABLE if not _listens(address):
            started = f"`{command} {address}`"
            return Failure(f"nothing listens there: run {started}, or correct the address", True)
        case grpc.StatusCode.UNAVAILABLE if "timed out" not in details:
            hint = "correct the address; if it has a tls_cert, give the engine its tls_ca"
            return Failure(f"{stranger}: {hint}", True)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return Failure("it takes connections, and has not answered in time", True)
        case grpc.StatusCode.UNIMPLEMENTED:
            return Failure(f"{stranger}: correct the address", False)
        case _:
            return Failure(details or code.name, code is grpc.StatusCode.RESOURCE_EXHAUSTED)


def _listens(address: str) -> bool:
    with suppress(OSError), socket.create_connection(host_and_port("attention", address), timeout=1.0):
        return True
    return False
