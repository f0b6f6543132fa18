"""A text fed in any pieces ends where the whole text would, and shows nothing that it takes back."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.engine.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab\N{GREEK SMALL LETTER ALPHA}", max_size=12)


@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text(alphabet="ab\N{GREEK SMALL LETTER ALPHA}", min_size=1, max_size=4), max_size=3),
)
def test_any_split_of_a_text_ends_at_the_same_place(pieces: list[str], stops: list[str]) -> None:
    finder, held, shown, whole = StopStrings(stops), "", "", "".join(pieces)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    for piece in pieces:
        held += piece
        if hit := finder.find(held):
            place, stop = hit
            assert held[place:].startswith(stop)
            assert whole.startswith(shown + held[:place] + stop)
            assert places, "there is none in the whole text"
            return
        count = finder.shown(held)
        shown, held = shown + held[:count], held[count:]
        assert not any(stop in shown for stop in stops)
    assert not places, "it was missed"
    assert shown + held == whole


def test_of_two_stop_strings_the_first_in_the_text_counts() -> None:
    assert StopStrings(["cd", "b"]).find("abcd") == (1, "b")
    assert StopStrings([]).find("abc") is None


def test_a_long_stop_string_costs_no_more_than_itself() -> None:
    tracemalloc.start()
    finder = StopStrings(["a" * 20_000])
    assert finder.shown("b" + "a" * 100) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    assert StopStrings(["\n\n"]).shown("x\n") == 1
    assert StopStrings(["\n\n"]).shown("x") == 1
    assert StopStrings(["abc", "bx"]).shown("xab") == 1
    assert StopStrings([]).shown("xab") == 3
