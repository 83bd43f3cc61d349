"""Offline batches: requests that share a prefix run together."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, decodes, prefills
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, Plan, SeqId, StepDone


class Entry:
    """A request that has not finished its prompt. `hashes`: those of its full prompt pages."""

    __slots__ = ("hashes", "output", "seq")

    def __init__(self, seq: SeqView, hashes: tuple[bytes, ...]) -> None:
        self.seq = seq
        self.hashes = hashes
        self.output = seq.max_new if seq.output is None else seq.output


@register("batchllm")
class BatchLLM(Policy):
    """Global prefix sharing and throughput-oriented batching (BatchLLM, arXiv:2412.03594).

    Requests that wait form a prefix tree (by page hashes). They run depth first, so that all requests below a node
    follow each other and its KV is computed once; subtrees go in falling order of tokens to generate per token to
    prefill, shared ones counted once, so that decodes are there when the long prompts come. A request waits while one
    that runs computes pages of its prefix, and others take its place. A step is limited by tokens and pages only. The
    tree is built of what is there when the last one is used up, or when as many have come since: one tree for a whole
    job whose window is the job.
    """

    def __init__(self, lookahead: int = 256, least: int = 64, gather_s: float = 0.1) -> None:
        self.lookahead = lookahead
        self.least = least
        self.gather_s = gather_s
        self._arrived = 0.0
        self._fresh: OrderedDict[SeqId, Entry] = OrderedDict()
        self._order: OrderedDict[SeqId, Entry] = OrderedDict()
        self._running: dict[SeqId, Entry] = {}
        self._claimed: set[bytes] = set()
        """Pages that were computed for this tree or are being computed."""
        self._done: set[bytes] = set()
        self.optimum = 0
        """Tokens of all trees so far: what prefilling their requests takes if every shared page is computed once."""

    # Events

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                self._fresh[seq.id] = Entry(seq, event.hashes)
                self._arrived = event.now
        elif isinstance(event, StepDone):
            for result in event.results:
                if result.finished:
                    self._forget(result.seq)
        elif isinstance(event, Abort):
            self._forget(event.seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        for admit in plan.admits:
            entry = self._order.pop(admit.seq, None) or self._fresh.pop(admit.seq)
            self._running[admit.seq] = entry
        for preempted in plan.preempted:
            entry = self._running.pop(preempted)
            self._unclaim(entry)
            if view.get(preempted) is not None:
                self._order[preempted] = entry
                self._order.move_to_end(preempted, last=False)

    def _forget(self, seq: SeqId) -> None:
        entry = self._running.pop(seq, None)
        if entry is not None:
            self._unclaim(entry)
        self._fresh.pop(seq, None)
        self._order.pop(seq, None)

    def _unclaim(self, entry: Entry) -> None:
        """It computes no more: nobody must wait for pages that it left undone."""
        self._claimed.difference_update(name for name in entry.hashes if name not in self._done)

    # Answers

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        if not view.admitting or self._gathering(view):
            return
        if self._fresh and len(self._fresh) >= max(self.least, len(self._order)) or not self._order:
            self._plant(view.limits.page_tokens)
        self._note_done(view.limits.page_tokens)
        held = 0
        for entry in self._order.values():
            if not view.admitting or held >= self.lookahead:
                return
            if not entry.seq.ready or self._must_wait(entry):
                held += 1
                continue
            yield entry.seq
            if entry.seq.resident:
                self._claimed.update(entry.hashes)

    def next_wake(self, view: View) -> float | None:
        return self._arrived + self.gather_s if self._gathering(view) else None

    def _gathering(self, view: View) -> bool:
        """Nothing runs and more is coming: a few moments make a better tree."""
        return bool(self._fresh) and not self._order and not self._running and view.now < self._arrived + self.gather_s

    def _must_wait(self, entry: Entry) -> bool:
        """Whether somebody is computing pages of its prefix right now: in a step or two they can be shared."""
        low, high = 0, len(entry.hashes)
        while low < high:  # claimed pages are a beginning of the prompt
            middle = (low + high + 1) // 2
            if entry.hashes[middle - 1] in self._claimed:
                low = middle
            else:
                high = middle - 1
        return low > 0 and entry.hashes[low - 1] not in self._done

    def _note_done(self, page_tokens: int) -> None:
        """A page can be shared once a plan before this one computes it."""
        for entry in self._running.values():
            known = min(entry.seq.computed // page_tokens, len(entry.hashes))
            for name in reversed(entry.hashes[:known]):
                if name in self._done:
                    break
                self._done.add(name)

    # The tree

    def _plant(self, page_tokens: int) -> None:
        """A new tree of everybody who waits."""
        entries = [*self._order.values(), *self._fresh.values()]
        self._fresh.clear()
        running = set().union(*(entry.hashes for entry in self._running.values())) if self._running else set()
        self._claimed &= running
        self._done &= running
        self._order = OrderedDict((entry.seq.id, entry) for entry in depth_first(entries, page_tokens))
        self.optimum += tree_tokens(entries, page_tokens)


def tree_tokens(entries: Sequence[Entry], page_tokens: int) -> int:
    """Tokens to prefill if every page that several share is computed once; the last token is always computed."""
    seen: set[bytes] = set()
    tokens = 0
    for entry in entries:
        prompt, hashes = entry.seq.prompt, entry.hashes
        sharable = min(len(hashes), (prompt - 1) // page_tokens)
        shared = 0
        while shared < sharable and hashes[shared] in seen:
            shared += 1
        tokens += prompt - shared * page_tokens
        seen.update(hashes)
    return tokens


def depth_first(entries: Sequence[Entry], page_tokens: int) -> list[Entry]:
    """The order in which a walk of the prefix tree meets them, at each node the subtree with most decoding first."""
    leaves = Counter(name for entry in entries for name in entry.hashes)
    ordered: list[Entry] = []
    stack: list[tuple[list[Entry], int]] = [(list(entries), 0)]
    while stack:
        below, depth = stack.pop()
        if len(below) == 1:
            ordered.append(below[0])
            continue
        children: dict[bytes | None, list[Entry]] = {}
        for entry in below:
            shared = depth < len(entry.hashes) and leaves[entry.hashes[depth]] > 1
            children.setdefault(entry.hashes[depth] if shared else None, []).append(entry)
        parts: list[list[Entry]] = [[entry] for entry in children.pop(None, [])] + list(children.values())
        if len(parts) == 1 and children:  # nobody branches off here
            stack.append((parts[0], depth + 1))
            continue
        parts.sort(key=lambda part: (ratio(part, depth, page_tokens), -part[0].seq.order))
        stack.extend((part, depth + 1) for part in parts)
    return ordered


def ratio(part: Sequence[Entry], depth: int, page_tokens: int) -> float:
    """Tokens to generate per token to prefill below `depth` pages, pages that all of `part` share counted once."""
    deepest = min(len(entry.hashes) for entry in part)
    shared = depth
    while shared < deepest and len({entry.hashes[shared] for entry in part}) == 1:
        shared += 1
    prompts = sum(entry.seq.prompt - shared * page_tokens for entry in part) + (shared - depth) * page_tokens
    return sum(entry.output for entry in part) / max(1, prompts)
