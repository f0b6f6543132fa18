"""A text fed in any pieces ends where the whole text would, and shows nothing that it takes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.engine.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab\N{GREEK SMALL LETTER ALPHA}", max_size=12)


@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text(alphabet="ab\N{GREEK SMALL LETTER ALPHA}", min_size=1, max_size=4), max_size=3),
)
def test_any_split_of_a_text_ends_at_the_same_place(pieces: list[str], stops: list[str]) -> None:
    finder, text, seen, shown = StopStrings(stops), "", 0, ""
    for piece in pieces:
        text += piece
        hit = finder.find(text, seen)
        if hit:
            break
        seen = len(text)
        now = finder.shown(text)
        assert now.startswith(shown), "what was shown is taken back"
        assert not any(stop in now for stop in stops)
        shown = now
    places = [place for stop in stops if (place := "".join(pieces).find(stop)) >= 0]
    if not places:
        assert hit_of(finder, "".join(pieces)) is None
        return
    assert hit is not None
    place, stop = hit
    assert text[place:].startswith(stop)
    assert text[:place].startswith(shown), "part of a stop string was shown"


def hit_of(finder: StopStrings, text: str) -> tuple[int, str] | None:
    return finder.find(text, 0)


def test_of_two_stop_strings_the_first_in_the_text_counts() -> None:
    assert StopStrings(["cd", "b"]).find("abcd", 0) == (1, "b")
    assert StopStrings(["cd", "b"]).find("abcd", 2) == (1, "b")
    assert StopStrings([]).find("abc", 0) is None
    assert StopStrings(["\n\n"]).shown("x\n") == "x"
    assert StopStrings(["\n\n"]).shown("x") == "x"
