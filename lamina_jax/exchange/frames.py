"""What crosses a data channel to or from an attention worker: a fixed header, then raw bytes.

Little-endian; q, k, v and o in the wire dtype, integers as int32. Knows nothing of channels, jax or requests.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

MAGIC, VERSION = 0x4A4C, 1

_LAYOUT = struct.Struct("<HBBIHHIQQ")  # MAGIC, VERSION, and a `Header`
HEADER_BYTES = _LAYOUT.size


class ProtocolError(ValueError):
    """Bytes that are no frame of ours, or one that may not come here."""


class Kind(IntEnum):
    """What a frame is. Its payload, B rows of Q new tokens (T = B Q), for each of a worker's pieces in turn:

    HELLO: the session's id; the first frame of a socket.
    BEGIN: int32 B, Q, then a microbatch's `StepMetadata` for this worker.
    QUERY: q[B, Q, n, H]; an ANSWER follows.
    KV: kv[B, Q, 2k, H], k's heads, then v's; of a cache cut by token only the tokens kept there, [T', 2k, H].
    QKV: qkv[B, Q, n + 2k, H]; an ANSWER follows.
    ANSWER: a message of `lamina_jax.pool.message`.
    FAILED: UTF-8 text: why the worker, or the prefill host, gives up.
    PULL: int32 first KV head, the one behind the last, then T' positions; a worker asks a prefill host.
    STORED: its answer: what pages hold of them, values [T', 2, k, H], then scales [T', 2, k] if quantised.
    """

    HELLO = 1
    BEGIN = 2
    QUERY = 3
    KV = 4
    QKV = 5
    ANSWER = 6
    FAILED = 7
    PULL = 8
    STORED = 9


class Header(NamedTuple):
    """The beginning of a frame.

    Attributes:
        kind: what the payload is.
        length: of the payload, in bytes; below 2^32.
        microbatch, layer, step: what it belongs to, below 2^16, 2^16 and 2^32; an answer has those of its
            query.
        received_ns, done_ns: of an answer, when its query was received and its part computed, on the
            worker's monotonic clock; 0 elsewhere.
    """

    kind: Kind
    length: int
    microbatch: int = 0
    layer: int = 0
    step: int = 0
    received_ns: int = 0
    done_ns: int = 0

    def pack(self) -> bytes:
        """As `HEADER_BYTES` bytes."""
        return _LAYOUT.pack(MAGIC, VERSION, *self)


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """The inverse of `Header.pack`.

    Raises:
        ProtocolError: another magic number, version or kind.
    """
    magic, version, kind, *others = _LAYOUT.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"a frame begins with {magic:#06x}, not {MAGIC:#06x}: the peer is no lamina_jax")
    if version != VERSION:
        raise ProtocolError(f"frames of version {version}, and this side speaks {VERSION}: run one release")
    known = _KINDS.get(kind)
    if known is None:
        raise ProtocolError(f"a frame of unknown kind {kind}")
    return Header(known, *others)


_KINDS = {kind.value: kind for kind in Kind}  # a fifth of the time that Kind(...) takes
