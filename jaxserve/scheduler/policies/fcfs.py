"""Iteration-level batching, prefill first: the baseline that other policies are compared with."""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, decodes, prefills
from jaxserve.scheduler.request import DECODE
from jaxserve.scheduler.view import Budget, SeqView, View


@register("fcfs")
class FCFS(Policy):
    """First come, first served at every iteration (Orca, OSDI 2022, with the prefill priority of early vLLM).

    A step computes prompts if any can start, whole, else one token of every running sequence. Only a prompt too long
    for any step is split. Never preempts by choice: when pages run out, later arrivals give theirs up.
    """

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from prefills(view)
        yield from view.waiting()
        yield from decodes(view)

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        if seq.phase is DECODE:
            return view.limits.q if left.tiles == view.limits.max_tiles else 0
        tile = view.limits.page_tokens
        most = min(view.limits.max_tiles, view.limits.max_num_batched_tokens // tile)
        tiles = min(left.tiles, left.tokens // tile)
        wanted = super().tokens(seq, left, view)
        whole = wanted <= tiles * tile
        return wanted if whole or tiles == most else 0
