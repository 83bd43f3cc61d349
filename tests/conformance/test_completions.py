"""`/v1/completions` through the openai client and as evaluation harnesses call it."""

from __future__ import annotations

import httpx
import openai
import pytest

TEXT = "Once upon a time there was a small"


def ids_of(http: httpx.Client, text: str) -> list[int]:
    return http.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_greedy_text(client: openai.OpenAI):
    answer = client.completions.create(model="small", prompt=TEXT, max_tokens=12, temperature=0)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "small"
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason in ("length", "stop") and choice.logprobs is None
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_four_spellings_of_prompts_agree(http: httpx.Client):
    ids = ids_of(http, TEXT)
    prompts = [TEXT, [TEXT], ids, [ids], [TEXT, TEXT], [ids, ids]]
    texts = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        choices = http.post("/v1/completions", json=body).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        texts += [choice["text"] for choice in choices]
    assert len(texts) == 8 and len(set(texts)) == 1


def test_max_tokens_defaults_to_openais(http: httpx.Client):
    answer = http.post("/v1/completions", json={"prompt": TEXT, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"


def test_choices_are_numbered_by_prompt_and_differ(http: httpx.Client):
    body = {
        "prompt": [TEXT, "A list of words:"],
        "n": 3,
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 7,
        "ignore_eos": True,
    }
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert len({choice["text"] for choice in answer["choices"]}) > 3
    assert answer["usage"]["completion_tokens"] == 6 * 12
    assert http.post("/v1/completions", json=body).json()["choices"] == answer["choices"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 2, "seed": 3, "temperature": 0.8},
        {"prompt": [TEXT, "Two"]},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"stop": ["e"]},
        {"return_token_ids": True},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
    ],
)
def test_streams_say_what_whole_answers_say(http: httpx.Client, client: openai.OpenAI, extra: dict):
    body = {"prompt": TEXT, "max_tokens": 20, "temperature": 0, **extra}
    whole = http.post("/v1/completions", json=body).json()
    found: dict[int, dict] = {}
    usage = None
    known = {name: value for name, value in body.items() if name != "return_token_ids"}
    for chunk in client.completions.create(
        model="small",
        **known,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": extra.get("return_token_ids")},
    ):
        usage = chunk.usage or usage
        for piece in chunk.model_dump()["choices"]:
            merge(found.setdefault(piece["index"], {}), piece)
    assert usage is not None and usage.model_dump(exclude_none=True) == whole["usage"]
    for choice in whole["choices"]:
        streamed = found[choice["index"]]
        for name in ("text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids"):
            assert streamed.get(name) == choice.get(name), name


def merge(into: dict, piece: dict) -> None:
    """What the chunks of one choice say together."""
    for name, value in piece.items():
        if name == "text":
            into[name] = into.get(name, "") + value
        elif name == "logprobs" and value is not None:
            if into.get(name) is None:
                into[name] = {key: [] for key in value}
            for key in value:
                into[name][key] += value[key]
        elif name == "token_ids" and value is not None:
            into[name] = into.get(name, []) + value
        elif value is not None or name not in into:
            into[name] = value


def test_loglikelihood_as_harnesses_ask_for_it(http: httpx.Client):
    """Batches of token ids with echo, log-probs and one token or none to generate."""
    prompts = [ids_of(http, text) for text in ("The capital of France is Paris", "two plus two is four")]
    for max_tokens in (1, 0):
        body = {
            "model": "small",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": max_tokens,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        choices = http.post("/v1/completions", json=body).json()["choices"]
        for choice, prompt in zip(choices, prompts, strict=True):
            scores = choice["logprobs"]
            assert len(scores["tokens"]) == len(prompt) + max_tokens
            assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
            for own, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
                assert own <= max(top.values()) <= 0 and own in top.values()
            assert scores["text_offset"][1:] == sorted(scores["text_offset"][1:])
    assert "".join(scores["tokens"]) == "two plus two is four" == choice["text"]


def test_scored_prompts_agree_with_generated_tokens(http: httpx.Client):
    """The log-probs of tokens do not depend on whether the model wrote them or read them."""
    body = {
        "prompt": TEXT,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": 3,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    written = http.post("/v1/completions", json=body).json()["choices"][0]
    prompt = written["prompt_token_ids"] + written["token_ids"]
    read = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 3}).json()
    scores = read["choices"][0]["logprobs"]["token_logprobs"][-10:]
    assert scores == pytest.approx(written["logprobs"]["token_logprobs"], abs=1e-3)


def test_prompt_logprobs_in_vllms_form(http: httpx.Client):
    body = {"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 2, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(choice["prompt_token_ids"]) - 1
    for token, entry in zip(choice["prompt_token_ids"][1:], others, strict=True):
        assert entry[str(token)]["rank"] >= 1 and 2 <= len(entry) <= 3


def test_stop_strings_and_tokens(http: httpx.Client):
    free = http.post(
        "/v1/completions",
        json={"prompt": TEXT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True},
    ).json()["choices"][0]
    word = free["text"].split()[2]
    body = {"prompt": TEXT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    cut = http.post("/v1/completions", json={**body, "stop": word}).json()["choices"][0]
    assert cut["text"] == free["text"][: free["text"].index(word)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", word)
    kept = http.post("/v1/completions", json={**body, "stop": [word], "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["text"] == cut["text"] + word
    token = free["token_ids"][5]
    by_token = http.post("/v1/completions", json={**body, "stop_token_ids": [token]}).json()["choices"][0]
    assert (by_token["finish_reason"], by_token["stop_reason"]) == ("stop", token)


def test_cached_tokens_are_reported_and_do_not_cross_salts(http: httpx.Client):
    prompt = [5 + i % 300 for i in range(400)]
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "cache_salt": "first"}

    def cached(**extra: str) -> int:
        answer = http.post("/v1/completions", json={**body, **extra}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0
    assert cached() >= 320
    assert cached(cache_salt="second") == 0


def test_truncation_keeps_the_end(http: httpx.Client):
    prompt = [5 + i % 300 for i in range(100)]
    body = {"prompt": prompt, "max_tokens": 1, "truncate_prompt_tokens": 10, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["prompt_token_ids"] == prompt[-10:]


def test_tokens_by_id_and_constraints(http: httpx.Client):
    body = {
        "prompt": TEXT,
        "max_tokens": 4,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "allowed_token_ids": [70, 71],
        "ignore_eos": True,
    }
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert set(choice["token_ids"]) <= {70, 71}
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    body = {
        "prompt": TEXT,
        "max_tokens": 3,
        "temperature": 0,
        "logit_bias": {"99": 100},
        "return_token_ids": True,
        "ignore_eos": True,
    }
    biased = http.post("/v1/completions", json=body).json()["choices"][0]
    assert biased["token_ids"] == [99, 99, 99]


def test_unknown_fields_are_named_and_known_ones_refused(http: httpx.Client):
    answer = http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1, "sparkle": 1, "x\nbad": 2})
    assert answer.status_code == 200
    assert answer.headers["x-jaxserve-ignored"] == "sparkle, x?bad"
    for name, value in (
        ("best_of", 2),
        ("suffix", "end"),
        ("guided_json", {}),
        ("use_beam_search", True),
        ("request_id", "mine"),
        ("response_format", {"type": "json_object"}),
    ):
        refused = http.post("/v1/completions", json={"prompt": TEXT, name: value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name
    neutral = {
        "best_of": 1,
        "suffix": None,
        "use_beam_search": False,
        "response_format": {"type": "text"},
        "user": "me",
    }
    assert http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1, **neutral}).status_code == 200
