"""tau-bench trajectories: whole tool-calling conversations in OpenAI's message format, without times.

https://github.com/sierra-research/tau-bench: JSONL with `traj`, a list of messages. Each assistant message is one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from jaxserve.sim.traces.sessions import Call, jobs, tokens
from jaxserve.sim.workload import Job

TOOL_S = 0.2
USER_S = 5.0
"""The trace has no times: a tool is taken to answer, and the simulated user to reply, after these."""


def matches(head: str) -> bool:
    return '"traj"' in head and '"task_id"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    return jobs((0.0, _calls(msgspec.json.decode(line)["traj"])) for line in lines)


def _calls(messages: list[dict[str, Any]]) -> list[Call]:
    calls: list[Call] = []
    before = known = 0
    for message, last in zip(messages, [{}, *messages], strict=False):
        length = _length(message)
        if message["role"] == "assistant":
            tool = last["role"] == "tool"
            think = 0.0 if not calls else TOOL_S if tool else USER_S
            calls.append(Call(known, length, before, think, str(last.get("name", "tool")) if tool else ""))
            before = known + length
        known += length
    return calls


def _length(message: dict[str, Any]) -> int:
    text = message.get("content") or ""
    calls = message.get("tool_calls") or ()
    return tokens(text + "".join(call["function"]["name"] + call["function"]["arguments"] for call in calls))
