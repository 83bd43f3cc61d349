"""Steps whose tiles fill the program that runs them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, Wrapper
from jaxserve.scheduler.request import Phase
from jaxserve.scheduler.view import Budget, SeqView, View
from jaxserve.types import PAGE_TOKENS, SeqId


@register("prepacking")
class Prepacking(Wrapper):
    """Packs prompts into a number of tiles that a program exists for (Prepacking, arXiv:2404.09529, for tile buckets).

    The paper packs prompts into rows as long as the longest one; here a prompt takes whole tiles of 64 tokens, several
    prompts share a step, and a step is padded up to the next tile bucket. So the step gets the largest bucket that the
    waiting prompts can fill: in the order of the inner policy whole prompts while they fit, then a piece of the first
    one that does not. What is left over starts the next step. Looks at `window` prompts.
    """

    def __init__(self, inner: Policy, window: int = 64) -> None:
        super().__init__(inner)
        self.window = window
        self._share: dict[SeqId, int] = {}

    def rank(self, view: View) -> Iterator[SeqView]:
        prompts: list[SeqView] = []
        inner = self.inner.rank(view)
        for seq in inner:
            if seq.phase is Phase.DECODE:
                yield seq
            else:
                prompts.append(seq)
                prompts.extend(islice(inner, self.window))
                break
        self._share = {}
        room = min(view.limits.max_tiles, view.limits.max_num_batched_tokens // PAGE_TOKENS)
        decoding = [seq for seq in prompts if seq.phase is Phase.DECODE]
        prompts = [seq for seq in prompts if seq.phase is not Phase.DECODE]
        yield from decoding
        yield from self._pack(prompts, room, view)
        yield from inner

    def _pack(self, prompts: list[SeqView], room: int, view: View) -> list[SeqView]:
        sizes = [tiles_of(seq) for seq in prompts]
        left = target = filled(min(room, sum(sizes)), view.limits.tile_buckets)
        whole, cut = [], None
        for seq, tiles in zip(prompts, sizes, strict=True):
            if tiles <= left:
                whole.append(seq)
                self._share[seq.id] = seq.target - seq.computed
                left -= tiles
            elif cut is None:
                cut = seq
        if cut is not None and left:
            self._share[cut.id] = left * PAGE_TOKENS - cut.computed % PAGE_TOKENS
            return [*whole, cut]
        return whole if target else []

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        if seq.phase is Phase.DECODE:
            return self.inner.tokens(seq, left, view)
        return self._share.get(seq.id, 0)


def tiles_of(seq: SeqView) -> int:
    """Tiles that the rest of its prompt takes."""
    first = (seq.computed if seq.resident else 0) // PAGE_TOKENS
    return -(-(seq.target if seq.resident else seq.known) // PAGE_TOKENS) - first


def filled(tiles: int, buckets: tuple[int, ...]) -> int:
    """The largest bucket that `tiles` fill; all of them where there are no buckets or none is so small."""
    at = bisect_right(buckets, tiles)
    return buckets[at - 1] if at else tiles
