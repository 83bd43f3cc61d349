"""How many pages fit. Pure arithmetic: knows no device, no allocator, no request."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.kv.format import KVFormat
from jaxserve.types import KVGroup, PageClass, PageClasses


class DoesNotFitError(ValueError):
    """Not even one sequence of the maximum length fits into the KV memory."""


def held_tokens(group: KVGroup, length: int, max_chunk: int) -> int:
    """Tokens whose pages a sequence of `length` tokens holds at most in `group`, a multiple of the page.

    A windowed group frees pages behind the window, but a prefill chunk of `max_chunk` tokens needs the window before
    its first token and all of its own, and both may begin inside a page.
    """
    pages = -(-length // group.page_tokens)
    if group.window is not None:
        pages = min(pages, -(-(group.window + max_chunk) // group.page_tokens) + 1)
    return pages * group.page_tokens


def grid(pages: int) -> int:
    """`pages` rounded down so that at most 1/16 is lost: jitter in free memory then seldom changes a shape."""
    step = 1 << max(pages.bit_length() - 5, 0)
    return pages // step * step


def size_pages(
    memory: int,
    groups: Sequence[KVGroup],
    formats: Sequence[KVFormat],
    *,
    max_model_len: int,
    max_chunk: int,
    expected_len: int | None = None,
    max_num_seqs: int | None = None,
) -> tuple[PageClasses, ...]:
    """Page counts by group and class within `memory` bytes of KV (temporaries of the programs already taken off).

    Every class gets what one sequence of `max_model_len` tokens needs; the rest is split as sequences of
    `expected_len` tokens (default: a quarter of the maximum) use it. With `max_num_seqs`, no class gets more than that
    many sequences of `max_model_len` can hold. `max_chunk`: largest number of prompt tokens of one sequence in a step.
    Raises DoesNotFitError, naming the options that help, if one sequence of `max_model_len` does not fit.
    """
    expected = expected_len or max(max_model_len // 4, 1)
    sized = [(g, f, f.kinds(g)) for g, f in zip(groups, formats, strict=True)]
    need = [_least(g, f, max_model_len, max_chunk) for g, f, _ in sized]
    share = [f.pages_held(held_tokens(g, expected, max_chunk) // g.page_tokens) for g, f, _ in sized]

    def cost(pages: Sequence[tuple[int, ...]]) -> int:
        return sum(
            n * kind.bytes
            for (_, _, kinds), row in zip(sized, pages, strict=True)
            for n, kind in zip(row, kinds, strict=True)
        )

    spare = memory - cost(need)
    if spare < 0:
        raise DoesNotFitError(_advice(memory, cost(need), max_model_len, sized, max_chunk))
    share_cost = cost(share)

    def pages(least: int, share: int) -> int:
        count = max(grid(least + spare * share // share_cost), least)
        return count if max_num_seqs is None else min(count, least * max_num_seqs)

    return tuple(
        PageClasses(
            classes=tuple(
                PageClass(name=kind.name, pages=pages(n, s), bytes=kind.bytes)
                for kind, n, s in zip(kinds, row, shares, strict=True)
            ),
            window=g.window,
            sink_pages=f.sink_pages,
            residual_pages=f.residual_pages,
            page_tokens=g.page_tokens,
        )
        for (g, f, kinds), row, shares in zip(sized, need, share, strict=True)
    )


def _least(group: KVGroup, format: KVFormat, length: int, max_chunk: int) -> tuple[int, ...]:
    """Pages by class with which one sequence of `length` tokens can always go on.

    With two classes it holds more than usual while it passes from page to page: a prefill chunk brings the 16-bit pages
    of its end before those of its beginning are given back, a row of unknown length may need a page before the last one
    is known to be full, and the newest page is sealed when it is full.
    """
    held = format.pages_held(held_tokens(group, length, max_chunk) // group.page_tokens)
    return held if len(held) == 1 else (held[0] + format.residual_pages + 1, held[1] + 1)


def _advice(memory: int, needed: int, max_model_len: int, sized: Sequence[tuple], max_chunk: int) -> str:
    def fits(length: int) -> bool:
        held = (
            n * kind.bytes
            for g, f, kinds in sized
            for n, kind in zip(_least(g, f, length, max_chunk), kinds, strict=True)
        )
        return sum(held) <= memory

    step = max(g.page_tokens for g, _, _ in sized)
    low, high = 0, max_model_len // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    mib = 1 << 20
    text = (
        f"One sequence of --max-model-len {max_model_len} needs {needed / mib:.1f} MiB of KV cache, "
        f"but {max(memory, 0) / mib:.1f} MiB are there: raise --kv-cache-memory"
    )
    return f"{text} or lower --max-model-len to {low * step} or less." if low else f"{text}."
