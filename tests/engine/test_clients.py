"""Both ways to reach a core give the same tokens, and a core that dies or refuses says why."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.client import EngineDead
from jaxserve.engine.process import ProcessClient
from jaxserve.engine.thread import ThreadClient
from jaxserve.scheduler.record import EVENT, PLAN, frames
from jaxserve.types import Arrive, Delta, Event, Plan, Prefix, Request, SamplingParams
from tests.engine.test_engine import SHAPE

Client = ThreadClient | ProcessClient


def config(executables: str, **options: object) -> EngineConfig:
    return EngineConfig.of(**{**SHAPE, "wait_for_buckets": False, "compile_cache": executables, **options})


def request(name: str, **params: object) -> Request:
    chosen = {"max_tokens": 12, "seed": 1, "temperature": 0.8, "ignore_eos": True, **params}
    return Request(id=name, prompt=[5, 6, 7, 8], params=SamplingParams(**chosen))


async def answer(client: Client, deltas: asyncio.Queue[Delta], wanted: Request) -> list[int]:
    client.submit(wanted)
    tokens: list[int] = []
    while True:
        delta = await deltas.get()
        tokens.extend(delta.tokens)
        if delta.finish is not None:
            return tokens


def with_client(
    kind: type[Client], settings: EngineConfig, body: Callable[[Client, asyncio.Queue], Awaitable]
) -> object:
    async def main() -> object:
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        client = kind(settings)
        try:
            await client.start(lambda batch: [deltas.put_nowait(d) for d in batch] and None)
            return await asyncio.wait_for(body(client, deltas), 60)
        finally:
            await client.close()

    return asyncio.run(main())


def test_thread_and_process_give_the_same_tokens(executables: str) -> None:
    async def body(client: Client, deltas: asyncio.Queue) -> list[int]:
        tokens = await answer(client, deltas, request("a"))
        stats = await client.control("stats")
        assert stats.counters["generation_tokens"] == 12
        assert stats.counters["undeclared_compilations"] == 0
        return tokens

    assert with_client(ThreadClient, config(executables), body) == with_client(ProcessClient, config(executables), body)


def test_a_prefix_crosses_the_process_border(executables: str) -> None:
    tokens = list(range(4, 134))

    async def export(client: Client, deltas: asyncio.Queue) -> Prefix:
        await answer(client, deltas, msgspec.structs.replace(request("a"), prompt=tokens))
        return await client.export_prefix(tokens)

    async def bring(client: Client, deltas: asyncio.Queue) -> Prefix:
        return await client.import_prefix(tokens, prefix.pages)

    settings = config(executables, kv_transfer=True)
    prefix = with_client(ThreadClient, settings, export)
    assert isinstance(prefix, Prefix) and (prefix.count, prefix.error) == (128, None)
    received = with_client(ProcessClient, settings, bring)
    assert isinstance(received, Prefix) and (received.count, received.error) == (128, None)
    refused = with_client(ThreadClient, config(executables), bring)
    assert isinstance(refused, Prefix) and "start it with --kv-transfer" in (refused.error or "")


def test_a_killed_engine_process_is_noticed(executables: str) -> None:
    async def body(client: ProcessClient, deltas: asyncio.Queue) -> str:
        os.kill(client.pid, signal.SIGKILL)
        cause = await client.wait_failed()
        with pytest.raises(EngineDead, match="signal 9"):
            client.submit(request("late"))
        assert client.failure == cause
        return cause

    assert with_client(ProcessClient, config(executables), body) == "the engine process was killed by signal 9"


@pytest.mark.parametrize("kind", [ThreadClient, ProcessClient])
def test_a_closed_engine_says_so(kind: type[Client], executables: str) -> None:
    """Whoever waits for an answer and whoever asks too late."""

    async def body(client: Client, deltas: asyncio.Queue) -> None:
        waiting = asyncio.ensure_future(client.export_prefix(list(range(64))))
        await asyncio.sleep(0)
        await client.close()
        for question in (waiting, client.control("stats"), client.import_prefix([5], [])):
            try:
                assert isinstance(await question, Prefix)  # it was answered in time
            except EngineDead as error:
                assert "closed" in str(error)
            else:
                assert question is waiting

    with_client(kind, config(executables), body)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder is not a folder"),
        ({"max_model_len": 10**6}, "--max-model-len 1000000 is more than"),
        ({"kv_cache_memory": 1000}, "raise --kv-cache-memory"),
        ({"scheduling_policy": "lottery"}, "no scheduling policy 'lottery'"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3"),
        ({"decode_buckets": [99]}, "--decode-buckets 99 must lie between 1 and 8"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_start(options: dict, message: str, executables: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_client(ThreadClient, config(executables, **options), never)


def test_a_refusal_crosses_the_process_border(executables: str) -> None:
    with pytest.raises(ConfigError, match="/no/such/folder is not a folder"):
        with_client(ProcessClient, config(executables, model="/no/such/folder"), never)


async def never(client: Client, deltas: asyncio.Queue) -> None:
    raise AssertionError("it started")


@pytest.mark.parametrize("kind", [ThreadClient, ProcessClient])
def test_requests_submitted_together_wait_together(kind: type[Client], executables: str, tmp_path: Path) -> None:
    """The record of scheduler events and plans has every arrival before the first plan that does something."""

    async def body(client: Client, deltas: asyncio.Queue) -> None:
        client.submit_all([request(str(number)) for number in range(40)])
        ended = 0
        while ended < 40:
            ended += (await deltas.get()).finish is not None

    record = tmp_path / "record"
    with_client(kind, config(executables, record=str(record)), body)
    plan, event = msgspec.msgpack.Decoder(Plan), msgspec.msgpack.Decoder(Event)
    before = []
    for sort, data in frames(record.read_bytes()):
        if sort == PLAN and plan.decode(data).has_work:
            break
        if sort == EVENT:
            before.append(event.decode(data))
    assert sum(isinstance(one, Arrive) for one in before) == 40
