"""A model for scripts and notebooks: synchronous calls over an AsyncLLM that runs on a thread. Imports no jax."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from jaxserve.api.async_llm import AsyncLLM
from jaxserve.config import EngineConfig
from jaxserve.engine.client import EngineDead
from jaxserve.text.intake import ParsedPrompt, Prompt, parse_prompt
from jaxserve.text.processor import RequestState
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import CachedPrefix, ModelLimits, ParamError, Ready, RequestOutput, SamplingParams, Stats

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]

PROGRESS_S = 0.2
"""Between two looks at what is done."""


class LLM:
    """A model for scripts and notebooks. The engine runs on threads of this process until `close()`, or the end.

    >>> with LLM() as llm:
    ...     [output] = llm.generate("Once upon a time", SamplingParams(max_tokens=32))
    """

    def __init__(self, model: str | None = None, **options: Any):
        """`model`: a folder in Hugging Face layout or a hub id; without it the bundled model. `options`: those of
        EngineConfig by their flat names (`max_num_seqs=16`).

        Raises:
            ConfigError, CheckpointError: what cannot be served, and why.
            EngineDead: the engine failed to start.
        """
        self._loop = _LoopThread()
        self._llm = AsyncLLM(EngineConfig.of(model=model, **options))
        self._finalizer = weakref.finalize(self, _shut, self._loop, self._llm)
        try:
            self._loop.run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        program_id: str | Sequence[str] | None = None,
        last_turn: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, in their order. One of them is text, a list of token ids, or a dict with `prompt` or
        `prompt_token_ids`; parameters are one for all or one each (None: the model's recommendations).

        `program_id`, one for each prompt, makes the prompts turns of jobs: the KV of a turn is held for the next one
        with the same id, unless it is the `last_turn`.

        Raises:
            ParamError: naming the prompt by its index. Nothing runs then.
            EngineDead: the engine ended.
        """
        parsed = [_numbered(index, parse_prompt, prompt) for index, prompt in enumerate(_as_list(prompts))]
        params = self._params(sampling_params, len(parsed), self._llm.sampling_params())
        return self._complete(
            parsed, params, use_tqdm, priority, add_special_tokens=True, programs=program_id, last_turn=last_turn
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        program_id: str | Sequence[str] | None = None,
        last_turn: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, in their order. Without parameters an answer may take all the room there
        is. Programs and errors as `generate`."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        chats: Sequence[Any] = messages if several else [messages]

        def render(chat: Messages) -> ParsedPrompt:
            text = self._llm.chat_prompt(
                chat,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                options=chat_template_kwargs,
            )
            return ParsedPrompt(text, None, "")

        parsed = [_numbered(index, render, chat) for index, chat in enumerate(chats)]
        default = self._llm.sampling_params(max_tokens=None)
        return self._complete(
            parsed,
            self._params(sampling_params, len(parsed), default),
            use_tqdm,
            priority,
            add_special_tokens=False,
            programs=program_id,
            last_turn=last_turn,
        )

    def chat_prompt(self, messages: Messages, **options: Any) -> str:
        """The text that `chat` would complete; see text/chat.py for the options. Encode it without special tokens."""
        return self._llm.chat_prompt(messages, **options)

    def get_tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends."""
        return self._llm.sampling_params()

    @property
    def limits(self) -> ModelLimits:
        return self._llm.limits

    @property
    def ready(self) -> Ready:
        """What the engine said when it had started: its limits and the shape of its KV cache."""
        return self._llm.ready

    def stats(self) -> Stats:
        """The engine's counters and gauges."""
        self._check_open()
        return self._loop.run(self._llm.stats())

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix that no running request uses."""
        self._check_open()
        self._loop.run(self._llm.reset_prefix_cache())

    def close_program(self, program_id: str, *, salt: str = "") -> None:
        """The program has no further turns: the KV held for it is let go. Unknown programs are ignored."""
        self._check_open()
        self._loop.run(self._llm.close_program(program_id, salt=salt))

    def export_prefix(self, prompt: Prompt, *, salt: str = "") -> CachedPrefix:
        """The KV of the beginning of `prompt` that is in the prefix cache, for `import_prefix` of another engine. Needs
        `LLM(kv_transfer=True)`. Errors as AsyncLLM.export_prefix."""
        self._check_open()
        return self._loop.run(self._llm.export_prefix(prompt, salt=salt))

    def import_prefix(self, prefix: CachedPrefix, *, salt: str = "") -> int:
        """Puts an exported prefix into the prefix cache; returns how many tokens of it are cached then. Needs
        `LLM(kv_transfer=True)`. Errors as AsyncLLM.import_prefix."""
        self._check_open()
        return self._loop.run(self._llm.import_prefix(prefix, salt=salt))

    def close(self) -> None:
        """Ends the engine and frees its memory. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineDead("this LLM has been closed")

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
    ) -> list[SamplingParams]:
        if given is None:
            return [default] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ParamError(
                "sampling_params", f"{len(given)} sampling_params for {count} prompts: give one for all or one each"
            )
        return list(given)

    def _complete(
        self,
        parsed: Sequence[ParsedPrompt],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        priority: int,
        *,
        add_special_tokens: bool,
        programs: str | Sequence[str] | None,
        last_turn: bool,
    ) -> list[RequestOutput]:
        self._check_open()
        names = _programs(programs, len(parsed))
        texts = [prompt.text for prompt in parsed if prompt.text is not None]
        encoded = iter(self._llm.tokenizer.encode_batch(texts, add_special_tokens) if texts else ())
        states = []
        for index, (prompt, one, program) in enumerate(zip(parsed, params, names, strict=True)):
            tokens = next(encoded) if prompt.tokens is None else prompt.tokens
            states.append(
                _numbered(
                    index,
                    self._llm.prepare,
                    tokens,
                    prompt.text,
                    one,
                    request_id=str(index),
                    priority=priority,
                    salt=prompt.salt,
                    stream=False,
                    program_id=program,
                    last_turn=last_turn,
                )
            )
        if not use_tqdm:
            return self._loop.run(self._llm.complete(states))
        with contextlib.closing(_Progress(states)) as progress:
            return self._loop.run(self._llm.complete(states), progress)


