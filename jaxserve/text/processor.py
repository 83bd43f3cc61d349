"""From an engine's deltas to outputs: text, stop strings, log-probs, why a choice ended. Knows no clock and no asyncio.

A `RequestState` folds the deltas of one request; what is new since the last look is its `take()`, everything so far its
`output()`. Deltas that were not taken merge, so a slow reader costs no more memory than the answer itself.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stops import StopFinder
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import CompletionOutput, Delta, FinishReason, Request, RequestOutput, TokenLogprobs


class ChoiceDelta(msgspec.Struct):
    """What one choice gained since the last look. `logprobs`: one entry a token, None unless asked for.

    `token_ids` may run ahead of `text`: half a character, or the beginning of a stop string, is held back.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestDelta(msgspec.Struct):
    """What a request gained since the last look. `prompt_logprobs` comes once, with the first one."""

    choices: list[ChoiceDelta]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


class _Choice:
    """One choice: its text so far, and what of it has not been taken."""

    __slots__ = (
        "index",
        "text",
        "tokens",
        "logprobs",
        "cumulative",
        "finish",
        "stop_reason",
        "new",
        "_params",
        "_eos",
        "_detokenizer",
        "_stops",
    )

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, eos: Collection[int]):
        params = request.params
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative = 0.0
        self.finish: str | None = None
        self.stop_reason: int | str | None = None
        self.new: ChoiceDelta | None = None
        self._params = params
        self._eos = () if params.ignore_eos else eos
        self._detokenizer = (
            Detokenizer(tokenizer, request.prompt, params.skip_special_tokens) if params.detokenize else None
        )
        self._stops = StopFinder(tuple(params.stop), params.include_stop_str_in_output) if params.stop else None

    def push(self, delta: Delta) -> bool:
        """Takes a delta in. True when a stop string ended the choice before the engine did."""
        tokens, finish, stopped = delta.tokens, delta.finish, False
        by_token = finish is FinishReason.STOP and delta.stop_token is not None
        spoken = tokens[:-1] if by_token and not self._params.include_stop_str_in_output else tokens
        text = ""
        if self._stops is not None:
            text, stop, used = self._find_stop(self._stops, spoken)
            if stop is not None:
                stopped, tokens, finish = True, tokens[:used], FinishReason.STOP
                self.stop_reason = stop
        elif self._detokenizer is not None:
            text = self._detokenizer.push(spoken)
        if finish is not None and not stopped:
            tail, stop = self._flush()
            text += tail
            if stop is not None:
                finish, self.stop_reason = FinishReason.STOP, stop
            elif by_token and delta.stop_token not in self._eos:
                self.stop_reason = delta.stop_token
        logprobs = None
        if self.logprobs is not None and delta.logprobs is not None:
            logprobs = delta.logprobs[: len(tokens)]
            self.logprobs.extend(logprobs)
            self.cumulative += sum(entry.logprobs[0] for entry in logprobs)
        self._add(text, tokens, logprobs, finish)
        return stopped and delta.finish is None

    def end(self, reason: FinishReason) -> None:
        """Ends the choice from outside, with the text that is there."""
        tail, _ = self._flush()
        self._add(tail, (), None, reason)

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.tokens.copy(),
            cumulative_logprob=None if self.logprobs is None else self.cumulative,
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            finish_reason=self.finish,
            stop_reason=self.stop_reason,
        )

    def _find_stop(self, stops: StopFinder, tokens: tuple[int, ...]) -> tuple[str, str | None, int]:
        """(text, the stop string or None, tokens up to and with the one that completed it), token by token."""
        text = ""
        seen = len(self.tokens)
        for index, token in enumerate(tokens):
            piece = self._detokenizer.push((token,)) if self._detokenizer is not None else ""
            if seen + index < self._params.min_tokens:
                text += piece
                continue
            shown, stop = stops.push(piece)
            text += shown
            if stop is not None:
                return text, stop, index + 1
        return text, None, len(tokens)

    def _flush(self) -> tuple[str, str | None]:
        tail = self._detokenizer.flush() if self._detokenizer is not None else ""
        if self._stops is None:
            return tail, None
        shown, stop = self._stops.push(tail)
        return (shown, stop) if stop is not None else (shown + self._stops.flush(), None)

    def _add(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
        finish: FinishReason | None,
    ) -> None:
        self.text += text
        self.tokens.extend(tokens)
        new = self.new
        if new is None:
            new = self.new = ChoiceDelta(self.index, text, list(tokens), None if logprobs is None else list(logprobs))
        else:
            new.text += text
            new.token_ids.extend(tokens)
            if logprobs is not None:
                new.logprobs = [*(new.logprobs or ()), *logprobs]
        if finish is not None:
            self.finish = new.finish_reason = finish.value
            new.stop_reason = self.stop_reason


class RequestState:
    """One request on its way through an engine. `metrics` holds the times that `push` and `end` were told."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos: Collection[int],
        *,
        request_id: str,
        prompt: str | None,
        now: float,
    ):
        """`eos`: ids that end a text on their own; `request_id`: the name that its caller knows."""
        self.request = request
        self.request_id = request_id
        self.prompt = prompt
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.error: str | None = None
        self.refused = False
        self.metrics: dict[str, float] = {"arrival_time": now}
        self._choices = [_Choice(index, request, tokenizer, eos) for index in range(request.params.n)]
        self._running = len(self._choices)
        self._prompt_logprobs_taken = False

    @property
    def finished(self) -> bool:
        return not self._running

    @property
    def generated(self) -> int:
        """Tokens so far, all choices together."""
        return sum(len(choice.tokens) for choice in self._choices)

    def push(self, delta: Delta, now: float) -> str | None:
        """Takes a delta in. Returns what to cancel in the engine, if anything: the request, or one choice of it."""
        choice = self._choices[delta.choice]
        if "first_token_time" not in self.metrics:
            self.metrics["first_token_time"] = now
            self.metrics["queued_s"] = delta.queued_s
        if delta.choice == 0 and delta.cached_tokens:
            self.cached_tokens = delta.cached_tokens  # other choices share the first one's pages in any case
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.error is not None:
            self.error, self.refused = delta.error, delta.refused
        if choice.finish is not None:
            return None  # the engine had not read the cancellation yet
        stopped = choice.push(delta)
        if choice.finish is not None:
            self._ended(now)
        if not stopped:
            return None
        return self.request.id if self.finished else f"{self.request.id}/{delta.choice}"

    def end(self, reason: FinishReason, now: float, error: str | None = None) -> None:
        """Ends every choice that runs; the engine is told by the caller."""
        self.error = error if error is not None else self.error
        for choice in self._choices:
            if choice.finish is None:
                choice.end(reason)
                self._ended(now)

    def take(self) -> RequestDelta | None:
        """What is new since the last look, or None."""
        fresh = []
        for choice in self._choices:
            if choice.new is not None:
                fresh.append(choice.new)
                choice.new = None
        if not fresh:
            return None
        prompt_logprobs = None
        if self.prompt_logprobs is not None and not self._prompt_logprobs_taken:
            prompt_logprobs, self._prompt_logprobs_taken = self.prompt_logprobs, True
        return RequestDelta(fresh, not self._running, prompt_logprobs, self.error)

    def output(self) -> RequestOutput:
        """Everything so far; a copy."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt,
            outputs=[choice.output() for choice in self._choices],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.cached_tokens,
            metrics=self.metrics.copy(),
            error=self.error,
        )

    def _ended(self, now: float) -> None:
        self._running -= 1
        if not self._running:
            self.metrics["finished_time"] = now
