"""What the engine knows of a running sequence: its tokens, how far its output went, when it ends. Knows no device."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.engine.hashing import chain_root, extend_chain
from jaxserve.sampling.head import HeadVariant, variant_for
from jaxserve.types import Delta, FinishReason, Request, SeqId, SeqResult, TokenLogprobs, program_key


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `tokens` is the prompt and everything generated so far.

    `limit` is the number of tokens at which it ends, `floor` the number below which no stop token ends it,
    `page_tokens` the size of the pages that hold its KV.
    """

    seq: SeqId
    request: Request
    choice: int
    tokens: list[int]
    eos: tuple[int, ...]
    stops: frozenset[int]
    max_new: int
    arrived: float
    page_tokens: int
    chain: list[bytes] = field(default_factory=list)
    root: bytes = b""
    first_scheduled: float | None = None
    cached_tokens: int = 0
    sent: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pending: list[int] = field(default_factory=list)
    pending_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    program: str = field(init=False)
    prompt: int = field(init=False)
    limit: int = field(init=False)
    floor: int = field(init=False)
    _settled: HeadVariant | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.program = program_key(request.tenant, request.salt, request.program_id)
        self.prompt = len(request.prompt)
        self.limit = self.prompt + self.max_new
        self.floor = self.prompt + request.params.min_tokens

    @property
    def variant(self) -> HeadVariant:
        """The least head that serves it now."""
        if self._settled is None:
            variant = variant_for(self.request.params, self.generated)
            if len(self.tokens) < self.floor:
                return variant
            self._settled = variant
        return self._settled

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt

    def fail(self, why: str) -> None:
        self.finish, self.error = FinishReason.ERROR, why

    def start_chain(self, identity: str) -> tuple[bytes, ...]:
        """Hashes of the full prompt pages."""
        self.root = chain_root(identity, self.request.salt)
        self.chain = extend_chain(self.root, self.tokens, 0, self.prompt // self.page_tokens, self.page_tokens)
        return tuple(self.chain)

    def append(self, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> SeqResult:
        """Takes the tokens that a step gave it, as far as they count, and says so to the scheduler."""
        known, took = self.tokens, 0
        for token in tokens:
            if self.finish is not None or len(known) >= self.limit:
                break
            known.append(token)
            self.pending.append(token)
            if logprobs is not None:
                self.pending_logprobs.append(logprobs[took])
            took += 1
            if token in self.stops and len(known) > self.floor:
                self.finish = FinishReason.STOP
        if self.finish is None and len(known) >= self.limit:
            self.finish = FinishReason.LENGTH
        # The KV of the newest token comes with the next step.
        full = (len(known) - 1) // self.page_tokens
        hashes = self._extend(full) if self.root and full > len(self.chain) else ()
        return SeqResult(seq=self.seq, tokens=took, finished=self.finish is not None, hashes=hashes)

    def _extend(self, full: int) -> tuple[bytes, ...]:
        """Hashes of the pages that became full, up to `full` in all."""
        known = len(self.chain)
        last = self.chain[-1] if self.chain else self.root
        fresh = extend_chain(last, self.tokens, known, full - known, self.page_tokens)
        self.chain.extend(fresh)
        return tuple(fresh)

    def take_delta(self) -> Delta | None:
        """What the front end has not seen yet, or None."""
        if not self.pending and self.finish is None:
            return None
        if self.sent and self.finish is None and not self.pending_logprobs:
            delta = Delta(id=self.request.id, choice=self.choice, tokens=tuple(self.pending))
            self.pending = []
            return delta
        first = self.sent == 0
        delta = Delta(
            id=self.request.id,
            choice=self.choice,
            tokens=tuple(self.pending),
            logprobs=tuple(self.pending_logprobs) if self.request.params.logprobs is not None else None,
            finish=self.finish,
            stop_token=self.pending[-1] if self.finish is FinishReason.STOP else None,
            cached_tokens=self.cached_tokens if first else 0,
            prompt_logprobs=tuple(self.prompt_logprobs) if first and self.prompt_logprobs is not None else None,
            error=self.error,
            queued_s=max(0.0, (self.first_scheduled or self.arrived) - self.arrived) if first else 0.0,
        )
        self.sent += 1
        self.pending, self.pending_logprobs = [], []
        return delta
