"""The reader: lines of any kind, in bounded memory, from any saved position."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.batch.job import read_job
from jaxserve.batch.lines import Line, Lines

contents = st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(data)
    return path


@settings(deadline=None)
@given(contents, st.booleans())
def test_lines_are_those_between_line_feeds(tmp_path_factory, lines: list[bytes], closed: bool):
    data = b"\n".join(lines) + (b"\n" if closed else b"")
    expected = data.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    found = list(Lines(write(tmp_path_factory.mktemp("lines"), data)))
    assert [line.data for line in found] == expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert not found or found[-1].end == len(data)


@settings(deadline=None)
@given(contents, st.data())
def test_a_restored_position_goes_on_where_it_was_saved(tmp_path_factory, lines: list[bytes], data: st.DataObject):
    path = write(tmp_path_factory.mktemp("lines"), b"".join(line + b"\n" for line in lines))
    everything = list(Lines(path))
    cut = data.draw(st.integers(0, len(everything)))
    first = iter(Lines(path).map(read_job))
    for _ in range(cut):
        next(first)
    second = iter(Lines(path).map(read_job))
    second.set_state(first.get_state())
    assert [job.number for job in second] == [line.number for line in everything[cut:]]


def test_a_line_over_the_limit_is_reported_without_its_content(tmp_path: Path):
    path = write(tmp_path, b"short\n" + b"x" * 5_000_000 + b"\nlast")
    assert list(Lines(path, max_bytes=100)) == [
        Line(1, 6, b"short"),
        Line(2, 5_000_007, None),
        Line(3, 5_000_011, b"last"),
    ]


def test_a_line_of_exactly_the_limit_passes(tmp_path: Path):
    path = write(tmp_path, b"x" * 100 + b"\n" + b"y" * 101 + b"\n")
    assert [line.data for line in Lines(path, max_bytes=100)] == [b"x" * 100, None]
