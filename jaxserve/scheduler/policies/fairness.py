"""Fair shares for tenants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush, heapreplace

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, decodes, prefills
from jaxserve.scheduler.queue import Queue
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, Plan, SeqId, StepDone

KEPT = 1024
"""Tenants below this number are never forgotten."""


class Tenant:
    """`service`: weighted tokens that it was given. It only grows."""

    __slots__ = ("name", "queue", "ranked", "running", "service", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.service = 0.0
        self.queue = Queue()
        self.running = 0
        self.ranked = False
        """Whether the heap of waiting tenants has it."""


@register("fairness")
class Fairness(Policy):
    """Virtual token counters (VTC, Sheng et al., OSDI 2024): the tenant that was served least comes next.

    A tenant's counter grows by `prompt_weight` for each prompt token when a request is admitted and by `output_weight`
    for each token generated, divided by the tenant's entry in `weights` (1 where it has none). A tenant that comes back
    from idleness is lifted to the least counter of those that wait, so nobody saves up service. Within a tenant the
    order is that of arrival; who runs is never displaced, so shares are exact over times longer than a request.
    """

    def __init__(
        self, prompt_weight: float = 1.0, output_weight: float = 2.0, weights: Mapping[str, float] | None = None
    ) -> None:
        self.prompt_weight = prompt_weight
        self.output_weight = output_weight
        self.weights = weights
        self._tenants: dict[str, Tenant] = {}
        self._of: dict[SeqId, Tenant] = {}
        self._heap: list[tuple[float, str]] = []
        """Tenants with waiting requests by their service or less: counters grow without moving the entry."""
        self._charged: set[SeqId] = set()
        self._prune_at = KEPT
        self._last = 0.0
        """Counter of the tenant that was last served or went idle."""

    def service(self, tenant: str) -> float:
        known = self._tenants.get(tenant)
        return 0.0 if known is None else known.service

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, StepDone):
            for result in event.results:
                tenant = self._of.get(result.seq)
                if tenant is not None:
                    tenant.service += self.output_weight * result.tokens / tenant.weight
                    if result.finished:
                        self._forget(result.seq)
        elif isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                self._join(seq)
        elif isinstance(event, Abort):
            self._forget(event.seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        for admit in plan.admits:
            tenant = self._of[admit.seq]
            tenant.queue.discard(admit.seq)
            tenant.running += 1
            self._charge(admit.seq, view)
        for preempted in plan.preempted:
            seq = view.get(preempted)
            if seq is not None:
                tenant = self._of[preempted]
                tenant.running -= 1
                self._wait(tenant, seq)

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        tried: dict[str, Iterator[SeqView]] = {}
        passed: list[tuple[float, str]] = []
        try:
            while view.admitting and (tenant := self._least()) is not None:
                if tenant.name not in tried:
                    tried[tenant.name] = iter(tenant.queue)
                seq = next((seq for seq in tried[tenant.name] if seq.ready), None)
                if seq is None:
                    passed.append(heappop(self._heap))
                    continue
                yield seq
                if seq.resident:
                    self._charge(seq.id, view)
        finally:  # also when the builder has heard enough
            for entry in passed:
                heappush(self._heap, entry)

    def _least(self) -> Tenant | None:
        while self._heap:
            known, name = self._heap[0]
            tenant = self._tenants[name]
            if not tenant.queue:
                heappop(self._heap)
                tenant.ranked = False
            elif known < tenant.service:
                heapreplace(self._heap, (tenant.service, name))
            else:
                return tenant
        return None

    def _join(self, seq: SeqView) -> None:
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            if len(self._tenants) >= self._prune_at:
                self._prune()
            tenant = self._tenants[seq.tenant] = Tenant(seq.tenant, (self.weights or {}).get(seq.tenant, 1.0))
        if not tenant.running and not tenant.queue:
            least = self._least()
            tenant.service = max(tenant.service, self._last if least is None else least.service)
        self._of[seq.id] = tenant
        self._wait(tenant, seq)

    def _wait(self, tenant: Tenant, seq: SeqView) -> None:
        tenant.queue.add(seq, 0)
        if not tenant.ranked:
            tenant.ranked = True
            heappush(self._heap, (tenant.service, tenant.name))

    def _charge(self, seq: SeqId, view: View) -> None:
        admitted, tenant = view.get(seq), self._of[seq]
        if admitted is not None and seq not in self._charged:
            self._charged.add(seq)
            tenant.service += self.prompt_weight * admitted.prompt / tenant.weight
            self._last = tenant.service

    def _forget(self, seq: SeqId) -> None:
        tenant = self._of.pop(seq, None)
        if tenant is None:
            return
        self._charged.discard(seq)
        if seq in tenant.queue:
            tenant.queue.discard(seq)
        else:
            tenant.running -= 1
        if not tenant.running and not tenant.queue:
            self._last = tenant.service

    def _prune(self) -> None:
        """Forgets idle tenants that would be lifted anyway if they came back."""
        least = self._least()
        floor = self._last if least is None else least.service
        idle = [t for t in self._tenants.values() if not t.running and not t.queue and not t.ranked]
        for tenant in idle:
            if tenant.service <= floor:
                del self._tenants[tenant.name]
        self._prune_at = KEPT + 2 * len(self._tenants)
