"""What an engine and an attention worker say to each other beside the frames of the decode loop.

The gRPC service `lamina_jax.Pool` has six methods. Their messages are in msgpack:

    Describe   anything -> Description
    Measure    LeaseRequest -> Footprint: what the programs of such a lease need beside its pages
    Lease      LeaseRequest -> a stream of Progress and then Ready: the worker prepares what is asked, and
               is the engine's for as long as this stream lives
    Pull       PullOrder -> Pulled (`pull.py`): the worker fetches a prompt's KV from a prefill host
    Drop       DropOrder -> nothing: it fetches it no more
    Exchange   a bidirectional stream of raw frames (`frames.py`); the session's id stands in its metadata
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from lamina_jax.compilation import Footprint
from lamina_jax.config import ConfigError
from lamina_jax.pool.geometry import KV_BYTES
from lamina_jax.pool.spec import KEY_BYTES, WorkerSpec

SERVICE = "lamina_jax.Pool"
CONTROL_BYTES = 1 << 20
"""No message of the control plane is larger."""

_MOST_LAYERS, _MOST_BUCKETS, _MOST_TOKENS = 1024, 256, 1 << 20
_MOST_GROUP = 64


class Description(Struct, frozen=True, kw_only=True):
    """What a worker is and has. All but the versions may be missing in what another release says.

    Attributes:
        version: of lamina_jax.
        frames_version: of the data stream's frames.
        platform, device_kind: "cpu", "gpu" or "tpu", and the device's name.
        devices: how many.
        memory_bytes: that the KV cache may fill, over all devices.
        listen: "host:port" of its gRPC server, as the worker itself says it.
        data_port: of its socket listener, on the host that was asked.
        unix_path: of the same for processes of the worker's host and user.
        held_by: the engine that holds it; empty: none.
        clock_ns: its monotonic clock, which also stamps answers.
    """

    version: str
    frames_version: int
    jax_version: str = ""
    platform: str = ""
    device_kind: str = ""
    devices: int = 0
    memory_bytes: int = 0
    listen: str = ""
    data_port: int = 0
    unix_path: str = ""
    held_by: str = ""
    clock_ns: int = 0


class LeaseRequest(Struct, frozen=True):
    """`engine`: who asks, for the eyes of others; `group`: of engines that share the worker, all others are
    refused while one of them has it. Empty: it shares with nobody."""

    engine: str
    spec: WorkerSpec
    group: str = ""


class Progress(Struct, frozen=True, tag=True):
    """Programs compiled, of how many."""

    done: int
    total: int


class Ready(Struct, frozen=True, tag=True):
    """`session_id`: random bytes that open a data channel; `pages`: KV pages that are held ready;
    `transfer`: address of the worker's transfer server, where there is one."""

    session_id: bytes
    pages: int
    transfer: str = ""


LeaseEvent = Progress | Ready

encode = msgspec.msgpack.encode
decode_description = msgspec.msgpack.Decoder(Description).decode
decode_footprint = msgspec.msgpack.Decoder(Footprint).decode
decode_event = msgspec.msgpack.Decoder(LeaseEvent).decode
_LEASE_REQUEST = msgspec.msgpack.Decoder(LeaseRequest)


def decode_request(data: bytes) -> LeaseRequest:
    """Raises `ConfigError` for what no engine of this version sends; the text names the field."""
    if len(data) > CONTROL_BYTES:
        raise ConfigError(f"a message of {len(data)} bytes, {CONTROL_BYTES} are allowed")
    try:
        request = _LEASE_REQUEST.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"no request for a lease: {error}") from None
    _check_spec(request.spec)
    _check(len(request.group) <= _MOST_GROUP, "group", request.group)
    return request


def _check_spec(spec: WorkerSpec) -> None:
    g = spec.geometry
    for name, value in [*vars(g).items(), *vars(spec).items()]:
        if name.endswith("dtype"):
            _check(value in (KV_BYTES if name == "dtype" else ("float32", "bfloat16")), name, value)
        elif type(value) is int:
            _check((name not in ("first_device", "kv_start")) <= value < 1 << 32, name, value)
    for name in ("windows", "scales", "softcaps"):
        _check(len(getattr(spec, name)) == g.num_layers <= _MOST_LAYERS, name, getattr(spec, name))
    _check(all(0 < window < 1 << 31 for window in spec.windows), "windows", spec.windows)
    _check(0 < len(spec.buckets) <= _MOST_BUCKETS, "buckets", len(spec.buckets))
    for rows, queries, _ in spec.buckets:
        _check(rows > 0 and queries > 0 and rows * queries <= _MOST_TOKENS, "buckets", (rows, queries))
    _check(g.num_heads % g.num_kv_heads == 0, "num_heads", g.num_heads)
    _check(g.num_kv_heads % spec.devices == 0, "devices", spec.devices)
    _check(spec.transfer is None or len(spec.transfer.key) == KEY_BYTES, "transfer", spec.transfer)


def _check(right: bool, name: str, value: object) -> None:
    if not right:
        raise ConfigError(f"the spec of a lease: {name}={value} cannot be")
