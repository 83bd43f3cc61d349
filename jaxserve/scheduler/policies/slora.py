"""Admission by what running requests will still need."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, Wrapper
from jaxserve.scheduler.request import Phase
from jaxserve.scheduler.view import Budget, SeqView, View
from jaxserve.types import PAGE_TOKENS, SeqId


@register("slora")
class SLoRA(Wrapper):
    """Admits a request only if the KV of all can never outgrow the pool (S-LoRA, arXiv:2311.03285, and LightLLM).

    Sort who runs by tokens still to come, the most first. When the i-th of them ends, the i first are still there and
    have grown by as much: i * left_i + (what these i hold now) is needed then, and the largest of these sums must fit.
    So nobody is preempted for lack of pages. Over any policy; `believed` is the share of `max_tokens` that answers are
    believed to take.
    """

    def __init__(self, inner: Policy, believed: float = 1.0) -> None:
        super().__init__(inner)
        self.believed = believed
        self._refused: SeqId | None = None

    def rank(self, view: View) -> Iterator[SeqView]:
        capacity = self._capacity(view)
        needs: list[tuple[int, int]] | None = None
        self._refused = None
        for seq in self.inner.rank(view):
            newcomer = seq.phase is Phase.WAITING and seq.ready
            if newcomer:
                if needs is None:
                    needs = sorted(self._need(other) for other in view.residents())
                if needs and peak([*needs, self._need(seq)]) > capacity:
                    self._refused = seq.id
            yield seq
            if newcomer and needs is not None and seq.resident:
                insort(needs, self._need(seq))

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        """None for who does not fit: the builder then admits nobody else, unless the inner policy skips misfits."""
        return 0 if seq.id == self._refused else self.inner.tokens(seq, left, view)

    def _need(self, seq: SeqView) -> tuple[int, int]:
        """(minus tokens still to come, tokens held then at least)"""
        coming = max(1, int(self.believed * seq.max_new) - seq.generated)
        return -coming, seq.known

    @staticmethod
    def _capacity(view: View) -> float:
        """Tokens that the smallest pool of a group without a window holds for sequences."""
        held = sum(pin.pages for pin in view.pins())
        return min(
            (
                (group.classes[0].pages * (1 - view.limits.watermark) - held) * PAGE_TOKENS
                for group in view.groups
                if group.window is None
            ),
            default=float("inf"),
        )


def peak(needs: list[tuple[int, int]]) -> int:
    """Most tokens that sequences will hold together, from (minus tokens to come, tokens held) of each."""
    most = held = 0
    for i, (coming, known) in enumerate(sorted(needs), 1):
        held += known
        most = max(most, held - i * coming)
    return most
