"""How many pages fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv import DoesNotFitError, formats, size_pages
from jaxserve.kv.sizing import grid, held_tokens
from jaxserve.types import KVGroup

FULL = KVGroup(layers=tuple(range(6)), kv_heads=2, head_dim=64)
WINDOWED = KVGroup(layers=tuple(range(30)), kv_heads=2, head_dim=64, window=512)
F32 = formats.get("f32")
PAGE_BYTES = 6 * 2 * 2 * 64 * 64 * 4


def test_all_memory_goes_to_one_group() -> None:
    (classes,) = size_pages(100 * PAGE_BYTES, [FULL], [F32], max_model_len=1024, max_chunk=512)
    assert classes.classes[0].bytes == PAGE_BYTES
    assert classes.classes[0].pages == 100
    (capped,) = size_pages(100 * PAGE_BYTES, [FULL], [F32], max_model_len=1024, max_chunk=512, max_num_seqs=4)
    assert capped.classes[0].pages == 64


@pytest.mark.parametrize(("name", "token_bytes"), [("bf16", 128 * 2), ("int8", 128 + 4), ("fp8_e4m3", 128 + 2)])
def test_fewer_bytes_are_more_pages(name: str, token_bytes: int) -> None:
    """K and V of a token and head take what the format says, and 1 GiB holds as many pages as that gives."""
    group = KVGroup(layers=tuple(range(32)), kv_heads=8, head_dim=128)
    (classes,) = size_pages(1 << 30, [group], [formats.get(name)], max_model_len=4096, max_chunk=512)
    page_bytes = 32 * 8 * 64 * 2 * token_bytes
    assert classes.classes[0].bytes == page_bytes
    assert classes.classes[0].pages == grid((1 << 30) // page_bytes)


def test_error_names_the_options() -> None:
    with pytest.raises(DoesNotFitError) as error:
        size_pages(10 * PAGE_BYTES, [FULL], [F32], max_model_len=1024, max_chunk=512)
    assert str(error.value) == (
        "One sequence of --max-model-len 1024 needs 6.0 MiB of KV cache, but 3.8 MiB are there: "
        "raise --kv-cache-memory or lower --max-model-len to 640 or less."
    )


def test_a_windowed_group_holds_its_window_and_a_chunk() -> None:
    assert held_tokens(WINDOWED, 100_000, 256) == 512 + 256 + 64
    assert held_tokens(WINDOWED, 100, 256) == 128
    assert held_tokens(FULL, 100_000, 256) == 100_032


@given(memory=st.integers(0, 1 << 31), length=st.integers(1, 5000), chunk=st.integers(64, 2048))
def test_fits_and_holds_a_sequence(memory: int, length: int, chunk: int) -> None:
    groups = [FULL, WINDOWED]
    try:
        sized = size_pages(memory, groups, [F32, F32], max_model_len=length, max_chunk=chunk)
    except DoesNotFitError:
        return
    assert sum(c.pages * c.bytes for s in sized for c in s.classes) <= memory
    for group, s in zip(groups, sized, strict=True):
        assert s.classes[0].pages * 64 >= held_tokens(group, length, chunk)
        assert s.window == group.window


@given(st.integers(0, 1 << 30))
def test_grid_is_coarse_and_loses_little(pages: int) -> None:
    rounded = grid(pages)
    assert pages - pages // 16 <= rounded <= pages
    assert grid(rounded) == rounded
    assert bin(rounded).count("1") <= 5
