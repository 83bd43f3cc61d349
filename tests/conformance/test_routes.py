"""Routes that do not generate, as clients find them."""

from __future__ import annotations

import httpx
import openai
import pytest


def test_models_lists_every_served_name(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["small", "alias"]
    model = client.models.retrieve("alias")
    assert model.id == "alias" and model.object == "model"
    assert model.model_dump()["max_model_len"] > 0
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_liveness_and_version(http: httpx.Client):
    assert http.get("/health").status_code == 200
    assert http.get("/ping").status_code == 200
    assert http.post("/ping").status_code == 200
    assert http.get("/version").json()["version"]
    assert http.get("/load").json()["server_load"] == 0
    answer = http.get("/health_generate")
    assert answer.status_code == 200 and answer.json()["status"] == "ok"


def test_tokenize_and_back(http: httpx.Client):
    text = "Hello, wörld! <|im_end|>"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    assert answer["max_model_len"] > 0
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == text


def test_tokenize_a_conversation(http: httpx.Client):
    turn = {"role": "user", "content": "hi"}
    whole = http.post("/tokenize", json={"messages": [turn]}).json()
    bare = http.post("/tokenize", json={"messages": [turn], "add_generation_prompt": False}).json()
    assert whole["tokens"][: bare["count"]] == bare["tokens"]
    assert whole["count"] > bare["count"]
    asked = http.post("/v1/chat/completions", json={"messages": [turn], "max_tokens": 1}).json()
    assert asked["usage"]["prompt_tokens"] == whole["count"]


@pytest.mark.parametrize("tokens", [[-1], [2**31], [10**6], [1.5], "abc", [True]])
def test_detokenize_refuses_what_is_no_token(http: httpx.Client, tokens):
    answer = http.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_unknown_routes_and_methods_get_the_error_object(http: httpx.Client, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]


def test_openapi_describes_the_request_bodies(http: httpx.Client):
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rsplit("/")[-1]
    assert "prompt" in schema["components"]["schemas"][name]["properties"]


def test_metrics_use_vllm_names(http: httpx.Client):
    http.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 4})
    text = http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_sum",
        "e2e_request_latency_seconds_count",
        "request_success_total",
        "request_prompt_tokens_bucket",
    ):
        assert f"\njaxserve:{name}{{" in text, name
    assert "\nvllm:" not in text


def test_request_ids_are_repeated_when_sane(http: httpx.Client):
    assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "<script>"):
        given = http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given and given != bad


def test_admin_routes_answer_to_this_machine(http: httpx.Client):
    assert http.post("/reset_prefix_cache").status_code == 200
    for header in ({"X-Forwarded-For": "10.0.0.1"}, {"Origin": "http://evil.example"}):
        assert http.post("/reset_prefix_cache", headers=header).status_code == 403


def test_a_program_keeps_its_kv_from_turn_to_turn(http: httpx.Client):
    body = {
        "prompt": "A program begins",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "program_id": "job",
        "tool": "search",
        "deadline_s": 60.0,
        "return_token_ids": True,
    }
    said = http.post("/v1/completions", json=body).json()
    tokens = [*said["choices"][0]["prompt_token_ids"], *said["choices"][0]["token_ids"]]
    again = http.post("/v1/completions", json={**body, "prompt": [*tokens, 7]}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(tokens) - 1
    assert http.post("/close_program", json={"program_id": "job"}).status_code == 200
    afresh = http.post("/v1/completions", json={**body, "prompt": [*tokens, 7], "last_turn": True}).json()
    assert not (afresh["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")


@pytest.mark.parametrize(
    "wrong",
    [
        {"program_id": "a", "n": 2},
        {"last_turn": True},
        {"tool": "x"},
        {"deadline_s": 0},
        {"program_id": ""},
        {"program_id": "a", "prompt": ["b", "c"]},
    ],
)
def test_program_fields_that_make_no_sense_are_refused(http: httpx.Client, wrong: dict):
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **wrong})
    assert answer.status_code == 400 and answer.json()["error"]["param"] in {"n", "program_id", "deadline_s"}
