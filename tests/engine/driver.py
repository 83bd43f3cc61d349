"""Runs an engine core on the test's own thread: everything is submitted, then the loop is stepped until it is idle."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.load import load_core
from jaxserve.types import (
    Control,
    Delta,
    Deltas,
    ExportPrefix,
    FinishReason,
    FromCore,
    ImportPrefix,
    Prefix,
    Request,
    SamplingParams,
    Stats,
    Submit,
    TokenLogprobs,
)


@dataclass
class Answer:
    """What one choice got, all deltas together."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None
    deltas: int = 0

    def take(self, delta: Delta) -> None:
        assert self.finish is None, "a delta after the last one"
        self.tokens.extend(delta.tokens)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish, self.error = delta.finish, delta.error
        self.cached_tokens += delta.cached_tokens
        self.deltas += 1


_open: list[EngineCore] = []


def close_all() -> None:
    """Closes every core there is: what they hold would pile up in a process that runs hundreds of tests."""
    while _open:
        _open.pop().close()
    gc.collect()


class Driver:
    """One engine core and what it said. Whoever makes one calls `close_all` at the end, see conftest.py."""

    def __init__(self, kv_format: str | None = None, **options: object):
        """`kv_format`: a registered KV format that is no choice of --kv-cache-dtype."""
        self.inbox = Inbox()
        self.answers: dict[tuple[str, int], Answer] = {}
        self.stats: Stats | None = None
        self.prefix: Prefix | None = None
        config = EngineConfig.of(**options)
        if kv_format is not None:
            config = replace(config, cache=replace(config.cache, kv_cache_dtype=kv_format))
        self.core: EngineCore = load_core(config, self.inbox, self._receive, lambda _: None)
        _open.append(self.core)

    def _receive(self, message: FromCore) -> None:
        if isinstance(message, Deltas):
            for delta in message.deltas:
                self.answers.setdefault((delta.id, delta.choice), Answer()).take(delta)
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Prefix):
            self.prefix = message

    def submit(
        self,
        name: str,
        prompt: list[int],
        *,
        salt: str = "",
        stream: bool = True,
        program_id: str = "",
        last_turn: bool = False,
        **params: object,
    ) -> None:
        sampling = SamplingParams(**{"seed": 0, "temperature": 0.0, **params})
        request = Request(
            id=name,
            prompt=prompt,
            params=sampling,
            salt=salt,
            stream=stream,
            program_id=program_id,
            last_turn=last_turn,
        )
        self.inbox.put(Submit(request=request))

    def run(self, most: int = 10_000) -> dict[tuple[str, int], Answer]:
        """Steps until nothing is left to do; returns the answers so far and forgets them."""
        for _ in range(most):
            if not self.core.step():
                break
        else:
            raise AssertionError(f"the engine still works after {most} steps")
        answers, self.answers = self.answers, {}
        return answers

    def one(self, prompt: list[int], **params: object) -> Answer:
        self.submit("one", prompt, **params)
        return self.run()["one", 0]

    def ask(self, message: ExportPrefix | ImportPrefix) -> Prefix:
        """What the core answers."""
        self.prefix = None
        self.inbox.put(message)
        self.run()
        assert self.prefix is not None
        return self.prefix

    def gauge(self, name: str) -> float:
        return self._fresh_stats().gauges[name]

    def counter(self, name: str) -> float:
        return self._fresh_stats().counters[name]

    def counters(self) -> dict[str, float]:
        return self._fresh_stats().counters

    def _fresh_stats(self) -> Stats:
        self.inbox.put(Control(verb="stats"))
        self.run()
        assert self.stats is not None
        return self.stats


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random tokens of a vocabulary of 500."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 500, n).tolist() for n in lengths]


def answers(driver: Driver, cases: list[list[int]], **params: object) -> list[Answer]:
    """Of all cases at once, greedy unless `params` say otherwise."""
    for index, prompt in enumerate(cases):
        driver.submit(str(index), prompt, **{"max_tokens": 80, "ignore_eos": True, "logprobs": 3, **params})
    got = driver.run()
    return [got[str(index), 0] for index in range(len(cases))]


def same(a: list[Answer], b: list[Answer]) -> None:
    """Tokens and log-probs, bit for bit."""
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.error is None and x.tokens == y.tokens, index
        assert x.logprobs == y.logprobs, index


def alone(driver: Driver, cases: list[list[int]], **params: object) -> list[Answer]:
    """One after the other, none from the prefix cache of another."""
    return [answers(driver, [case], salt=f"alone {index}", **params)[0] for index, case in enumerate(cases)]
