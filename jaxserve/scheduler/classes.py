"""Which pages of a sequence each page class holds. Arithmetic only: knows no pools, pages or sequences.

A group of one class keeps every page in it. A group of two keeps sinks and the newest pages in 16 bits (`Open`) and
every full page behind the sinks sealed (`Sealed`). A page is sealed as soon as it is full: from the activations if a
prefill chunk completes it, else after the step whose rows may have filled it. Its 16-bit form goes when no later query
reads it; a page that a chunk completes never gets one unless queries after the chunk read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.scheduler.limits import Limits
from jaxserve.types import PageClasses

NEVER = 1 << 62


def pages_for(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)


def pages_spanned(tokens: int, page_tokens: int) -> int:
    """Pages that `tokens` consecutive positions touch at most, wherever they begin."""
    return (tokens + page_tokens - 2) // page_tokens + 1


def first_read(position: int, window: int | None, page_tokens: int) -> int:
    """First page that a query at `position` or later reads."""
    return 0 if window is None else max(0, position - window + 1) // page_tokens


class Span(NamedTuple):
    """How far a sequence's tables reach: pages [0, `entries`) hold tokens, [0, `full`) may be full, and later queries
    stand in page `reads` or behind it."""

    entries: int
    reads: int
    full: int

    @classmethod
    def prefilled(cls, tokens: int, page_tokens: int) -> Span:
        """Exactly `tokens` are computed."""
        full = tokens // page_tokens
        return cls(pages_for(tokens, page_tokens), full, full)


@dataclass(frozen=True)
class Whole:
    """The class of a group with one: every page, written in its final form.

    `cap`: pages of a windowed group with which a sequence can always go on.
    """

    group: int
    cls: int
    window: int | None
    cap: int

    def end(self, span: Span) -> int:
        """Entries of the table."""
        return span.entries

    def takes(self, index: int, span: Span) -> bool:
        """Whether the page at `index` < `end(span)` is held."""
        return True

    def cost(self, have: int, span: Span) -> int:
        """Pages that a table with `have` entries is granted on its way to `span`."""
        return max(0, span.entries - have)

    def need(self, have: int, span: Span, step: int) -> int:
        """Pages to reserve for that way if it takes several steps of up to `step` pages; a window holds few of them at
        a time."""
        return min(span.entries - have, self.cap + step)

    def least(self, span: Span) -> int:
        """Pages without which a sequence that comes as far as `span` could not run even alone."""
        return min(span.entries, self.cap)

    def shares(self, index: int) -> bool:
        """Whether a full page is of use to other sequences."""
        return True


@dataclass(frozen=True)
class Open(Whole):
    """16-bit pages of a group with two classes. `cap`: besides the sinks."""

    sinks: int
    residual: int

    def takes(self, index: int, span: Span) -> bool:
        return index < self.sinks or index > span.reads - self.residual

    def cost(self, have: int, span: Span) -> int:
        sinks = max(0, min(self.sinks, span.entries) - have)
        return sinks + max(0, span.entries - max(have, self.sinks, span.reads - self.residual + 1))

    def need(self, have: int, span: Span, step: int) -> int:
        sinks = max(0, min(self.sinks, span.entries) - have)
        return sinks + min(span.entries - have - sinks, self.residual)

    def least(self, span: Span) -> int:
        return min(span.entries, self.sinks + self.cap)

    def shares(self, index: int) -> bool:
        # A query right behind a shared prefix reads its last residual - 1 pages in 16 bits.
        return index < self.sinks or self.residual > 1


@dataclass(frozen=True)
class Sealed(Whole):
    """Sealed pages of a group with two classes."""

    sinks: int

    def end(self, span: Span) -> int:
        return span.full

    def takes(self, index: int, span: Span) -> bool:
        return index >= self.sinks

    def cost(self, have: int, span: Span) -> int:
        return max(0, span.full - max(have, self.sinks))

    def need(self, have: int, span: Span, step: int) -> int:
        return min(self.cost(have, span), self.cap + step)

    def least(self, span: Span) -> int:
        return min(self.cost(0, span), self.cap)


def rules_of(number: int, group: PageClasses, limits: Limits) -> tuple[Whole, ...]:
    """The rule of each class of group `number`.

    Raises:
        ValueError: a group that nobody can account for.
    """
    size = limits.page_tokens
    if group.page_tokens != size:
        raise ValueError(f"KV group {number} has pages of {group.page_tokens} tokens, the scheduler accounts in {size}")
    window = group.window
    if window is not None and window < 1:
        raise ValueError(f"KV group {number} has a window of {window} tokens; it must be at least 1")
    cap = NEVER
    if window is not None:  # a tile or row and the window before it
        rows = window + (limits.q - 1) * (limits.lag + 1)
        cap = max(pages_spanned(rows, size), pages_for(window - 1, size) + 1)
    if len(group.classes) == 1:
        return (Whole(number, 0, window, cap),)
    sinks, residual = group.sink_pages, group.residual_pages
    if len(group.classes) != 2 or sinks < 0 or residual < 1:
        names = ", ".join(c.name for c in group.classes)
        raise ValueError(
            f"KV group {number} has page classes ({names}) with {sinks} sink and {residual} residual pages; it can "
            "have one class, or two with at least 0 sink and 1 residual pages"
        )
    # A chunk brings the pages of its end before those of its beginning go, and a row of uncertain length may need the
    # next page before the last one is known to be full.
    newest = max(2 * residual - 1, residual + (limits.q > 1))
    return Open(number, 0, window, newest, sinks, residual), Sealed(number, 1, window, cap, sinks)
