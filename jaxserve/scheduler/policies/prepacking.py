"""Steps whose tiles fill the program that runs them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from math import inf

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, Wrapper
from jaxserve.scheduler.request import DECODE
from jaxserve.scheduler.view import Budget, SeqView, View
from jaxserve.types import SeqId


@register("prepacking")
class Prepacking(Wrapper):
    """Packs prompts into a number of tiles that a program exists for (Prepacking, arXiv:2404.09529, for tile buckets).

    The paper packs prompts into rows as long as the longest one; here a prompt takes whole tiles, several
    prompts share a step, and a step is padded up to the next tile bucket. So the step gets the largest bucket that the
    waiting prompts can fill: the first prompt of the inner policy, so that none is overtaken forever, then in its order
    whole prompts while they fit, then a piece of the first one that does not. Tiles that find no pages go to the next
    in line, and what is left over starts the next step. Looks at `window` prompts.
    """

    def __init__(self, inner: Policy, window: int = 64) -> None:
        super().__init__(inner)
        self.window = window
        self._share: dict[SeqId, int] = {}
        self._spare = 0
        """Tiles of the step that no bucket can use."""

    def rank(self, view: View) -> Iterator[SeqView]:
        prompts: list[SeqView] = []
        inner = self.inner.rank(view)
        for seq in inner:
            if seq.phase is DECODE:
                yield seq
            else:
                prompts.append(seq)
                prompts.extend(islice(inner, self.window))
                break
        self._share = {}
        decoding = [seq for seq in prompts if seq.phase is DECODE]
        prompts = [seq for seq in prompts if seq.phase is not DECODE]
        yield from decoding
        yield from self._pack(prompts, view)
        yield from inner

    def _pack(self, prompts: list[SeqView], view: View) -> list[SeqView]:
        tile = view.limits.page_tokens
        sizes = [tiles_of(seq, tile) for seq in prompts]
        room = min(view.limits.max_tiles, view.limits.max_num_batched_tokens // tile)
        left = filled(min(room, self._startable(prompts, sizes, view)), view.limits.tile_buckets)
        self._spare = view.limits.max_tiles - left
        packed, passed = [], []
        for seq, tiles in zip(prompts, sizes, strict=True):
            if tiles <= left:
                packed.append(seq)
                self._share[seq.id] = seq.remaining if seq.resident else seq.known
                left -= tiles
            elif not packed:
                packed.append(seq)
                self._share[seq.id] = piece(seq, left, tile)
                left = 0
            else:
                passed.append(seq)
        return [*packed, *passed]

    def _startable(self, prompts: list[SeqView], sizes: list[int], view: View) -> int:
        """Tiles of the prompts that are started or will find slots and pages."""
        started = [tiles for seq, tiles in zip(prompts, sizes, strict=True) if seq.resident]
        slots = len(prompts) if self.displaces else view.limits.max_num_seqs - view.num_residents
        pages, total = room_for_newcomers(view) - sum(started), sum(started)
        for seq, tiles in zip(prompts, sizes, strict=True):
            if not seq.resident:
                slots, pages = slots - 1, pages - tiles
                if slots < 0 or pages < 0:
                    break
                total += tiles
        return total or sizes[0] if sizes else 0

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        if seq.phase is DECODE:
            return self.inner.tokens(seq, left, view)
        share = self._share.get(seq.id)
        return piece(seq, left.tiles - self._spare, view.limits.page_tokens) if share is None else share


def room_for_newcomers(view: View) -> float:
    """Pages of the smallest group without a window, of its larger class, without those that stay free at admission."""
    free = [
        max(view.free(i, cls) - int(kind.pages * view.limits.watermark) for cls, kind in enumerate(group.classes))
        for i, group in enumerate(view.groups)
        if group.window is None
    ]
    return min(free, default=inf)


def piece(seq: SeqView, tiles: int, size: int) -> int:
    """Tokens with which its prompt fills so many tiles of that size, if it is that long."""
    return tiles * size - seq.computed % size if tiles > 0 else 0


def tiles_of(seq: SeqView, size: int) -> int:
    """Tiles of that size that the rest of its prompt takes."""
    first = (seq.computed if seq.resident else 0) // size
    return -(-(seq.target if seq.resident else seq.known) // size) - first


def filled(tiles: int, buckets: tuple[int, ...]) -> int:
    """The largest bucket that `tiles` fill; all of them where there are no buckets or none is so small."""
    at = bisect_right(buckets, tiles)
    return buckets[at - 1] if at else tiles
