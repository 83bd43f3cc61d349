from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.stops import StopFinder

SMALL = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def stream(stops: tuple[str, ...], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    finder = StopFinder(stops, include)
    text = ""
    for piece in pieces:
        shown, stop = finder.push(piece)
        text += shown
        if stop is not None:
            return text, stop
    return text + finder.flush(), None


def plain(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """The definition: the first end of any stop, and there the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(stops=STOPS, pieces=st.lists(st.text("ab", max_size=6), max_size=10))
def test_finds_what_plain_search_finds_however_the_text_is_cut(stops: tuple[str, ...], pieces: list[str]) -> None:
    assert stream(stops, pieces) == plain(stops, "".join(pieces))


@given(stops=STOPS, pieces=st.lists(st.text("ab", max_size=6), max_size=10))
def test_shows_all_that_cannot_be_a_stop_and_no_more(stops: tuple[str, ...], pieces: list[str]) -> None:
    finder = StopFinder(stops)
    shown = text = ""
    for piece in pieces:
        text += piece
        new, stop = finder.push(piece)
        shown += new
        if stop is not None:
            return
        held = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert shown == text[: len(text) - held]


@given(stops=STOPS, text=SMALL)
def test_included_stops_end_the_text(stops: tuple[str, ...], text: str) -> None:
    without, stop = stream(stops, [text])
    assert stream(stops, [text], include=True) == (without + (stop or ""), stop)


@pytest.mark.parametrize("pieces", [["one\n", "\nHuman", ": hi"], ["one\n\nHuman: hi"], list("one\n\nHuman: hi")])
def test_the_earliest_end_wins(pieces: list[str]) -> None:
    assert stream(("\n\nHuman:", "man"), pieces) == ("one\n\nHu", "man")


def test_characters_of_any_width() -> None:
    assert stream(("世界", "👍"), ["你好世", "界👍"]) == ("你好", "世界")


def test_long_near_misses_take_linear_time() -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        assert stream(("a" * 500 + "b",), ["a"] * count) == ("a" * count, None)
        return time.process_time() - start

    assert min(seconds(20_000) for _ in range(3)) < 40 * min(seconds(2_000) for _ in range(3))
