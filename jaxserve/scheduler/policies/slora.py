"""Admission by what running requests will still need."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, Wrapper
from jaxserve.scheduler.request import WAITING
from jaxserve.scheduler.view import SeqView, View


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

    def rank(self, view: View) -> Iterator[SeqView]:
        capacity = self._capacity(view)
        needs: list[tuple[int, int]] | None = None
        for seq in self.inner.rank(view):
            if seq.phase is not WAITING or not seq.ready:
                yield seq
                continue
            if needs is None:
                needs = sorted(self._needs(view.residents()))
            if needs and peak(needs, self._needs((seq,))[0]) > capacity:
                view.refuse_newcomers()
                continue
            yield seq
            if seq.resident:
                insort(needs, self._needs((seq,))[0])

    def _needs(self, seqs: Iterable[SeqView]) -> list[tuple[int, int]]:
        """(minus tokens still to come, tokens held then at least) of each."""
        believed = self.believed
        return [(min(-1, (known := seq.known) - seq.prompt - int(believed * seq.max_new)), known) for seq in seqs]

    @staticmethod
    def _capacity(view: View) -> float:
        """Tokens that the smallest pool of a group without a window holds for sequences."""
        held = sum(pin.pages for pin in view.pins())
        return min(
            (
                (group.classes[0].pages * (1 - view.limits.watermark) - held) * group.page_tokens
                for group in view.groups
                if group.window is None
            ),
            default=float("inf"),
        )


def peak(needs: list[tuple[int, int]], newcomer: tuple[int, int]) -> int:
    """Most tokens that sequences will hold together, from (minus tokens to come, tokens held) of each, in this
    order."""
    insort(needs, newcomer)
    most = held = count = 0
    for coming, known in needs:
        count += 1
        held += known
        total = held - count * coming
        if total > most:
            most = total
    needs.remove(newcomer)
    return most
