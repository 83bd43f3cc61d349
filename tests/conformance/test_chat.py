"""`/v1/chat/completions` through the openai client."""

from __future__ import annotations

import httpx
import openai
import pytest

TURNS = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Tell me a story."}]


def test_answer(client: openai.OpenAI):
    answer = client.chat.completions.create(model="small", messages=TURNS, max_tokens=16, temperature=0)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize(
    "extra", [{}, {"n": 3, "seed": 11, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 3}, {"stop": [" "]}]
)
def test_streams_say_what_whole_answers_say(client: openai.OpenAI, extra: dict):
    body = {"model": "small", "messages": TURNS, "max_tokens": 16, "temperature": 0, **extra}
    whole = client.chat.completions.create(**body)
    texts: dict[int, str] = {}
    roles: dict[int, str] = {}
    ends: dict[int, str] = {}
    scores: dict[int, list] = {}
    *chunks, last = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk" and chunk.usage is None and len(chunk.choices) == 1
        (choice,) = chunk.choices
        if choice.index not in roles:
            assert choice.delta.role == "assistant"
            roles[choice.index] = choice.delta.role
        assert choice.index not in ends
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        scores.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else ())
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert last.choices == [] and last.usage.model_dump() == whole.usage.model_dump()
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert ends[choice.index] == choice.finish_reason
        assert scores[choice.index] == (choice.logprobs.content if choice.logprobs else [])


def test_stream_framing(http: httpx.Client):
    body = {"messages": TURNS, "max_tokens": 4, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    assert all('"usage":{"prompt_tokens"' in line for line in lines[:-1])


def test_logprobs_carry_bytes(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="small", messages=TURNS, max_tokens=8, temperature=0, logprobs=True, top_logprobs=5
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 5 and entry.logprob <= entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_max_completion_tokens(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="small", messages=TURNS, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="differ"):
        client.chat.completions.create(model="small", messages=TURNS, max_tokens=4, max_completion_tokens=3)


def test_continue_the_last_message(http: httpx.Client):
    turns = [*TURNS, {"role": "assistant", "content": "Once upon a"}]
    body = {
        "messages": turns,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": 2,
        "return_token_ids": True,
    }
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    prompt = http.post("/detokenize", json={"tokens": answer.json()["prompt_token_ids"]}).json()["prompt"]
    assert prompt.endswith("Once upon a")
    refused = http.post("/v1/chat/completions", json={**body, "add_generation_prompt": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "continue_final_message"


def test_text_parts_are_joined(http: httpx.Client):
    def count(content: object) -> int:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    assert count([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]) == count("one\ntwo")


def test_aliases_are_reported_as_asked_for(client: openai.OpenAI):
    answer = client.chat.completions.create(model="alias", messages=TURNS, max_tokens=1)
    assert answer.model == "alias"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=TURNS)
