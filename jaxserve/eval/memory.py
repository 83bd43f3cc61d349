"""KV bytes of a sequence, from what the engine says its cache is made of. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.types import PageClasses


def pages_held(group: PageClasses, length: int) -> tuple[int, ...]:
    """Pages of each class that a sequence of `length` tokens holds once all it holds is written."""
    pages = -(-length // group.page_tokens)
    if group.window is not None:
        pages = min(pages, -(-group.window // group.page_tokens) + 1)
    if len(group.classes) == 1:
        return (pages,)
    unsealed = min(pages, group.sink_pages + group.residual_pages)
    return (unsealed, pages - unsealed)


def kv_bytes(groups: Sequence[PageClasses], length: int) -> int:
    """Bytes of KV that a sequence of `length` tokens holds."""
    return sum(
        count * cls.bytes
        for group in groups
        for count, cls in zip(pages_held(group, length), group.classes, strict=True)
    )


def sequences_cached(groups: Sequence[PageClasses], length: int) -> int:
    """How many sequences of `length` tokens the cache can hold at once; at least 1, since one always fits."""
    room = [
        cls.pages // count
        for group in groups
        for count, cls in zip(pages_held(group, length), group.classes, strict=True)
        if count
    ]
    return max(1, min(room))
