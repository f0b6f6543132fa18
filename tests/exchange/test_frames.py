"""Headers come back as they were, and no other bytes pass for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.exchange.frames import HEADER_BYTES, Header, Kind, ProtocolError, unpack_header

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
HEADERS = st.builds(Header, st.sampled_from(Kind), U32, U16, U16, U32, U64, U64)


@given(HEADERS)
def test_round_trip(header: Header) -> None:
    data = header.pack()
    assert len(data) == HEADER_BYTES == 32
    assert unpack_header(data) == header
    assert unpack_header(memoryview(bytearray(data))) == header


@given(HEADERS, st.integers(0, HEADER_BYTES - 1), st.integers(0, 255))
def test_one_other_byte_is_noticed_or_refused(header: Header, place: int, value: int) -> None:
    data = bytearray(header.pack())
    same = data[place] == value
    data[place] = value
    try:
        assert (unpack_header(data) == header) is same
    except ProtocolError:
        assert not same


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_bytes(data: bytes) -> None:
    try:
        header = unpack_header(data)
    except ProtocolError:
        return
    assert header.pack() == data


@pytest.mark.parametrize(
    ("place", "says"), [(0, "the peer is no lamina_jax"), (2, "run one release"), (3, "unknown kind 250")]
)
def test_refusals_say_what_was_wrong(place: int, says: str) -> None:
    data = bytearray(Header(Kind.QUERY, 5).pack())
    data[place] = 250
    with pytest.raises(ProtocolError, match=says):
        unpack_header(data)
