"""An engine in this process as a Talker (see talk.py), for `chat` and `complete`."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from jaxserve.api import AsyncLLM, Stream
from jaxserve.cli.errors import Failure
from jaxserve.config import EngineConfig
from jaxserve.engine.client import EngineDead

_PROMPTS = ("prompt", "messages")


class Local:
    """Owns an event loop that turns only while an answer is awaited; Ctrl-C cancels what is awaited."""

    def __init__(self, config: EngineConfig):
        self._runner = asyncio.Runner()
        self._llm = AsyncLLM(config)
        self._runner.run(self._llm.start())

    def stream(self, url: str, body: dict[str, Any]) -> Generator[str, None, None]:
        fields = {name: value for name, value in body.items() if name not in _PROMPTS}
        stream = self._runner.run(self._submit(body, fields))
        try:
            while (text := self._runner.run(_next(stream))) is not None:
                yield text
        except EngineDead as error:
            raise Failure(f"the engine failed: {error}") from None
        finally:
            stream.close()

    async def _submit(self, body: dict[str, Any], fields: dict[str, Any]) -> Stream:
        llm = self._llm
        if "prompt" in body:
            return await llm.submit(body["prompt"], llm.sampling_params(**fields))
        text = llm.chat_prompt(body["messages"])
        tokens = await llm.encode(text, add_special_tokens=False)
        return await llm.submit(tokens, llm.sampling_params(**{"max_tokens": None, **fields}))

    def close(self) -> None:
        self._runner.run(self._llm.close())
        self._runner.close()


async def _next(stream: Stream) -> str | None:
    """New text, perhaps empty; None at the end."""
    try:
        delta = await anext(stream)
    except StopAsyncIteration:
        return None
    if delta.error is not None:
        raise Failure(f"the request failed: {delta.error}")
    return "".join(choice.text for choice in delta.choices)