class _LoopThread:
    """An event loop on a thread of its own, for callers that have none, or one that is busy (notebooks)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jaxserve-llm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], look: Callable[[], None] | None = None) -> T:
        """The result of `work`, which is cancelled if the caller is interrupted; `look` is called now and then."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while look is not None and not future.done():
                look()
                concurrent.futures.wait((future,), PROGRESS_S)
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            if look is not None:
                look()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread


def _shut(loop: _LoopThread, llm: AsyncLLM) -> None:
    if loop.is_current:  # the garbage collector chose this thread, which must not wait for itself
        threading.Thread(target=_shut, args=(loop, llm)).start()
        return
    loop.run(llm.close())
    loop.stop()


class _Progress:
    """A bar of finished requests with the tokens generated in a second."""

    def __init__(self, states: Sequence[RequestState]):
        from tqdm.auto import tqdm

        self._states = states
        self._bar = tqdm(total=len(states), unit="request", dynamic_ncols=True)
        self._started = time.monotonic()

    def __call__(self) -> None:
        tokens = sum(state.generated for state in self._states)
        elapsed = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        self._bar.update(sum(state.finished for state in self._states) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    plain: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(plain, str | Mapping) or (plain and isinstance(plain[0], int)):
        return [plain]
    return list(plain)


def _programs(given: str | Sequence[str] | None, count: int) -> list[str]:
    """The program of each prompt. Turns of one program come one after another, so no two of a call are of the same."""
    names = [given] if isinstance(given, str) else list(given or [""] * count)
    named = [name for name in names if name]
    if len(names) != count or len(set(named)) != len(named):
        raise ParamError("program_id", f"program_id must be one name for each of the {count} prompts, all different")
    return names


def _numbered(index: int, work: Callable[..., T], *args: Any, **options: Any) -> T:
    """`work(...)` whose refusal names the prompt."""
    try:
        return work(*args, **options)
    except ParamError as error:
        raise ParamError(error.param, f"prompt {index}: {error}") from None
