"""AsyncLLM: streams, cancellation and failure, with a real engine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from jaxserve.api import QueueFull
from jaxserve.engine.client import EngineDead
from jaxserve.engine.process import ProcessClient
from jaxserve.types import ParamError

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(asyncio.wait_for(work, 120))


@pytest.fixture(scope="module")
def llm(run: Run, engine_options: dict[str, Any]) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig.of(**engine_options, max_queued_requests=4))
    run(llm.start())
    yield llm
    run(llm.close())


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:  # noqa: B007
        pass
    return output


async def idle(llm: AsyncLLM) -> dict[str, float]:
    """The engine's gauges once nothing runs."""
    while True:
        gauges = (await llm.stats()).gauges
        if not gauges["num_requests_running"] and not gauges["num_requests_waiting"]:
            return gauges
        await asyncio.sleep(0.01)


def test_outputs_grow_until_they_are_finished(llm: AsyncLLM, run: Run) -> None:
    async def work() -> list[RequestOutput]:
        return [output async for output in llm.generate("Once upon a time", SHORT, request_id="mine")]

    outputs = run(work())
    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert len(texts) > 3
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"mine"}
    assert len(outputs[-1].outputs[0].token_ids) == 16
    metrics = outputs[-1].metrics
    assert metrics["arrival_time"] <= metrics["first_token_time"] <= metrics["finished_time"]


def test_many_streams_at_once_are_what_they_are_alone(llm: AsyncLLM, run: Run) -> None:
    prompts = ["Once upon a time", "The ball is red.", "Hi", [5, 6, 7]] * 2

    async def one(prompt: Any) -> str:
        async with await llm.submit(prompt, SHORT) as stream:
            return "".join([choice.text async for delta in stream for choice in delta.choices])

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*map(one, prompts))

    assert run(all_at_once()) == [run(one(prompt)) for prompt in prompts]


def test_a_slow_reader_gets_it_in_fewer_pieces(llm: AsyncLLM, run: Run) -> None:
    async def work() -> tuple[list[Any], RequestOutput]:
        stream = await llm.submit("Once upon a time", SHORT)
        await idle(llm)
        return [delta async for delta in stream], stream.output()

    [delta], output = run(work())
    assert delta.finished and delta.choices[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("leave", ["close", "cancel", "drop"])
def test_leaving_a_stream_frees_its_pages(llm: AsyncLLM, run: Run, leave: str) -> None:
    async def read(outputs: AsyncIterator[RequestOutput], started: asyncio.Event) -> None:
        async for _ in outputs:
            started.set()

    async def work() -> dict[str, float]:
        if leave == "drop":
            stream = await llm.submit("Once upon a time", LONG)
            await anext(stream)
            del stream
        elif leave == "close":
            outputs = llm.generate("Once upon a time", LONG)
            await anext(outputs)
            await outputs.aclose()
        else:
            started = asyncio.Event()
            task = asyncio.create_task(read(llm.generate("Once upon a time", LONG), started))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        before = (await llm.stats()).counters["generation_tokens"]
        gauges = await idle(llm)
        assert (await llm.stats()).counters["generation_tokens"] - before < 100
        return gauges

    assert run(work())["kv_cache_usage_perc"] == 0
    assert llm.unfinished == 0


def test_an_abort_ends_the_request_of_that_name(llm: AsyncLLM, run: Run) -> None:
    async def work() -> tuple[RequestOutput, RequestOutput, bool]:
        mine = await llm.submit("Once upon a time", LONG, request_id="a")
        other = asyncio.create_task(last(llm.generate("Once upon a time", SHORT, request_id="ab")))
        await anext(mine)
        unknown = llm.abort("nobody")
        assert llm.abort("a")
        async for _ in mine:
            pass
        return mine.output(), await other, unknown

    mine, other, unknown = run(work())
    assert not unknown
    assert (mine.outputs[0].finish_reason, mine.finished) == ("abort", True)
    assert other.outputs[0].finish_reason == "length"


def test_one_choice_stops_and_the_others_go_on(llm: AsyncLLM, run: Run) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=48, ignore_eos=True)
    whole = run(last(llm.generate("Once upon a time", params))).outputs
    stop = next(
        text
        for start in range(40)
        if len({(text := c.text[start : start + 3]) for c in whole}) == 3
        if (text := whole[1].text[start : start + 3]) not in whole[0].text + whole[2].text
    )
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=48, ignore_eos=True, stop=stop)
    stopped = run(last(llm.generate("Once upon a time", params))).outputs
    assert stopped[1].text == whole[1].text[: whole[1].text.index(stop)]
    assert [choice.finish_reason for choice in stopped] == ["length", "stop", "length"]
    assert [stopped[0].text, stopped[2].text] == [whole[0].text, whole[2].text]
    assert run(idle(llm))["kv_cache_usage_perc"] == 0


def test_cached_prompts_are_counted(llm: AsyncLLM, run: Run) -> None:
    async def cached(salt: str) -> int:
        prompt = list(range(10, 150))
        return (await last(llm.generate(prompt, SHORT, salt=salt))).num_cached_tokens

    assert [run(cached("x")), run(cached("x")), run(cached("y"))] == [0, 128, 0]
    run(llm.reset_prefix_cache())
    assert run(cached("x")) == 0


def test_too_many_are_refused_and_room_comes_back(llm: AsyncLLM, run: Run) -> None:
    async def work() -> None:
        streams = [await llm.submit("Once upon a time", LONG) for _ in range(11)]
        with pytest.raises(QueueFull, match="max_queued_requests is 4"):
            await llm.submit("Hi", SamplingParams(n=2))
        streams.append(await llm.submit("Hi", SHORT))
        for stream in streams:
            await stream.aclose()
        assert (await last(llm.generate("Hi", SHORT))).finished

    run(work())


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ("x", {"params": SamplingParams(temperature=-1)}, "temperature"),
        ("x", {"priority": 2**40}, "priority"),
        ("x", {"salt": "s" * 129}, "cache_salt"),
        ([], {}, "prompt"),
        ({"prompt": {"prompt": "x"}}, {}, "prompt"),
    ],
)
def test_refusals_come_from_submit(llm: AsyncLLM, run: Run, prompt: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(ParamError) as error:
        run(llm.submit(prompt, **options))
    assert error.value.param == param


def test_recommendations_of_the_model_are_defaults(llm: AsyncLLM) -> None:
    assert llm.sampling_params().temperature == 0  # do_sample is false there
    assert llm.sampling_params(temperature=0.3, max_tokens=5) == SamplingParams(temperature=0.3, max_tokens=5)


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_everyone_hears_of_a_dead_engine(run: Run, engine_options: dict[str, Any]) -> None:
    async def work() -> None:
        config = EngineConfig.of(**engine_options)
        before = children()
        llm = AsyncLLM(config, ProcessClient(config))
        await llm.start()
        [engine] = children() - before
        assert (await last(llm.generate("Hi", SHORT))).finished
        readers = [asyncio.create_task(last(llm.generate("Hi", LONG))) for _ in range(3)]
        await asyncio.sleep(0.1)
        os.kill(engine, signal.SIGKILL)
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineDead) and "signal 9" in str(result)
        with pytest.raises(EngineDead):
            await llm.submit("Hi", SHORT)
        assert "signal 9" in await llm.wait_failed()
        assert llm.unfinished == 0
        await llm.close()

    run(work())
