"""Whatever bytes arrive, a body is understood or refused with a 400 that names what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.errors import ApiError
from jaxserve.server.protocol import AbortBody, Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse

BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, AbortBody)
FIELDS = sorted({name for body in BODIES for name in (*body.model_fields, *body.REFUSED)})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def completion(**fields: object) -> CompletionBody:
    return parse(CompletionBody, json.dumps({"prompt": "a", **fields}).encode())


def refusal(body: type[Body], raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, raw)
    return caught.value


@given(st.binary(max_size=64))
def test_any_bytes(raw: bytes):
    for body in BODIES:
        assert refusal(body, raw).status == 400


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=6))
def test_any_object(fields: dict):
    for body in BODIES:
        try:
            parsed = parse(body, json.dumps(fields).encode())
        except ApiError as error:
            assert error.status == 400 and error.message
        else:
            assert set(parsed.ignored()) == set(fields) - set(body.model_fields) - set(body.REFUSED)


@pytest.mark.parametrize(
    "prompt,meant", [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_spellings_of_prompts(prompt: object, meant: list):
    assert completion(prompt=prompt).prompt == meant


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [["a"]], [True], [1.5], None, {}, ["a"] * 1025, [[1], []]])
def test_what_is_no_prompt(prompt: object):
    assert refusal(CompletionBody, json.dumps({"prompt": prompt}).encode()).param == "prompt"


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", "0.5"),
        ("n", True),
        ("n", 1.0),
        ("seed", 2**64),
        ("top_p", float("nan")),
        ("min_p", float("inf")),
        ("stream", 1),
        ("logit_bias", {"1": "2"}),
        ("stop", 5),
        ("model", ["a"]),
    ],
)
def test_types_are_strict_and_numbers_finite(field: str, value: object):
    assert refusal(CompletionBody, json.dumps({"prompt": "a", field: value}).encode()).param.split(".")[0] == field


def test_null_is_the_default_of_every_optional_field():
    for body in (CompletionBody, ChatBody):
        required = {"prompt": "a"} if body is CompletionBody else {"messages": [{"role": "user", "content": "a"}]}
        nulls = dict.fromkeys({*body.model_fields, *body.REFUSED} - set(required))
        assert parse(body, json.dumps({**required, **nulls}).encode()).given() == {}


def test_known_fields_are_refused_unless_they_ask_for_nothing():
    for name, neutral in CompletionBody.REFUSED.items():
        for value in neutral:
            assert completion(**{name: value}).ignored() == []
        assert refusal(CompletionBody, json.dumps({"prompt": "a", name: "unheard of"}).encode()).param == name


def test_given_parameters_are_only_those_that_were_given():
    assert completion(temperature=0.5, stop=["x"], n=2).given(max_tokens=3) == {
        "temperature": 0.5,
        "stop": ["x"],
        "n": 2,
        "max_tokens": 3,
    }


@pytest.mark.parametrize(
    "body, field, empty", [(ChatBody, "messages", []), (ChatBody, "cache_salt", ""), (AbortBody, "request_ids", [])]
)
def test_what_must_not_be_empty(body: type[Body], field: str, empty: object):
    given = {"messages": [{"role": "user", "content": "a"}]} if body is ChatBody else {}
    error = refusal(body, json.dumps({**given, field: empty}).encode())
    assert (error.message, error.param) == (f"{field} must not be empty.", field)
