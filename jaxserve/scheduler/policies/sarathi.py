"""Chunked prefill mixed with decodes."""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, decodes, prefills
from jaxserve.scheduler.view import SeqView, View


@register("sarathi")
class Sarathi(Policy):
    """Stall-free batching (Sarathi-Serve, arXiv:2403.02310).

    Under one token budget: all decodes, then prompts partly computed, then new ones, each in order of arrival. A prompt
    takes what the decodes left, so no decode waits longer than one step of the budget's size.
    """

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        yield from view.waiting()
