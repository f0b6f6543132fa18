"""What compute hosts say to each other: plain data in msgpack, on one gRPC stream of each follower.

The service `lamina_jax.Hosts` has one method, `Join`: a follower says `Hello`, then how it gets on; host 0
says what all of them do, in order. Numpy arrays are (dtype, shape, bytes). Knows nothing of who speaks.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from lamina_jax.config import ConfigError
from lamina_jax.core import StepPlan

SERVICE = "lamina_jax.Hosts"
MOST_BYTES = 64 * 2**20
"""Of one message: more than the plan of the largest step."""

_DTYPES = {name: np.dtype(name) for name in ("int32", "float32", "bool")}
_MOST_DIMENSIONS = 4


class Hello(Struct, frozen=True, tag=True):
    """The first message of a follower. `facts`: what has to be the same on all hosts, by name; `process`:
    who it is, for the eyes of others."""

    host_id: int
    num_hosts: int
    facts: dict[str, str]
    process: str


class Compiled(Struct, frozen=True, tag=True):
    """This host can run steps."""


class Traffic(Struct, frozen=True, tag=True):
    """What has crossed between this host and the workers so far, in so many steps, and how long the host
    was busy dispatching them."""

    steps: int = 0
    tensor_bytes: int = 0
    messages: int = 0
    metadata_bytes: int = 0
    dispatch_seconds: float = 0.0


class Trouble(Struct, frozen=True, tag=True):
    """Whoever says this ends now; everybody else has to."""

    reason: str


Report = Hello | Compiled | Traffic | Trouble
"""From a follower."""


class Accepted(Struct, frozen=True, tag=True):
    """The follower is one of the hosts; the others are waited for."""


class World(Struct, frozen=True, tag=True):
    """All hosts are there. `address`: of the JAX world's own coordinator, on host 0; `group`: that leases the
    workers."""

    address: str
    group: str


class Agreed(Struct, frozen=True, tag=True):
    """Pages of each part of the cache."""

    num_pages: int


class Dispatch(Struct, frozen=True, tag=True):
    """Queue this step."""

    plan: StepPlan


class Read(Struct, frozen=True, tag=True):
    """Wait for the oldest step that has not been read."""


class End(Struct, frozen=True, tag=True):
    """Give back what is held, and end."""


Order = Accepted | World | Agreed | Dispatch | Read | End | Trouble
"""From host 0."""


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (
            str(value.dtype),
            value.shape,
            np.ascontiguousarray(value).data.cast("B") if value.size else b"",
        )
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"{kind.__name__} cannot be received")
    dtype, shape, data = msgspec.convert(value, tuple[str, list[int], bytes])
    if dtype not in _DTYPES or len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise ValueError(f"no array is {dtype}{shape}")
    if math.prod(shape) * _DTYPES[dtype].itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not {dtype}{shape}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_REPORTS: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
_ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order, dec_hook=_decode_array)

encode = _ENCODER.encode


def decode_report(data: bytes) -> Report:
    """Raises `ConfigError` for what no follower of this version says."""
    return _decoded(data, _REPORTS)


def decode_order(data: bytes) -> Order:
    """Raises `ConfigError` for what no host 0 of this version says."""
    return _decoded(data, _ORDERS)


def _decoded(data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"no message of a compute host: {error}") from None
